"""KLU, a sparse LU for CPU, through the optional dependency klujax.

Davis and Palamadai Natarajan, 2010, "Algorithm 907: KLU, a direct sparse solver for
circuit simulation problems".
"""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from ._pattern import optional

_LOADED: dict[str, ModuleType | None] = {}


def klu() -> ModuleType | None:
    """The module klujax, or `None`. Importing it leaves the configuration as it was.

    (klujax 0.5 switches on 64 bits and selects the CPU when it is imported.)
    """
    if "klujax" not in _LOADED:
        names = ("jax_enable_x64", "jax_platform_name")
        before = {name: jax.config.read(name) for name in names}
        try:
            _LOADED["klujax"] = optional("klujax")
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
    return _LOADED["klujax"]


def _quasi_random(count: int) -> Array:
    """Numbers in [1/2, 3/2] without a pattern: a quasi-random sequence."""
    index = jnp.arange(count, dtype=jnp.float64)
    return 1.0 + 0.5 * jnp.cos(index * index * 0.7548776662466927)


def _never_singular(values: Array) -> Array:
    r"""A matrix whose LU meets no zero pivot, equal to `values` up to rounding.

    If it has full structural rank: an empty row stays one.

    KLU raises an error at an exactly zero pivot, which a derivative must not. A real
    matrix gets imaginary parts of $10^{-20}$ with many random bits: as in a
    complex-step derivative they change the real part of the solution by $10^{-40}$
    only, and a pivot that cancels in the real part is left with an imaginary one, so
    that the solution of a singular system is about $10^{20}$, which the caller sees.
    A complex matrix has no such free direction: it is changed by $2^{-42}$, and where
    it is zero by $10^{-20}$.
    """
    signs = _quasi_random(values.shape[0])
    if jnp.iscomplexobj(values):
        both = jax.lax.complex(signs, signs[::-1])
        return values * (1.0 + 2.0**-42 * both) + 1e-20 * both
    return jax.lax.complex(values, 1e-20 * signs)


def klu_solve(
    rows: np.ndarray,
    cols: np.ndarray,
    values: Inexact[Array, " nnz"],
    rhs: Inexact[Array, "n k"],
) -> tuple[Inexact[Array, "n k"], Inexact[Array, " k"]]:
    """The solution, and its largest absolute value, column by column.

    In double precision whatever the dtypes and the configuration. The entries are
    taken to be of order one, at places of full structural rank. The size of the
    solution is that of its complex form: about `1e20` if the matrix is singular.
    """
    module = klu()
    assert module is not None
    dtype = rhs.dtype
    with jax.enable_x64(True):
        wide = jnp.complex128 if jnp.iscomplexobj(values) else jnp.float64
        matrix = _never_singular(values.astype(wide))
        b = rhs.astype(jnp.complex128)
        x = module.solve(jnp.asarray(rows), jnp.asarray(cols), matrix, b)
        size = jnp.max(jnp.abs(x), axis=0)
        top = float(jnp.finfo(dtype).max)
        size = jnp.minimum(size, top).astype(jnp.finfo(dtype).dtype)
        x = x if jnp.issubdtype(dtype, jnp.complexfloating) else x.real
        return x.astype(dtype), size
