"""What a failed solve raises: one exception, whose first line is cause and remedy."""

import contextlib
import functools
import os
from collections.abc import Generator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Int

from ._lanes import over_lanes
from ._solution import RESULTS, Solution
from .solvers._on_host import last_failure


class SolveError(eqx.EquinoxRuntimeError):
    """A solve failed. The first line of the message is the cause, then the remedy.

    A layer that is called outside of `jit` raises this, under `jax.grad` and `jax.vmap`
    too. Inside a compiled program the exception is made by whoever compiled it, with
    the same sentence further down:

    | called under | raises | the sentence is |
    |---|---|---|
    | no `jit` | `SolveError` | the first line |
    | `eqx.filter_jit` | `eqx.EquinoxRuntimeError`, its base | below the stack |
    | `jax.jit` | `jax.errors.JaxRuntimeError` | buried in a traceback |
    | any of them in [`eqximplicit.solve_errors`][] | `SolveError` | the first line |

    All of them are a `RuntimeError`.
    """


@functools.cache
def _sentences() -> tuple[str, ...]:
    """The message of every result code, on one line."""
    structure = jtu.tree_structure(RESULTS.successful)
    codes = [jtu.tree_unflatten(structure, [np.array(i)]) for i in range(len(RESULTS))]
    return tuple(" ".join(RESULTS[code].split()) for code in codes)


@contextlib.contextmanager
def solve_errors() -> Generator[None, None, None]:
    """Makes every failed solve inside raise a `SolveError`, however it was compiled.

    For programs under `jax.jit`, whose runtime errors are long and end in the sentence
    that matters. As a context or as a decorator; other errors pass unchanged. On an
    accelerator wait for the result inside (`jax.block_until_ready`): an error comes
    with the value.

    **Returns:** a context manager.

    **Raises:** [`eqximplicit.SolveError`][] in place of the compiler's exception.

    !!! example

        ```python
        with eqi.solve_errors():
            y = jax.jit(lambda a: layer(y0, a))(a)
        ```
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        said = [sentence for sentence in _sentences() if sentence and sentence in text]
        if isinstance(error, SolveError) or not said:
            raise
        raise SolveError(said[0]) from None


# The largest code of a batch, a failure if there is one; success for no lanes.
_worst_lane = over_lanes(functools.partial(jnp.max, initial=0))


def _value(code: Array) -> int | None:
    """A code as a number, if it has a value yet."""
    try:
        return int(code)
    except jax.errors.ConcretizationTypeError:
        return None


def refuse_failure(solution: Solution[Any, Any]) -> Solution[Any, Any]:
    """The solution of a solve that has succeeded.

    **Raises:** `SolveError` if it has failed; inside `jit`, when the program runs.
    """
    (code,) = jtu.tree_leaves(solution.result)
    code = jnp.asarray(code)
    value = _value(code)
    if value is None:
        code = _worst_lane(code)
        value = _value(code)
    if value is None or os.environ.get("EQX_ON_ERROR", "raise") != "raise":
        return _refused_when_run(solution, code)
    if value != 0:
        raise SolveError(_sentence_for(value))
    return solution


def _sentence_for(value: int) -> str:
    """Of a host failure what the host said, where that is still known."""
    (by_host,) = jtu.tree_leaves(RESULTS.host_failure)
    said = last_failure()
    return said if said is not None and value == int(by_host) else _sentences()[value]


def _refused_when_run(
    solution: Solution[Any, Any], code: Int[Array, ""]
) -> Solution[Any, Any]:
    # The check is on a scalar: one on the state would gather a sharded state.
    ok = solution.result == RESULTS.successful
    ok = eqx.branched_error_if(ok, code != 0, code, _sentences())
    y = jtu.tree_map(lambda y: jnp.where(ok, y, jnp.nan), solution.value)
    return eqx.tree_at(lambda s: s.value, solution, y)
