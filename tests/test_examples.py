"""Every example runs as a script, without a warning, and saves its pictures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tmp_path):
    subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        check=True,
        timeout=600,
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg"},
    )
    pictures = list((tmp_path / "outputs").glob(f"{example.stem[:2]}_*.png"))
    assert pictures
