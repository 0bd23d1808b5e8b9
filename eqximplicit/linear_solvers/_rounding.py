"""How well products with an operator are rounded, which no residual is better than."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jax.extend.core import Jaxpr, JaxprEqn

from .._reach import inner_jaxprs
from ._residual import epsilon

# Of the type in which GPUs multiply float32 by JAX's default: `jax.lax.Precision`.
_TENSORFLOAT32 = 2.0**-10
_PRODUCTS = ("dot_general", "conv_general_dilated")


def is_coarse(operator: lx.AbstractLinearOperator) -> bool:
    """Whether products may be rounded in a lower precision than that of the operator.

    As those of matrices in float32 are on accelerators, by JAX's default.
    """
    own = epsilon(operator.in_structure())
    return jax.default_backend() != "cpu" or rounding_of_products(operator) > own


def rounding_of_products(operator: lx.AbstractLinearOperator) -> float:
    """The epsilon of the lowest precision in a product, or of the operator."""
    struct = operator.in_structure()
    program = jax.make_jaxpr(operator.mv)(struct)
    return max(epsilon(struct), coarsest(program.jaxpr, _of_fast_products()))


def coarsest(jaxpr: Jaxpr, fast: float) -> float:
    """The largest epsilon in a program; zero if it has no floating-point number.

    `fast` is that of a product of float32 of which not the highest precision is asked.
    """
    inside = (inner for eqn in jaxpr.eqns for inner in inner_jaxprs(eqn))
    own = (_epsilon_of(eqn, fast) for eqn in jaxpr.eqns)
    return max([0.0, *own, *(coarsest(inner, fast) for inner in inside)])


def _epsilon_of(eqn: JaxprEqn, fast: float) -> float:
    dtypes = [getattr(out.aval, "dtype", jnp.dtype(bool)) for out in eqn.outvars]
    floating = [d for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    own = max((float(jnp.finfo(d).eps) for d in floating), default=0.0)
    if eqn.primitive.name in _PRODUCTS and jnp.float32 in floating:
        return own if _is_highest(eqn.params["precision"]) else max(own, fast)
    return own


def _is_highest(precision: Any) -> bool:
    both = precision if isinstance(precision, tuple) else (precision,)
    return all(p == jax.lax.Precision.HIGHEST for p in both)


@functools.cache
def _of_fast_products() -> float:
    platform = jax.default_backend()
    if platform == "tpu":
        return float(jnp.finfo(jnp.bfloat16).eps)
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    major = capability.split(".")[0]
    fast = platform == "gpu" and major.isdigit() and int(major) >= 8
    return _TENSORFLOAT32 if fast else 0.0
