"""The default: a linear solver chosen at trace time from size, dtype and tags."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from .._custom_types import PyTree
from .._ranges import refuse_below, refuse_negative
from ._dense import MAX_BYTES
from ._measured import AbstractMeasuredSolver, Measured
from ._pattern import narrow_structure
from ._placed import OnOneDevice
from ._residual import epsilon, size, structure
from ._rounding import rounding_of_products
from ._small import is_placed
from ._structure import Structure
from .checked import Checked
from .direct_lu import DirectLU
from .direct_symmetric import DirectSymmetric
from .krylov import default_rtol, HybridKrylov
from .sparse import SparseDirect

# Measured on one core (`benchmarks/linear_solvers.py`), one right-hand side, with 25 us
# of dispatch; a dense matrix, which costs nothing to materialise (`_columns.py`), at a
# contraction of 0.5, for which Picard takes 23 products to 1e-7. CG of a Hessian.
#     n      LU + solve   Picard     Cholesky + solve   CG
#     10     50 us        25 us      60 us              30 us
#     50     80 us        45 us      100 us             80 us
#     100    150 us       70 us      190 us (n = 110)   160 us
#     200    530 us       180 us     510 us             350 us
#     1000   25 000 us    7400 us
# And a matrix of a lane each is eliminated lane by lane.
DENSE_SIZE = 32
# Up to here the matrix is small (32 MiB in float64) and a factorisation takes less than
# a second: worth having as the fallback, and for many right-hand sides at once.
FALLBACK_SIZE = 2048


class Selection(NamedTuple):
    """A linear solver, and a sentence that says why it was chosen."""

    solver: AbstractMeasuredSolver[Any]
    reason: str


# A solver, and what says why.
_Choice = tuple[AbstractMeasuredSolver[Any], Callable[[], str]]


class AutoState(eqx.Module):
    """The state of the solver that was chosen."""

    solver: AbstractMeasuredSolver[Any]
    inner: Any


class AutoLinearSolver(AbstractMeasuredSolver[AutoState]):
    r"""The right linear solver for an operator's size, dtype and tags.

    | operator | solver |
    |---|---|
    | tagged diagonal, tridiagonal, triangular | lineax's, with the residual measured |
    | symmetric, `n <= dense_size` | Cholesky; where singular, the pseudo-inverse |
    | other, `n <= dense_size` | LU; closed form for `n <= 3` |
    | symmetric, larger | conjugate gradients |
    | other, larger, of at most three bands, on one device | `SparseDirect` |
    | other, larger | Picard iteration |
    | those two iterations, where they fail | `n <= fallback_size`: the direct solver; |
    | | larger: generalised conjugate residuals (GMRES) |

    Bands are found in the jaxpr of the operator, at little cost; a direct solve would
    gather a state that is sharded over several devices, so there it is not done. Where
    elimination has no answer, the iterations are asked as well. Wider patterns are for
    [`eqximplicit.SparseDirect`][] by name.

    Under `vmap` of many right-hand sides over one operator of up to `fallback_size`
    unknowns (the columns of a Jacobian) the direct solver factorises once. A symmetric
    operator may be singular (flat directions of a minimum): a consistent system has its
    minimum-norm solution. Any other singular matrix is a failure; so is each solve
    whose measured residual is too large. A matrix-free solve cannot see that a
    non-symmetric operator is singular if the right-hand side is consistent.

    **Arguments:**

    - `rtol`: relative residual of a matrix-free solve; tied to the dtype if `None`.
        See [`eqximplicit.HybridKrylov`][].
    - `rcond`: eigenvalues of a symmetric matrix below this part of the largest count as
        zero; see [`eqximplicit.DirectSymmetric`][].
    - `max_steps`: the largest number of products in each phase of a matrix-free solve.
    - `dense_size`: the largest number of unknowns solved directly at once.
    - `fallback_size`: the largest number of unknowns for a dense factorisation.
    - `max_bytes`: the largest matrix that is materialised, in bytes per lane.

    **Options:** those of the chosen solver.
    """

    rtol: float | Float[Array, ""] | None = None
    rcond: float | Float[Array, ""] | None = None
    max_steps: int = eqx.field(default=1000, static=True)
    dense_size: int = eqx.field(default=DENSE_SIZE, static=True)
    fallback_size: int = eqx.field(default=FALLBACK_SIZE, static=True)
    max_bytes: int = eqx.field(default=MAX_BYTES, static=True)

    def __check_init__(self) -> None:
        """Refuses negative tolerances, and no step at all."""
        refuse_negative("AutoLinearSolver", rtol=self.rtol, rcond=self.rcond)
        refuse_below("AutoLinearSolver", 1, max_steps=self.max_steps)

    def select(self, operator: lx.AbstractLinearOperator) -> Selection:
        """Returns the solver for `operator`, and why; decided without any product.

        **Raises:** `ValueError` if the operator is not square or not of one real dtype,
        and, with the number of bytes, if a matrix would exceed `max_bytes`.
        """
        solver, why = self._choice(operator)
        return Selection(solver, why())

    def _choice(self, operator: lx.AbstractLinearOperator) -> _Choice:
        n = size(structure(operator))
        tagged = self._by_structure(operator)
        if tagged is not None:
            return tagged
        symmetric = lx.is_symmetric(operator)
        direct = self._direct(symmetric)
        if n <= self.dense_size:
            return direct, lambda: self._direct_words(symmetric, n)
        small = n <= self.fallback_size
        krylov = HybridKrylov(
            rtol=self.rtol,
            max_steps=self.max_steps,
            fallback=direct if small else None,
        )
        words = lambda: self._krylov_words(operator, n, small)
        if symmetric or not (found := narrow(operator)):
            return krylov, words
        reason = f"{found.kind} by its jaxpr, {n} unknowns: elimination, O(n)"
        solver = OnOneDevice(SparseDirect(), krylov)
        return solver, lambda: f"{reason}; over several devices: {words()}"

    def _by_structure(self, operator: lx.AbstractLinearOperator) -> _Choice | None:
        if operator.in_size() == 1:
            return None  # lineax calls it diagonal; the closed form knows a zero
        if lx.is_diagonal(operator):
            division = Checked(lx.Diagonal(well_posed=True), probe=True)
            return division, lambda: "tagged diagonal: division"
        if lx.is_tridiagonal(operator):
            elimination = Checked(lx.Tridiagonal(), probe=True)
            words = "tagged tridiagonal: elimination without fill-in, O(n)"
            return elimination, lambda: words
        if lx.is_lower_triangular(operator) or lx.is_upper_triangular(operator):
            substitution = Checked(lx.Triangular(), max_bytes=self.max_bytes)
            return substitution, lambda: "tagged triangular: substitution"
        return None

    def _direct(self, symmetric: bool) -> AbstractMeasuredSolver[Any]:
        if symmetric:
            return DirectSymmetric(rcond=self.rcond, max_bytes=self.max_bytes)
        return DirectLU(max_bytes=self.max_bytes)

    def _direct_words(self, symmetric: bool, n: int) -> str:
        what = _how_directly(symmetric, n)
        return f"{_kind(symmetric)}, {n} unknowns (at most {self.dense_size}): {what}"

    def _krylov_words(
        self, operator: lx.AbstractLinearOperator, n: int, small: bool
    ) -> str:
        symmetric, rtol = lx.is_symmetric(operator), self.rtol
        if rtol is None:
            eps = epsilon(operator.in_structure())
            rtol = default_rtol(eps, rounding_of_products(operator))
        known = isinstance(rtol, (int, float))  # else an array, which may be traced
        limit = f"{rtol:.1e}" if known else "`rtol`"
        quick = "conjugate gradients" if symmetric else "Picard iteration"
        direct = "Cholesky or pseudo-inverse" if symmetric else "LU"
        slow = direct if small else "generalised conjugate residuals"
        return (
            f"{_kind(symmetric)}, {n} unknowns (more than {self.dense_size}): matrix-"
            f"free, {quick} to a relative residual of {limit}, then {slow} where that "
            "stagnates"
        )

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> AutoState:
        """Returns the state of the chosen solver."""
        solver, _ = self._choice(operator)
        return AutoState(solver, solver.init(operator, options))

    def is_exact(self, state: AutoState) -> bool:
        """Whether a good answer solves the system: true of all that are chosen."""
        return state.solver.is_exact(state.inner)

    def is_direct(self, state: AutoState) -> bool:
        """Whether the chosen solver has factorised."""
        return state.solver.is_direct(state.inner)

    def answer(
        self, state: AutoState, vector: PyTree[Array], options: dict[str, Any]
    ) -> Measured:
        """Returns the solution, its result, and at least its `residual_norm`."""
        return state.solver.answer(state.inner, vector, options)

    def seldom(
        self, state: AutoState, vector: PyTree[Array], options: dict[str, Any]
    ) -> PyTree[Array]:
        """As `answer`, without judgement, by the chosen solver."""
        return state.solver.seldom(state.inner, vector, options)

    def transpose(
        self, state: AutoState, options: dict[str, Any]
    ) -> tuple[AutoState, dict[str, Any]]:
        """Returns the state of the transposed operator."""
        inner, options = state.solver.transpose(state.inner, options)
        return AutoState(state.solver, inner), options

    def conj(
        self, state: AutoState, options: dict[str, Any]
    ) -> tuple[AutoState, dict[str, Any]]:
        """Returns the state of the conjugate operator, which is real: the same."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Whether a singular operator is a failure: not if symmetric and consistent."""
        return False


def narrow(operator: lx.AbstractLinearOperator) -> Structure | None:
    """The structure of a diagonal or tridiagonal operator, else `None`."""
    struct = operator.in_structure()
    if is_placed(struct) or epsilon(struct) > jnp.finfo(jnp.float32).eps:
        return None
    found = narrow_structure(operator)
    narrow = found is not None and found.kind in ("diagonal", "tridiagonal")
    return found if narrow else None


def _kind(symmetric: bool) -> str:
    return "symmetric" if symmetric else "not tagged symmetric"


def _how_directly(symmetric: bool, n: int) -> str:
    if n <= 3:
        inverse = "inverse in closed form"
        return f"{inverse}, pseudo-inverse where singular" if symmetric else inverse
    if symmetric:
        return "Cholesky, pseudo-inverse where singular (flat directions)"
    return "LU factorisation"
