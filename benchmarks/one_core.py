"""Binds the process to one core. Import it before NumPy and JAX make their threads."""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
CORES = len(os.sched_getaffinity(0))
CORE = max(os.sched_getaffinity(0))
os.sched_setaffinity(0, {CORE})

import jax  # noqa: E402

# XLA hands a program of 1000 operations or more over to another thread, of which there
# is none here: a switch of threads for one contestant, none for the next.
jax.config.update("jax_cpu_enable_async_dispatch", False)
