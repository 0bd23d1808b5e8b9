"""A matrix-free solve that starts with the cheapest iteration, and has a second."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float

from .._custom_types import LinearSolver, PyTree
from .._lanes import any_lane
from .._placement import by_placement
from .._ranges import refuse_below, refuse_negative
from .._state import known
from ._dense import consistency_limit, uncertainty
from ._iterations import contracts, Found, picard, System, unbegun
from ._krylov_fallback import (
    columns,
    direct,
    factorised,
    iterated,
    KrylovState,
    Outcome,
)
from ._krylov_iterations import conjugate_gradient, conjugate_residual
from ._measured import AbstractMeasuredSolver, Measured, measured
from ._residual import (
    dot,
    epsilon,
    minus,
    require_like,
    scale,
    size,
    structure,
    transposed_options,
    warn_if_unreachable,
    where,
    zeros_like,
)
from ._rounding import rounding_of_products

# From this many right-hand sides per unknown on, factorising once is the cheaper way.
MANY = 1 / 8
# XLA sets memory aside for a fallback even where it is not taken: at most this much for
# all lanes of a `vmap` over operators.
FALLBACK_BYTES = 2**28


def default_rtol(eps: float, rounding: float) -> float:
    """The relative residual at which a matrix-free solve stops by default.

    `eps` is that of the vectors, `rounding` that of the lowest precision in a product:
    no residual is much less. Of half precision there are no 16 to spare.
    """
    return max(1e-10, min(16 * eps, max(eps, 1e-5)), rounding)


class HybridKrylov(AbstractMeasuredSolver[KrylovState]):
    r"""Picard or conjugate gradients as long as they work, then something that does.

    An operator with a symmetric tag starts with conjugate gradients; any other with
    the Picard iteration $x \leftarrow x + (b - Ax)$, which is the adjoint's own fixed
    point iteration and needs one product and no inner product with a stored vector per
    step. Where that does not contract (or the curvature is not positive), the solve
    continues from its last iterate: with `fallback`, a direct solver, if there is one,
    and with restarted generalised conjugate residuals (GMRES) otherwise. Robust in
    float32: the residual that decides is that of the answer, not of a recurrence.

    A consistent singular symmetric system yields the minimum-norm solution.

    **Arguments:**

    - `rtol`, `atol`: stops at `‖b - A x‖₂ <= rtol ‖b‖₂ + atol`. With `rtol=None`, stops
        at 1e-10 (float64) or 2e-6 (float32), but not below the rounding of a product in
        a lower precision, and accepts the root of that rounding, for a system too
        ill-conditioned for more; a given `rtol` must be reached within a factor of two.
    - `max_steps`: the largest number of products in each of the two phases.
    - `restart`: how many pairs of vectors the second phase keeps; with 0 there is no
        second phase, and what stagnates has failed (and is compiled faster).
    - `fallback`: a direct solver for the second phase, on one device: it would gather
        a state that is sharded over several. It is also used instead of both under
        `vmap` of many right-hand sides over one operator, where it factorises once (the
        columns of a Jacobian).

    **Options:**

    - `preconditioner`: an approximate inverse, a lineax operator.
    - `y0`: where to start; `y0_transpose` in the transposed system.
    - `operator_error`: of a symmetric operator; see [`eqximplicit.DirectSymmetric`][].
    """

    rtol: float | Float[Array, ""] | None = None
    atol: float = 0.0
    max_steps: int = eqx.field(default=1000, static=True)
    restart: int = eqx.field(default=20, static=True)
    fallback: LinearSolver | None = None

    def __check_init__(self) -> None:
        """Refuses negative tolerances, and a solver that takes no step."""
        refuse_negative("HybridKrylov", rtol=self.rtol, atol=self.atol)
        refuse_below("HybridKrylov", 1, max_steps=self.max_steps)
        refuse_below("HybridKrylov", 0, restart=self.restart)

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> KrylovState:
        """Returns the linearised operator."""
        structure(operator)  # which refuses what is not square, or not real
        rounding = rounding_of_products(operator)
        warn_if_unreachable("HybridKrylov", self.rtol, self.atol, rounding)
        negative = lx.is_negative_semidefinite(operator)
        symmetric = lx.is_symmetric(operator)
        error = options.get("operator_error") if symmetric else None
        linear = lx.linearise(operator)
        return KrylovState(linear, error, -1 if negative else 1, symmetric, rounding)

    def is_exact(self, state: KrylovState) -> bool:
        """`True`: a residual above the tolerance is a failure."""
        del state
        return True

    def answer(
        self, state: KrylovState, vector: PyTree[Array], options: dict[str, Any]
    ) -> Measured:
        """Returns the solution, its result, its `residual_norm` and `num_steps`.

        `fallback` is one if the direct solver has answered, else zero.
        """
        for key in ("preconditioner", "y0"):
            require_like(options.get(key), vector, key)
        outcome = self._outcome(state, vector, options)
        default, rtol = consistency_limit(state.rounding), self.rtol
        accepted = default if rtol is None else 2 * rtol
        slack: Any = 2 * self.atol
        if state.error is not None:
            unsure = uncertainty(state.error, outcome.x, vector, epsilon(vector))
            slack = slack + unsure
        # The direct solver has limits of its own: what it calls an answer is one.
        rr = jnp.where(outcome.direct, 0, outcome.rr)
        return measured(
            outcome.x,
            rr,
            dot(vector, vector),
            rtol=accepted,
            atol=slack,
            regular=~outcome.failed,
            failure=lx.RESULTS.stagnation,
            num_steps=outcome.steps,
            residual_norm=jnp.sqrt(outcome.rr),
            fallback=outcome.direct.astype(int),
        )

    def seldom(
        self, state: KrylovState, vector: PyTree[Array], options: dict[str, Any]
    ) -> PyTree[Array]:
        """As `answer`, without judgement, by the second phase alone if there is one."""
        return self._outcome(state, vector, options, self.restart > 0).x

    def transpose(
        self, state: KrylovState, options: dict[str, Any]
    ) -> tuple[KrylovState, dict[str, Any]]:
        """Returns the state of the transposed operator, and its options."""
        transposed = state.operator if state.symmetric else state.operator.transpose()
        of_symmetric = state.symmetric and not state.transposed
        flipped = dataclasses.replace(
            state, operator=transposed, transposed=of_symmetric
        )
        return flipped, transposed_options(options)

    def conj(
        self, state: KrylovState, options: dict[str, Any]
    ) -> tuple[KrylovState, dict[str, Any]]:
        """Returns the same state: operators are real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Whether a singular operator is a failure: not if symmetric and consistent."""
        return True

    def _system(
        self, state: KrylovState, vector: PyTree[Array], options: dict[str, Any]
    ) -> System:
        default, rtol = default_rtol(epsilon(vector), state.rounding), self.rtol
        preconditioner = options.get("preconditioner")
        sign, operator = state.sign, state.operator
        return System(
            mv=operator.mv if sign == 1 else lambda v: scale(-1, operator.mv(v)),
            precondition=_precondition(preconditioner, sign),
            b=vector if sign == 1 else scale(-1, vector),
            bb=dot(vector, vector),
            rtol=default if rtol is None else rtol,
            atol=self.atol,
            max_steps=self.max_steps,
        )

    def _outcome(
        self,
        state: KrylovState,
        vector: PyTree[Array],
        options: dict[str, Any],
        straight: bool = False,
    ) -> Outcome:
        """What both phases find, or the second, if that is entered `straight`."""
        if self.fallback is None or options:
            return self._solve(state, vector, options, straight)
        return self._solve_lane_or_columns(state, vector, straight)

    def _solve(
        self,
        state: KrylovState,
        vector: PyTree[Array],
        options: dict[str, Any],
        straight: bool,
    ) -> Outcome:
        system = self._system(state, vector, options)
        warm = options.get("y0")
        if straight:
            it = unbegun(system, warm)
        elif state.symmetric:
            it = conjugate_gradient(system, warm)
        else:
            it = picard(system, warm, contracts)
        need = (straight | ~system.solved(it.rr)) & jnp.isfinite(system.bb)
        if self.restart == 0:
            return iterated(_measured(system, it) if state.symmetric else it)
        first = iterated(it)
        stage = _Stage(self, state, vector, options, it, need)

        def second() -> Outcome:
            if self.fallback is None:
                return self._iteratively(stage)
            return by_placement(self._directly, self._iteratively, stage)

        if straight:
            return second()
        return jax.lax.cond(any_lane(need), second, lambda: first)

    @staticmethod
    def _directly(stage: "_Stage") -> Outcome:
        """The answer of the direct solver, in lanes that need one."""
        fallback, found = stage.solver.fallback, stage.found
        assert fallback is not None
        factors = factorised(fallback, stage.state)
        answer = direct(fallback, factors, stage.vector, stage.options, found.steps)
        return where(stage.need, answer, iterated(found))

    @staticmethod
    def _iteratively(stage: "_Stage") -> Outcome:
        """Conjugate residuals, from where the first phase is, if that is any better."""
        solver, it = stage.solver, stage.found
        system = solver._system(stage.state, stage.vector, stage.options)
        system = dataclasses.replace(system, max_steps=2 * solver.max_steps)
        restart = min(solver.restart, size(system.b))
        x = where(it.rr <= system.bb, it.x, zeros_like(it.x))
        return iterated(conjugate_residual(system, x, it.steps, restart))

    def _solve_lane_or_columns(
        self, state: KrylovState, vector: PyTree[Array], straight: bool
    ) -> Outcome:
        """`_solve`, with a rule for `vmap` that knows how many columns there are."""
        # The tolerances are given, too: a rule for `vmap` captures no tracer.
        arrays, static = eqx.partition((self, state), eqx.is_array)
        n, itemsize = size(vector), jtu.tree_leaves(vector)[0].dtype.itemsize
        many = max(2, int(MANY * n))

        def restored(arrays: Any) -> tuple[HybridKrylov, KrylovState]:
            return eqx.combine(arrays, static)

        def one(arrays: Any, vector: PyTree[Array]) -> Outcome:
            solver, state = restored(arrays)
            return solver._solve(state, vector, {}, straight)

        def one_light(arrays: Any, vector: PyTree[Array]) -> Outcome:
            solver, state = restored(arrays)
            light = dataclasses.replace(solver, fallback=None)
            return light._solve(state, vector, {}, straight)

        def at_once(arrays: Any, vector: PyTree[Array], axes: Any) -> Outcome:
            solver, state = restored(arrays)
            assert solver.fallback is not None
            return columns(solver.fallback, state, vector, axes)

        solve = custom_vmap(one)

        @solve.def_vmap
        def _(
            axis_size: Any, batched: list[Any], arrays: Any, vector: Any
        ) -> tuple[Outcome, Any]:
            lanes = known(axis_size)
            axes = jtu.tree_map(lambda b: 0 if b else None, batched)
            shared = not any(jtu.tree_leaves(batched[0]))
            if shared and lanes >= many:
                out = by_placement(
                    lambda given: at_once(*given, axes[1]),
                    lambda given: jax.vmap(one_light, tuple(axes))(*given),
                    (arrays, vector),
                )
            elif shared or lanes * n * n * itemsize <= FALLBACK_BYTES:
                out = jax.vmap(one, tuple(axes))(arrays, vector)
            else:
                out = jax.vmap(one_light, tuple(axes))(arrays, vector)
            return out, jtu.tree_map(lambda _: True, out)

        return solve(arrays, vector)


class _Stage(NamedTuple):
    """A solve that its first phase has brought so far."""

    solver: HybridKrylov
    state: KrylovState
    vector: PyTree[Array]
    options: dict[str, Any]
    found: Found
    need: Bool[Array, ""]  # of this lane, to go on


def _measured(system: System, found: Found) -> Found:
    """With the residual of the answer, where that of a recurrence was known."""
    r = minus(system.b, system.mv(found.x))
    return found._replace(rr=dot(r, r), steps=found.steps + 1)


def _precondition(preconditioner: lx.AbstractLinearOperator | None, sign: int) -> Any:
    if preconditioner is None:
        return lambda r: r
    return lambda r: scale(sign, preconditioner.mv(r))
