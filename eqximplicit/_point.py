"""A layer at one solution, taken apart for diagnosis: its inputs and its Jacobian."""

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
from jax.core import Tracer
from jaxtyping import Array, Key, UInt32

from ._adjoint import ImplicitAdjoint
from ._condition import AbstractCondition
from ._custom_types import PyTree
from ._function import ImplicitFunction
from ._module import AbstractImplicitModule
from ._solution import Solution
from ._state import (
    as_arrays,
    describe,
    from_real,
    leaf_name,
    real_dtype,
    struct_of,
    to_real,
)
from .solvers import AbstractHostSolver

# A matrix of this size is 2 MiB in float64, and its singular values take 0.1 s.
SMALL = 512
AnyLayer = ImplicitFunction[Any, Any, Any, Any] | AbstractImplicitModule
Seed = Key[Array, ""] | UInt32[Array, "2"] | None


class Theta(eqx.Module):
    """Everything that a layer's solution is a function of, the guess apart."""

    fn: Any
    args: Any


class Subject(eqx.Module):
    """A layer as a function of `theta`, with a failed solve reported, not thrown."""

    theta: Theta
    y0: Any
    at: Callable[[Theta], tuple[ImplicitFunction[Any, Any, Any, Any], Any]] = eqx.field(
        static=True
    )

    def solve(self, theta: Theta, y0: Any = None) -> Solution[Any, Any]:
        """The solution for other values of `theta`."""
        layer, args = self.at(theta)
        return layer.solve(self.y0 if y0 is None else y0, args)

    @property
    def layer(self) -> ImplicitFunction[Any, Any, Any, Any]:
        """The layer at its own values."""
        return self.at(self.theta)[0]


def is_iterative(layer: ImplicitFunction[Any, Any, Any, Any]) -> bool:
    """Whether the layer's steps are driven by us, so that they can be unrolled."""
    return isinstance(layer.solver, optx.AbstractIterativeSolver)


def knows_condition(layer: ImplicitFunction[Any, Any, Any, Any]) -> bool:
    """Whether the solver is told the condition, and so sees the parameters in it."""
    return is_iterative(layer) or isinstance(layer.solver, AbstractHostSolver)


def _as_array(leaf: Any) -> Any:
    number = isinstance(leaf, (float, complex, np.ndarray, np.generic))
    if number and np.issubdtype(np.asarray(leaf).dtype, np.inexact):
        return jnp.asarray(leaf)
    return leaf


class _Inputs(eqx.Module):
    theta: Theta
    y0: Any


def _refuse_tracers(name: str, inputs: _Inputs) -> None:
    for path, leaf in jtu.tree_leaves_with_path(inputs):
        if isinstance(leaf, Tracer):
            where = leaf_name("", path).removeprefix(".theta").lstrip(".")
            raise ValueError(
                f"`{name}` needs values, but `{where}` is "
                f"traced ({describe(leaf)}). Call it outside of `jit`, `grad` and "
                "`vmap`, on one representative input."
            )


def subject(name: str, layer: AnyLayer, y0: Any, args: Any) -> Subject:
    """What is to be examined, for a layer of either kind.

    **Raises:** `TypeError` for anything but a layer; `ValueError` inside a trace.
    """
    if isinstance(layer, AbstractImplicitModule):
        found = _of_module(layer, y0, args)
    elif isinstance(layer, ImplicitFunction):  # pyright: ignore[reportUnnecessaryIsInstance]
        found = _of_function(layer, y0, args)
    else:
        raise TypeError(
            f"`{name}` examines an `ImplicitFunction` or an `AbstractImplicitModule`; "
            f"got {describe(layer)}. Build a layer from your condition and solver: of "
            "a `nn.DEQ`, `ImplicitFunction(FixedPoint(deq.cell), deq.solver, "
            "deq.adjoint)`, with `z0` and `x` for `y0` and `args`."
        )
    _refuse_tracers(name, _Inputs(found.theta, found.y0))
    return found


def _of_function(
    layer: ImplicitFunction[Any, Any, Any, Any], y0: Any, args: Any
) -> Subject:
    quiet = dataclasses.replace(layer, throw=False)
    guess = as_arrays(jtu.tree_map(_as_array, layer.y0 if y0 is None else y0))
    args = as_arrays(jtu.tree_map(_as_array, args))
    if not knows_condition(layer):
        # The solver is told `args` alone: moving `fn` would not move its solution.
        return Subject(Theta(None, args), guess, lambda theta: (quiet, theta.args))
    # The aux of a layer that drives the solver is that of its function.
    condition = layer.condition
    if layer.has_aux and not condition.has_aux:
        condition = dataclasses.replace(condition, has_aux=True)

    def at(theta: Theta) -> tuple[ImplicitFunction[Any, Any, Any, Any], Any]:
        moved = dataclasses.replace(condition, fn=theta.fn)
        return dataclasses.replace(quiet, condition=moved), theta.args

    return Subject(Theta(layer.condition.fn, args), guess, at)


def _of_module(module: AbstractImplicitModule, y0: Any, args: Any) -> Subject:
    packed = args if isinstance(args, tuple) else () if args is None else (args,)

    def at(theta: Theta) -> tuple[ImplicitFunction[Any, Any, Any, Any], Any]:
        moved: AbstractImplicitModule = theta.fn
        layer: ImplicitFunction[Any, Any, Any, Any] = ImplicitFunction(
            moved.condition,
            lambda y0, args: moved.solve(y0, *args),
            moved.adjoint,
            throw=False,
            has_aux=moved.has_aux,
        )
        return layer, theta.args

    packed = as_arrays(jtu.tree_map(_as_array, packed))
    return Subject(Theta(module, packed), as_arrays(y0), at)


class Point(eqx.Module):
    """A solution, and the linear system `∂F/∂y` of its derivative in its real form."""

    subject: Subject
    solution: Solution[Any, Any]
    condition: AbstractCondition[Any, Any]
    args: Any
    operator: lx.FunctionLinearOperator

    @property
    def y(self) -> PyTree[Array]:
        """The solution."""
        return self.solution.value

    @property
    def untagged(self) -> lx.FunctionLinearOperator:
        """The operator as it is: lineax reads off a tagged one what its tags leave."""
        return lx.FunctionLinearOperator(self.operator.mv, self.operator.in_structure())

    @property
    def size(self) -> int:
        """The number of real unknowns."""
        return self.operator.in_size()

    @property
    def eps(self) -> float:
        """Machine epsilon of the coarsest dtype of the state."""
        return max(float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(self.y))

    def residual(self, y: PyTree[Array]) -> PyTree[Array]:
        """The residual of the condition at another state."""
        return self.condition.residual(y, self.args, self._aux)

    def jacobian(self, y: PyTree[Array]) -> lx.FunctionLinearOperator:
        """`∂F/∂y` at another state, in its real form."""
        return _jacobian(self.condition, y, self.args, self._aux)

    @property
    def _aux(self) -> Any:
        return self.solution.aux if self.condition.takes_aux else None

    def residual_of(self, given: Any) -> PyTree[Array]:
        """The residual of `given.condition` at `given.y` and `given.args`."""
        return given.condition.residual(given.y, given.args, self._aux)


def examine(found: Subject) -> Point:
    """The solution of a subject, with its Jacobian as an operator."""
    layer, args = found.at(found.theta)
    solution, condition = found.solve(found.theta), layer.condition
    aux = solution.aux if condition.takes_aux else None
    operator = _jacobian(condition, solution.value, args, aux)
    return Point(found, solution, condition, args, operator)


def _jacobian(
    condition: AbstractCondition[Any, Any], y: PyTree[Array], args: Any, aux: Any
) -> lx.FunctionLinearOperator:
    dtype = real_dtype(y)

    def real_residual(real_y: PyTree[Array]) -> PyTree[Array]:
        return to_real(condition.residual(from_real(real_y, y), args, aux), dtype)

    real_y = to_real(y, dtype)
    _, mv = jax.linearize(real_residual, real_y)
    return lx.FunctionLinearOperator(mv, struct_of(real_y), condition.tags)


def implicit_adjoint(
    layer: ImplicitFunction[Any, Any, Any, Any],
) -> ImplicitAdjoint | None:
    """The adjoint of a layer, if it is the implicit one."""
    return layer.adjoint if isinstance(layer.adjoint, ImplicitAdjoint) else None


def flat(tree: PyTree[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    """All numbers of a pytree as one real NumPy vector, complex ones as pairs."""
    dtype = np.dtype(np.float64)
    parts = [np.zeros(0, dtype)]
    for leaf in jtu.tree_leaves(tree):
        x: np.ndarray[Any, np.dtype[Any]] = np.asarray(leaf)
        if np.iscomplexobj(x):
            parts += [
                np.real(x).ravel().astype(dtype),
                np.imag(x).ravel().astype(dtype),
            ]
        else:
            parts.append(x.ravel().astype(dtype))
    return np.concatenate(parts)


def unflat(vector: np.ndarray[Any, np.dtype[Any]], like: PyTree[Any]) -> PyTree[Array]:
    """The pytree like `like` (arrays or structs) whose `flat` is `vector`."""
    leaves, treedef = jtu.tree_flatten(like)
    parts, start = list[Array](), 0
    for leaf in leaves:
        values = vector[start : start + leaf.size]
        start += leaf.size
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            values = values + 1j * vector[start : start + leaf.size]
            start += leaf.size
        parts.append(jnp.asarray(values.reshape(leaf.shape), leaf.dtype))
    return jtu.tree_unflatten(treedef, parts)


def shares(vector: np.ndarray[Any, np.dtype[Any]], y: PyTree[Array]) -> str:
    """How much of the squared length of a flat real vector lies in each leaf of `y`."""
    total, start, parts = float(vector @ vector) or 1.0, 0, list[tuple[float, str]]()
    for path, leaf in jtu.tree_leaves_with_path(y):
        stop = start + leaf.size * (2 if jnp.iscomplexobj(leaf) else 1)
        part = vector[start:stop]
        parts.append((float(part @ part) / total, leaf_name("y", path)))
        start = stop
    largest = sorted(parts, reverse=True)[:4]
    return ", ".join(f"{share:.0%} in `{name}`" for share, name in largest)
