"""Any Python callable as a solver on the host."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer

from .._captured import captured_tracers
from .._solution import RESULTS
from .._state import describe
from ._on_host import (
    AbstractHostSolver,
    as_result,
    FAILED,
    forget_failure,
    Kind,
    OK,
    report_failure,
    run_on_host,
    sentence_of,
    stopped,
)


class HostSolver(AbstractHostSolver):
    """Any Python callable as a solver: a loop, another library, a simulation program.

    `HostSolver(solver)(y0, args)` gives `solver` NumPy pytrees and returns what it
    returns, as JAX arrays. It can be traced by `jit` and `vmap` (lane by lane).
    `ImplicitFunction` attaches its derivative; by itself it has none.

    **Arguments:**

    - `solver`: `solver(y0, args) -> y`, NumPy in and out; `y` is structured and shaped
        as `y0`. A module's arrays arrive as NumPy too. It must be a pure function: JAX
        may call it more than once.

    !!! example

        ```python
        solver = eqi.HostSolver(lambda y0, args: my_library.solve(y0, **args))
        eqi.ImplicitFunction(eqi.Root(fn), solver=solver)(y0, args)
        ```
    """

    solver: Callable[[Any, Any], Any]
    kind: ClassVar[Kind] = "any"

    def __check_init__(self) -> None:
        if not callable(self.solver):
            raise TypeError(
                "`HostSolver(solver)` needs a callable `(y0, args) -> y`; got "
                f"{self.solver!r}."
            )

    def __call__(self, y0: Any, args: Any) -> Any:
        """Returns the solver's answer.

        **Raises:**

        - `RuntimeError`: the host code raised; one sentence, with its error as cause.
        - `TypeError`: it is differentiated, instead of an `ImplicitFunction` of it.
        """
        return _opaque(self, y0, args)[0]

    def solve(
        self, fn: Callable[[Any, Any], Any], y0: Any, args: Any
    ) -> tuple[Any, RESULTS, dict[str, Any]]:
        """Returns the solver's answer and whether it raised; `fn` is not used."""
        del fn
        y, code = _call_host(self, y0, args, throw=False)
        unknown = jnp.asarray(-1, jnp.int32)
        stats = {"num_steps": unknown, "num_evaluations": unknown}
        return y, as_result(code), stats


@eqx.filter_custom_jvp
def _opaque(solver: HostSolver, y0: Any, args: Any) -> Any:
    return _call_host(solver, y0, args, throw=True)


@_opaque.def_jvp
def _refuse(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise TypeError(
        "`HostSolver` has no derivative of its own. Differentiate "
        "`eqi.ImplicitFunction(condition, solver=HostSolver(...))(y0, args)` instead, "
        "or pass `jax.lax.stop_gradient` of the inputs."
    )


def _call_host(solver: HostSolver, y0: Any, args: Any, *, throw: bool) -> Any:
    """Returns `(y, code)` from the host, `y` shaped as `y0`."""
    forget_failure()
    arrays, static = eqx.partition((solver.solver, y0, args), eqx.is_array)
    _refuse_tracers(captured_tracers(static[0]))
    y_arrays = jtu.tree_map(jnp.asarray, y0)
    struct = (jax.eval_shape(lambda: y_arrays), jax.ShapeDtypeStruct((), jnp.int32))

    def host(arrays: Any) -> Any:
        arrays = jtu.tree_map(np.asarray, arrays)
        call, guess, args_ = eqx.combine(arrays, static)
        try:
            return _fitted(call(guess, args_), struct[0]), np.int32(OK)
        except Exception as error:  # whatever the user's code raises
            sentence = sentence_of(solver, error)
            if throw:
                raise RuntimeError(sentence) from error
            report_failure(sentence)
            return _fitted(guess, struct[0]), np.int32(FAILED)

    return run_on_host(host, struct, stopped(arrays))


def _refuse_tracers(captured: list[tuple[str, Tracer[Any]]]) -> None:
    """Refuses a solver that would find arrays without a value when it runs."""
    named = [
        f"`{name} (captured by the solver)`, {describe(x)}" for name, x in captured
    ]
    if named:
        raise ValueError(
            "A `HostSolver` cannot see a traced array that is not passed to it. Traced "
            f"here: {'; '.join(named)}. Pass it in `args`, or make the solver an "
            "`eqx.Module` with the array as a field."
        )


def _fitted(y: Any, struct: Any) -> Any:
    """Returns `y` as NumPy arrays, which must have the structure of `struct`."""
    if jtu.tree_structure(y) != jtu.tree_structure(struct):
        raise ValueError(
            f"the solver returned {jtu.tree_structure(y)} for a guess of "
            f"{jtu.tree_structure(struct)}"
        )

    def fit(leaf: Any, like: Any) -> Any:
        array = np.asarray(leaf)
        if array.shape != like.shape:
            raise ValueError(
                f"the solver returned shape {array.shape} for a guess of {like.shape}"
            )
        return array.astype(like.dtype)

    return jtu.tree_map(fit, y, struct)
