"""What a plan for a sparse matrix is: how it is read, checked and solved.

A plan is static (hashed by identity, shared through a cache); the entries of the
matrix are arrays that its methods take first. `transposed` asks for the transpose.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact

from .._custom_types import ShapeDtypeStruct
from .._entries import peak
from ._coloring import Colouring
from ._structure import Structure


class Solved(NamedTuple):
    """A solution and what was measured of it.

    `condition` estimates the norm of the inverse of the matrix scaled to entries of at
    most one (for a dominant diagonal it is a bound).
    """

    x: Inexact[Array, " n"]
    trusted: Bool[Array, ""]
    residual: Float[Array, ""]
    condition: Float[Array, ""]


class AbstractPlan(abc.ABC):
    """The static half of a sparse matrix; its entries are a pytree of arrays."""

    structure: Structure
    colouring: Colouring

    def derived(
        self, linear: Callable[[Array], Array], struct: ShapeDtypeStruct
    ) -> tuple[Any, Bool[Array, ""]] | None:
        """The entries from the jaxpr of a map of flat vectors, if that tells them.

        And whether it is linear.
        """
        del linear, struct

    @abc.abstractmethod
    def read(self, products: Inexact[Array, "count n"]) -> Any:
        """The entries, from the products with `colouring.seeds()`."""

    @abc.abstractmethod
    def agrees(
        self, values: Any, probe: np.ndarray, image: Inexact[Array, " n"], rtol: float
    ) -> Bool[Array, ""]:
        """Whether the matrix maps `probe` (positive) to `image`, up to `rtol`."""

    @abc.abstractmethod
    def solve(self, values: Any, b: Inexact[Array, " n"], transposed: bool) -> Solved:
        """The solution, and whether to trust it."""


@functools.lru_cache(maxsize=64)
def generic_vector(size: int) -> np.ndarray:
    """A vector in [1/2, 3/2] without a pattern, not orthogonal to a constant."""
    return np.random.default_rng(0).uniform(0.5, 1.5, size)


def eps_power(dtype: Any, power: float) -> float:
    return float(jnp.finfo(dtype).eps) ** power


def or_one(scale: Array) -> Array:
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)


def peaks(x: Array) -> Array:
    return peak(x, axis=0)


def is_trusted(residual: Array, size: Array, top: Array) -> Bool[Array, "*k"]:
    """A small backward error, and a matrix that is not (nearly) singular.

    All are largest absolute values of a scaled system: the residual, the solution, and
    the right-hand side.
    """
    backward = residual <= eps_power(residual.dtype, 0.75) * (size + top)
    return backward & is_regular(size, top)


def is_regular(size: Array, top: Array | float = 1.0) -> Bool[Array, "*k"]:
    """Whether a scaled matrix with solutions of this size leaves digits; NaN does not.

    That of a condition number, too.
    """
    return size <= eps_power(size.dtype, -0.8) * top
