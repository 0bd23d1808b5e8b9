"""Deep equilibrium models: a layer whose output is the fixed point of its cell."""

from collections.abc import Callable
from typing import Any, Generic, overload, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._adjoint import AbstractAdjoint, ImplicitAdjoint
from .._condition import FixedPoint
from .._function import ImplicitFunction
from .._solution import RESULTS, Solution
from .._state import as_state, real_dtype, stop_gradient
from ..solvers.auto_fixed_point import AutoFixedPoint
from ._budget import FixedBudget
from ._cell import cast, CellMap, infer_state, Inputs, state_dtypes

Z = TypeVar("Z")


def _as_dtype(dtype: Any) -> np.dtype | None:
    return None if dtype is None else jnp.dtype(dtype)


class DEQ(eqx.nn.StatefulLayer, Generic[Z]):
    r"""A layer whose output is the fixed point of a cell: a deep equilibrium model.

    $$z^\star = f_\theta(z^\star, x)$$

    It has infinitely many layers of shared weights, at the memory of one: the solver is
    not differentiated, so the memory of the derivative does not grow with its steps.

    **The gradient** is `adjoint`'s one knob, its linear solver for $I - \partial f/
    \partial z$. The default is exact. `ImplicitAdjoint(Neumann(1))` is Jacobian-free
    backpropagation, a damped Neumann series of several terms is the phantom gradient.

    **Convergence.** A solve that fails raises, or with `throw=False` says so in
    `solve(...).result`; its derivative is NaN either way, because the implicit function
    theorem says nothing away from a solution. To accept an unconverged state on
    purpose, wrap the solver: `FixedBudget(solver, 12)` makes at most 12 steps, calls
    what it has a solution, never throws (unless the state is not finite), and has
    finite derivatives.

    **Batches.** `jax.vmap(layer)(x)` solves each example by itself. A cell of batched
    arrays makes one large equation of the whole batch, which stops when its worst
    example has converged.

    **Warm start.** With `warm_start=z_init` the layer is stateful, as
    `eqx.nn.BatchNorm` is: `z, state = layer(x, state)` starts from the last solution
    and stores the new one, without a derivative. A failed solve stores nothing.

    **Mixed precision.** With `compute_dtype=jnp.bfloat16` the cell is evaluated with
    its weights, `z` and `x` in bfloat16, while the weights are kept and the state is
    solved for in float32 (or the precision of `z0`).

    **Arguments:**

    - `cell`: $f$, called as `cell(z, x)`, or as `cell(z, x, key=key)` if it has an
        argument `key`. It returns a state shaped and typed as `z`. Its arrays are the
        layer's parameters.
    - `solver`: how the fixed point is found: an optimistix solver, or any callable
        `(z0, inputs) -> z`. By default `AutoFixedPoint`, to a tolerance that suits the
        precision: 1e-8 in float64, 1e-5 in float32, 1e-2 where the cell is computed in
        less.
    - `adjoint`: how it is differentiated; `ImplicitAdjoint()` by default.
    - `max_steps`: the largest number of steps; `None` for no limit. A `FixedBudget`
        may not exceed it.
    - `throw`: whether a failed solve raises.
    - `residual_tol`: the largest residual (largest absolute entry of `z - f(z, x)`,
        dimensionless) at which the derivative is trusted.
    - `warm_start`: the state before the first call, any pytree of arrays shaped as
        `z`; `None` for a layer without memory.
    - `compute_dtype`: the dtype in which the cell computes; `None` to change nothing.

    **Raises:** `ValueError` for a `compute_dtype` that is not a real floating dtype, or
    for a budget above `max_steps`.

    !!! example

        ```python
        class Cell(eqx.Module):
            recur: eqx.nn.Linear
            inject: eqx.nn.Linear

            def __call__(self, z, x):
                return jnp.tanh(self.recur(z) + self.inject(x))

        model = eqx.nn.Sequential([eqi.nn.DEQ(cell), eqx.nn.Linear(64, 10, key=key)])
        logits = jax.vmap(model)(x)
        ```

    ??? cite "References"

        S. Bai, J. Z. Kolter and V. Koltun, *Deep equilibrium models*, NeurIPS 2019.
        S. W. Fung et al., *JFB: Jacobian-free backpropagation for implicit networks*,
        AAAI 2022. Z. Geng et al., *On training implicit models*, NeurIPS 2021: phantom
        gradients.
    """

    cell: Callable[..., Z]
    solver: Any
    adjoint: AbstractAdjoint
    warm_start: eqx.nn.StateIndex[Any] | None
    max_steps: int | None = eqx.field(static=True)
    throw: bool = eqx.field(static=True)
    residual_tol: float | None = eqx.field(static=True)
    compute_dtype: np.dtype | None = eqx.field(static=True)

    def __init__(
        self,
        cell: Callable[..., Z],
        solver: Any = None,
        adjoint: AbstractAdjoint | None = None,
        *,
        max_steps: int | None = 256,
        throw: bool = True,
        residual_tol: float | None = None,
        warm_start: Z | None = None,
        compute_dtype: Any = None,
    ):
        self.cell = cell
        self.solver = solver
        self.adjoint = ImplicitAdjoint() if adjoint is None else adjoint
        self.max_steps = max_steps
        self.throw = throw
        self.residual_tol = residual_tol
        self.compute_dtype = _as_dtype(compute_dtype)
        if warm_start is None:
            self.warm_start = None
        else:
            self.warm_start = eqx.nn.StateIndex(_strong(as_state(warm_start)))

    def __check_init__(self) -> None:
        dtype, solver = self.compute_dtype, self.solver
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"`compute_dtype` must be a real floating dtype; got {dtype.name}."
            )
        budget = solver.num_steps if isinstance(solver, FixedBudget) else 0
        if isinstance(budget, int) and self.max_steps is not None:
            if budget > self.max_steps:
                raise ValueError(
                    f"The budget of {budget} steps exceeds "
                    f"`max_steps={self.max_steps}`; raise `max_steps`."
                )

    def is_stateful(self) -> bool:
        """Whether the layer is called as `layer(x, state)`: whether it warm-starts."""
        return self.warm_start is not None

    @overload
    def __call__(
        self,
        x: Any,
        state: None = None,
        *,
        z0: Z | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Z: ...

    @overload
    def __call__(
        self,
        x: Any,
        state: eqx.nn.State,
        *,
        z0: Z | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Z, eqx.nn.State]: ...

    def __call__(
        self,
        x: Any,
        state: eqx.nn.State | None = None,
        *,
        z0: Z | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Z | tuple[Z, eqx.nn.State]:
        """Returns the fixed point, differentiable in the cell and in `x`.

        **Arguments:**

        - `x`: the input, any pytree; passed to the cell.
        - `state`: with `warm_start`, the `eqx.nn.State` that holds the last solution.
        - `z0`: the initial guess, which decides the shape of the state and has no
            derivative. By default the last solution, or else zeros of the shape that
            the cell keeps: that of `cell.initial_state(x)` if there is such a method,
            else it is found by tracing the cell.
        - `key`: a random key, passed to a cell that takes one: the same key at every
            step of the solve, so that a dropout mask is fixed along it.

        **Returns:** the fixed point; with `state`, the pair `(fixed point, state)`.

        **Raises:** `ValueError` at trace time if the cell's output does not fit the
        state, or the state's shape cannot be told; a runtime error if the solve fails
        and `throw` is set.
        """
        if state is None:
            return self.solve(x, z0=z0, key=key).value
        index = self._index()
        solution = self.solve(x, state, z0=z0, key=key)
        return solution.value, state.set(index, _kept(solution, state.get(index)))

    def solve(
        self,
        x: Any,
        state: eqx.nn.State | None = None,
        *,
        z0: Z | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Solution[Z, None]:
        """Returns the fixed point together with how the solve went.

        **Arguments:** as for the call. The `state` is read, not changed.

        **Returns:** a [`eqximplicit.Solution`][], whose `value` is differentiable.

        **Raises:** as for the call.
        """
        fn = CellMap(cast(self.cell, self.compute_dtype), self.compute_dtype)
        inputs = Inputs(cast(x, self.compute_dtype), key)
        guess = self._guess(fn, inputs, x, state) if z0 is None else z0
        guess: Any = as_state(guess)
        layer = ImplicitFunction[Any, Inputs, None, Any](
            FixedPoint[Any, Inputs](fn),
            self._solver_for(guess),
            self.adjoint,
            max_steps=self.max_steps,
            throw=self.throw,
            residual_tol=self.residual_tol,
        )
        return layer.solve(guess, inputs)

    def _index(self) -> eqx.nn.StateIndex[Any]:
        if self.warm_start is None:
            raise ValueError(
                "This DEQ was called with a `state` but has no memory: construct it "
                "with `DEQ(..., warm_start=z_init)`, or call it as `layer(x)`."
            )
        return self.warm_start

    def _guess(
        self, fn: CellMap, inputs: Inputs, x: Any, state: eqx.nn.State | None
    ) -> Any:
        if state is not None:
            return state.get(self._index())
        if self.warm_start is not None:
            raise ValueError(
                "This DEQ has a warm start: call it as `z, state = layer(x, state)`, "
                "with the `state` of `eqx.nn.make_with_state(make_model)(...)`."
            )
        dtypes = state_dtypes(self.cell, x, self.compute_dtype)
        return infer_state(fn, inputs, dtypes)

    def _solver_for(self, z: Any) -> Any:
        if self.solver is not None:
            return self.solver
        tol = _tolerance(z, self.compute_dtype)
        return AutoFixedPoint(rtol=tol, atol=tol)


def _strong(z: Any) -> Any:
    """`z` without weak types: a stored solution has none."""
    return jtu.tree_map(lambda a: jnp.asarray(a, a.dtype), z)


def _tolerance(z: Any, compute_dtype: np.dtype | None) -> float:
    """What can be reached comfortably where rounding is that of the coarsest dtype."""
    dtypes = [real_dtype(z), *(jnp.finfo(a.dtype).dtype for a in jtu.tree_leaves(z))]
    if compute_dtype is not None:
        dtypes.append(compute_dtype)
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    return 1e-8 if eps < 1e-12 else 1e-5 if eps < 1e-6 else 1e-2


def _kept(solution: Solution[Any, Any], last: Any) -> Any:
    """What the next solve starts from: a failed one leaves the last solution."""
    ok = solution.result == RESULTS.successful

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(ok, new, old)

    return jtu.tree_map(keep, stop_gradient(solution.value), last)
