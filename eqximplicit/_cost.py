"""Roughly how much work a function is, read off its jaxpr."""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import Jaxpr

from ._reach import inner_jaxpr, inner_jaxprs
from ._state import known

_TRANSCENDENTAL = frozenset(
    ["exp", "exp2", "expm1", "log", "log1p", "sin", "cos", "tan", "asin", "acos"]
    + ["atan", "atan2", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "logistic"]
    + ["erf", "erfc", "erf_inv", "lgamma", "digamma", "pow", "cbrt"]
)
# Of cubic cost in the last dimension.
_FACTORISATIONS = frozenset(
    ["eigh", "eig", "svd", "qr", "householder_product", "lu", "cholesky", "schur"]
    + ["hessenberg", "tridiagonal", "triangular_solve", "geqrf"]
)
_PER_ENTRY, _PER_CUBE = 10.0, 10.0


def num_operations(jaxpr: Jaxpr) -> float:
    """About how many additions a run costs; infinite where that is not known.

    So it is for a loop without a known end, a call of the host, and any other equation
    that holds functions and is no plain call.
    """
    return math.fsum(map(_of_equation, jaxpr.eqns))


def _of_equation(eqn: Any) -> float:
    name = eqn.primitive.name
    if (inner := inner_jaxpr(eqn)) is not None:
        return num_operations(inner)
    if name == "scan":
        return eqn.params["length"] * num_operations(eqn.params["jaxpr"].jaxpr)
    if name == "cond":
        return max(map(num_operations, inner_jaxprs(eqn)))
    if "callback" in name or any(True for _ in inner_jaxprs(eqn)):
        return math.inf
    entries = math.fsum(_size(getattr(x.aval, "shape", ())) for x in eqn.outvars)
    if name == "dot_general":
        ((contracted, _), _) = eqn.params["dimension_numbers"]
        return entries * _size([eqn.invars[0].aval.shape[i] for i in contracted])
    if name in _FACTORISATIONS:
        return _PER_CUBE * entries * _size(eqn.invars[0].aval.shape[-1:])
    return (_PER_ENTRY if name in _TRANSCENDENTAL else 1.0) * entries


def _size(shape: Sequence[Any]) -> float:
    return float(known(math.prod(shape)))
