"""HOW a solution is differentiated: the policy. `_implicit.py` has the mathematics."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool

from ._captured import detach
from ._claim import Claim
from ._condition import AbstractCondition, LeastSquares, Minimum, Root
from ._custom_types import check_instance, LinearSolver, PyTree
from ._entries import greatest
from ._implicit import attached_solution, implicit_solution
from ._iterate import lax_while_loop, Outcome, WhileLoop
from ._solution import is_successful, RESULTS, where_result
from ._state import coarse_epsilon, stop_gradient
from .linear_solvers import AutoLinearSolver
from .linear_solvers._residual import size
from .linear_solvers.auto import DENSE_SIZE
from .solvers import AbstractHostSolver, AutoRootFinder, Broyden, FIRE
from .solvers._accepted import AbstractAccepted
from .solvers._default import ROUNDINGS

# A solver measures the distance from a solution in its own way: it is held to its
# tolerance times this; to one digit of a state of order one at least, never to more
# than two, nor to its own roundings.
_SLACK, _ONE_DIGIT, _TWO_DIGITS = 100.0, 1e-1, 1e-2
# Their step is itself the estimate of the distance.
_MEASURED = (optx.Newton, optx.Chord)
# A residual is small in units that only the Jacobian tells.
_BY_RESIDUAL = (AutoRootFinder, Broyden, AbstractHostSolver)
# An error is so many residuals near a multiple root, and where a Jacobian is weak.
_WEAK = 100.0
# To so small a residual, plain iteration near a double root takes some 3000 steps.
_TIGHT = 1e-7


class Solve(eqx.Module):
    """A solve that has not run yet: everything it depends on, apart from the loop.

    **Attributes:**

    - `condition`: what is solved, with the solver's own view of its arrays.
    - `solver`: an optimistix solver or a callable.
    - `y0`: the initial guess, as a state.
    - `args`: the argument of the condition's function.
    - `run`: runs these four with a given while loop.
    """

    condition: AbstractCondition[Any, Any]
    solver: Any
    y0: Any
    args: Any
    run: Callable[["Solve", WhileLoop], Outcome] = eqx.field(static=True)
    with_inverse: bool = eqx.field(static=True, default=False)

    def detached(self, with_inverse: bool = False) -> "Solve":
        """The same solve, with no derivative through anything it depends on."""
        condition, y0, args = stop_gradient((self.condition, self.y0, self.args))
        solver = detach(self.solver)
        return Solve(condition, solver, y0, args, self.run, with_inverse)


class AbstractAdjoint(optx.AbstractAdjoint):
    """How the solution of a condition is differentiated."""

    @abc.abstractmethod
    def differentiable(self, solve: Solve, residual_tol: float | None) -> Outcome:
        """Returns the outcome of `solve`, its value with a derivative.

        **Arguments:**

        - `solve`: the solve, on the live condition and arguments.
        - `residual_tol`: above this residual (largest absolute entry, dimensionless)
            the derivative is not to be trusted; `None` for no limit.
        """


def _judged(outcome: Outcome, residual_tol: float | None) -> Outcome:
    """The outcome, trusted no further than the residual of its value allows."""
    if residual_tol is None:
        return outcome
    # A NaN residual fails the comparison, which is written so that it does.
    small = outcome.stats["residual_norm"] <= residual_tol
    unexplained = ~small & (outcome.result == RESULTS.successful)
    result = where_result(unexplained, RESULTS.residual_too_large, outcome.result)
    trusted = outcome.trusted & small
    return dataclasses.replace(outcome, result=result, trusted=trusted, at=None)


def _if_like(y0: Any, y: Any) -> Any:
    """The guess if it is a state like `y`; a bare callable may be given anything."""
    return y0 if _structure(y0) == _structure(y) else None


def _structure(tree: Any) -> Any:
    leaves, structure = jtu.tree_flatten(tree)
    arrays = map(eqx.is_array, leaves)
    return [(x.shape, x.dtype) for x in leaves] if all(arrays) else None, structure


def _claim_of(
    solver: Any, condition: AbstractCondition[Any, Any], outcome: Outcome
) -> Claim | None:
    """What `solver` claims by reporting success; `None` for one that claims nothing.

    optimistix's own solvers are held to a distance, and so are those that judge by the
    residual or the gradient alone; all of these but the root finders also to having
    found a minimum. The other solvers of this package measure what they claim. To a
    simple root all are held that have not looked.
    """
    if not _claims(solver):
        return None
    maker = type(solver).__module__.partition(".")[0]
    theirs, ours = maker == "optimistix", maker == __name__.partition(".")[0]
    stepping = theirs or isinstance(solver, FIRE)
    coarse = coarse_epsilon(outcome.y)
    distance, least = None, max(_TWO_DIGITS, ROUNDINGS * (coarse or 0))
    if stepping and not isinstance(solver, _MEASURED):
        loose = _SLACK * greatest(solver.rtol, solver.atol)
        distance = jnp.maximum(jnp.minimum(loose, _ONE_DIGIT), least)
    elif isinstance(solver, _BY_RESIDUAL):
        distance = least
    extremal = isinstance(condition, (Minimum, LeastSquares))
    minimum = extremal and (stepping or isinstance(solver, AbstractHostSolver))
    multiple = coarse is None and _may_be_multiple(solver, outcome)
    measured = distance is None and (ours or isinstance(solver, _MEASURED))
    return Claim(distance, measured, minimum, multiple)


def _claims(solver: Any) -> bool:
    """Whether success says something: not of a callable, nor of a mere budget."""
    kinds = (optx.AbstractIterativeSolver, AbstractHostSolver)
    return isinstance(solver, kinds) and not isinstance(solver, AbstractAccepted)


def _may_be_multiple(solver: Any, outcome: Outcome) -> Bool[Array, ""] | bool:
    """Whether a solution may be a multiple root, by what the solver tells."""
    stats = outcome.stats
    if "simple" in stats or _is_left_alone(solver, outcome.y):
        return False
    if "slow" in stats:
        return stats["slow"]
    return stats["amplification"] > _WEAK if "amplification" in stats else True


def _is_left_alone(solver: Any, y: Any) -> bool:
    """Whether it is so cheap that the question would be most of the work.

    Plain iteration is slow near a multiple root: after `n` steps towards a double one
    the residual is of order `1 / n²`. So a tight tolerance ends the budget before.
    """
    if not isinstance(solver, optx.FixedPointIteration):
        return False
    tols = solver.rtol, solver.atol
    tight = all(isinstance(tol, float) for tol in tols) and max(tols) < _TIGHT
    return tight or size(y) > DENSE_SIZE


class ImplicitAdjoint(AbstractAdjoint):
    r"""The implicit function theorem at the solution that the solver returned.

    The solver is not differentiated, so time and memory of the derivative do not grow
    with its number of steps. Every approximate gradient of the literature is a
    `linear_solver` here: `Neumann(1)` is Jacobian-free backpropagation, say.

    It is an `optx.AbstractAdjoint` too: pass it as `adjoint=` to `optx.root_find`,
    `optx.fixed_point`, `optx.minimise` or `optx.least_squares`.

    **Arguments:**

    - `linear_solver`: a lineax solver for $\partial F/\partial y$.
    - `options`: its run-time options, such as `{"preconditioner": operator}`.
    - `reuse`: whether its preconditioner is the inverse of $\partial F/\partial y$ with
        which the forward solver has ended: that which [`eqximplicit.Broyden`][] or
        `optx.BFGS` have learnt, or the factorisation of `optx.Chord`. With
        `Neumann(1)` that inverse is all there is of the derivative, which is SHINE;
        an iteration to a tolerance makes an exact one of it in fewer steps. Direct
        solvers have no use for it.

    ??? cite "References"

        Z. Ramzi, F. Mannel, S. Bai, J.-L. Starck, P. Ciuciu, T. Moreau, *SHINE: SHaring
        the INverse Estimate from the forward pass for bi-level optimization and
        implicit models*, ICLR (2022).
    """

    linear_solver: LinearSolver = eqx.field(default_factory=AutoLinearSolver)
    options: dict[str, Any] = eqx.field(default_factory=dict)
    reuse: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        check_instance(
            "linear_solver",
            self.linear_solver,
            lx.AbstractLinearSolver,
            "a lineax solver, `eqi.DirectLU()` say",
        )
        if self.reuse and "preconditioner" in self.options:
            raise ValueError(
                "`ImplicitAdjoint` is given a preconditioner in `options`, and `reuse` "
                "for another one. Leave one of them out."
            )

    def differentiable(self, solve: Solve, residual_tol: float | None) -> Outcome:
        """Returns the outcome of the detached solve with the derivative attached.

        A lane whose solver failed, whose residual exceeds `residual_tol`, or whose
        value contradicts what an optimistix solver claims of it, has a NaN derivative.
        """
        detached = solve.detached(self.reuse)
        outcome = stop_gradient(detached.run(detached, lax_while_loop))
        options, outcome = self._with_inverse(outcome)
        outcome = _judged(outcome, residual_tol)
        guess = _if_like(detached.y0, outcome.y)
        if outcome.at is None and guess is not None:
            outcome = outcome.linearised_from(guess)
        y = attached_solution(
            solve.condition,
            outcome.y,
            solve.args,
            linear_solver=self.linear_solver,
            options=options,
            aux=outcome.aux,
            trusted=outcome.trusted,
            at=outcome.at,
            claim=_claim_of(detached.solver, solve.condition, outcome),
        )
        return eqx.tree_at(lambda o: o.y, outcome, y)

    def _with_inverse(self, outcome: Outcome) -> tuple[dict[str, Any], Outcome]:
        """The options of the linear solver, and the outcome without what is in them."""
        if not self.reuse:
            return self.options, outcome
        if outcome.inverse is None:
            raise ValueError(
                "`ImplicitAdjoint(reuse=True)` needs a solver of optimistix or of this "
                "package that ends with an inverse of `∂F/∂y`; a callable, or a solver "
                "on the host, has none to give. Leave out `reuse`."
            )
        options = {**self.options, "preconditioner": outcome.inverse}
        return options, dataclasses.replace(outcome, inverse=None)

    def apply(
        self,
        primal_fn: Callable[..., Any],
        rewrite_fn: Callable[..., Any],
        inputs: PyTree[Any],
        tags: frozenset[object],
    ) -> PyTree[Array]:
        """Runs optimistix's loop; optimistix calls this when given as `adjoint=`.

        Where it reports a failure, the derivative is NaN.
        """
        if self.reuse:
            raise ValueError(
                "`ImplicitAdjoint(reuse=True)` is for the functions and layers of this "
                "package: optimistix does not tell what its solvers have learnt."
            )
        root, rest = stop_gradient(primal_fn((*stop_gradient(inputs), lax_while_loop)))
        condition = Root(lambda y, inputs: rewrite_fn(y, rest, inputs), tags)
        y = implicit_solution(
            condition,
            root,
            inputs,
            linear_solver=self.linear_solver,
            options=self.options,
            trusted=_all_successful(rest),
        )
        return y, rest


def _all_successful(outcome: PyTree[Any]) -> Bool[Array, ""]:
    """Whether every result code in what an optimistix solve returns says success."""
    is_code = lambda x: isinstance(x, optx.RESULTS)
    codes = filter(is_code, jtu.tree_leaves(outcome, is_leaf=is_code))
    successes = (jnp.asarray(is_successful(code)) for code in codes)
    return functools.reduce(jnp.logical_and, successes, jnp.asarray(True))


def _differentiated_while_loop(*args: Any, **kwargs: Any) -> Any:
    # Not `lax_while_loop` itself: a solver's own steps are wanted, without an opening.
    return lax_while_loop(*args, **kwargs)


class UnrolledAdjoint(AbstractAdjoint):
    r"""The derivative of the solver's own steps.

    Exact for what the solver computed, converged or not, and therefore the right one
    for few fixed steps (truncated backpropagation, MAML). Memory grows with the number
    of steps, or with its logarithm by checkpoints. `y0` has a derivative here.

    It is an `optx.AbstractAdjoint` too.

    **Arguments:**

    - `checkpoints`: number of states that are kept; `None` lets Equinox choose from
        `max_steps`, for a cost of `O(n log n)` steps (Wang, Moin & Iaccarino, *SIAM J.
        Sci. Comput.* 31(4), 2009).
    - `mode`: `"reverse"` needs a finite `max_steps`; `"forward"` is for `jax.jvp` and
        `jax.jacfwd`, which the checkpointed loop does not support.
    """

    checkpoints: int | None = eqx.field(default=None, static=True)
    mode: Literal["reverse", "forward"] = eqx.field(default="reverse", static=True)

    def differentiable(self, solve: Solve, residual_tol: float | None) -> Outcome:
        """Returns the outcome of the live solve."""

        def run(inputs: tuple[Solve, WhileLoop]) -> Outcome:
            live, while_loop = inputs
            return live.run(live, while_loop)

        outcome: Any = self.apply(run, run, (solve,), solve.condition.tags)
        return _judged(outcome, residual_tol)

    def apply(
        self,
        primal_fn: Callable[..., Any],
        rewrite_fn: Callable[..., Any],
        inputs: PyTree[Any],
        tags: frozenset[object],
    ) -> PyTree[Array]:
        """Runs a loop that JAX can differentiate; optimistix calls this too."""
        if self.mode == "forward":
            return primal_fn((*inputs, _differentiated_while_loop))
        checkpointed = optx.RecursiveCheckpointAdjoint(checkpoints=self.checkpoints)
        return checkpointed.apply(primal_fn, rewrite_fn, inputs, tags)
