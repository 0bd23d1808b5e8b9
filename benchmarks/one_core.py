"""Binds the process to one core. Import it before NumPy and JAX make their threads."""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
CORES = len(os.sched_getaffinity(0))
CORE = max(os.sched_getaffinity(0))
os.sched_setaffinity(0, {CORE})
