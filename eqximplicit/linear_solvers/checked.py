"""A lineax solver whose answer is measured instead of believed."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool

from .._custom_types import LinearSolver, PyTree, ShapeDtypeStruct
from .._entries import greatest, max_abs
from .._solution import is_successful
from ._dense import residual_limit, singular_below
from ._measured import AbstractMeasuredSolver, Measured, measured
from ._residual import check_bytes, dot, epsilon, even, minus, size, structure
from ._rounding import rounding_of_products
from ._three_diagonals import Bands, bands_of, flip, is_exact, is_regular
from .direct_lu import DirectLU

# How much more than it was asked for an iterative solver may leave.
_SLACK = 10.0
# Factorisations of any regular matrix, whose answer is that of `DirectLU`.
_GENERAL = (lx.LU, lx.QR)
# By substitution alone: of a singular matrix it is not finite.
_SUBSTITUTION = (lx.Diagonal, lx.Triangular)
_DIRECT = (*_SUBSTITUTION, lx.Cholesky, lx.Tridiagonal, lx.AutoLinearSolver)


class _Need(NamedTuple):
    """What solvers of lineax need of an operator, and the tag that says it."""

    kinds: tuple[Any, ...]
    what: str
    tag: str
    tests: tuple[Callable[[lx.AbstractLinearOperator], bool], ...]


_DEFINITE = (lx.is_positive_semidefinite, lx.is_negative_semidefinite)
_SIDES = (lx.is_lower_triangular, lx.is_upper_triangular)
_NEEDS = (
    _Need((lx.CG, lx.Cholesky), "definite", "positive_semidefinite_tag", _DEFINITE),
    _Need((lx.Diagonal,), "diagonal", "diagonal_tag", (lx.is_diagonal,)),
    _Need((lx.Tridiagonal,), "tridiagonal", "tridiagonal_tag", (lx.is_tridiagonal,)),
    _Need((lx.Triangular,), "triangular", "lower_triangular_tag", _SIDES),
)


def _refuse_untagged(solver: LinearSolver, operator: lx.AbstractLinearOperator) -> None:
    for need in _NEEDS:
        if isinstance(solver, need.kinds) and not any(t(operator) for t in need.tests):
            raise ValueError(
                f"`lx.{type(solver).__name__}` needs an operator that is {need.what}, "
                "and the tags of the condition do not say that `∂F/∂y` is. If it "
                f"always is, pass `tags=lx.{need.tag}` to the condition; else use "
                "`eqi.AutoLinearSolver()`."
            )


def checked(solver: LinearSolver, operator: lx.AbstractLinearOperator) -> LinearSolver:
    """`solver`, measured if it claims to have the solution of a regular system.

    One of this package measures its answers itself, and one that is for singular
    systems need not have small residuals. Elimination is probed, too; that of a matrix
    without structure is done by [`eqximplicit.DirectLU`][], which knows more of it.

    **Raises:** `ValueError` if the operator lacks the tag that the solver asks for.
    """
    _refuse_untagged(solver, operator)
    if isinstance(_selected(solver, operator), _GENERAL):
        return DirectLU(max_bytes=sys.maxsize)
    ours = isinstance(solver, AbstractMeasuredSolver)
    if ours or not solver.assume_full_rank():
        return solver
    return Checked(solver, probe=isinstance(solver, _DIRECT))


def _selected(
    solver: LinearSolver, operator: lx.AbstractLinearOperator
) -> LinearSolver:
    automatic = isinstance(solver, lx.AutoLinearSolver)
    return solver.select_solver(operator) if automatic else solver


class CheckedState(eqx.Module):
    """The state of the inner solver, and the operator that measures its answers.

    `bands` are those of a matrix that is solved as a tridiagonal one, else `None`.
    `eps` is that of the lowest precision in a product.
    """

    inner: Any
    operator: lx.AbstractLinearOperator
    regular: Bool[Array, ""]
    bands: Bands | None
    eps: float = eqx.field(static=True)


class Checked(AbstractMeasuredSolver[CheckedState]):
    r"""A lineax solver for square systems, with a result code that can be relied on.

    One product more measures the residual $\lVert b - Ax\rVert_2$; above
    `rtol` $\lVert b\rVert_2$ the solve has failed, whatever the solver says. That of a
    tridiagonal matrix is measured row by row, relative to the terms of each, and may be
    $\epsilon^{3/4}$ of them. A zero right-hand side has the solution zero.

    **Arguments:**

    - `solver`: any lineax solver for square systems.
    - `rtol`: dimensionless; $\epsilon^{1/3}$ if `None` (6e-6 in float64, 5e-3 in
        float32; of the lowest precision in a product), or ten times what `solver` is
        asked for if that is more.
    - `probe`: also solves for one right-hand side without a pattern, once for a state.
        Elimination of a singular matrix often ends finite, and its residual is small if
        the right-hand side is consistent; the answer to the probe is then about
        $1/\epsilon$ too large. Rows and columns of a tridiagonal matrix are scaled to
        entries of at most one first, for their units make no system singular.
    - `max_bytes`: if given, refuses an operator whose dense matrix would be larger.

    **Options:** those of `solver`.
    """

    solver: LinearSolver
    rtol: float | None = None
    probe: bool = eqx.field(default=False, static=True)
    max_bytes: int | None = eqx.field(default=None, static=True)

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> CheckedState:
        """Returns the state of the inner solver, and the operator."""
        struct = structure(operator)
        if self.max_bytes is not None:
            n, itemsize = operator.in_size(), jtu.tree_leaves(struct)[0].dtype.itemsize
            who = type(self.solver).__name__
            check_bytes(n, n, itemsize, self.max_bytes, who)
        inner, bands = self.solver.init(operator, options), None
        if isinstance(_selected(self.solver, operator), lx.Tridiagonal):
            bands = bands_of(operator)
        regular = jnp.asarray(True)
        if self.probe and bands is not None:
            regular = is_regular(bands, ravel_pytree(even(struct))[0])
        elif self.probe:
            regular = self._survives_probe(operator, inner, struct, options)
        eps = rounding_of_products(operator)
        return CheckedState(inner, lx.linearise(operator), regular, bands, eps)

    def is_exact(self, state: CheckedState) -> bool:
        """`True`: what leaves a residual has failed."""
        del state
        return True

    def is_direct(self, state: CheckedState) -> bool:
        """Whether the inner solver eliminates or substitutes."""
        return isinstance(_selected(self.solver, state.operator), _DIRECT)

    def _survives_probe(
        self,
        operator: lx.AbstractLinearOperator,
        inner: Any,
        struct: PyTree[ShapeDtypeStruct],
        options: dict[str, Any],
    ) -> Bool[Array, ""]:
        # ‖A‖ ‖A⁻¹ g‖ / ‖g‖ bounds the condition number of A from below.
        probe = even(struct)
        x, _, _ = self.solver.compute(inner, probe, options)
        if isinstance(_selected(self.solver, operator), _SUBSTITUTION):
            return jnp.isfinite(max_abs(x))
        grown = max_abs(x) * max_abs(operator.mv(probe))
        return grown * singular_below(epsilon(struct)) < max_abs(probe) ** 2

    def answer(
        self, state: CheckedState, vector: PyTree[Array], options: dict[str, Any]
    ) -> Measured:
        """Returns the solution, its result, and its measured `residual_norm`."""
        x, claimed, stats = self.solver.compute(state.inner, vector, options)
        rtol = self._limit(vector, state.eps) if self.rtol is None else self.rtol
        r, bb = minus(vector, state.operator.mv(x)), dot(vector, vector)
        regular = state.regular & ((bb == 0) | is_successful(claimed))
        # What the solver itself says of its failure is more than that it failed.
        failure = lx.RESULTS.where(is_successful(claimed), lx.RESULTS.singular, claimed)
        rr = dot(r, r)
        if state.bands is not None:
            # Each row is measured in its own units: their sum has no say.
            limit = state.eps**0.75 if self.rtol is None else self.rtol
            flat_x, flat_b, left = (ravel_pytree(v)[0] for v in (x, vector, r))
            exact = is_exact(state.bands, flat_x, flat_b, left, limit)
            regular = regular & ((bb == 0) | exact)
            stats, rr = {**stats, "residual_norm": jnp.sqrt(rr)}, jnp.zeros_like(rr)
        return measured(x, rr, bb, rtol=rtol, regular=regular, failure=failure, **stats)

    def _limit(self, vector: PyTree[Array], eps: float) -> Any:
        # Other norms than ours decide when an iteration has done what it was asked for.
        slack = _SLACK * size(vector) ** 0.5
        asked = [getattr(self.solver, name, 0.0) for name in ("rtol", "atol")]
        limit = residual_limit(eps)
        return greatest(limit, *(slack * tol for tol in asked))

    @property
    def atol(self) -> Any:
        """The absolute tolerance of the inner solver, zero if it has none."""
        return getattr(self.solver, "atol", 0.0)

    def transpose(
        self, state: CheckedState, options: dict[str, Any]
    ) -> tuple[CheckedState, dict[str, Any]]:
        """Returns the state of the transposed operator."""
        inner, options = self.solver.transpose(state.inner, options)
        operator, bands = state.operator, state.bands
        if not lx.is_symmetric(operator):
            operator = operator.transpose()
        bands = None if bands is None else flip(bands)
        flipped = CheckedState(inner, operator, state.regular, bands, state.eps)
        return flipped, options

    def conj(
        self, state: CheckedState, options: dict[str, Any]
    ) -> tuple[CheckedState, dict[str, Any]]:
        """Returns the same state: operators are real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """What the inner solver assumes."""
        return self.solver.assume_full_rank()
