"""Strict numerics for every test, and bounded memory for a long run."""

import gc
import os

os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import psutil
import pytest
from hypothesis import settings

CACHE_LIMIT = 3 * 2**30  # bytes; above it the compiled functions of past files go

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

settings.register_profile("eqximplicit", deadline=None, derandomize=True)
settings.load_profile("eqximplicit")


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    yield
    if psutil.Process().memory_info().rss > CACHE_LIMIT:
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(config, items):
    """Deselect, not skip, what this machine cannot run."""
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and jax.default_backend() != "gpu":
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if item not in needs_gpu]
