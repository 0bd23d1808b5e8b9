# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Implicit MAML, functional and object-oriented
#
# Meta-learning wants parameters $\theta$ from which a network learns a task quickly. In
# implicit MAML (Rajeswaran, Finn, Kakade & Levine, *Meta-learning with implicit
# gradients*, NeurIPS 2019) the adapted parameters solve
#
# $$\phi^\star(\theta) = \arg\min_\phi\;
# G(\phi, \theta) = L(\phi, D_\mathrm{train}) + \tfrac\lambda2\|\phi - \theta\|^2,$$
#
# and the meta-gradient is $\nabla_\theta$ of a loss at $\phi^\star(\theta)$. It does
# not matter how $\phi^\star$ was found: its derivative follows from
# $\nabla_\phi G(\phi^\star, \theta) = 0$. Here 100 steps of gradient descent find it.
#
# Data and numbers are those of TorchOpt's tutorial on implicit differentiation. All
# quantities are dimensionless.

# %%
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import matplotlib.pyplot as plt
import numpy as np
import optax
from jaxtyping import Array, Float

import eqximplicit as eqi
from eqximplicit.linear_solvers import Neumann, NormalCG

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## Data and network
#
# Twenty points with four features, as the tutorial draws them (`torch.manual_seed(0)`),
# and a linear layer whose weights are one and whose bias is zero.

# %%
# fmt: off
DATA = jnp.array([  # four features and the target
    [-1.1258398, -1.1523602, -0.25057858, -0.4338788, -0.0056904554],
    [0.84871036, 0.69200915, -0.31601277, -2.1152194, 1.4089794],
    [0.32227492, -1.2633348, 0.3499832, 0.30813393, -1.7601492],
    [0.11984151, 1.2376579, 1.1167772, -0.24727815, -0.7377053],
    [-1.3526537, -1.6959312, 0.5666506, 0.79350835, -2.3618822],
    [0.59883946, -1.5550951, -0.3413604, 1.8530061, -4.4703636],
    [0.7501895, -0.58549756, -0.17339675, 0.18347794, -1.4905391],
    [1.3893661, 1.5863342, 0.94629836, -0.84367675, 0.05971893],
    [-0.6135831, 0.03159274, -0.49267697, 0.24841475, -0.7968812],
    [0.43969584, 0.112411186, 0.64079237, 0.44115627, -1.3076502],
    [-0.10230965, 0.792444, -0.2896677, 0.052507486, -1.3626974],
    [0.52286047, 2.3022053, -1.4688939, -1.5866888, 0.98757935],
    [-0.6730899, 0.8728312, 1.0553575, 0.17784372, -1.2918404],
    [-0.23033547, -0.3917544, 0.5432947, -0.39515755, -1.0667306],
    [-0.44621718, 0.7440207, 1.5209795, 3.4105027, -3.0256445],
    [-1.5311843, -1.234135, 1.8197253, -0.5515287, -1.0928847],
    [-0.5692481, 0.9199714, 1.1108161, 1.2898741, -1.9265202],
    [-1.478174, 2.5672328, -0.4731198, 0.33555076, -0.010073185],
    [-1.629326, -0.54974365, -0.47983426, -0.49968153, -0.25885507],
    [-1.0669804, 1.1149396, -0.14067143, 0.8057536, -0.76637244],
], jnp.float32).astype(jnp.float64)  # drawn in float32
# fmt: on
x, y = DATA[:, :4], DATA[:, 4:]

net = eqx.nn.Linear(4, 1, key=jax.random.key(0))
net = eqx.tree_at(
    lambda net: (net.weight, net.bias), net, (jnp.ones((1, 4)), jnp.zeros(1))
)


def mse(net, x, y):
    return jnp.mean((jax.vmap(net)(x) - y) ** 2)


def half_square_distance(net, other):
    pairs = zip(jtu.tree_leaves(net), jtu.tree_leaves(other), strict=True)
    return sum(jnp.sum((p - q) ** 2) for p, q in pairs) / 2


def outer_loss(net):
    return jnp.mean(jax.vmap(net)(x))


# %% [markdown]
# ## 1. Functional
#
# Write the inner objective, and a solver as you would without any thought of
# derivatives: the network is a pytree, so any optax optimiser will do. `custom_root`
# gives the solver the derivative of a root of its first argument, the gradient of the
# objective.
#
# `argnums=1` makes the argument `meta` the meta-parameter; data have no derivative.
# `argnums=(1, 2)` would add the inputs, and `None` is for all.


# %%
def imaml_objective(net, meta, x, y):
    return mse(net, x, y) + half_square_distance(net, meta)


def descend(net, meta, x, y, steps=100):
    optimiser = optax.sgd(2e-2)

    def step(carry, _):
        net, state = carry
        grads = jax.grad(imaml_objective)(net, meta, x, y)
        updates, state = optimiser.update(grads, state)
        return (eqx.apply_updates(net, updates), state), None

    (net, _), _ = jax.lax.scan(step, (net, optimiser.init(net)), length=steps)
    return net


@eqi.custom_root(
    jax.grad(imaml_objective), argnums=1, linear_solver=NormalCG(max_steps=5)
)
def inner_solver(net, meta, x, y):
    return descend(net, meta, x, y)


def meta_loss(meta):
    return outer_loss(inner_solver(meta, meta, x, y))


def show(name, grads):
    print(f"{name:<34}", np.round(np.append(grads.weight, grads.bias), 8))


by_cg = jax.jit(jax.grad(meta_loss))(net)
show("normal CG, 5 steps", by_cg)

# %% [markdown]
# No clone of the network is made: pytrees do not change. `meta` is the guess and the
# meta-parameter at once; the guess has no derivative.
#
# The other linear solver of the tutorial is the Neumann series with a hundred terms
# after the first. One argument is different.


# %%
def meta_gradient(linear_solver, inner=descend):
    decorate = eqi.custom_root(
        jax.grad(imaml_objective),
        argnums=1,
        linear_solver=linear_solver,
        tags=lx.positive_semidefinite_tag,
    )
    solve = decorate(inner)
    return jax.jit(jax.grad(lambda meta: outer_loss(solve(meta, meta, x, y))))(net)


by_neumann = meta_gradient(Neumann(1 + 100, alpha=0.1))
exact = meta_gradient(None)
show("Neumann, 100 terms, alpha 0.1", by_neumann)
show("the default linear solver", exact)

# %% [markdown]
# ## 2. Object-oriented
#
# `AbstractImplicitModule` wants two methods: `solve`, which is never differentiated,
# and one that says what is solved. With `objective` the optimality condition is derived
# from it; `optimality` or `fixed_point_map` may take its place.
#
# The fields of the module are the meta-parameters, all of them: here the network and
# the strength $\lambda$.


# %%
class InnerNet(eqi.AbstractImplicitModule):
    meta_net: eqx.nn.Linear
    reg_param: Float[Array, ""]
    n_inner_iter: int = eqx.field(static=True)
    adjoint = eqi.ImplicitAdjoint(linear_solver=NormalCG(max_steps=5))

    def objective(self, net, x, y):
        distance = half_square_distance(net, self.meta_net)
        return mse(net, x, y) + self.reg_param * distance

    def solve(self, net, x, y):
        def step(net, _):
            grads = jax.grad(self.objective)(net, x, y)
            return jtu.tree_map(lambda p, g: p - 2e-2 * g, net, grads), None

        return jax.lax.scan(step, net, length=self.n_inner_iter)[0]


inner_net = InnerNet(net, reg_param=jnp.array(1.0), n_inner_iter=100)


@eqx.filter_jit
@eqx.filter_value_and_grad
def meta_value_and_grad(inner_net):
    adapted = inner_net(inner_net.meta_net, x, y)  # a network, like its guess
    return outer_loss(adapted)


value, by_module = meta_value_and_grad(inner_net)
show("AbstractImplicitModule", by_module.meta_net)
print(f"{'  and d/d reg_param':<34} {by_module.reg_param:.6f}")

# %% [markdown]
# Where only a part of a larger model is adapted, `eqx.tree_at` puts the adapted part
# into a copy of the model.


# %%
class Model(eqx.Module):
    body: eqx.nn.Linear
    scale: Float[Array, ""]

    def __call__(self, x):
        return self.scale * self.body(x)


model = Model(net, jnp.array(2.0))
adapted = eqx.tree_at(lambda m: m.body, model, inner_net(model.body, x, y))
print(f"{'loss of the adapted model':<34} {outer_loss(adapted):.6f}")

# %% [markdown]
# ## Meta-training
#
# The meta-gradient trains the meta-network, here towards adapted networks whose mean
# output is one. The module goes through `filter_grad`, optax and `apply_updates` like
# any other; the strength is kept by a partition.

# %%
spec = eqx.tree_at(
    lambda m: m.meta_net,
    jtu.tree_map(lambda _: False, inner_net),
    replace=jtu.tree_map(lambda _: True, net),
)
trained, frozen = eqx.partition(inner_net, spec)
optimiser = optax.sgd(2.0)


@eqx.filter_jit
def train_step(trained, state):
    def loss(trained):
        inner_net = eqx.combine(trained, frozen)
        return (outer_loss(inner_net(inner_net.meta_net, x, y)) - 1) ** 2

    value, grads = eqx.filter_value_and_grad(loss)(trained)
    updates, state = optimiser.update(grads, state)
    return eqx.apply_updates(trained, updates), state, value


state, losses = optimiser.init(trained), []
for _ in range(30):
    trained, state, value_now = train_step(trained, state)
    losses.append(float(value_now))

# %% [markdown]
# ## How many steps of CG, how many terms?
#
# There are five unknowns, so five steps of CG are exact. The Neumann series needs
# $|1 - \alpha\mu| < 1$ for each eigenvalue $\mu$ of the Hessian, and converges the more
# slowly the closer that is to one.
#
# The alternative, the derivative of the hundred steps themselves, is another number:
# gradient descent has not converged. It is right about the steps, the implicit gradient
# about the minimum.


# %%
def error(grads):
    pairs = zip(jtu.tree_leaves(grads), jtu.tree_leaves(exact), strict=True)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


cg_steps, terms = range(1, 6), [1, 5, 10, 20, 40, 60, 80, 101]
cg_errors = [error(meta_gradient(NormalCG(max_steps=n))) for n in cg_steps]
neumann_errors = [error(meta_gradient(Neumann(n, alpha=0.1))) for n in terms]
unrolled = jax.jit(jax.grad(lambda meta: outer_loss(descend(net, meta, x, y))))(net)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
left.semilogy(cg_steps, cg_errors, "o-", label="normal CG")
left.semilogy(terms, neumann_errors, "s-", label="Neumann, alpha 0.1")
left.axhline(error(unrolled), color="grey", ls="--", label="unrolled, 100 steps")
left.set(
    xlabel="steps of CG, terms of the series",
    ylabel="error of the meta-gradient (dimensionless)",
    title="The linear solver's budget",
)
left.legend()
right.semilogy(losses, label="(mean output - 1)²")
right.set(xlabel="meta-step", ylabel="meta-loss (dimensionless)", title="Meta-training")
right.legend()
outputs = Path("outputs")
outputs.mkdir(exist_ok=True)
figure.savefig(outputs / "06_imaml.png", dpi=150)

# %% [markdown]
# ## What must hold
#
# The tutorial prints $(-0.0369, 0.0248, 0.0347, 0.0067;\ 0.3156)$.

# %%
printed = jnp.array([-0.0369, 0.0248, 0.0347, 0.0067, 0.3156])
exact_ift = jnp.array(
    [-0.03689379243, 0.02480984290, 0.03474849698, 0.00665596276, 0.31561732842]
)
for grads, tol in (
    (exact, 1e-10),
    (by_cg, 1e-9),
    (by_neumann, 1e-9),
    (by_module.meta_net, 1e-9),
):
    vector = jnp.append(grads.weight, grads.bias)
    assert jnp.allclose(vector, printed, rtol=0, atol=5e-5)
    assert jnp.allclose(vector, exact_ift, rtol=0, atol=tol)
assert abs(value - -0.7040421952460342) < 1e-10
assert 1e-4 < error(unrolled) < 3e-3
assert losses[-1] < 1e-8 < losses[0]
