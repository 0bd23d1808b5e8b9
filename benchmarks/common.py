"""What a workload of the benchmarks is, and code by hand that several of them share.

A contestant is a function `solve(theta) -> y`, differentiable in `theta`; its workload
says which derivative of it is wanted. Everyone is asked for the same tolerances. The
references are NumPy programs that share no code with any contestant.

Contestants' names: `eqximplicit` has the default solvers, `eqximplicit, named` a
plain forward solver by name and the default linear solver, and `eqximplicit, matched`
is given the algorithm of the code `by hand`. Nothing raises: every library is asked for
`throw=False`, which is what `optimistix` is fastest with, too.
"""

import operator
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx

import eqximplicit as eqi

jax.config.update("jax_enable_x64", True)

with warnings.catch_warnings():  # jaxopt announces on import that nobody maintains it
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt as jaxopt
    from jaxopt import linear_solve as jaxopt_linear  # noqa: F401

Solve = Callable[[Any], Any]
OURS, MATCHED, BY_HAND = "eqximplicit", "eqximplicit, matched", "by hand"
# As `MATCHED`, but for the linear solver, which is the default.
NAMED = "eqximplicit, named"
# As `by hand`, but for the linear system, which is left to the solver of `MATCHED`.
SAME = "rule by hand"
# A layer that differs from that in the rule alone.
OWN = "eqximplicit, loop by hand"
# All of them again, with elimination by lineax.
MATCHED_LU, SAME_LU = "eqximplicit, lx.LU", "rule by hand, lx.LU"
OWN_LU = "eqximplicit, loop by hand, lx.LU"
# The rule by hand around the solver of optimistix that `MATCHED` has.
SOLVER, SOLVER_LU = "rule by hand, optimistix", "rule by hand, optimistix, lx.LU"


class Workload(NamedTuple):
    """One problem and everyone who solves it.

    **Fields:**

    - `theta`: the parameters, a pytree of arrays.
    - `solves`: the contestants' `solve(theta)`.
    - `gradients`: the contestants' derivative of it, to be checked and timed.
    - `reference`: that derivative in float64, by NumPy; a pytree like it.
    - `rtol`: the largest relative error (2-norm) with which a contestant is timed.
    - `limit`: the ratio to the best code by hand that is aimed at, in run time.
    - `approximated`: our gradient, given a linear solver; where that is of interest.
    """

    title: str
    theta: Any
    solves: dict[str, Solve]
    gradients: dict[str, Callable[[Any], Any]]
    reference: Any
    rtol: float
    limit: float
    approximated: Callable[[Any], Callable[[Any], Any]] | None = None


def value_and_grad(loss: Callable[[Any], Any], solves: dict[str, Solve]) -> Any:
    """The value and gradient of `loss(solve(theta))` for each contestant."""
    return {
        name: jax.value_and_grad(lambda theta, solve=solve: loss(solve(theta)))
        for name, solve in solves.items()
    }


def layer_call(layer: eqi.ImplicitFunction, y0: Any) -> Solve:
    """The layer as `solve(theta)`."""
    return lambda theta: layer(y0, theta)


# --- By hand: what an expert writes for one problem -----------------------------------


def largest(x: Any) -> Any:
    return jnp.max(jnp.abs(x))


def picard(fn: Callable[[Any], Any], y0: Any, tol: Any, limit: int = 1000) -> Any:
    """Iterates `y = fn(y)` until the largest change of an entry is at most `tol`."""

    def step(carry: Any) -> Any:
        y, _, count = carry
        new = fn(y)
        change = jax.tree.reduce(
            jnp.maximum, jax.tree.map(lambda a, b: largest(a - b), new, y)
        )
        return new, change, count + 1

    def unfinished(carry: Any) -> Any:
        return (carry[1] > tol) & (carry[2] < limit)

    start = (y0, jnp.array(jnp.inf, jax.tree.leaves(y0)[0].dtype), 0)
    return jax.lax.while_loop(unfinished, step, start)[0]


def picard_adjoint(rtol: float) -> Callable[..., Any]:
    """Solves `u = ct + Jᵀ u` by iteration."""

    def solve(transposed: Callable[[Any], Any], ct: Any) -> Any:
        return picard(lambda u: ct + transposed(u), ct, rtol * largest(ct))

    return solve


def dense_adjoint(transposed: Callable[[Any], Any], ct: Any) -> Any:
    """Solves `u = ct + Jᵀ u` by LU."""
    eye = jnp.eye(ct.size, dtype=ct.dtype)
    rows = jax.vmap(transposed)(eye)
    return jnp.linalg.solve((eye - rows).T, ct)


def lineax_adjoint(solver: lx.AbstractLinearSolver[Any]) -> Callable[..., Any]:
    """Solves `u = ct + Jᵀ u` by a lineax solver."""

    def solve(transposed: Callable[[Any], Any], ct: Any) -> Any:
        mv = lambda u: jax.tree.map(operator.sub, u, transposed(u))
        system = lx.FunctionLinearOperator(mv, jax.eval_shape(lambda: ct))
        return lx.linear_solve(system, ct, solver, throw=False).value

    return solve


def by_optimistix(fn: Callable[[Any, Any], Any], y0: Any, tol: float) -> Solve:
    """The loop of optimistix instead of one by hand."""
    solver = optx.FixedPointIteration(rtol=tol, atol=tol)
    return lambda theta: optx.fixed_point(fn, solver, y0, theta, throw=False).value


def fixed_point_by_hand(
    fn: Callable[[Any, Any], Any],
    y0: Any,
    tol: float,
    adjoint: Callable[..., Any],
    loop: Solve | None = None,
) -> Solve:
    """A fixed point with a handwritten `custom_vjp`, and `loop` or a loop by hand."""

    @jax.custom_vjp
    def solve(theta: Any) -> Any:
        if loop is not None:
            return loop(theta)
        return picard(lambda y: fn(y, theta), y0, tol)

    def forward(theta: Any) -> Any:
        y = solve(theta)
        return y, (y, theta)

    def backward(residuals: Any, ct: Any) -> Any:
        _, pullback = jax.vjp(fn, *residuals)
        return (pullback(adjoint(lambda u: pullback(u)[0], ct))[1],)

    solve.defvjp(forward, backward)
    return solve


def around_loop(
    fn: Callable[[Any, Any], Any],
    y0: Any,
    tol: float,
    linear_solver: lx.AbstractLinearSolver[Any],
) -> Solve:
    """A layer around the same loop."""
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(fn),
        lambda y0, theta: picard(lambda y: fn(y, theta), y0, tol),
        eqi.ImplicitAdjoint(linear_solver),
        throw=False,
    )
    return layer_call(layer, y0)


def unrolled(fn: Callable[[Any, Any], Any], y0: Any, steps: int) -> Solve:
    """The derivative through a fixed number of steps."""

    def solve(theta: Any) -> Any:
        return jax.lax.scan(lambda y, _: (fn(y, theta), None), y0, length=steps)[0]

    return solve


def sum_of_squares(y: Any) -> Any:
    return jax.tree.reduce(operator.add, jax.tree.map(lambda a: jnp.sum(a**2), y))
