"""How the benchmarks measure: interleaved, in one process, medians.

- One core, one thread: `one_core.py` sees to that when it is imported, and must be so
  before JAX. Then CPU time is wall time less what other processes take, so CPU time is
  what is measured: a busy machine changes it little.
- Run time: everyone in turns, in an order drawn for each round.
- First call: trace, lowering and compilation, with JAX's caches cleared before each,
  and nobody's garbage left for the next to collect.
- Temporary memory: what the compiled program says it allocates beside its arguments
  and results.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

# Whoever measures on a GPU sets `time.perf_counter`: what that does is no CPU time.
clock = time.process_time


class FirstCall(NamedTuple):
    """Seconds of CPU time until a function is compiled, and its temporary bytes."""

    trace: float
    lower: float
    compile: float
    temp_bytes: int

    @property
    def seconds(self) -> float:
        return self.trace + self.lower + self.compile


def first_call(fn: Callable[..., Any], *args: Any) -> FirstCall:
    """Stages and compiles `fn` from nothing."""
    jax.clear_caches()
    gc.collect()
    times = [clock()]
    traced = jax.jit(fn).trace(*args)
    times.append(clock())
    lowered = traced.lower()
    times.append(clock())
    compiled = lowered.compile()
    times.append(clock())
    memory = compiled.memory_analysis()
    trace, lower, compile_ = np.diff(times).tolist()
    return FirstCall(trace, lower, compile_, memory.temp_size_in_bytes)


def first_calls(
    contestants: dict[str, Callable[..., Any]], args: tuple[Any, ...], rounds: int
) -> dict[str, FirstCall]:
    """For each contestant the round with the median of the total."""
    found: dict[str, list[FirstCall]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, fn in contestants.items():
            found[name].append(first_call(fn, *args))
    return {
        name: sorted(calls, key=lambda c: c.seconds)[len(calls) // 2]
        for name, calls in found.items()
    }


def _timed(run: Callable[..., Any], args: tuple[Any, ...], number: int) -> float:
    start = clock()
    for _ in range(number):
        out = run(*args)
    jax.block_until_ready(out)
    return (clock() - start) / number


def run_times(
    contestants: dict[str, Callable[..., Any]],
    args: tuple[Any, ...],
    *,
    seconds: float,
    least: int = 7,
) -> dict[str, float]:
    """Medians in CPU seconds of everyone in turns, for about `seconds` in all.

    A turn of a short function is several calls, of 2 ms together. Each round has its
    own order: large arrays leave the caches empty to whoever comes next.
    """
    jitted = {name: jax.jit(fn) for name, fn in contestants.items()}
    numbers = {}
    for name, run in jitted.items():
        jax.block_until_ready(run(*args))
        numbers[name] = max(1, math.ceil(2e-3 / _timed(run, args, 3)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    start, rounds, order = clock(), 0, random.Random(0)
    while rounds < least or clock() - start < seconds:
        rounds += 1
        for name in order.sample(list(jitted), len(jitted)):
            times[name].append(_timed(jitted[name], args, numbers[name]))
    return {name: statistics.median(ts) for name, ts in times.items()}


def relative_error(found: Any, reference: Any) -> float:
    """The 2-norm of the difference of two pytrees, over that of the second."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True)
    flat = [
        (np.ravel(np.asarray(a, np.float64)), np.ravel(np.asarray(b, np.float64)))
        for a, b in pairs
    ]
    a, b = (np.concatenate(parts) for parts in zip(*flat, strict=True))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def derivative_of(out: Any) -> Any:
    """The derivative, from `(value, gradient)` or from a Jacobian alone."""
    return out[1] if isinstance(out, tuple) else out


def errors(
    contestants: dict[str, Callable[..., Any]], theta: Any, reference: Any
) -> dict[str, float]:
    """The relative error of each contestant's derivative; infinite where it is NaN."""
    found = {}
    for name, fn in contestants.items():
        error = relative_error(derivative_of(jax.jit(fn)(theta)), reference)
        found[name] = error if math.isfinite(error) else math.inf
    return found


def geometric_mean(ratios: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(r) for r in ratios))


def temp_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """The temporary memory of the compiled function."""
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes
