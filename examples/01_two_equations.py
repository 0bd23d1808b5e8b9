# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Two equations, two parameters, two pytrees
#
# We look for the fixed point $x = F(x, \alpha, \beta)$ of
#
# $$
# F(x, \alpha, \beta) =
# \begin{pmatrix} \sqrt{\alpha - x_1 x_2} \\ \sqrt{(57 - x_2) / (\beta F_1)}
# \end{pmatrix}
# $$
#
# and for its derivative with respect to $\alpha$ and $\beta$. At $\alpha = 10$,
# $\beta = 3$ the solution is $(2, 3)$. All quantities are dimensionless.
#
# The parameters are an Equinox module, and so is each of the two unknowns.

# %%
import timeit
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


class Para(eqx.Module):
    alpha: Float[Array, ""]
    beta: Float[Array, ""]


class Var(eqx.Module):
    value: Float[Array, ""]


class Fc(eqx.Module):
    para: Para

    def __call__(self, x: list[Var], args: None = None) -> list[Var]:
        F_0 = jnp.sqrt(self.para.alpha - x[0].value * x[1].value)
        F_1 = jnp.sqrt((57 - x[1].value) / (self.para.beta * F_0))
        return [Var(F_0), Var(F_1)]


def show(name: str, tree: object) -> None:
    print(f"{name:<28}", eqx.tree_pformat(tree, short_arrays=False, width=200))


para = Para(jnp.array(10.0), jnp.array(3.0))
x_guess = [Var(jnp.array(1.5)), Var(jnp.array(3.5))]

# %% [markdown]
# ## Solve
#
# A condition says *what* defines the solution; `where` says which part of it we call
# the parameters. The solver and the adjoint have defaults; here we ask the default
# solver for four digits more than its own tolerance of 1e-8.

# %%
solver = eqi.AutoFixedPoint(rtol=1e-12, atol=1e-12)
layer = eqi.ImplicitFunction(eqi.FixedPoint(Fc(para)), solver, where=lambda fn: fn.para)

solution = eqx.filter_jit(layer.solve)(x_guess)
show("solution", solution.value)
print(f"{'residual':<28} {solution.stats['residual_norm']:.1e} (dimensionless)")
print(f"{'steps':<28} {solution.stats['num_steps']}")

# %% [markdown]
# ## Differentiate, forward and in reverse
#
# `with_params` is `eqx.tree_at` with `where`, so any transformation of JAX sees a
# function of the parameters. The guess has no derivative.


# %%
@eqx.filter_jit
def solve(para: Para, x_guess: list[Var]) -> list[Var]:
    return layer.with_params(para)(x_guess)


forward = jax.jacfwd(solve)(para, x_guess)
reverse = jax.jacrev(solve)(para, x_guess)
for name, jacobian in (("forward", forward), ("reverse", reverse)):
    show(f"d/dalpha, {name}", jnp.stack([v.value.alpha for v in jacobian]))
    show(f"d/dbeta, {name}", jnp.stack([v.value.beta for v in jacobian]))

guess_jacobian = jax.jacrev(solve, argnums=1)(para, x_guess)
show("d/dx_guess", jnp.stack(jax.tree.leaves(guess_jacobian)))

# %% [markdown]
# ## The derivative of one output
#
# One output is an ordinary function of the solution: a lambda, or a method of a module
# that holds the layer.


# %%
class OneOutput(eqx.Module):
    layer: eqi.ImplicitFunction

    def output1(self, x_guess: list[Var]) -> Array:
        return self.layer(x_guess)[0].value


def output1(para: Para) -> Array:
    return OneOutput(layer.with_params(para)).output1(x_guess)


grad_output1 = jax.jit(jax.grad(output1))(para)
show("d output1 / d para", grad_output1)

# %% [markdown]
# ## Without a guess argument
#
# The guess may live in the layer.

# %%
nox = eqi.ImplicitFunction(
    eqi.FixedPoint(Fc(para)), where=lambda fn: fn.para, y0=x_guess
)
show("without a guess argument", nox())

# %% [markdown]
# ## Second derivatives
#
# The rule differentiates itself, in any order of modes.

# %%
hessian = jax.jit(jax.hessian(lambda para: solve(para, x_guess)[0].value))(para)
show("d2 x1 / d alpha2", hessian.alpha.alpha)

# %% [markdown]
# ## Beside the unrolled derivative
#
# The alternative is to differentiate through a thousand steps of the iteration. The
# layer raises if a solve fails, which costs a call of the host; with `throw=False` it
# answers with NaN derivatives and a result code instead, and calls no one.


# %%
def unrolled(para: Para, x_guess: list[Var]) -> list[Var]:
    def step(x: list[Var], _: None) -> tuple[list[Var], None]:
        return Fc(para)(x), None

    return jax.lax.scan(step, x_guess, length=1000)[0]


def milliseconds(fn, *args) -> float:
    compiled = jax.jit(fn).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    repeat = lambda: jax.block_until_ready(compiled(*args))
    return min(timeit.repeat(repeat, number=20, repeat=5)) / 20 * 1e3


quiet = eqi.ImplicitFunction(
    eqi.FixedPoint(Fc(para)), where=lambda fn: fn.para, throw=False
)
quiet_solve = lambda para, x_guess: quiet.with_params(para)(x_guess)
implicit_ms = milliseconds(jax.jacrev(solve), para, x_guess)
quiet_ms = milliseconds(jax.jacrev(quiet_solve), para, x_guess)
unrolled_ms = milliseconds(jax.jacrev(unrolled), para, x_guess)
print(f"{'implicit jacobian':<28} {implicit_ms:.3f} ms")
print(f"{'the same, throw=False':<28} {quiet_ms:.3f} ms")
print(f"{'unrolled jacobian':<28} {unrolled_ms:.3f} ms")

# %% [markdown]
# ## Train
#
# Find the parameters whose solution is a given target, in a `filter_jit` loop with
# optax. The gradient is with respect to the whole layer, of which only the parameters
# are arrays. The previous solution is the next guess.

# %%
target = [Var(jnp.array(1.8)), Var(jnp.array(3.4))]
optimiser = optax.adam(0.05)


@eqx.filter_jit
def train_step(layer, state, x):
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(layer):
        solution = layer.solve(x)
        error = [s.value - t.value for s, t in zip(solution.value, target, strict=True)]
        return error[0] ** 2 + error[1] ** 2, solution

    (value, solution), grads = loss(layer)
    updates, state = optimiser.update(grads, state)
    return eqx.apply_updates(layer, updates), state, value, solution.value


state = optimiser.init(eqx.filter(layer, eqx.is_inexact_array))
losses = []
x = x_guess
while not losses or losses[-1] > 1e-12:
    layer, state, value, x = train_step(layer, state, x)
    losses.append(float(value))
    assert len(losses) < 1000, "the training does not reach its target"

show(f"after {len(losses)} training steps", x)
show("trained parameters", layer.params)

# %% [markdown]
# ## The picture
#
# How the iteration and Newton's method converge, and how the training does.


# %%
def picard_step(x: list[Var], _: None) -> tuple[list[Var], Array]:
    x_new = Fc(para)(x)
    gaps = [abs(new.value - old.value) for new, old in zip(x_new, x, strict=True)]
    return x_new, jnp.maximum(*gaps)


def newton_residual(steps: int) -> float:
    newton = optx.Newton(rtol=1e-14, atol=1e-14)
    short = eqi.ImplicitFunction(
        eqi.FixedPoint(Fc(para)), newton, max_steps=steps, throw=False
    )
    return float(short.solve(x_guess).stats["residual_norm"])


_, picard = jax.lax.scan(picard_step, x_guess, length=28)
newton = [newton_residual(steps) for steps in range(6)]

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.semilogy(picard, "o-", ms=3, label="fixed-point iteration")
left.semilogy(jnp.maximum(jnp.array(newton), 1e-17), "s-", ms=4, label="Newton")
left.set(xlabel="solver step", ylabel="residual (dimensionless)", title="Solve")
left.legend()
right.semilogy(losses, label="squared distance to the target")
right.set(xlabel="training step", ylabel="loss (dimensionless)", title="Train")
right.legend()
outputs = Path("outputs")
outputs.mkdir(exist_ok=True)
figure.savefig(outputs / "01_two_equations.png", dpi=150)
print(f"{'picture':<28} {outputs / '01_two_equations.png'}")

# %% [markdown]
# ## What must hold
#
# The exact derivatives are $(37, -27)/205$ and $(36, -126)/205$.

# %%
values = jnp.stack([v.value for v in solution.value])
assert jnp.allclose(values, jnp.array([2.0, 3.0]), rtol=0, atol=1e-10)
for jacobian in (forward, reverse):
    d_alpha = jnp.stack([v.value.alpha for v in jacobian])
    d_beta = jnp.stack([v.value.beta for v in jacobian])
    assert jnp.allclose(d_alpha, jnp.array([37, -27]) / 205, rtol=0, atol=1e-10)
    assert jnp.allclose(d_beta, jnp.array([36, -126]) / 205, rtol=0, atol=1e-10)
assert all(leaf == 0 for leaf in jax.tree.leaves(guess_jacobian))
assert abs(grad_output1.alpha - 37 / 205) < 1e-10
assert abs(hessian.alpha.alpha - -0.009496321875770812) < 1e-8
assert jnp.allclose(layer.params.alpha, 1.8**2 + 1.8 * 3.4, atol=1e-4)
assert jnp.allclose(layer.params.beta, (57 - 3.4) / (1.8 * 3.4**2), atol=1e-4)
