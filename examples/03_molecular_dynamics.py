# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # The minimum of an energy: soft spheres in a periodic box
#
# $N$ soft spheres lie in a periodic square box. Each pair that overlaps repels,
#
# $$
# E(R) = \frac12 \sum_{i \ne j} \frac{1}{\alpha_{ij}}
# \Bigl(1 - \frac{r_{ij}}{\sigma_{ij}}\Bigr)^{\alpha_{ij}}
# \quad\text{where}\quad r_{ij} < \sigma_{ij},
# $$
#
# and the spheres move until the energy is minimal. We want the derivative of what we
# see at the minimum with respect to all $\sigma_{ij}$ and $\alpha_{ij}$. Unrolling the
# tens of thousands of steps of the minimiser would need the memory of all of them; the
# implicit function theorem needs the minimum only. All quantities are dimensionless.

# %%
import os
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from matplotlib.collections import EllipseCollection, LineCollection

import eqximplicit as eqi
from eqximplicit.solvers import FIRE

jax.config.update("jax_enable_x64", True)

OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)

# With LONG=1 the 55 spheres take 170 000 small steps instead of 6000: half a minute.
LONG = os.environ.get("LONG") == "1"

# %% [markdown]
# ## The energy
#
# Distances are to the nearest periodic image. A distance of zero (a sphere and itself)
# and a pair that does not touch get a harmless number first, so that no derivative
# divides by zero.


# %%
def distance(delta, box):
    delta = delta - box * jnp.round(delta / box)
    square = jnp.sum(delta**2, axis=-1)
    apart = square > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)


def distances(positions, box):
    return distance(positions[:, None] - positions[None, :], box)


def soft_sphere(r, sigma, alpha):
    touching = (r > 0) & (r < sigma)
    overlap = jnp.where(touching, 1 - r / sigma, 0.5)
    return jnp.where(touching, overlap**alpha / alpha, 0.0)


def total_energy(positions, params, box):
    r = distances(positions, box)
    return 0.5 * jnp.sum(soft_sphere(r, params["sigma"], params["alpha"]))


def contact_r2(positions, box, diameter=2.0):
    r = distances(positions, box)
    return jnp.sum(jnp.where((r > 0) & (r < diameter), r**2, 0.0))


def setup(n, density):
    """The box, random positions, and matrices of parameters."""
    box = (n / density) ** 0.5
    with jax.threefry_partitionable(False):  # the random numbers of older releases
        key, _ = jax.random.split(jax.random.PRNGKey(5))
        start = jax.random.uniform(key, (n, 2), maxval=box, dtype=jnp.float64)
    full = jnp.full((n, n), 2.0)
    return box, start, {"sigma": full, "alpha": full}


# %% [markdown]
# ## Seven spheres
#
# `FIRE` is damped molecular dynamics: one force per step, in a `while` loop, until the
# largest force is below $10^{-12}$. The condition `Minimum` says what the positions
# solve, and nothing has to be stopped, hoisted or written twice. The energy does not
# change if all spheres move together, so its Hessian is singular; the derivative is the
# one of minimum norm, in which the spheres do not drift.

# %%
fire = FIRE(rtol=0.0, atol=1e-12, dt_start=0.001, dt_max=0.005)
box, start, params = setup(7, density=0.3)


def energy(positions, params):
    return total_energy(positions, params, box)


layer = eqi.ImplicitFunction(eqi.Minimum(energy), fire, max_steps=None)


@jax.jit
def minimal_energy(params):
    solution = layer.solve(start, params)
    return energy(solution.value, params), solution


@jax.jit
def contacts(params):
    positions = layer(start, params)
    return contact_r2(positions, box)


(value, solution), grad_energy = jax.value_and_grad(minimal_energy, has_aux=True)(
    params
)
print("energy     ", value)
print("max force  ", solution.stats["residual_norm"])
print("steps      ", solution.stats["num_steps"])
print("dE/dsigma  ", grad_energy["sigma"][0])
print("dE/dalpha  ", grad_energy["alpha"][0])

# %% [markdown]
# ### A gradient that tests nothing
#
# This gradient is no evidence that the implicit derivative works. The energy is
# stationary at its minimum, so the way in which the minimum moves does not matter (the
# envelope theorem): its derivative *at fixed positions* is the same. A library that
# drops the implicit term returns it, too.
#
# Here is a quantity that does depend on where the spheres go: the sum of $r^2$ over all
# contacts. At fixed positions its derivative is exactly zero.

# %%
grad_contacts = jax.grad(contacts)(params)
fixed = jax.lax.stop_gradient(solution.value)
partial_energy = jax.grad(energy, argnums=1)(fixed, params)
partial_contacts = jax.grad(lambda params: contact_r2(fixed, box))(params)
print("energy,   implicit ", grad_energy["sigma"][0])
print("energy,   fixed    ", partial_energy["sigma"][0])
print("contacts, implicit ", grad_contacts["sigma"][0])
print("contacts, fixed    ", partial_contacts["sigma"][0])

# %% [markdown]
# ## Memory
#
# What XLA reserves for the gradient: implicit, and through unrolled steps.


# %%
def gradient_bytes(adjoint, max_steps):
    layer = eqi.ImplicitFunction(
        eqi.Minimum(energy), fire, adjoint, max_steps=max_steps, throw=False
    )
    gradient = jax.grad(lambda params: contact_r2(layer(start, params), box))
    compiled = jax.jit(gradient).lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes


IMPLICIT, UNROLLED = [10_000, 1_000_000], [100, 3000]
implicit = [gradient_bytes(eqi.ImplicitAdjoint(), n) for n in IMPLICIT]
unrolled = [gradient_bytes(eqi.UnrolledAdjoint(checkpoints=n), n) for n in UNROLLED]

# %% [markdown]
# ## Fifty-five spheres
#
# A dense packing has many minima, and which one is found depends on every step. The
# seven spheres' time step finds one after about 170 000 steps. The derivative does not
# know the path, so we take small steps only until the forces are small, and then large
# ones to the same minimum.

# %%
large_box, large_start, large_params = setup(55, density=0.5)


def large_energy(positions, params):
    return total_energy(positions, params, large_box)


def large_layer(**settings):
    return eqi.ImplicitFunction(
        eqi.Minimum(large_energy), FIRE(rtol=0.0, **settings), max_steps=None
    )


near = large_layer(atol=1e-12 if LONG else 1e-2, dt_start=0.001, dt_max=0.005)
polish = large_layer(atol=1e-12, dt_start=0.1, dt_max=0.4)


@jax.jit
def large_contacts(params):
    first = near.solve(large_start, params)
    last = polish.solve(first.value, params)
    steps = first.stats["num_steps"] + last.stats["num_steps"]
    return contact_r2(last.value, large_box), (last.value, steps)


began = time.perf_counter()
(large_value, (packing, large_steps)), large_grad = jax.value_and_grad(
    large_contacts, has_aux=True
)(large_params)
norm = jnp.linalg.norm(large_grad["sigma"])
print(f"{int(large_steps)} steps in {time.perf_counter() - began:.1f} s")
print("energy             ", large_energy(packing, large_params))
print("sum of r^2         ", large_value)
print("|d/dsigma|         ", norm)

# %% [markdown]
# ## Auxiliary output: neighbour lists
#
# In large systems only neighbours are looked at. A neighbour list has room for a fixed
# number of pairs; when there are more, a new list must be *allocated*, which no
# compiled loop can do. So the solver is a Python loop, and returns the final list and
# the number of steps as auxiliary output. The condition needs that list: `takes_aux`.
#
# The list is a module with integer and Boolean arrays and a static field. Its pairs are
# counted once, so the gradient is twice the upper triangle of the one above.


# %%
class NeighbourList(eqx.Module):
    pairs: Int[Array, "2 capacity"]  # i < j, padded with (0, 0)
    built_at: Float[Array, "n 2"]
    overflowed: Bool[Array, ""]
    capacity: int = eqx.field(static=True)


SKIN = 0.1  # how far a sphere may move before the list is built anew


def near_pairs(positions):
    return jnp.triu(distances(positions, box) < 2.0 + 2 * SKIN, 1)


def build(positions, capacity):
    near = near_pairs(positions)
    pairs = jnp.stack(jnp.nonzero(near, size=capacity, fill_value=0))
    return NeighbourList(pairs, positions, jnp.sum(near) > capacity, capacity)


def allocate(positions):
    count = int(jnp.sum(near_pairs(positions)))
    return build(positions, count + count // 4)


def update(positions, neighbours):
    moved = distance(positions - neighbours.built_at, box)
    return jax.lax.cond(
        jnp.any(moved > SKIN),
        lambda: build(positions, neighbours.capacity),
        lambda: neighbours,
    )


@jax.jit
def pair_energy(positions, params, neighbours):
    i, j = neighbours.pairs
    r = distance(positions[i] - positions[j], box)
    return jnp.sum(soft_sphere(r, params["sigma"][i, j], params["alpha"][i, j]))


def objective(positions, args):
    return pair_energy(positions, *args), None


stepper = FIRE(rtol=0.0, atol=1e-12, dt_start=0.001, dt_max=0.05)


@jax.jit
def advance(positions, state, params, neighbours):
    neighbours = update(positions, neighbours)
    args = params, neighbours
    step = stepper.step(objective, positions, args, {}, state, frozenset())
    return *step[:2], neighbours


def pair_force(positions, aux, params):
    return -jax.grad(pair_energy)(positions, params, aux["neighbours"])


@eqi.custom_root(pair_force, has_aux=True, takes_aux=True, tags=lx.symmetric_tag)
def relax(positions, params):
    neighbours = allocate(positions)
    scalar = jax.ShapeDtypeStruct((), positions.dtype)
    args = params, neighbours
    state = stepper.init(objective, positions, args, {}, scalar, None, frozenset())
    steps, allocations = 0, 1
    while float(state.force_norm) > 1e-12:
        moved, next_state, neighbours = advance(positions, state, params, neighbours)
        if neighbours.overflowed:
            neighbours = allocate(positions)
            allocations += 1
        else:
            positions, state, steps = moved, next_state, steps + 1
    aux = {"neighbours": neighbours, "steps": steps, "allocations": allocations}
    return positions, aux


def listed_contacts(params):
    positions, aux = relax(start, params)
    return contact_r2(positions, box), aux


listed_grad, aux = jax.grad(listed_contacts, has_aux=True)(params)
print(f"{aux['steps']} steps, {aux['allocations']} allocations")
print("pairs in the list  ", aux["neighbours"].capacity)
print("with a list        ", listed_grad["sigma"][0])
print("twice the triangle ", 2 * jnp.triu(grad_contacts["sigma"])[0])

# %% [markdown]
# ## A cautionary tale
#
# Now the box, the initial positions, the energy and even the solver (whose `shift` puts
# spheres back into the box) depend on the diameter $D$ with respect to which we
# differentiate, through closures and nested `jit`s. There is nothing to write for it:
# no `stop_gradient`, no argument that is there for the derivative only.
#
# All lengths scale with $D$, so the energy at the minimum does not depend on it: its
# derivative is exactly zero, and that of the contacts is $2/D$ times their value. To
# stop the gradient of the box is a remedy often given, and answers another question:
# what happens if the spheres grow in a box that does not?

# %%
with jax.threefry_partitionable(False):
    fractions = jax.random.uniform(jax.random.PRNGKey(5), (32, 2), dtype=jnp.float64)


def grown(diameter, *, stop_box=False):
    box = 4.5 * diameter
    box = jax.lax.stop_gradient(box) if stop_box else box

    @jax.jit
    def energy(positions, _):
        r = distances(positions, box)
        return 0.5 * jnp.sum(jax.jit(soft_sphere)(r, diameter, 2.0))

    @jax.jit
    def shift(positions, step):
        return jnp.mod(positions + step, box)

    mover = FIRE(rtol=0.0, atol=1e-12, dt_start=0.001, dt_max=0.005, shift=shift)
    layer = eqi.ImplicitFunction(eqi.Minimum(energy), mover, max_steps=None)
    positions = layer(box * fractions)
    return energy(positions, None), contact_r2(positions, box, diameter), positions


def slopes(stop_box):
    """The energy and the contacts, with their derivatives, from one solve."""

    @jax.jit
    def run(diameter):
        observe = lambda diameter: grown(diameter, stop_box=stop_box)
        (e, c, positions), pull = jax.vjp(observe, diameter)
        still = jnp.zeros_like(positions)
        by_e = pull((jnp.ones(()), jnp.zeros(()), still))[0]
        by_c = pull((jnp.zeros(()), jnp.ones(()), still))[0]
        return e, c, by_e, by_c, positions

    return run(D)


D = 1.3
e, c, dE, dC, grown_positions = slopes(stop_box=False)
_, _, dE_stopped, dC_stopped, _ = slopes(stop_box=True)
print(f"energy     {e:.10f}   dE/dD {dE:+.1e}   box stopped {dE_stopped:.7f}")
print(f"contacts   {c:.8f}  d/dD  {dC:.7f}  box stopped {dC_stopped:.7f}")

# %% [markdown]
# To see these slopes we follow the minimum: from the one at $D$, scaled, to those of
# its neighbours. In a box that does not grow, contacts open and close on the way, where
# the sum over contacts jumps; the slope is that of the smooth piece around $D$.

# %%
DIAMETERS = jnp.linspace(1.27, 1.33, 13)


@jax.jit
def follow(diameter, box):
    energy = lambda positions, _: (
        0.5 * jnp.sum(soft_sphere(distances(positions, box), diameter, 2.0))
    )
    mover = FIRE(rtol=0.0, atol=1e-8, dt_start=0.01, dt_max=0.1)
    layer = eqi.ImplicitFunction(eqi.Minimum(energy), mover, max_steps=None)
    positions = layer(grown_positions * (box / (4.5 * D)))
    return energy(positions, None), contact_r2(positions, box, diameter)


boxes = jnp.stack([4.5 * DIAMETERS, jnp.full_like(DIAMETERS, 4.5 * D)])
along = jax.vmap(jax.vmap(follow), in_axes=(None, 0))(DIAMETERS, boxes)
(scaling, growing) = np.stack(along, axis=-1)  # (13, 2) each: energy and contacts

# %% [markdown]
# ## Pictures


# %%
def draw_packing(ax, positions, box, sensitivity, title):
    """Spheres, and each contact coloured by how the sum of r^2 depends on its sigma."""
    positions = np.asarray(positions) % box
    images = np.array([[x, y] for x in (-box, 0, box) for y in (-box, 0, box)])
    centres = (positions[None] + images[:, None]).reshape(-1, 2)
    size = np.full(len(centres), 2.0)
    spheres = EllipseCollection(
        *(size, size, 0 * size),
        units="x",
        offsets=centres,
        transOffset=ax.transData,
        facecolors="white",
        edgecolors="0.7",
    )
    ax.add_collection(spheres)
    delta = positions[None] - positions[:, None]
    delta -= box * np.round(delta / box)
    i, j = np.nonzero(np.sum(delta**2, -1) * (1 - np.eye(len(delta))) > 0)
    touching = np.hypot(*delta[i, j].T) < 2.0
    i, j = i[touching], j[touching]
    ends = np.stack([positions[i], positions[i] + delta[i, j]], axis=1)
    colours = np.asarray(sensitivity)[i, j]
    limit = np.max(np.abs(colours))
    lines = LineCollection(ends, cmap="coolwarm", linewidths=3)
    lines.set(array=colours, clim=(-limit, limit))
    ax.add_collection(lines)
    ax.set(xlim=(0, box), ylim=(0, box), aspect="equal", title=title)
    ax.set(xlabel="x (dimensionless)", ylabel="y (dimensionless)")
    ax.figure.colorbar(
        lines,
        ax=ax,
        shrink=0.8,
        label=r"$\partial \sum r^2 / \partial \sigma_{ij}$ (dimensionless)",
    )


fig, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
draw_packing(axes[0], solution.value, box, grad_contacts["sigma"], "7 spheres")
draw_packing(axes[1], packing, large_box, large_grad["sigma"], "55 spheres")
sphere = plt.Line2D(
    [],
    [],
    linestyle="",
    marker="o",
    markersize=14,
    color="white",
    markeredgecolor="0.7",
    label="sphere of diameter 2",
)
contact = plt.Line2D([], [], color="C3", linewidth=3, label="contact")
fig.legend(handles=[sphere, contact], loc="outside lower center", ncols=2)
fig.savefig(OUTPUTS / "03_packings.png", dpi=120)

# %%
fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
axes[0].loglog(IMPLICIT, np.array(implicit) / 2**20, "o-", label="implicit")
axes[0].loglog(UNROLLED, np.array(unrolled) / 2**20, "s--", label="unrolled")
axes[0].axvline(
    int(solution.stats["num_steps"]),
    color="grey",
    linewidth=0.8,
    label="steps to the minimum",
)
axes[0].set(
    xlabel="largest number of steps",
    ylabel="scratch memory of the gradient / MiB",
    title="7 spheres: memory",
)
observables = (("energy", e, dE, dE_stopped), ("sum of $r^2$", c, dC, dC_stopped))
for k, (name, here, slope, stopped) in enumerate(observables):
    ax = axes[k + 1]
    ax.plot(DIAMETERS, scaling[:, k], "C0o", markersize=4, label="box $4.5\\,D$")
    ax.plot(DIAMETERS, growing[:, k], "C1s", markersize=4, label="box fixed")
    ax.plot(DIAMETERS, here + slope * (DIAMETERS - D), "C0", label="implicit slope")
    ax.plot(
        *(DIAMETERS, here + stopped * (DIAMETERS - D), "C1--"),
        label="implicit slope, box stopped",
    )
    ax.set(
        xlabel="diameter D (dimensionless)",
        ylabel=f"{name} (dimensionless)",
        title=f"32 spheres: {name} at the minimum",
    )
for ax in axes:
    ax.legend(fontsize=8)
fig.savefig(OUTPUTS / "03_memory_and_slopes.png", dpi=120)

# %% [markdown]
# ## What must hold
#
# The numbers come from finite differences that follow the minimum, and from dense
# linear algebra.


# %%
def close(actual, expected, atol):
    return np.allclose(actual, expected, rtol=0, atol=atol)


assert close(value, 0.06159430273402538, 1e-14)
assert solution.stats["residual_norm"] < 1e-12
row = np.array([0, 0.00297984, 0.00736627, 0.015354, 0, 0.015354, 0.00297984])
assert close(grad_energy["sigma"][0], row, 1e-8)
row = np.array([0, -0.00017895, -0.00092201, -0.00348099, 0, -0.00348099, -0.00017895])
assert close(grad_energy["alpha"][0], row, 1e-8)
for name in ("sigma", "alpha"):
    assert close(partial_energy[name], grad_energy[name], 1e-10)
    assert not np.any(partial_contacts[name])
    assert close(listed_grad[name], 2 * np.triu(grad_contacts[name]), 1e-7)
row = [0, 1.98381138, 2.93425998, -1.02783872, 0, -1.02783872, 1.98381138]
assert close(grad_contacts["sigma"][0], row, 1e-7)
assert implicit[0] == implicit[1] < 2**20
assert unrolled[1] > 20 * unrolled[0]
assert close(large_energy(packing, large_params), 4.725423394698032, 1e-12)
assert close(large_value, 1001.4616898576446, 1e-6)
assert close(norm, 183.44656674990424, 2e-4)
assert aux["allocations"] > 1
assert close(dE, 0.0, 1e-9)
assert close(dE_stopped, 8.593758706523193, 1e-7)
assert close(dC, 366.1580286329193, 1e-6)
assert close(dC_stopped, 36.42050280972525, 1e-6)
