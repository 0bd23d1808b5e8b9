"""The types that an editor shows: pyright reads this file, nothing runs it.

For a user who lets nothing be unknown, which the package itself cannot.
"""

# pyright: reportUnknownArgumentType=true, reportUnknownVariableType=true

from typing import Any, assert_type, Protocol

import equinox as eqx
import optimistix as optx
from jaxtyping import Array

import eqximplicit as eqi


class Var(eqx.Module):
    value: Array


State = tuple[Var, Var]


def cell(y: State, args: float) -> State:
    return y if args > 0 else (y[1], y[0])


def energy(y: State, args: float) -> Array:
    return args * y[0].value


def a_layer_returns_the_users_state(y0: State) -> None:
    layer = eqi.ImplicitFunction(eqi.FixedPoint(cell))
    assert_type(layer(y0, 1.0), State)
    assert_type(layer.solve(y0, 1.0).value, State)


def nothing_of_a_layer_is_unknown(y0: State) -> None:
    layer = eqi.ImplicitFunction(eqi.FixedPoint(cell))
    assert_type(layer, eqi.ImplicitFunction[State, float, Any, Any])
    solution = layer.solve(y0, 1.0)
    aux = solution.aux
    assert_type(solution, eqi.Solution[State, Any])
    assert_type(aux, Any)


class Cell(eqx.Module):
    weight: Var

    def __call__(self, y: State, args: float) -> State:
        return y


def weight_of(fn: Cell) -> Var:
    return fn.weight


def parameters_have_the_type_that_an_annotated_where_returns(cell: Cell) -> None:
    layer = eqi.ImplicitFunction(eqi.FixedPoint(cell), where=weight_of)
    assert_type(layer, eqi.ImplicitFunction[State, float, Any, Var])
    assert_type(layer.params, Var)
    assert_type(layer.with_params(cell.weight).params, Var)


def parameters_are_otherwise_any(cell: Cell, y0: State) -> None:
    # A condition is typed by its state and its args, and forgets what else `fn` is. So
    # without `where` (all of `fn`), and where a lambda is given any function, nothing
    # tells the type.
    whole = eqi.ImplicitFunction(eqi.FixedPoint(cell))
    picked = eqi.ImplicitFunction(eqi.FixedPoint(cell), where=lambda fn: fn.weight)
    assert_type(whole.params, Any)
    assert_type(picked.params, Any)
    assert_type(picked(y0, 1.0), State)


@eqi.custom_root(cell)
def root_solver(y0: State, args: float, *, tol: float = 1e-3) -> State:
    return y0 if args > tol else (y0[1], y0[0])


@eqi.custom_fixed_point(cell, has_aux=True)
def solver_with_aux(y0: State, args: float) -> tuple[State, int]:
    return y0, int(args)


class RootSolver(Protocol):
    """The signature of `root_solver`, as it was before it was decorated."""

    def __call__(self, y0: State, args: float, *, tol: float = 1e-3) -> State: ...


def a_decorated_solver_keeps_its_signature(y0: State) -> None:
    same: RootSolver = root_solver
    assert_type(same(y0, 1.0, tol=1e-6), State)
    assert_type(root_solver(y0, args=1.0), State)
    assert_type(solver_with_aux(y0, 1.0), tuple[State, int])
    root_solver(y0, "one")  # pyright: ignore[reportArgumentType]


def one_liners_return_the_users_state(y0: State) -> None:
    assert_type(eqi.root_find(cell, y0, 1.0).value, State)
    assert_type(eqi.fixed_point(cell, y0, 1.0).value, State)
    assert_type(eqi.minimise(energy, y0, 1.0).value, State)
    assert_type(eqi.least_squares(cell, y0, 1.0).value, State)
    assert_type(eqi.root_find(cell, y0, 1.0), eqi.Solution[State, Any])


def the_primitive_keeps_the_type(y: State, ct_y: State) -> None:
    assert_type(eqi.implicit_solution(eqi.Root(cell), y, 1.0), State)
    assert_type(eqi.root_vjp(cell, y, 1.0, ct_y), float)


def the_adjoint_is_optimistixs(fn: Any, solver: Any, y0: State) -> None:
    optx.root_find(fn, solver, y0, adjoint=eqi.ImplicitAdjoint())


class Inner(eqi.AbstractImplicitModule):
    net: Var

    def objective(self, y: State, batch: Array) -> Array:
        return batch * y[0].value * self.net.value

    def solve(self, y0: State, batch: Array) -> State:
        return y0


def a_module_has_the_users_own_signature(net: Var, y0: State, batch: Array) -> None:
    assert_type(Inner(net).solve(y0, batch), State)
