"""Problems whose solution and Jacobian are known in closed form.

All of them have the solution `y = arcsinh(G B θ)` for a constant matrix `G`, with the
arguments `(B, θ)`: three unknowns, eight parameters, nonlinear in `y`. Where the
condition allows it `∂F/∂y` is not symmetric, so that a missing transpose is seen.
The solver is a Python loop over NumPy arrays: JAX can neither trace nor
differentiate it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx

import eqximplicit as eqi

# Condition numbers are below 10 and nothing iterates: rounding is all that is left.
EXACT = 1e-9
# Both sides are the same bilinear form, summed in two orders.
TRANSPOSE = 1e-10

A = np.array([[2.0, 1.0, 0.0], [0.3, 2.0, -1.0], [0.5, 0.0, 3.0]])
C = np.array([[0.3, -0.4, 0.0], [0.2, 0.1, 0.5], [0.0, 0.3, -0.2]])
W = np.array([[2.0, 0.5, 0.1], [0.5, 1.5, -0.3], [0.1, -0.3, 1.0]])
K = np.array(
    [[1.0, 0.2, 0], [0, 2.0, 0.3], [0.4, 0, 1.5], [1, -1, 0.5], [0.2, 0.3, 0.1]]
)
E = np.array(
    [[0.5, 0, 1], [0.2, 1, 0], [0, 0.3, 0.7], [1.1, 0, -0.4], [0.6, -0.2, 0.3]]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A condition, an undifferentiable solver, and the truth."""

    name: str
    condition: Callable[..., eqi.AbstractCondition[Any, Any]]
    fn: Callable[[Any, Any], Any]
    gain: np.ndarray
    y0: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))

    def __str__(self) -> str:
        return self.name

    @property
    def args(self) -> tuple[jax.Array, jax.Array]:
        weight = [[0.9, -0.3], [0.2, 1.1], [-0.5, 0.4]]
        return jnp.array(weight), jnp.array([0.7, -0.4])

    def solution(self, args: Any) -> jax.Array:
        weight, theta = args
        return jnp.arcsinh(self.gain @ (weight @ theta))

    def jacobian(self, args: Any) -> tuple[np.ndarray, np.ndarray]:
        """Shapes (3, 3, 2) and (3, 2): rows are unknowns."""
        weight, theta = (np.asarray(arg) for arg in args)
        slope = 1 / np.sqrt(1 + (self.gain @ weight @ theta) ** 2)
        by_weight = np.einsum("i,ij,k->ijk", slope, self.gain, theta)
        return by_weight, slope[:, None] * (self.gain @ weight)

    def solve(self, y0: Any, args: Any) -> np.ndarray:
        """Newton's method on `sinh(y) = G B θ`, as a Python loop."""
        weight, theta = (np.asarray(arg) for arg in args)
        target = self.gain @ weight @ theta
        y = np.array(y0, dtype=float)
        for _ in range(100):
            step = (np.sinh(y) - target) / np.cosh(y)
            y = y - step
            if float(np.max(np.abs(step))) < 1e-15:
                break
        return y


def _root(y, args):
    weight, theta = args
    return A.astype(y.dtype) @ jnp.sinh(y) - weight @ theta


def _fixed_point(y, args):
    weight, theta = args
    return jnp.arcsinh(C.astype(y.dtype) @ jnp.sinh(y) + weight @ theta)


def _objective(y, args):
    weight, theta = args
    v = jnp.sinh(y)
    return v @ (W.astype(y.dtype) @ v) / 2 - v @ (weight @ theta)


def _residuals(y, args):
    weight, theta = args
    k, e = K.astype(y.dtype), E.astype(y.dtype)
    return k @ jnp.sinh(y) - e @ (weight @ theta)


ROOT = Problem("root", eqi.Root, _root, np.linalg.inv(A))
FIXED_POINT = Problem(
    "fixed point", eqi.FixedPoint, _fixed_point, np.linalg.inv(np.eye(3) - C)
)
MINIMUM = Problem("minimum", eqi.Minimum, _objective, np.linalg.inv(W))
LEAST_SQUARES = Problem(
    "least squares", eqi.LeastSquares, _residuals, np.linalg.pinv(K) @ E
)
PROBLEMS = [ROOT, FIXED_POINT, MINIMUM, LEAST_SQUARES]

# Tolerances below `EXACT` by the condition number.
_TIGHT = {"rtol": 1e-12, "atol": 1e-12}
GENERAL_SOLVERS = {
    "default": None,
    "LU": lx.LU(),
    "QR": lx.QR(),
    "SVD": lx.SVD(),
    "AutoLinearSolver": lx.AutoLinearSolver(well_posed=None),
    "GMRES": lx.GMRES(**_TIGHT),
    "BiCGStab": lx.BiCGStab(**_TIGHT),
    "Normal(CG)": lx.Normal(lx.CG(**_TIGHT)),
    "Normal(Cholesky)": lx.Normal(lx.Cholesky()),
    "LSMR": lx.LSMR(**_TIGHT),
}
# These need a symmetric positive definite ∂F/∂y, as `MINIMUM` has.
DEFINITE_SOLVERS = {"Cholesky": lx.Cholesky(), "CG": lx.CG(**_TIGHT)}


def assert_close(got: Any, expected: Any, tol: float = EXACT) -> None:
    """Same number of leaves, and each within `tol` relative and absolute."""
    got_leaves, expected_leaves = jtu.tree_leaves(got), jtu.tree_leaves(expected)
    assert len(got_leaves) == len(expected_leaves)
    for a, b in zip(got_leaves, expected_leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def dot(a: Any, b: Any) -> Any:
    """The sum of products over all leaves."""
    pairs = zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)
    return sum(jnp.vdot(x, y) for x, y in pairs)


class Para(eqx.Module):
    """The parameters of two equations with the solution (2, 3) at (10, 3)."""

    alpha: Any
    beta: Any


class Var(eqx.Module):
    value: Any


class Cell(eqx.Module):
    """`x₁ = √(α - x₁ x₂)`, `x₂ = √((57 - x₂) / (β x₁'))`."""

    para: Para

    def __call__(self, x: Any, args: Any = None) -> Any:
        del args
        first = jnp.sqrt(self.para.alpha - x[0].value * x[1].value)
        second = jnp.sqrt((57 - x[1].value) / (self.para.beta * first))
        return Var(first), Var(second)


CELL_GUESS = (Var(jnp.array(1.5)), Var(jnp.array(3.5)))
# Exact rationals, from Cramer's rule at the solution.
CELL_JACOBIAN = (
    Var(Para(37 / 205, 36 / 205)),
    Var(Para(-27 / 205, -126 / 205)),
)


def _para_of(cell: Cell) -> Para:
    return cell.para


def cell_layer(alpha: Any = 10.0, beta: Any = 3.0, **kwargs: Any) -> Any:
    para = Para(jnp.array(alpha, float), jnp.array(beta, float))
    return eqi.ImplicitFunction(
        eqi.FixedPoint(Cell(para)),
        optx.Newton(rtol=1e-10, atol=1e-10),
        where=_para_of,
        **kwargs,
    )
