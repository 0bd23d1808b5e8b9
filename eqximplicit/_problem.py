r"""Which function a solver of each kind iterates, for each condition.

| solver \ condition   | `Root`       | `FixedPoint`      | `Minimum` | `LeastSquares` |
|----------------------|--------------|-------------------|-----------|----------------|
| fixed-point solver   | refused      | `fn`              | refused   | refused        |
| root finder          | `fn`         | `y - fn`          | refused   | refused        |
| least-squares solver | `fn`         | `y - fn`          | refused   | `fn`           |
| minimiser            | `½ ‖fn‖²`    | `½ ‖y - fn‖²`     | `fn`      | `½ ‖fn‖²`      |

A root finder on the gradient of an objective would take a saddle for a minimum, so it
is refused by name. A least-squares solver or a minimiser that stands in for a root
finder stops only where the residual is below its `atol`.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array

from ._condition import (
    AbstractCondition,
    FixedPoint,
    half_sum_of_squares,
    LeastSquares,
    Minimum,
    Root,
)
from ._cost import num_operations
from ._custom_types import PyTree, ShapeDtypeStruct
from ._hoist import jaxpr, out_struct
from ._state import from_real, real_dtype, retree, struct_of, to_real

Solver = optx.AbstractIterativeSolver[Any, Any, Any, Any]


class _Evaluated(eqx.Module):
    """A condition's function and its output `raw` at one point."""

    condition: AbstractCondition[Any, Any]
    y: PyTree[Array]
    args: Any
    raw: Any


class IteratedFn(eqx.Module):
    """The function `(y, args) -> (out, (residual, aux))` that a solver iterates.

    `y` is in the real form of the state; `residual` is `None` unless the solver must
    also be held to a small one. `aux` has the arrays of the function's own only, and
    `whole_aux` adds the rest. `tags` are those of what the solver takes for its
    operator.
    """

    condition: AbstractCondition[Any, Any]
    output: Callable[[_Evaluated], PyTree[Array]]
    like: PyTree[ShapeDtypeStruct]
    must_vanish: bool = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)

    def __call__(self, real_y: PyTree[Array], args: Any) -> tuple[Any, tuple[Any, Any]]:
        raw_and_aux = self.condition.call(from_real(real_y, self.like), args)
        return self._finish(real_y, args, raw_and_aux)

    def out_struct(self, real_y: PyTree[Array], args: Any) -> Any:
        """Shapes and dtypes of the output, without another look at the function."""
        raw_and_aux = out_struct(self.condition)
        return eqx.filter_eval_shape(self._finish, real_y, args, raw_and_aux)

    def _finish(
        self, real_y: PyTree[Array], args: Any, raw_and_aux: tuple[Any, Any]
    ) -> tuple[Any, tuple[Any, Any]]:
        y, (raw, aux) = from_real(real_y, self.like), raw_and_aux
        evaluated = _Evaluated(self.condition, y, args, raw)
        residual = _residual(evaluated) if self.must_vanish else None
        out = to_real(self.output(evaluated), real_dtype(self.like))
        return out, (residual, eqx.filter(aux, eqx.is_array))

    @property
    def num_operations(self) -> float:
        """About how many additions a call costs."""
        return num_operations(jaxpr(self.condition))

    def whole_aux(self, arrays: Any) -> Any:
        """The auxiliary output of the function, of which `arrays` are the arrays."""
        return eqx.combine(arrays, eqx.filter(out_struct(self.condition)[1], _is_rest))


def _is_rest(leaf: Any) -> bool:
    return not isinstance(leaf, jax.ShapeDtypeStruct)


def _residual(evaluated: _Evaluated) -> PyTree[Array]:
    condition, y, raw = evaluated.condition, evaluated.y, evaluated.raw
    if isinstance(condition, FixedPoint):
        return jtu.tree_map(lambda a, b: a - b, y, raw)
    if isinstance(condition, Root):
        return retree(raw, y)
    if isinstance(condition, LeastSquares):
        return raw
    return condition.residual(y, evaluated.args)


def _objective(evaluated: _Evaluated) -> Array:
    return half_sum_of_squares(_residual(evaluated))


def _raw(evaluated: _Evaluated) -> PyTree[Array]:
    return evaluated.raw


def _refusal(solver: Solver, condition: AbstractCondition[Any, Any]) -> TypeError:
    name, kind = type(solver).__name__, type(condition).__name__
    if isinstance(solver, optx.AbstractFixedPointSolver):
        remedy = "Use a root finder or a minimiser, or state a `FixedPoint`."
    elif isinstance(solver, optx.AbstractRootFinder):
        remedy = (
            "Use a minimiser or a least-squares solver: a root finder on the gradient "
            "takes a saddle for a minimum. `Root(jax.grad(fn))` does so on purpose."
        )
    else:
        remedy = "Use a minimiser, or state `LeastSquares`."
    return TypeError(f"The solver `{name}` cannot solve a `{kind}`. {remedy}")


def _is_square(condition: AbstractCondition[Any, Any]) -> bool:
    return not isinstance(condition, (Minimum, LeastSquares))


def _output(
    solver: Solver, condition: AbstractCondition[Any, Any]
) -> Callable[[_Evaluated], PyTree[Array]] | None:
    """What the solver iterates, from one evaluation of `fn`; `None` if refused."""
    square, minimum = _is_square(condition), isinstance(condition, Minimum)
    if isinstance(solver, optx.AbstractFixedPointSolver):
        return _raw if isinstance(condition, FixedPoint) else None
    if isinstance(solver, optx.AbstractRootFinder):
        return _residual if square else None
    if isinstance(solver, optx.AbstractLeastSquaresSolver):
        return None if minimum else _residual
    if isinstance(solver, optx.AbstractMinimiser):
        return _raw if minimum else _objective
    return None


def _tags(solver: Solver, condition: AbstractCondition[Any, Any]) -> frozenset[object]:
    """Those of the Jacobian of the residual, where that is the solver's operator."""
    own_hessian = isinstance(solver, optx.AbstractMinimiser) == isinstance(
        condition, Minimum
    )
    same = own_hessian and not isinstance(condition, LeastSquares)
    return condition.tags if same else frozenset()


def iterated_fn(
    solver: Solver, condition: AbstractCondition[Any, Any], y: PyTree[Array]
) -> IteratedFn:
    """The function that `solver` iterates to solve `condition`, from a state like `y`.

    **Raises:** `TypeError` naming both, for a pair that the table above refuses.
    """
    output = _output(solver, condition)
    if output is None:
        raise _refusal(solver, condition)
    stands_in = isinstance(
        solver, (optx.AbstractLeastSquaresSolver, optx.AbstractMinimiser)
    )
    must_vanish = stands_in and _is_square(condition)
    tags = _tags(solver, condition)
    return IteratedFn(condition, output, struct_of(y), must_vanish, tags)
