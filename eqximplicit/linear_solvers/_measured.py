"""The answer of a linear solve that is measured instead of believed."""

import abc
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax import lax
from jaxtyping import Array, Bool, Float

from .._custom_types import AbstractLinearSolver, LinearSolver, PyTree
from .._entries import all_finite, max_abs, nonzero_and_finite
from ._closed_form import inverse_power
from ._residual import is_zero, scale, where, within, zeros_like

_State = TypeVar("_State")
Stats = dict[str, Any]
# Options that are a guess of the solution, and of that of the transposed system.
_STARTS = ("y0", "y0_transpose")
# Squares of entries between this and its inverse are numbers in float32, and so are
# those of a residual some digits smaller.
_LARGE = 2.0**30


class Measured(eqx.Module):
    """The answer of a linear solve, and what it is worth.

    **Attributes:**

    - `x`: the answer, or anything where the right-hand side is zero.
    - `asked`: whether the right-hand side is not zero.
    - `good`: whether `x` answers it; then it is finite.
    - `result`, `stats`: the same in lineax's words.
    """

    x: PyTree[Array]
    asked: Bool[Array, ""]
    good: Bool[Array, ""]
    result: lx.RESULTS
    stats: Stats


class AbstractMeasuredSolver(AbstractLinearSolver[_State]):
    """A lineax solver that measures its answer, so that nobody else has to.

    `compute` is `answer` in lineax's words, for right-hand sides of any size. An
    `answer` needs one whose square is a number, and not zero.
    """

    @abc.abstractmethod
    def answer(
        self, state: _State, vector: PyTree[Array], options: dict[str, Any]
    ) -> Measured:
        """Returns the solution with its judgement."""

    def is_exact(self, state: _State) -> bool:
        """Whether a good answer solves the system, and is not inexact by design."""
        return self.is_direct(state)

    def is_direct(self, state: _State) -> bool:
        """Whether `state` is a factorisation, which makes another solve cheap."""
        del state
        return False

    def seldom(
        self, state: _State, vector: PyTree[Array], options: dict[str, Any]
    ) -> PyTree[Array]:
        """As `answer`, without judgement, of a solve to be compiled and hardly made."""
        return self.answer(state, vector, options).x

    def compute(
        self, state: _State, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, Stats]:
        """Returns the solution, its result, and at least its `residual_norm`."""
        asked = _for_compute(self, vector, options)
        found = self.answer(state, asked.vector, asked.options)
        x = where(found.asked, found.x, zeros_like(found.x))
        left = asked.as_asked(found.stats["residual_norm"])
        stats = {**found.stats, "residual_norm": left}
        return asked.as_asked(x), found.result, stats


class AbstractDirectSolver(AbstractMeasuredSolver[_State]):
    """One that factorises every operator."""

    def is_direct(self, state: _State) -> bool:
        """Whether `state` is a factorisation, which makes another solve cheap."""
        del state
        return True


class Asked(NamedTuple):
    """A right-hand side, and the number that takes the answer back to its units."""

    vector: PyTree[Array]
    options: dict[str, Any]
    back: Float[Array, ""] | None

    def as_asked(self, x: PyTree[Array]) -> PyTree[Array]:
        """An answer, or a number that goes with it, in the units of the question."""
        return x if self.back is None else scale(self.back, x)


def as_given(vector: PyTree[Array], options: dict[str, Any]) -> Asked:
    return Asked(vector, options, None)


def in_range(
    vector: PyTree[Array], options: dict[str, Any], small: float = 1 / _LARGE
) -> Asked:
    """The question in units in which squares of float32 neither over- nor underflow.

    By a power of two, which is exact: up to order one where the largest entry is below
    `small`, and down from where squares overflow, but no further, for small entries
    would underflow.
    """
    power = inverse_power(max_abs(vector))
    unit = jnp.where(power * small > 1, power, jnp.minimum(power * _LARGE, 1))
    given = {key: scale(unit, options[key]) for key in _STARTS if key in options}
    return Asked(scale(unit, vector), {**options, **given}, inverse_power(unit))


def _for_compute(
    solver: LinearSolver, vector: PyTree[Array], options: dict[str, Any]
) -> Asked:
    narrow = all(leaf.dtype == jnp.float32 for leaf in jtu.tree_leaves(vector))
    relative = is_zero(getattr(solver, "atol", 0.0))
    return (in_range if narrow and relative else as_given)(vector, options)


def measured(
    x: PyTree[Array],
    rr: Float[Array, ""],
    bb: Float[Array, ""],
    asked: Bool[Array, ""] | None = None,
    *,
    rtol: Float[Array, ""] | float,
    atol: Float[Array, ""] | float = 0.0,
    regular: Bool[Array, ""] | None = None,
    failure: lx.RESULTS = lx.RESULTS.singular,
    **stats: Any,
) -> Measured:
    """The answer of a linear solve, judged by its measured residual `‖b - A x‖`.

    `rr` and `bb` are the squares of that and of `‖b‖`. It is good if
    `‖b - A x‖ <= rtol ‖b‖ + atol` in the Euclidean norm; a NaN on either side fails the
    comparison. A zero `b` has the answer zero; where its square does not tell, `asked`
    says whether it is another. If not `regular`, it has failed.
    """
    # Where `b` is zero, so is the answer, whatever `x` is.
    nonzero, finite = _of_square(bb)
    residual_norm = lax.sqrt(lax.select(nonzero, rr, lax.full_like(rr, 0)))
    stats = {"residual_norm": residual_norm, **stats}
    good = lax.bitwise_and(within(rr, bb, rtol, atol), finite)
    asked = nonzero if asked is None else asked
    return judged(x, asked, finite, good, regular, failure=failure, **stats)


def approximate(
    x: PyTree[Array],
    vector: PyTree[Array],
    residual_norm: Float[Array, ""],
    *,
    regular: Bool[Array, ""] | None = None,
    **stats: Any,
) -> Measured:
    """An answer whose own residual does not decide: good if it is finite.

    That of a solver which is inexact by design, or has been measured before. An answer
    into which not every product has gone tells nothing of the operator: then `regular`
    says whether that is finite.
    """
    asked, good = nonzero_and_finite(vector, x)
    finite = all_finite(vector)  # for what is said of a failure
    return judged(x, asked, finite, good, regular, residual_norm=residual_norm, **stats)


def _of_square(bb: Float[Array, ""]) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether a vector is not zero, and whether it is finite."""
    return lax.ne(bb, lax.full_like(bb, 0)), lax.is_finite(bb)


def judged(
    x: PyTree[Array],
    asked: Bool[Array, ""],
    finite: Bool[Array, ""],
    good: Bool[Array, ""],
    regular: Bool[Array, ""] | None,
    *,
    failure: lx.RESULTS = lx.RESULTS.singular,
    **stats: Any,
) -> Measured:
    """The answer where somebody has asked: of a zero right-hand side it is zero."""
    good = lax.bitwise_or(good, lax.bitwise_not(asked))
    result = failure
    if regular is not None:
        good = lax.bitwise_and(good, regular)
        result = lx.RESULTS.where(regular, result, lx.RESULTS.singular)
    result = lx.RESULTS.where(finite, result, lx.RESULTS.nonfinite_input)
    result = lx.RESULTS.where(good, lx.RESULTS.successful, result)
    return Measured(x, asked, good, result, stats)
