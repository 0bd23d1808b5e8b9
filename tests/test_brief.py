"""`print(layer)` is one short line: condition, solver, adjoint."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
import pytest

import eqximplicit as eqi


class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, y, args):
        return jnp.tanh(self.weight @ y)


def energy(y, args):
    return jnp.sum(y**2)


def solve(y0, args):
    return y0


LAYERS = {
    "ImplicitFunction(FixedPoint(Cell), AutoFixedPoint(), "
    "ImplicitAdjoint(AutoLinearSolver()))": eqi.ImplicitFunction(
        eqi.FixedPoint(Cell(jnp.eye(3)))
    ),
    "ImplicitFunction(Root(<lambda>), Newton(rtol=1e-08, atol=1e-06), "
    "ImplicitAdjoint(GMRES(rtol=0.001, atol=0.01)), throw=False)": eqi.ImplicitFunction(
        eqi.Root(lambda y, _: y),
        optx.Newton(rtol=1e-8, atol=1e-6),
        eqi.ImplicitAdjoint(lx.GMRES(rtol=1e-3, atol=1e-2)),
        throw=False,
    ),
    "ImplicitFunction(Minimum(energy), BFGS(rtol=0.1, atol=0.1), UnrolledAdjoint(), "
    "max_steps=9)": eqi.ImplicitFunction(
        eqi.Minimum(energy),
        optx.BFGS(rtol=0.1, atol=0.1),
        eqi.UnrolledAdjoint(),
        max_steps=9,
    ),
    "ImplicitFunction(Root(energy), solve, ImplicitAdjoint(Neumann(num_terms=2)), "
    "has_aux=True, residual_tol=0.001)": eqi.ImplicitFunction(
        eqi.Root(energy),
        solve,
        eqi.ImplicitAdjoint(eqi.Neumann(2)),
        has_aux=True,
        residual_tol=1e-3,
    ),
    "ImplicitFunction(FixedPoint(Cell), BestSoFarFixedPoint(FixedPointIteration("
    "rtol=0.1, atol=0.2)), ImplicitAdjoint(AutoLinearSolver()))": eqi.ImplicitFunction(
        eqi.FixedPoint(Cell(jnp.eye(3))),
        optx.BestSoFarFixedPoint(optx.FixedPointIteration(rtol=0.1, atol=0.2)),
    ),
}


@pytest.mark.parametrize("line", LAYERS)
def test_layer_prints_as_one_line_of_choices(line):
    assert str(LAYERS[line]) == repr(LAYERS[line]) == line


def test_pretty_printer_still_shows_the_parameters():
    layer = eqi.ImplicitFunction(eqi.FixedPoint(Cell(jnp.eye(3))))
    assert "weight=f64[3,3]" in eqx.tree_pformat(layer)


def test_traced_layer_prints_too():
    layer, lines = eqi.ImplicitFunction(eqi.FixedPoint(Cell(jnp.eye(3)))), []
    eqx.filter_jit(lambda layer: lines.append(str(layer)))(layer)
    assert lines == [str(layer)]
