# %% [markdown]
# # Implicit differentiation of a fixed point
#
# We look at the fixed point of a small network layer,
#
# $$z = \tanh(W z + x),$$
#
# or, as a root, $g(x, z) = z - \tanh(W z + x) = 0$, and at the derivative
# $\partial z^\star / \partial x$ of the solution. The problem is that of the NeurIPS
# 2020 tutorial on deep implicit layers (Kolter, Duvenaud & Johnson,
# <http://implicit-layers-tutorial.org>). All quantities are dimensionless.

# %%
import timeit
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx

import eqximplicit as eqi
from eqximplicit.nn import FixedBudget, spectral_radius
from eqximplicit.solvers import AutoFixedPoint

jax.config.update("jax_enable_x64", True)

OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)

NDIM = 10


def draw(partitionable):
    """W and x from two fixed keys; JAX's random stream changed in version 0.5."""
    with jax.threefry_partitionable(partitionable):
        w = jax.random.normal(jax.random.PRNGKey(0), (NDIM, NDIM), jnp.float32)
        x = jax.random.normal(jax.random.PRNGKey(1), (NDIM,), jnp.float32)
    w, x = w / jnp.sqrt(jnp.float32(NDIM)), x / jnp.sqrt(jnp.float32(NDIM))
    return w.astype(float), x.astype(float)


def func(z, params):
    w, x = params
    return jnp.tanh(w @ z + x)


W, x = draw(partitionable=False)
z_init = jnp.zeros(NDIM)

# %% [markdown]
# ## Three solvers, one condition
#
# *What* is solved is `FixedPoint(func)`. *How* is a choice: plain (Picard) iteration,
# Newton's method, or the default, which accelerates the iteration by Anderson's method.
# The Jacobian that Newton needs comes from autodiff.

# %%
TOL = 1e-10
SOLVERS = {
    "Picard": optx.FixedPointIteration(rtol=TOL, atol=TOL),
    "Newton": optx.Newton(rtol=TOL, atol=TOL),
    "default (Anderson)": AutoFixedPoint(rtol=TOL, atol=TOL),
}
layers = {
    name: eqi.ImplicitFunction(eqi.FixedPoint(func), solver)
    for name, solver in SOLVERS.items()
}
solutions = {name: layer.solve(z_init, (W, x)) for name, layer in layers.items()}
for name, solution in solutions.items():
    print(f"{name:20s} {solution.stats['num_steps']:3d} steps")

z_star = solutions["Newton"].value
assert np.allclose(z_star[:3], [-0.1679819, -0.3912993, -0.8303236], atol=1e-7)
for solution in solutions.values():
    assert np.allclose(solution.value, z_star, atol=1e-9)

# %% [markdown]
# ## The derivative
#
# Since $g(x, z^\star(x)) = 0$ for every $x$, the chain rule gives
#
# $$\frac{\partial z^\star}{\partial x}
# = -\left(\frac{\partial g}{\partial z}\right)^{-1}\frac{\partial g}{\partial x}
# = (I - D W)^{-1} D, \qquad D = \operatorname{diag}\tanh'(W z^\star + x).$$
#
# Mind that this is a solve with the matrix $\partial g/\partial x$, not with the
# residual $g$ itself, which is zero. With the layer it is one line, in either mode.

# %%
newton = layers["Newton"]
dz_dx = jax.jacrev(lambda x: newton(z_init, (W, x)))(x)
dz_dx_forward = jax.jacfwd(lambda x: newton(z_init, (W, x)))(x)

D = jnp.diag(1 - jnp.tanh(W @ z_star + x) ** 2)
by_hand = jnp.linalg.solve(jnp.eye(NDIM) - D @ W, D)
assert np.allclose(dz_dx, by_hand, atol=1e-12)
assert np.allclose(dz_dx_forward, by_hand, atol=1e-12)
assert np.isclose(np.max(np.abs(dz_dx)), 1.1941796736, atol=1e-9)

# %% [markdown]
# ## The exercise: Anderson acceleration
#
# Here is a solver as one writes it in an afternoon: a Python loop with a `break`, which
# JAX could not trace. It is never differentiated, so it need not be traced: the
# decorator says which equation it solves, and that is enough.


# %%
@eqi.custom_fixed_point(func)
def anderson_solver(z0, params, m=5, lam=1e-4, max_iter=50, tol=1e-5):
    def f(z):
        return func(z, params)

    X, F = [z0, f(z0)], [f(z0), f(f(z0))]
    for _ in range(2, max_iter):
        G = jnp.stack(F[-m:]) - jnp.stack(X[-m:])
        n = len(G)
        H = jnp.ones((n + 1, n + 1)).at[0, 0].set(0.0).at[1:, 1:].set(G @ G.T)
        H = H + lam * jnp.eye(n + 1)
        alpha = jnp.linalg.solve(H, jnp.zeros(n + 1).at[0].set(1.0))[1:]
        xk = alpha @ jnp.stack(F[-m:])
        X.append(xk)
        F.append(f(xk))
        res = jnp.linalg.norm(F[-1] - xk) / (1e-5 + jnp.linalg.norm(F[-1]))
        if res < tol:
            break
    return xk


z_anderson = anderson_solver(z_init, (W, x))
ct = jnp.ones(NDIM)
(ct_x,) = jax.vjp(lambda x: anderson_solver(z_init, (W, x)), x)[1](ct)
print("distance from the solution:", jnp.linalg.norm(z_anderson - z_star))
assert np.linalg.norm(z_anderson - z_star) < 2.5e-5
assert np.allclose(ct_x, ct @ by_hand, atol=1e-4)  # as good as the solution is

# %% [markdown]
# ## When plain iteration never ends
#
# Today's random stream gives another $W$. At its solution the map has a spectral radius
# of 1.17: each plain iteration *moves away*, and ends in a cycle of period two. An
# unlimited `while` loop would run for ever; here the solve says so. The solution exists
# all the same, Newton's method and the default find it, and the implicit function
# theorem asks only that $I - DW$ be invertible.

# %%
cycle = draw(partitionable=True)
budgets = jnp.arange(1, 41)


@eqx.filter_jit
def residual_norms(solver):
    """The residual after 1, 2, ... steps: as many solves, side by side."""

    def after(num_steps):
        layer = eqi.ImplicitFunction(
            eqi.FixedPoint(func), FixedBudget(solver, num_steps), throw=False
        )
        return layer.solve(z_init, cycle).stats["residual_norm"]

    return jax.vmap(after)(budgets)


traces = {name: residual_norms(solver) for name, solver in SOLVERS.items()}

fig, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
for (name, trace), style in zip(traces.items(), ("o-", "s-", "^-"), strict=True):
    ax.semilogy(budgets, np.maximum(trace, 1e-17), style, markersize=4, label=name)
ax.set(
    xlabel="solver steps",
    ylabel="largest residual (dimensionless)",
    title="A map that repels plain iteration",
)
ax.legend()
fig.savefig(OUTPUTS / "02_residuals.png", dpi=120)

# %%
picard = eqi.ImplicitFunction(
    eqi.FixedPoint(func), SOLVERS["Picard"], max_steps=2000, throw=False
)
endless = picard.solve(z_init, cycle)
print(eqi.RESULTS[endless.result])
assert endless.result == eqi.RESULTS.nonlinear_max_steps_reached
assert endless.stats["residual_norm"] > 1

z_repelling = newton(z_init, cycle)
radius = spectral_radius(func, z_repelling, cycle, key=jax.random.key(0))
print(f"spectral radius at the solution: {radius:.3f}")
assert np.isclose(radius, 1.168, atol=1e-2)
assert traces["Newton"][-1] < TOL
assert traces["default (Anderson)"][-1] < TOL

D = jnp.diag(1 - jnp.tanh(cycle[0] @ z_repelling + cycle[1]) ** 2)
expected = jnp.linalg.solve(jnp.eye(NDIM) - D @ cycle[0], D)
for linear_solver in (lx.LU(), lx.GMRES(rtol=1e-12, atol=1e-12)):
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(func), SOLVERS["Newton"], eqi.ImplicitAdjoint(linear_solver)
    )
    _, found = jax.jacrev(layer, argnums=1)(z_init, cycle)
    assert np.allclose(found, expected, atol=1e-9)

# %% [markdown]
# ## Is this actually faster?
#
# Differentiating *through* Newton's method means differentiating through every Jacobian
# and every linear solve in it, and storing them. The implicit function theorem needs
# one linear solve, at the end, whatever came before.


# %%
def unrolled(num_steps):
    """Newton's method as it is differentiated step by step."""

    def residual(z, x):
        return func(z, (W, x)) - z

    def solve(x):
        def step(z, _):
            return z - jnp.linalg.solve(
                jax.jacobian(residual)(z, x), residual(z, x)
            ), None

        return jax.lax.scan(step, z_init, None, length=num_steps)[0]

    return solve


def implicit(num_steps):
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(func), FixedBudget(optx.Newton(rtol=0.0, atol=0.0), num_steps)
    )
    return lambda x: layer(z_init, (W, x))


def cost(solve):
    """Milliseconds and scratch kilobytes of the compiled Jacobian, and the Jacobian."""
    compiled = jax.jit(jax.jacrev(solve)).lower(x).compile()
    compiled(x).block_until_ready()
    runs = timeit.repeat(lambda: compiled(x).block_until_ready(), number=20, repeat=5)
    kilobytes = compiled.memory_analysis().temp_size_in_bytes / 1024
    return 1000 * min(runs) / 20, kilobytes, compiled(x)


NUM_STEPS = [5, 20, 40]
costs = {
    "implicit": [cost(implicit(n)) for n in NUM_STEPS],
    "through the solver": [cost(unrolled(n)) for n in NUM_STEPS],
}

fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for (name, entries), style in zip(costs.items(), ("o-", "s--"), strict=True):
    axes[0].plot(NUM_STEPS, [ms for ms, _, _ in entries], style, label=name)
    axes[1].plot(NUM_STEPS, [kb for _, kb, _ in entries], style, label=name)
axes[0].set(ylabel="solve and Jacobian / ms", title="Time", ylim=(0, None))
axes[1].set(ylabel="scratch memory / kB", title="Memory", ylim=(0, None))
for ax in axes:
    ax.set_xlabel("Newton steps")
    ax.legend()
fig.savefig(OUTPUTS / "02_cost.png", dpi=120)

for name, entries in costs.items():
    print(f"{name:20s} {entries[0][0]:.3f} ms, {entries[0][1]:.1f} kB at 5 steps")
    for _, _, jacobian in entries:
        assert np.allclose(jacobian, by_hand, atol=1e-9)
assert costs["implicit"][0][1] == costs["implicit"][-1][1]
assert costs["through the solver"][-1][1] > 2 * costs["through the solver"][0][1]
