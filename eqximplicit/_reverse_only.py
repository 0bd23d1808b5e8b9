"""Functions whose derivative JAX can take in reverse mode alone."""

import contextlib
from collections.abc import Generator
from typing import Any

import jax
import jax.tree_util as jtu
from jax.extend.core import Jaxpr

from ._condition import AbstractCondition
from ._custom_types import PyTree
from ._hoist import jaxpr
from ._reach import inner_jaxprs


@contextlib.contextmanager
def reverse_only_explained() -> Generator[None]:
    """Says what is the matter where JAX has found no forward derivative.

    **Raises:** `TypeError` in place of JAX's.
    """
    try:
        yield
    except TypeError as error:
        if "can't apply forward-mode autodiff" not in str(error):
            raise
        raise TypeError(
            "The function contains a `jax.custom_vjp` (or a loop for reverse mode "
            "alone), which has no forward derivative; the derivative of a solution "
            "needs one, and so do Newton's steps. Use `jax.custom_jvp`."
        ) from error


def refuse_reverse_only(
    hoisted: AbstractCondition[Any, Any], y: PyTree[Any], args: Any, aux: Any
) -> None:
    """Refuses a residual without a forward derivative in the state, while tracing."""
    if not _has_custom_vjp(jaxpr(hoisted)):
        return
    residual = lambda y: hoisted.residual(y, args, aux)
    push = lambda t_y: jax.jvp(residual, (y,), (t_y,))[1]
    # JAX raises where it batches such a derivative; otherwise not before it compiles.
    lane = jtu.tree_map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), y)
    with reverse_only_explained():
        jax.eval_shape(jax.vmap(push), lane)


def _has_custom_vjp(fn: Jaxpr) -> bool:
    return any(
        "custom_vjp" in eqn.primitive.name or any(map(_has_custom_vjp, nested))
        for eqn, nested in ((eqn, inner_jaxprs(eqn)) for eqn in fn.eqns)
    )
