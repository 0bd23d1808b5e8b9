"""Reference system: implicit MAML, functional and object-oriented.

The data, the printed meta-gradient and the float64 truth are those of TorchOpt's
tutorial on implicit differentiation: one linear layer, 100 steps of gradient descent.
"""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
import pytest

import eqximplicit as eqi
from eqximplicit.linear_solvers import Neumann, NormalCG

REFERENCE = json.loads(
    (Path(__file__).parent / "references" / "seed004_imaml.json").read_text()
)
INPUTS, COMPUTED = REFERENCE["inputs"], REFERENCE["computed"]
X, Y = jnp.asarray(INPUTS["x"]), jnp.asarray(INPUTS["y"])
EXACT = np.array(COMPUTED["exact_ift"])
PRINTED = np.append(
    REFERENCE["printed"]["meta_grad_weight"], REFERENCE["printed"]["meta_grad_bias"]
)
DIGITS = 5e-5  # half a unit in the last printed digit
FLOAT64 = 1e-12


def linear(weight, bias, dtype=jnp.float64):
    net = eqx.nn.Linear(4, 1, key=jax.random.key(0))
    new = (jnp.asarray(weight, dtype).reshape(1, 4), jnp.asarray([bias], dtype))
    return eqx.tree_at(lambda net: (net.weight, net.bias), net, new)


META = linear(INPUTS["theta_weight"], INPUTS["theta_bias"])


def as_vector(net):
    return np.append(net.weight, net.bias)


def half_square_distance(net, other):
    pairs = zip(jtu.tree_leaves(net), jtu.tree_leaves(other), strict=True)
    return sum(jnp.sum((p - q) ** 2) for p, q in pairs) / 2


def mse(net, x, y):
    return jnp.mean((jax.vmap(net)(x) - y) ** 2)


def outer(net, x=X):
    return jnp.mean(jax.vmap(net)(x))


# --- Functional


def imaml_objective(net, meta, x, y, strength=1.0):
    return mse(net, x, y) + strength * half_square_distance(net, meta)


def sgd(net, meta, x, y, strength=1.0):
    """The tutorial's inner loop: 100 steps of plain gradient descent."""
    optimiser = optax.sgd(INPUTS["inner_lr"])

    def step(carry, _):
        net, state = carry
        grads = jax.grad(imaml_objective)(net, meta, x, y, strength)
        updates, state = optimiser.update(grads, state)
        return (eqx.apply_updates(net, updates), state), None

    start = (net, optimiser.init(net))
    return jax.lax.scan(step, start, length=INPUTS["inner_steps"])[0][0]


def inner_solver(linear_solver=None, argnums=1):
    return eqi.custom_root(
        jax.grad(imaml_objective),
        argnums=argnums,
        linear_solver=linear_solver,
        tags=lx.positive_semidefinite_tag,
    )(sgd)


def meta_gradient(solve, meta=META, data=(X, Y)):
    loss = lambda meta: outer(solve(meta, meta, *data), data[0])
    return jax.jit(jax.value_and_grad(loss))(meta)


LINEAR_SOLVERS = {
    "NormalCG(5)": (NormalCG(max_steps=5), 1e-10),
    "Neumann(100)": (Neumann(101, alpha=0.1), 1e-10),
    "CG": (lx.CG(rtol=1e-13, atol=1e-13), FLOAT64),
    "default": (None, FLOAT64),
}


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_functional_meta_gradient(name):
    linear_solver, tol = LINEAR_SOLVERS[name]
    value, got = meta_gradient(inner_solver(linear_solver))
    np.testing.assert_allclose(value, COMPUTED["outer_after_100_steps"], rtol=1e-12)
    np.testing.assert_allclose(as_vector(got), PRINTED, rtol=0, atol=DIGITS)
    np.testing.assert_allclose(as_vector(got), EXACT, rtol=0, atol=tol)


def test_neumann_series_is_that_of_the_reference_to_its_last_digit():
    _, got = meta_gradient(inner_solver(Neumann(101, alpha=0.1)))
    want = COMPUTED["neumann_100_alpha_0.1_float64"]
    np.testing.assert_allclose(as_vector(got), want, rtol=0, atol=1e-14)
    assert 4e-11 < np.linalg.norm(as_vector(got) - EXACT) < 8e-11


def test_meta_gradient_in_float32():
    meta, data = jtu.tree_map(lambda a: a.astype(jnp.float32), (META, (X, Y)))

    def inner(net, meta, x, y):
        def step(net, _):
            grads = jax.grad(imaml_objective)(net, meta, x, y)
            return jtu.tree_map(
                lambda p, g: p - jnp.float32(0.02) * g, net, grads
            ), None

        return jax.lax.scan(step, net, length=100)[0]

    solve = eqi.custom_root(
        jax.grad(imaml_objective), argnums=1, linear_solver=NormalCG(max_steps=5)
    )(inner)
    _, got = meta_gradient(solve, meta, data)
    assert got.weight.dtype == jnp.float32
    # The reference's own two solvers differ by 1e-7 in this precision.
    np.testing.assert_allclose(as_vector(got), EXACT, rtol=0, atol=4e-7)


def test_argnums_chooses_the_meta_parameters():
    """The parameters, the targets and the strength; the reference has all three."""
    strength = jnp.array(INPUTS["reg_param"])

    def gradients(argnums):
        solve = inner_solver(argnums=argnums)
        # From the exact minimum: the derivative in the strength needs it.
        phi = linear(COMPUTED["phi_star"][:4], COMPUTED["phi_star"][4])
        loss = lambda meta, y, strength: outer(solve(phi, meta, X, y, strength))
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(META, Y, strength)

    by_meta, by_y, by_strength = gradients((1, 3, 4))
    np.testing.assert_allclose(as_vector(by_meta), EXACT, rtol=0, atol=FLOAT64)
    want = COMPUTED["d_outer_d_y_at_phi_star"]
    np.testing.assert_allclose(by_y[:, 0], want, rtol=0, atol=FLOAT64)
    want = COMPUTED["d_outer_d_reg_param_at_phi_star"]
    np.testing.assert_allclose(by_strength, want, rtol=0, atol=1e-11)

    by_meta, by_y, by_strength = gradients(3)
    assert not np.any(as_vector(by_meta))
    assert by_strength == 0
    np.testing.assert_allclose(
        by_y[:, 0], COMPUTED["d_outer_d_y_at_phi_star"], rtol=0, atol=FLOAT64
    )


def test_argnums_refuses_the_initial_guess():
    with pytest.raises(ValueError, match=r"argnums=0.*Argument 0 is the initial guess"):
        inner_solver(argnums=0)(META, META, X, Y)


def test_unrolled_gradient_is_that_of_the_steps_and_another():
    """100 steps do not converge; only a quadratic problem hides that from the IFT."""
    fixed = jax.jit(jax.grad(lambda meta: outer(sgd(META, meta, X, Y))))(META)
    moving = jax.jit(jax.grad(lambda meta: outer(sgd(meta, meta, X, Y))))(META)
    for got, name in ((fixed, "init_fixed"), (moving, "init_theta")):
        want = COMPUTED[f"unrolled_100_steps_{name}"]
        np.testing.assert_allclose(as_vector(got), want, rtol=0, atol=1e-12)
        assert 1e-4 < np.max(np.abs(as_vector(got) - EXACT)) < 3e-3


# --- Object-oriented


class InnerNet(eqi.AbstractImplicitModule):
    """The tutorial's module; a copy by `tree_at` where it clones."""

    meta_net: eqx.nn.Linear
    reg_param: jax.Array
    n_inner_iter: int = eqx.field(static=True)
    adjoint = eqi.ImplicitAdjoint(linear_solver=NormalCG(max_steps=5))

    def objective(self, net, x, y):
        return mse(net, x, y) + self.reg_param * half_square_distance(
            net, self.meta_net
        )

    def solve(self, net, x, y):
        def step(net, _):
            grads = jax.grad(self.objective)(net, x, y)
            return jtu.tree_map(lambda p, g: p - 0.02 * g, net, grads), None

        return jax.lax.scan(step, net, length=self.n_inner_iter)[0]


class Model(eqx.Module):
    """What is adapted is one part of it."""

    net: eqx.nn.Linear
    scale: float = 1.0

    def __call__(self, x):
        return self.scale * self.net(x)


INNER = InnerNet(META, jnp.array(INPUTS["reg_param"]), INPUTS["inner_steps"])


def test_object_oriented_meta_gradient():
    model = Model(META)

    def loss(inner):
        adapted = eqx.tree_at(lambda m: m.net, model, inner(model.net, X, Y))
        return outer(adapted)

    value, got = eqx.filter_jit(eqx.filter_value_and_grad(loss))(INNER)
    np.testing.assert_allclose(value, COMPUTED["outer_after_100_steps"], rtol=1e-12)
    np.testing.assert_allclose(as_vector(got.meta_net), PRINTED, rtol=0, atol=DIGITS)
    np.testing.assert_allclose(as_vector(got.meta_net), EXACT, rtol=0, atol=1e-10)


def test_meta_module_may_be_trained_while_the_rest_is_frozen():
    """`filter_grad` over a partition: only the bias of the meta-module is trained."""
    spec = jtu.tree_map(lambda _: False, INNER)
    spec = eqx.tree_at(lambda m: m.meta_net.bias, spec, replace=True)
    trained, frozen = eqx.partition(INNER, spec)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(trained):
        return outer(eqx.combine(trained, frozen)(META, X, Y))

    got = gradient(trained)
    assert got.meta_net.weight is None
    np.testing.assert_allclose(got.meta_net.bias, EXACT[4:], rtol=0, atol=1e-10)


class PythonLoop(InnerNet):
    def solve(self, net, x, y):
        for _ in range(self.n_inner_iter):  # any code, and concrete numbers
            grads = jax.grad(self.objective)(net, x, y)
            net = eqx.apply_updates(net, jtu.tree_map(lambda g: -0.02 * g, grads))
            assert float(net.bias[0]) < 1
        return net


def test_python_loop_outside_of_jit():
    """Two steps are far from a minimum; the Hessian is the same everywhere."""
    inner = PythonLoop(META, jnp.array(1.0), 2)
    got = eqx.filter_grad(lambda inner: outer(inner(META, X, Y)))(inner).meta_net
    np.testing.assert_allclose(as_vector(got), EXACT, rtol=0, atol=1e-10)


def test_meta_batch_of_tasks():
    """The mean over tasks, the meta-parameters shared: `grad` of `mean` of `vmap`."""
    shifts = jnp.linspace(-1, 1, 3)
    ys = Y[None] + shifts[:, None, None]

    def losses(inner):
        return jax.vmap(lambda y: mse(inner(META, X, y), X, y))(ys)

    got = eqx.filter_jit(eqx.filter_grad(lambda i: jnp.mean(losses(i))))(INNER).meta_net
    a = np.hstack([np.asarray(X), np.ones((20, 1))])
    hessian = 2 * a.T @ a / 20
    solved = np.linalg.inv(hessian + np.eye(5))
    rate = np.linalg.matrix_power(np.eye(5) - 0.02 * (hessian + np.eye(5)), 100)
    want = []
    for y in np.asarray(ys)[..., 0]:
        star = solved @ (2 * a.T @ y / 20 + as_vector(META))
        phi = star + rate @ (as_vector(META) - star)  # 100 steps of descent
        want.append(solved @ (2 * a.T @ (a @ phi - y) / 20))
    np.testing.assert_allclose(as_vector(got), np.mean(want, 0), rtol=0, atol=1e-9)


class PerExample(InnerNet):
    def objective(self, net, x, y):
        return (jax.vmap(net)(x) - y) ** 2

    def solve(self, net, x, y):
        del x, y
        return net


class WrongShape(eqi.AbstractImplicitModule):
    meta_net: eqx.nn.Linear

    def optimality(self, net, x, y):
        return jax.grad(mse)(net, x, y).weight

    def solve(self, net, x, y):
        del x, y
        return net


def test_objective_that_is_no_scalar_is_refused():
    inner = PerExample(META, jnp.array(1.0), 0)
    message = r"objective must be a real scalar of shape \(\); got float64\[20, ?1\]"
    with pytest.raises(ValueError, match=message):
        inner(META, X, Y)


def test_optimality_that_does_not_fit_the_network_is_refused():
    with pytest.raises(ValueError, match=r"1 leaves and the state has 2.*bias"):
        WrongShape(META)(META, X, Y)
