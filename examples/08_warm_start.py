# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Warm starts, and watching a solve
#
# A solution is a good guess for the solution of a problem nearby. There are two places
# where problems come in a row: time steps in a `scan`, and updates in a training loop.
# In both the previous solution is the next `y0`. Nothing else changes: the guess has no
# derivative, so a warm start changes no gradient.
#
# The problem is a Duffing oscillator with strong damping, driven hard,
#
# $$\ddot u + c\, \dot u + k\, u + u^3 = 30 \cos t,$$
#
# in the unknowns $y = (u, \dot u)$, by the implicit midpoint rule: each time step is a
# root of two equations. All quantities are dimensionless.

# %%
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
import optimistix as optx
from jaxtyping import Array, Float

import eqximplicit as eqi

jax.config.update("jax_enable_x64", True)


class Oscillator(eqx.Module):
    damping: Float[Array, ""]
    stiffness: Float[Array, ""]

    def __call__(self, y: Float[Array, "2"], t: Float[Array, ""]) -> Array:
        u, v = y
        return jnp.stack(
            [v, 30 * jnp.cos(t) - self.damping * v - self.stiffness * u - u**3]
        )


class Midpoint(eqx.Module):
    """Zero where `y` is one time step `h` after `args[0]`, at the time `args[1]`."""

    oscillator: Oscillator
    h: float = 0.05

    def __call__(self, y: Array, args: tuple[Array, Array]) -> Array:
        before, t = args
        return y - before - self.h * self.oscillator((y + before) / 2, t + self.h / 2)


oscillator = Oscillator(jnp.array(4.0), jnp.array(5.0))
newton = optx.Newton(rtol=1e-10, atol=1e-10)
step = eqi.ImplicitFunction(
    eqi.Root(Midpoint(oscillator)), newton, where=lambda fn: fn.oscillator
)

# %% [markdown]
# ## In a scan
#
# The carry of the scan is the solution so far; better still is the line through the
# last two. A cold start begins every time step at the origin.

# %%
times = jnp.arange(400) * 0.05


def simulate(guess, step=step):
    """The path from rest, and the solver steps of each time step."""

    def advance(carry, t):
        last, now = carry
        solution = step.solve(guess(last, now), (now, t))
        return (now, solution.value), (solution.value, solution.stats["num_steps"])

    rest = jnp.array([1.0, 0.0])
    return jax.lax.scan(advance, (rest, rest), times)[1]


guesses = {
    "cold: the origin": lambda last, now: jnp.zeros(2),
    "warm: the last solution": lambda last, now: now,
    "warm: the line through two": lambda last, now: 2 * now - last,
}
paths, scan_steps = {}, {}
for name, guess in guesses.items():
    paths[name], scan_steps[name] = eqx.filter_jit(simulate)(guess)
    print(f"{name:<28} {scan_steps[name].mean():.2f} Newton steps per time step")

# %% [markdown]
# The gradient of the path's end with respect to the parameters is the same for all.


# %%
@eqx.filter_jit
def gradient(oscillator: Oscillator, guess) -> Oscillator:
    end = lambda o: simulate(guess, step.with_params(o))[0][-1, 0]
    return jax.grad(end)(oscillator)


gradients = {name: gradient(oscillator, guess) for name, guess in guesses.items()}
for name, value in gradients.items():
    print(f"{name:<28} d u / d damping = {value.damping:+.12f}")

# %% [markdown]
# ## In a training loop
#
# A deep equilibrium layer $z = \tanh(W z + U x + b)$ is fitted to a target. Each update
# moves the parameters a little, and so the equilibria. They are carried from one update
# to the next as the guess, beside the state of the optimiser.


# %%
class Cell(eqx.Module):
    W: Float[Array, "n n"]
    U: Float[Array, "n d"]
    b: Float[Array, " n"]

    def __call__(self, z: Float[Array, "m n"], x: Float[Array, "m d"]) -> Array:
        return jnp.tanh(z @ self.W.T + x @ self.U.T + self.b)


keys = jax.random.split(jax.random.key(0), 4)
n, d, m = 16, 2, 64
W = jax.random.normal(keys[0], (n, n)) * 0.5 / jnp.sqrt(n)
cell = Cell(W, jax.random.normal(keys[1], (n, d)), jnp.zeros(n))
readout = jax.random.normal(keys[2], (n,)) / jnp.sqrt(n)
x = jax.random.uniform(keys[3], (m, d), minval=-1.0, maxval=1.0)
target = jnp.sin(2 * x[:, 0]) * x[:, 1]

optimiser = optax.adam(2e-3)
deq = eqi.ImplicitFunction(
    eqi.FixedPoint(cell), eqi.AutoFixedPoint(rtol=1e-6, atol=1e-6)
)


@eqx.filter_jit
def update(deq, state, z):
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(deq):
        solution = deq.solve(z, x)
        return jnp.mean((solution.value @ readout - target) ** 2), solution

    (value, solution), grads = loss(deq)
    updates, state = optimiser.update(grads, state)
    return eqx.apply_updates(deq, updates), state, value, solution


def train(warm: bool):
    """The loss, and the solver steps, of each update."""
    layer, z = deq, jnp.zeros((m, n))
    state = optimiser.init(eqx.filter(deq, eqx.is_inexact_array))
    losses, steps = [], []
    for _ in range(100):
        layer, state, value, solution = update(layer, state, z)
        z = solution.value if warm else z
        losses.append(float(value))
        steps.append(int(solution.stats["num_steps"]))
    return jnp.array(losses), jnp.array(steps), layer


cold_losses, cold_steps, _ = train(warm=False)
warm_losses, warm_steps, trained = train(warm=True)
for name, steps in (("cold", cold_steps), ("warm", warm_steps)):
    print(f"{name:<28} {steps.mean():.1f} evaluations per update")

# %% [markdown]
# ## Watching one solve
#
# A `Monitor` keeps the residual of every step, and `plot_convergence` draws it. For a
# long solve `Monitor(progress_every=100)` shows a progress bar.

# %%
watched = eqi.ImplicitFunction(trained.condition, monitor=eqi.Monitor(history=64))
nearby = eqx.tree_at(
    lambda fn: fn.b, trained.condition.fn, replace_fn=lambda b: b + 0.003
)
equilibrium = watched.solve(jnp.zeros((m, n)), x).value
watched = watched.with_params(nearby)
cold = watched.solve(jnp.zeros((m, n)), x)
warm = watched.solve(equilibrium, x)

figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(13, 3.8), layout="constrained"
)
for name, steps in scan_steps.items():
    left.plot(times, jnp.cumsum(steps), label=name)
left.set(xlabel="time (dimensionless)", ylabel="Newton steps so far", title="Scan")
left.legend(fontsize="small")
middle.plot(cold_steps, label="cold: zero")
middle.plot(warm_steps, label="warm: the last solution")
middle.set(xlabel="update", ylabel="evaluations per solve", title="Training loop")
middle.set_ylim(0, 1.3 * float(cold_steps.max()))
middle.legend(loc="upper right", fontsize="small")
eqi.plot_convergence(cold, right)
eqi.plot_convergence(warm, right)
right.set(title="One solve")
right.legend(["cold", "warm"], fontsize="small")
outputs = Path("outputs")
outputs.mkdir(exist_ok=True)
figure.savefig(outputs / "08_warm_start.png", dpi=150)
print(f"{'picture':<28} {outputs / '08_warm_start.png'}")

# %% [markdown]
# ## What must hold

# %%
cold_scan, warm_scan, line_scan = (steps.mean() for steps in scan_steps.values())
assert line_scan <= warm_scan < 0.9 * cold_scan
reference = paths["cold: the origin"]
for name in guesses:
    assert jnp.allclose(paths[name], reference, rtol=0, atol=1e-9)
    exact = gradients["cold: the origin"]
    assert jnp.allclose(gradients[name].damping, exact.damping, rtol=1e-6)
    assert jnp.allclose(gradients[name].stiffness, exact.stiffness, rtol=1e-6)
assert warm_steps[1:].mean() < 0.8 * cold_steps[1:].mean()
assert jnp.allclose(warm_losses, cold_losses, rtol=1e-3)
assert cold_losses[-1] < 0.1 * cold_losses[0]
assert warm.stats["num_steps"] < cold.stats["num_steps"]
history = cold.stats["residual_history"]
assert jnp.any(jnp.isclose(history, cold.stats["residual_norm"], rtol=1e-6, atol=0))
