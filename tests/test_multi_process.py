"""Two real processes, each with its own devices, train one model."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_two_processes_train_one_model_together(tmp_path):
    script = shutil.copy(ROOT / "examples" / "09_multi_process.py", tmp_path)
    run = subprocess.run(
        [sys.executable, "-W", "error", script],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    line = r"process (\d): 1 of 2 devices, loss (\d\.\d+) -> (\d\.\d+)"
    ranks, firsts, lasts = zip(*re.findall(line, run.stdout), strict=True)
    assert ranks == ("0", "1")
    assert firsts[0] == firsts[1]
    assert lasts[0] == lasts[1]
    assert float(lasts[0]) < 0.2 * float(firsts[0])
    assert (tmp_path / "outputs" / "09_multi_process.png").stat().st_size > 0
