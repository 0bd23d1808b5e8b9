"""`AbstractImplicitModule`: what is solved and how, as two methods of a module."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from problems import assert_close, ROOT

import eqximplicit as eqi

RNG = np.random.default_rng(0)
X, Y = jnp.array(RNG.normal(size=(20, 4))), jnp.array(RNG.normal(size=(20, 1)))


def fit(net, batch):
    x, y = batch
    return jnp.mean((jax.vmap(net)(x) - y) ** 2)


def squared_distance(a, b):
    pairs = zip(*(jax.tree.leaves(net) for net in (a, b)), strict=True)
    return sum(jnp.sum((p - q) ** 2) for p, q in pairs)


class Inner(eqi.AbstractImplicitModule):
    """Implicit MAML: fit a batch, close to the meta-parameters."""

    meta_net: Any

    def objective(self, net, batch):
        return fit(net, batch) + squared_distance(net, self.meta_net) / 2

    def solve(self, net0, batch):
        optimiser = optax.sgd(0.2)

        def step(carry, _):
            net, state = carry
            grads = jax.grad(self.objective)(net, batch)
            updates, state = optimiser.update(grads, state)
            return (eqx.apply_updates(net, updates), state), None

        start = (net0, optimiser.init(net0))
        return jax.lax.scan(step, start, length=200)[0][0]


class Affine(eqx.Module):
    """A network whose leaves are all arrays."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return self.weight @ x + self.bias


def test_meta_gradient_is_the_inverse_hessian_of_the_inner_problem():
    net = Affine(jnp.ones((1, 4)), jnp.zeros(1))

    @eqx.filter_jit
    @eqx.filter_grad
    def meta_gradient(module):
        adapted = module(net, (X, Y))
        return jnp.mean(jax.vmap(adapted)(X))

    gradient = meta_gradient(Inner(net)).meta_net
    design = np.hstack([np.asarray(X), np.ones((20, 1))])
    hessian = 2 * design.T @ design / 20 + np.eye(5)
    expected = np.linalg.solve(hessian, design.mean(0))
    assert_close((gradient.weight[0], gradient.bias), (expected[:4], expected[4:]))


class Optimality(eqi.AbstractImplicitModule):
    weight: jax.Array

    def optimality(self, y, theta):
        return ROOT.fn(y, (self.weight, theta))

    def solve(self, y0, theta):
        return ROOT.solve(y0, (self.weight, theta))


class FixedPointMap(eqi.AbstractImplicitModule):
    weight: jax.Array

    def fixed_point_map(self, y, theta):
        return y - 0.1 * ROOT.fn(y, (self.weight, theta))

    def solve(self, y0, theta):
        return ROOT.solve(y0, (self.weight, theta))


@pytest.mark.parametrize("kind", [Optimality, FixedPointMap])
def test_gradient_flows_to_the_module_and_to_the_arguments(kind):
    weight, theta = ROOT.args

    def loss(both):
        module, theta = both
        return jnp.sum(module(ROOT.y0, theta))

    by_module, by_theta = eqx.filter_grad(loss)((kind(weight), theta))
    expected = [leaf.sum(0) for leaf in ROOT.jacobian(ROOT.args)]
    assert_close((by_module.weight, by_theta), expected)


class WithAux(eqi.AbstractImplicitModule):
    b: jax.Array
    has_aux = True
    adjoint = eqi.ImplicitAdjoint(linear_solver=lx.LU())

    def optimality(self, y):
        return y**3 + y - self.b

    def solve(self, y0):
        return 0 * y0 + 1.0, {"steps": 4}


def test_module_returns_the_auxiliary_output_of_its_solver():
    (value, aux), gradient = eqx.filter_value_and_grad(
        lambda module: module(jnp.array(0.5)), has_aux=True
    )(WithAux(jnp.array(2.0)))
    assert value == 1
    assert aux == {"steps": 4}
    assert_close(gradient.b, 0.25)


def test_module_that_defines_two_conditions_is_refused():
    class Both(eqi.AbstractImplicitModule):
        def objective(self, y):
            return y**2

        def optimality(self, y):
            return y

        def solve(self, y0):
            return y0

    with pytest.raises(
        TypeError, match=r"`Both` .*exactly one of.*defines `objective` and"
    ):
        Both()


def test_module_that_defines_no_condition_is_refused():
    class Neither(eqi.AbstractImplicitModule):
        def solve(self, y0):
            return y0

    with pytest.raises(TypeError, match="`Neither` .*exactly one of.*none of them"):
        Neither()


def test_module_without_a_solver_is_abstract():
    class Unsolved(eqi.AbstractImplicitModule):
        def objective(self, y):
            return y**2

    with pytest.raises(TypeError, match="abstract"):
        Unsolved()


class Shrunk(eqi.AbstractImplicitModule):
    weight: jax.Array
    adjoint: eqi.AbstractAdjoint = eqi.ImplicitAdjoint(eqi.DirectLU())

    def objective(self, y, x):
        return jnp.sum((y - x) ** 2) / 2 + self.weight * jnp.sum(y**2) / 2

    def solve(self, y0, x):
        del y0
        return x / (1 + self.weight)


def test_adjoint_may_be_a_field_after_the_others():
    x = jnp.ones(2)
    for given in ((), (eqi.ImplicitAdjoint(eqi.Neumann(1)),)):
        slope = jax.grad(lambda w, given=given: jnp.sum(Shrunk(w, *given)(x, x)))(2.0)
        # y = x / (1 + w); one Neumann term takes the inverse of 1 + w for one.
        expected = -2 / 9 if not given else -2 / 3
        np.testing.assert_allclose(slope, expected, rtol=1e-6)
