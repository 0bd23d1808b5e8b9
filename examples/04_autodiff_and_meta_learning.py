# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Advanced automatic differentiation, with solutions of equations
#
# The JAX tutorial "Advanced automatic differentiation" takes derivatives of formulas.
# Here a *solution* stands in each place where the tutorial has a formula: nothing else
# changes, because a solution is one more function that JAX can differentiate, in any
# mode and to any order. All quantities are dimensionless.

# %%
import timeit
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import matplotlib.pyplot as plt
import optax
import optimistix as optx
from jaxtyping import Array, Float

import eqximplicit as eqi

jax.config.update("jax_enable_x64", True)
OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)
NEWTON = optx.Newton(rtol=1e-12, atol=1e-12)

# %% [markdown]
# ## Higher-order derivatives
#
# The tutorial's polynomial is $f(x) = x^3 + 2x^2 - 3x + 1$. Its inverse function has no
# simple formula; it is the solution $y$ of $f(y) = x$, and its derivatives come from
# stacking `jax.grad` as usual. At $x = y = 1$, where $f', f'', f'''$ are $4, 10, 6$,
# calculus says
#
# $$y' = \frac1{f'} = \frac14,\quad y'' = -\frac{f''}{f'^3} = -\frac{10}{64},\quad
# y''' = \frac{3f''^2 - f'f'''}{f'^5} = \frac{276}{1024}.$$


# %%
def f(x):
    return x**3 + 2 * x**2 - 3 * x + 1


layer = eqi.ImplicitFunction(
    eqi.Root(lambda y, x: f(y) - x), NEWTON, y0=2.0, throw=False
)


def inverse(x):
    return layer(None, x)


dydx = jax.grad(inverse)
d2ydx = jax.grad(dydx)
d3ydx = jax.grad(d2ydx)
derivatives = jax.jit(lambda x: jnp.stack([inverse(x), dydx(x), d2ydx(x), d3ydx(x)]))
print("y, y', y'', y''' at x = 1: ", derivatives(1.0))
assert jnp.allclose(derivatives(1.0), jnp.array([1, 1 / 4, -10 / 64, 276 / 1024]))

# %% [markdown]
# The Hessian is `jacfwd` of `grad`, as in the tutorial. Its example is $x \cdot x$;
# ours is $y \cdot y$, where $y$ minimises $\tfrac12 y \cdot y - x \cdot y$, so that
# $y = x$.


# %%
def hessian(f):
    return jax.jacfwd(jax.grad(f))


def square_of_minimum(x):
    bowl = lambda y, x: jnp.dot(y, y) / 2 - jnp.dot(x, y)
    y = eqi.minimise(bowl, jnp.zeros(3), x, solver=optx.BFGS(1e-10, 1e-10)).value
    return jnp.dot(y, y)


two = jax.jit(hessian(square_of_minimum))(jnp.array([1.0, 2.0, 3.0]))
print(two)
assert jnp.allclose(two, 2 * jnp.eye(3))

# %% [markdown]
# ## Hessian-vector products
#
# Often the product with a vector is all one wants. A sheet of 64 x 64 cells, each of
# which answers to a stimulus and to its neighbours, has a Hessian of 134 megabytes. The
# forward-over-reverse product needs none of it: two matrix-free linear solves.


# %%
def sheet(z, stimulus):
    neighbours = sum(jnp.roll(z, shift, axis) for shift in (-1, 1) for axis in (0, 1))
    return jnp.tanh(0.22 * neighbours + stimulus)


def activity(stimulus):
    z0 = jnp.zeros_like(stimulus)
    picard = optx.FixedPointIteration(rtol=1e-12, atol=1e-12)
    z = eqi.fixed_point(sheet, z0, stimulus, solver=picard, throw=False).value
    return jnp.sum(z**2) / 2


@jax.jit
def hvp(x, v):
    return jax.jvp(jax.grad(activity), (x,), (v,))[1]


row = jnp.linspace(-1.0, 1.0, 64)
stimulus = 0.3 * jnp.sin(3 * row)[:, None] * jnp.cos(2 * row)[None]
poke = jnp.zeros((64, 64)).at[20, 40].set(1.0)
response = hvp(stimulus, poke)

gradient = jax.jit(jax.grad(activity))
quotient = (gradient(stimulus + 1e-4 * poke) - gradient(stimulus - 1e-4 * poke)) / 2e-4
print(
    f"largest deviation from a difference quotient {abs(response - quotient).max():.0e}"
)
assert jnp.allclose(response, quotient, rtol=0, atol=1e-6)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
xs = jnp.linspace(0.5, 4.0, 100)
curves = jax.jit(jax.vmap(derivatives))(xs)
for curve, name in zip(curves.T, ["y", "y'", "y''", "y'''"], strict=True):
    left.plot(xs, curve, label=name)
left.set(
    xlabel="x (dimensionless)",
    ylabel="dimensionless",
    title="The inverse of a cubic, and its derivatives",
    ylim=(-1, 2.5),
)
left.legend()
shown = right.imshow(
    jnp.log10(jnp.abs(response) + 1e-12), vmin=-6, vmax=1, origin="lower"
)
right.plot(40, 20, "r+", label="the entry that is poked")
right.set(xlabel="column", ylabel="row", title="One column of the Hessian")
right.legend()
figure.colorbar(shown, label="log10 of its entries (dimensionless)")
figure.savefig(OUTPUTS / "04_derivatives.png", dpi=150)

# %% [markdown]
# ## Higher-order optimisation
#
# MAML (Finn, Abbeel & Levine 2017) differentiates through a gradient step. The
# tutorial's sketch, `params - lr * grads`, is for one array; for a pytree it is
# `optax.apply_updates` or `jtu.tree_map`.
#
# Implicit MAML (Rajeswaran et al. 2019) *solves* the inner problem instead, held near
# the meta-parameters, and differentiates the solution. Both meta-gradients are a
# `jax.grad` of a mean over a `vmap` of tasks. A task is a sine of some amplitude and
# phase; five points are given, and the loss is asked at ten others.


# %%
class Features(eqx.Module):
    """A small network; what is adapted to a task is its last layer alone."""

    hidden: eqx.nn.Linear
    readout: eqx.nn.Linear

    def __call__(self, readout, x):
        h = jnp.tanh(jax.vmap(self.hidden)(x[:, None]))
        return jax.vmap(readout)(h)[:, 0]


def loss_fn(readout, net, data):
    x, y = data
    return jnp.mean((net(readout, x) - y) ** 2)


def near_meta(readout, args):
    net, data = args
    gaps = jtu.tree_map(lambda p, q: jnp.sum((p - q) ** 2), readout, net.readout)
    return loss_fn(readout, net, data) + 0.02 * sum(jtu.tree_leaves(gaps))


adapt = eqi.ImplicitFunction(
    eqi.Root(jax.grad(near_meta), tags=lx.positive_semidefinite_tag),
    NEWTON,  # the read-out is linear, so one step solves it
    throw=False,
)


def implicit(net, data):
    return adapt(net.readout, (net, data))


def one_step(net, data):
    grads = jax.grad(loss_fn)(net.readout, net, data)
    return jtu.tree_map(lambda p, g: p - 0.1 * g, net.readout, grads)


def sines(key, count):
    k1, k2, k3 = jax.random.split(key, 3)
    amplitude = jax.random.uniform(k1, (count, 1), minval=0.5, maxval=2.0)
    phase = jax.random.uniform(k2, (count, 1), maxval=jnp.pi)
    x = jax.random.uniform(k3, (count, 15), minval=-3.0, maxval=3.0)
    y = amplitude * jnp.sin(x + phase)
    return (x[:, :5], y[:, :5]), (x[:, 5:], y[:, 5:])


def meta_loss(net, tasks, adapted):
    given, asked = tasks
    losses = jax.vmap(lambda g, a: loss_fn(adapted(net, g), net, a))(given, asked)
    return jnp.mean(losses)


def meta_train(adapted, steps=300):
    k1, k2 = jax.random.split(jax.random.key(1))
    net = Features(eqx.nn.Linear(1, 24, key=k1), eqx.nn.Linear(24, 1, key=k2))
    optimiser = optax.adam(1e-2)

    @jax.jit
    def train(net):
        def step(carry, key):
            net, state = carry
            tasks = sines(key, 16)
            loss, grads = jax.value_and_grad(meta_loss)(net, tasks, adapted)
            updates, state = optimiser.update(grads, state)
            return (eqx.apply_updates(net, updates), state), loss

        keys = jax.random.split(jax.random.key(2), steps)
        (net, _), losses = jax.lax.scan(step, (net, optimiser.init(net)), keys)
        return net, losses

    return train(net)


runs = {
    "MAML, one gradient step": (one_step, *meta_train(one_step)),
    "implicit MAML, a solve": (implicit, *meta_train(implicit)),
}
new_tasks = sines(jax.random.key(3), 200)
for name, (adapted, net, _) in runs.items():
    print(f"{name:<26} loss on new tasks {meta_loss(net, new_tasks, adapted):.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
(given_x, given_y), _ = sines(jax.random.key(5), 1)
grid = jnp.linspace(-3, 3, 100)
for name, (adapted, net, losses) in runs.items():
    left.semilogy(jnp.convolve(losses, jnp.ones(20) / 20, mode="valid"), label=name)
    readout = adapted(net, (given_x[0], given_y[0]))
    right.plot(grid, net(readout, grid), label=name)
right.plot(given_x[0], given_y[0], "ko", label="the five points given")
left.set(xlabel="meta-step", ylabel="meta-loss (dimensionless)", title="Meta-training")
right.set(
    xlabel="x (dimensionless)",
    ylabel="y (dimensionless)",
    title="A task not seen before",
)
left.legend()
right.legend(fontsize=8)
figure.savefig(OUTPUTS / "04_meta_learning.png", dpi=150)

# %% [markdown]
# ## Stopping gradients
#
# The TD(0) update of reinforcement learning ignores that its target depends on the
# parameters. Let the value $v$ of a state be a solution too, of $2v = 2\theta \cdot s$:
# then the numbers are the tutorial's, with and without `stop_gradient`.

# %%
value_layer = eqi.ImplicitFunction(
    eqi.Root(lambda v, args: 2 * v - 2 * jnp.dot(*args)), NEWTON, y0=0.0, throw=False
)


def value_fn(theta, state):
    return value_layer(None, (theta, state))


theta = jnp.array([0.1, -0.1, 0.0])
s_tm1 = jnp.array([1.0, 2.0, -1.0])
r_t = jnp.array(1.0)
s_t = jnp.array([2.0, 1.0, 0.0])


def naive_td_loss(theta, s_tm1, r_t, s_t):
    target = r_t + value_fn(theta, s_t)
    return (target - value_fn(theta, s_tm1)) ** 2


def td_loss(theta, s_tm1, r_t, s_t):
    target = r_t + value_fn(theta, s_t)
    return (jax.lax.stop_gradient(target) - value_fn(theta, s_tm1)) ** 2


naive_update = jax.jit(jax.grad(naive_td_loss))(theta, s_tm1, r_t, s_t)
td_update = jax.jit(jax.grad(td_loss))(theta, s_tm1, r_t, s_t)
print("naive gradient", naive_update, " TD(0) update", td_update)
assert jnp.allclose(naive_update, jnp.array([2.4, -2.4, 2.4]))
assert jnp.allclose(td_update, jnp.array([-2.4, -4.8, 2.4]))

# %% [markdown]
# `stop_gradient` may also go to *part* of the parameters of a condition: here the value
# has feedback on itself, and the target forgets how it depends on the feedback.


# %%
class Feedback(eqx.Module):
    theta: Float[Array, "3"]
    gain: Float[Array, ""]

    def __call__(self, v, s):
        return jnp.tanh(self.gain * v + jnp.dot(self.theta, s))


feedback = eqi.ImplicitFunction(
    eqi.FixedPoint(Feedback(theta, jnp.array(0.5))), NEWTON, y0=0.0, throw=False
)


def partly_stopped_loss(params, params_of_target):
    frozen = eqx.tree_at(
        lambda p: p.gain, params_of_target, replace_fn=jax.lax.stop_gradient
    )
    target = r_t + feedback.with_params(frozen)(None, s_t)
    return (target - feedback.with_params(params)(None, s_tm1)) ** 2


by_params, by_target = jax.jit(jax.grad(partly_stopped_loss, argnums=(0, 1)))(
    feedback.params, feedback.params
)
print(f"the target's gain {by_target.gain}, its theta {by_target.theta}")
assert by_target.gain == 0
assert jnp.all(by_target.theta[:2] != 0)
assert by_params.gain != 0

# %% [markdown]
# One caution. Where TD learning *ends* is itself a solution: the $\theta$ at which the
# expected update vanishes. Do not write that condition with `stop_gradient` inside: the
# implicit function theorem differentiates the condition in $\theta$, and must see all
# of it. Give the target's parameters an argument of their own instead.

# %%
path = jnp.cos(jnp.arange(18.0).reshape(9, 2) ** 1.5)


def td_error(theta, theta_target, discount):
    target = 1 + discount * path[1:] @ theta_target
    return jnp.mean((target - path[:-1] @ theta) ** 2) / 2


def right_condition(theta, discount):
    return jax.grad(td_error)(theta, theta, discount)


def wrong_condition(theta, discount):
    loss = lambda theta: td_error(theta, jax.lax.stop_gradient(theta), discount)
    return jax.grad(loss)(theta)


def learned(condition):
    start = jnp.zeros(2)
    solver = optx.Newton(rtol=1e-12, atol=1e-12)
    exact = lambda d: eqi.root_find(right_condition, start, d, solver=solver).value

    def solution(discount):
        found = jax.lax.stop_gradient(exact(discount))
        return eqi.implicit_solution(eqi.Root(condition), found, discount)

    return jax.jit(solution), jax.jit(jax.jacfwd(solution))


solution, slope = learned(right_condition)
_, wrong_slope = learned(wrong_condition)
quotient = (solution(0.9001) - solution(0.8999)) / 2e-4
print(
    "d theta / d discount", slope(0.9), " with stop_gradient inside", wrong_slope(0.9)
)
assert jnp.allclose(slope(0.9), quotient, rtol=1e-5)
assert not jnp.allclose(wrong_slope(0.9), quotient, rtol=1e-2)

# %% [markdown]
# ## Straight-through estimator
#
# Rounding has no useful derivative; the straight-through estimator pretends that it is
# the identity. After a solve, the derivative that remains is the solution's; around a
# solve, the whole solve counts as the identity.


# %%
def straight_through(f, x):
    # An exactly-zero expression that has an exactly-one gradient.
    zero = x - jax.lax.stop_gradient(x)
    return zero + jax.lax.stop_gradient(f(x))


def cube_root(a):
    return eqi.root_find(lambda y, a: y**3 - a, 3.0, a, solver=NEWTON).value


def nearest_integer(x):
    return eqi.root_find(lambda y, x: y - jnp.round(x), x, x, solver=NEWTON).value


after = lambda a: straight_through(jnp.round, cube_root(a))
around = lambda x: straight_through(nearest_integer, x)
for name, fn, x, expected in (
    ("round(cube root)", lambda a: jnp.round(cube_root(a)), 3.2**3, 0),
    ("straight-through after it", after, 3.2**3, 1 / (3 * 3.2**2)),
    ("a solve that rounds", nearest_integer, 3.2, 0),
    ("straight-through around it", around, 3.2, 1),
):
    value, slope_here = jax.jit(jax.value_and_grad(fn))(x)
    print(f"{name:<28} {value}, derivative {slope_here:.6f}")
    assert value == 3
    assert jnp.allclose(slope_here, expected)

# %% [markdown]
# ## Per-example gradients
#
# `jit`, `vmap` and `grad` go together as for any function. Un-jitted, every call traces
# the rule once more; jitted, it is the compiled program alone.

# %%
inefficient_perex_grads = jax.vmap(jax.grad(td_loss), in_axes=(None, 0, 0, 0))
perex_grads = jax.jit(inefficient_perex_grads)
batch = [jnp.stack([leaf, leaf]) for leaf in (s_tm1, r_t, s_t)]


def milliseconds(fn, number):
    run = lambda: fn(theta, *batch).block_until_ready()
    run()
    return min(timeit.repeat(run, number=number, repeat=3)) / number * 1e3


unjitted_ms = milliseconds(inefficient_perex_grads, 2)
jitted_ms = milliseconds(perex_grads, 200)
print(f"un-jitted {unjitted_ms:.1f} ms, jitted {jitted_ms:.4f} ms")

# %%
for fn in (inefficient_perex_grads, perex_grads):
    assert jnp.allclose(fn(theta, *batch), jnp.array([[-2.4, -4.8, 2.4]] * 2))
assert jitted_ms < unjitted_ms / 10
_, net, losses = runs["implicit MAML, a solve"]
not_adapted = lambda net, given: net.readout
assert meta_loss(net, new_tasks, implicit) < 0.3
assert meta_loss(net, new_tasks, not_adapted) > 0.6
