# %% [markdown]
# # A deep equilibrium model for handwritten digits
#
# A deep equilibrium model (DEQ) replaces a stack of layers by one equation: its
# features are the fixed point of a cell,
#
# $$z^\star = \tanh(W z^\star + U x + b),$$
#
# as if the cell had been applied infinitely often (Bai, Kolter & Koltun 2019). The
# gradient comes from the implicit function theorem, so it needs the memory of *one*
# layer however many steps the solver takes.
#
# We train one on the 1797 digits of 8 x 8 pixels that ship with scikit-learn, and watch
# the three numbers that tell how a DEQ is doing: accuracy, solver steps, and the
# spectral radius of the cell's Jacobian.

# %%
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix as optx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import eqximplicit as eqi
from eqximplicit.nn import (
    DEQ,
    FixedBudget,
    jacobian_frobenius_squared,
    spectral_radius,
)

OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)

# %% [markdown]
# ## Data
#
# Grey values between 0 and 1; a fifth of the digits is kept for the test. A training
# digit is blended with a copy of itself shifted by a pixel, a new one each time.

# %%
digits = load_digits()
images = (digits.images / 16).astype(np.float32)[:, None]  # (1797, 1, 8, 8)
labels = digits.target.astype(np.int32)
x_train, x_test, y_train, y_test = train_test_split(
    images, labels, test_size=360, random_state=0, stratify=labels
)


def blurred(x, rng):
    """Each image of (batch, 1, 8, 8), mixed with a shift of itself."""
    padded = np.pad(x[:, 0], ((0, 0), (1, 1), (1, 1)))
    rows, columns = (rng.integers(0, 3, (len(x), 1)) + np.arange(8) for _ in range(2))
    which = np.arange(len(x))[:, None, None]
    shifted = padded[which, rows[:, :, None], columns[:, None, :]]
    share = rng.uniform(0, 0.6, (len(x), 1, 1)).astype(np.float32)
    return ((1 - share) * x[:, 0] + share * shifted)[:, None]


# %% [markdown]
# ## Model
#
# The cell is an ordinary Equinox module with a call `cell(z, x)`. `DEQ` makes it a
# layer like any other, here in the middle of an `eqx.nn.Sequential`. Nobody says how
# large the state is: the layer finds the one shape that the cell keeps.
#
# Training does not need twelve decimals, so we give the solver a *budget*: at most 40
# plain iterations, and whatever they reach is taken. Without the wrapper an unconverged
# solve would raise.

# %%
HIDDEN, BATCH, EPOCHS = 64, 64, 40


class Cell(eqx.Module):
    recur: eqx.nn.Linear
    inject: eqx.nn.Linear

    def __call__(self, z, x):
        return jnp.tanh(self.recur(z) + self.inject(x))


def make_model(key):
    k1, k2, k3, k4 = jax.random.split(key, 4)
    cell = Cell(
        eqx.nn.Linear(HIDDEN, HIDDEN, key=k2),
        eqx.nn.Linear(16 * 4 * 4, HIDDEN, use_bias=False, key=k3),
    )
    picard = optx.FixedPointIteration(rtol=1e-3, atol=1e-3)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 16, 3, padding=1, key=k1),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Lambda(jnp.ravel),
            DEQ(cell, FixedBudget(picard, num_steps=40)),
            eqx.nn.Linear(HIDDEN, 10, key=k4),
        ]
    )


def parts(model):
    return model[:4], model[4], model[5]  # what comes before, the DEQ, the read-out


# %% [markdown]
# ## Training
#
# Left alone, training makes the Jacobian $J = \partial f/\partial z$ grow: the model
# becomes "deeper", the solver slower, and some day it does not converge any more. So we
# add the penalty of Bai, Koltun & Kolter (2021), a Hutchinson estimate of
# $\|J\|_F^2$ per unknown, at one vector-Jacobian product per example.

# %%
OPTIMISER = optax.adamw(
    optax.cosine_decay_schedule(3e-3, EPOCHS * (len(x_train) // BATCH)),
    weight_decay=0.1,
)


def loss_fn(model, x, y, penalty, key):
    stem, deq, head = parts(model)
    h = jax.vmap(stem)(x)
    z = jax.vmap(deq)(h)
    logits = jax.vmap(head)(z)
    fit = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    def norm(z, h, key):
        return jacobian_frobenius_squared(deq.cell, z, h, key=key) / z.size

    keys = jax.random.split(key, len(x))
    norms = jax.vmap(norm)(jax.lax.stop_gradient(z), h, keys)
    return fit + penalty * jnp.mean(norms)


@eqx.filter_jit
def train_step(model, opt_state, x, y, penalty, key):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, x, y, penalty, key)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = OPTIMISER.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state, loss


@eqx.filter_jit
def evaluate(model, x, y, key):
    stem, deq, head = parts(model)
    h = jax.vmap(stem)(x)
    solution = jax.vmap(deq.solve)(h)
    radius = jax.vmap(lambda z, h: spectral_radius(deq.cell, z, h, key=key))
    return {
        "accuracy": jnp.mean(jax.vmap(head)(solution.value).argmax(-1) == y),
        "steps": solution.stats["num_steps"],
        "converged": solution.stats["converged"],
        "radius": radius(solution.value, h),
    }


def train(penalty, name):
    model = make_model(jax.random.key(0))
    opt_state = OPTIMISER.init(eqx.filter(model, eqx.is_inexact_array))
    rng, key, history = np.random.default_rng(0), jax.random.key(1), []
    for _ in (bar := tqdm(range(EPOCHS), desc=name, unit="epoch")):
        order = rng.permutation(len(x_train))
        for i in range(0, len(order) - BATCH + 1, BATCH):
            key, subkey = jax.random.split(key)
            batch = order[i : i + BATCH]
            x, y = blurred(x_train[batch], rng), y_train[batch]
            model, opt_state, loss = train_step(model, opt_state, x, y, penalty, subkey)
        history.append(jax.device_get(evaluate(model, x_test, y_test, subkey)))
        bar.set_postfix(loss=f"{loss:.3f}", test=f"{history[-1]['accuracy']:.1%}")
    return model, history


# %%
model, history = train(jnp.asarray(2.0), "penalty 2")
_, unregularised = train(jnp.asarray(0.0), "no penalty")

# %%
RUNS = {"penalty 2": (history, "C0"), "no penalty": (unregularised, "C1")}
epochs = np.arange(1, EPOCHS + 1)
fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
for name, (run, colour) in RUNS.items():
    accuracy = [100 * e["accuracy"] for e in run]
    axes[0].plot(epochs, accuracy, colour, label=name)
    for ax, what in ((axes[1], "steps"), (axes[2], "radius")):
        ax.plot(epochs, [np.mean(e[what]) for e in run], colour, label=f"{name}, mean")
        worst = [np.max(e[what]) for e in run]
        ax.plot(epochs, worst, colour, linestyle=":", label=f"{name}, worst digit")
axes[0].axhline(97, color="grey", linewidth=0.8, label="97 %")
axes[0].set(ylabel="test accuracy / %", ylim=(85, 100), title="Accuracy")
axes[1].set(ylabel="solver steps (of at most 40)", title="Solver steps", ylim=(0, 56))
axes[2].axhline(1, color="grey", linewidth=0.8, label="plain iteration diverges")
axes[2].set(
    ylabel="spectral radius (dimensionless)", title="Spectral radius of the cell"
)
axes[2].set_ylim(bottom=0)
for ax in axes:
    ax.set_xlabel("epoch")
    ax.legend(fontsize=7, loc="best" if ax is not axes[1] else "upper right")
fig.savefig(OUTPUTS / "05_deq_digits.png", dpi=120)

# %% [markdown]
# The penalty costs a digit or two of the 360, and keeps every digit's Jacobian well
# below a spectral radius of 1. Without it a solve takes half as many steps again, and
# the worst digits exhaust the budget.

# %%
last, wild = history[-1], unregularised[-1]
print(f"test accuracy {last['accuracy']:.1%}, without penalty {wild['accuracy']:.1%}")
assert last["accuracy"] >= 0.97
assert np.all(last["converged"])
assert np.max(last["radius"]) < 1
assert np.mean(last["steps"]) < np.mean(wild["steps"])

# %% [markdown]
# ## Memory
#
# XLA reports how much scratch memory a compiled gradient needs. Implicit: the same for
# any budget. Unrolled, which stores every step: proportional to it.

# %%
BUDGETS = [8, 128, 512]


def gradient_bytes(adjoint, num_steps):
    stem, deq, _ = parts(model)
    picard = optx.FixedPointIteration(rtol=1e-3, atol=1e-3)
    layer = DEQ(
        deq.cell,
        FixedBudget(picard, num_steps),
        adjoint,
        max_steps=num_steps,
    )
    h = jax.vmap(stem)(x_train[:BATCH])
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def mean_square(params):
        return jnp.mean(jax.vmap(eqx.combine(params, static))(h) ** 2)

    compiled = jax.jit(jax.grad(mean_square)).lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes


implicit = [gradient_bytes(eqi.ImplicitAdjoint(), n) for n in BUDGETS]
unrolled = [gradient_bytes(eqi.UnrolledAdjoint(checkpoints=n), n) for n in BUDGETS]

fig, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
ax.plot(BUDGETS, np.array(implicit) / 2**20, "o-", label="implicit (this layer)")
ax.plot(BUDGETS, np.array(unrolled) / 2**20, "s--", label="unrolled")
ax.set(
    xlabel="largest number of solver steps",
    ylabel="scratch memory of the gradient / MiB",
    title=f"A batch of {BATCH} digits",
    ylim=(0, None),
)
ax.legend()
fig.savefig(OUTPUTS / "05_deq_memory.png", dpi=120)

for n, a, b in zip(BUDGETS, implicit, unrolled, strict=True):
    print(f"{n:4d} steps: implicit {a / 2**20:.2f} MiB, unrolled {b / 2**20:.2f} MiB")
assert implicit[0] == implicit[1] == implicit[2]
assert unrolled[2] > 2 * implicit[2]
