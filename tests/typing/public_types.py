"""The types that an editor shows: pyright reads this file, nothing runs it.

For a user who lets nothing be unknown, which the package itself cannot.
"""

# pyright: reportUnknownArgumentType=true, reportUnknownVariableType=true

from typing import Any, assert_type

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
