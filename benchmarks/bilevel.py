"""Bilevel problems of the benchmarks: a hypergradient, and implicit MAML."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
from common import (
    BY_HAND,
    jaxopt,
    jaxopt_linear,
    layer_call,
    MATCHED,
    NAMED,
    OURS,
    Solve,
    value_and_grad,
    Workload,
)

import eqximplicit as eqi

# --- Multinomial logistic regression, one regulariser per feature

SAMPLES, FEATURES, CLASSES = 500, 200, 5


def logistic_data() -> Any:
    """Features and one-hot labels, for training and for validation."""
    draw = np.random.default_rng(3)
    truth = draw.normal(size=(FEATURES, CLASSES)) * (np.arange(FEATURES) < 40)[:, None]
    features = draw.normal(size=(2, SAMPLES, FEATURES))
    noisy = features @ truth + draw.gumbel(size=(2, SAMPLES, CLASSES)) * 3
    labels = np.eye(CLASSES)[noisy.argmax(axis=2)]
    return jnp.asarray(features), jnp.asarray(labels)


def cross_entropy(weights: Any, features: Any, labels: Any) -> Any:
    scores = features @ weights
    return jnp.mean(
        jax.scipy.special.logsumexp(scores, axis=1) - jnp.sum(scores * labels, axis=1)
    )


def conjugate_gradients(mv: Callable, b: Any, rtol: float, limit: int) -> Any:
    """What `jax.scipy.sparse.linalg.cg` does, without its options."""
    return jax.scipy.sparse.linalg.cg(mv, b, tol=rtol, maxiter=limit)[0]


def newton_cg(objective: Callable, w0: Any, tol: float) -> Any:
    """Newton's method with conjugate gradients, as exact as the progress asks for."""
    gradient = jax.grad(objective)

    def unfinished(carry: Any) -> Any:
        return (jnp.max(jnp.abs(carry[1])) > tol) & (carry[2] < 50)

    def step(carry: Any) -> Any:
        w, g, count = carry
        _, product = jax.linearize(gradient, w)
        forcing = jnp.minimum(0.1, jnp.sqrt(jnp.linalg.norm(g)))
        w = w - conjugate_gradients(product, g, forcing, 100)
        return w, gradient(w), count + 1

    return jax.lax.while_loop(unfinished, step, (w0, gradient(w0), 0))[0]


def minimum_by_hand(
    objective: Callable[[Any, Any], Any],
    solve_forward: Solve,
    solve_linear: Callable[[Callable, Any], Any],
) -> Solve:
    """A minimum with a handwritten `custom_vjp`."""
    gradient = jax.grad(objective)

    @jax.custom_vjp
    def solve(theta: Any) -> Any:
        return solve_forward(theta)

    def forward(theta: Any) -> Any:
        w = solve(theta)
        return w, (w, theta)

    def backward(residuals: Any, ct: Any) -> Any:
        w, theta = residuals
        _, product = jax.linearize(lambda w: gradient(w, theta), w)
        u = jax.tree.map(jnp.negative, solve_linear(product, ct))
        return jax.vjp(lambda theta: gradient(w, theta), theta)[1](u)

    solve.defvjp(forward, backward)
    return solve


def logistic_reference(data: Any, theta: np.ndarray) -> np.ndarray:
    """Newton's method and one dense solve, with the Hessian in closed form."""
    (x, x_val), (y, y_val) = (np.asarray(leaf) for leaf in data)
    ridge, w = np.exp(theta)[:, None], np.zeros((FEATURES, CLASSES))

    def softmax(scores: np.ndarray) -> np.ndarray:
        e = np.exp(scores - scores.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    def hessian(p: np.ndarray) -> np.ndarray:
        spread = p[:, :, None] * np.eye(CLASSES) - p[:, :, None] * p[:, None, :]
        blocks = np.empty((FEATURES, CLASSES, FEATURES, CLASSES))
        for c in range(CLASSES):
            for d in range(CLASSES):
                blocks[:, c, :, d] = (x * spread[:, c, d, None]).T @ x / SAMPLES
        matrix = blocks.reshape(FEATURES * CLASSES, -1)
        return matrix + np.diag(np.repeat(ridge, CLASSES))

    for _ in range(12):
        p = softmax(x @ w)
        g = x.T @ (p - y) / SAMPLES + ridge * w
        w = w - np.linalg.solve(hessian(p), g.reshape(-1)).reshape(w.shape)
    ct = x_val.T @ (softmax(x_val @ w) - y_val) / SAMPLES
    u = np.linalg.solve(hessian(softmax(x @ w)), ct.reshape(-1)).reshape(w.shape)
    return -np.sum(u * ridge * w, axis=1)


def logistic() -> Workload:
    data, tol, adjoint_rtol = logistic_data(), 1e-8, 1e-7
    theta = jnp.full(FEATURES, -3.0)
    w0 = jnp.zeros((FEATURES, CLASSES))
    (x, x_val), (y, y_val) = data

    def objective(w: Any, theta: Any) -> Any:
        ridge = jnp.sum(jnp.exp(theta)[:, None] * w**2) / 2
        return cross_entropy(w, x, y) + ridge

    def forward(theta: Any) -> Any:
        return newton_cg(lambda w: objective(w, theta), w0, tol)

    def with_jaxopt(theta: Any) -> Any:
        solver = jaxopt.LBFGS(
            objective,
            maxiter=500,
            tol=tol,
            implicit_diff_solve=functools.partial(
                jaxopt_linear.solve_cg, tol=adjoint_rtol
            ),
        )
        return solver.run(w0, theta).params

    def optimistix(theta: Any) -> Any:
        return optx.minimise(
            objective,
            optx.LBFGS(rtol=tol, atol=tol),
            w0,
            theta,
            adjoint=optx.ImplicitAdjoint(lx.CG(rtol=adjoint_rtol, atol=1e-10)),
            tags=frozenset({lx.positive_semidefinite_tag}),
            max_steps=500,
            throw=False,
        ).value

    adjoint = eqi.ImplicitAdjoint(eqi.AutoLinearSolver(rtol=adjoint_rtol))
    condition = eqi.Minimum(objective, tags=lx.positive_semidefinite_tag)
    ours = eqi.ImplicitFunction(condition, None, adjoint, throw=False)
    plain = eqi.ImplicitAdjoint(eqi.HybridKrylov(rtol=adjoint_rtol, restart=0))
    named, matched = (
        eqi.ImplicitFunction(
            condition, lambda _, theta: forward(theta), how, throw=False
        )
        for how in (adjoint, plain)
    )
    solves = {
        OURS: layer_call(ours, w0),
        NAMED: layer_call(named, w0),
        MATCHED: layer_call(matched, w0),
        BY_HAND: minimum_by_hand(
            objective,
            forward,
            lambda mv, ct: conjugate_gradients(mv, ct, adjoint_rtol, 1000),
        ),
        "optimistix, CG": optimistix,
        "jaxopt, CG": with_jaxopt,
    }
    loss = lambda w: cross_entropy(w, x_val, y_val)

    def approximated(linear_solver: Any) -> Callable[[Any], Any]:
        adjoint = eqi.ImplicitAdjoint(linear_solver)
        layer = eqi.ImplicitFunction(
            condition, lambda _, theta: forward(theta), adjoint, throw=False
        )
        return jax.grad(lambda theta: loss(layer(w0, theta)))

    return Workload(
        title="Logistic regression, 200 regularisers",
        theta=theta,
        solves=solves,
        gradients=value_and_grad(loss, solves),
        reference=logistic_reference(data, np.asarray(theta)),
        rtol=1e-6,
        limit=1.1,
        approximated=approximated,
    )


# --- Implicit MAML: a few steps forward, a few terms backward -------------------------

STEPS, RATE, PROXIMAL, TERMS, DAMPING = 16, 0.05, 2.0, 100, 0.05


def net(phi: Any, inputs: Any) -> Any:
    hidden = jnp.tanh(inputs[:, None] * phi["w1"][None, :] + phi["b1"][None, :])
    return hidden @ phi["w2"]


def maml_inner(phi: Any, theta: Any) -> Any:
    """The loss on the support set, and the proximal term."""
    inputs = jnp.linspace(-2.0, 2.0, 20)
    gap = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), phi, theta)
    fit = jnp.mean((net(phi, inputs) - jnp.sin(2 * inputs)) ** 2)
    return fit + PROXIMAL / 2 * jax.tree.reduce(jnp.add, gap)


def maml_outer(phi: Any) -> Any:
    inputs = jnp.linspace(-1.9, 2.1, 20)
    return jnp.mean((net(phi, inputs) - jnp.sin(2 * inputs)) ** 2)


def maml_adapt(theta: Any) -> Any:
    """Gradient descent from `theta`."""

    def step(_: Any, phi: Any) -> Any:
        slope = jax.grad(maml_inner)(phi, theta)
        return jax.tree.map(lambda p, g: p - RATE * g, phi, slope)

    return jax.lax.fori_loop(0, STEPS, step, theta)


def normal_cg(mv: Callable, b: Any) -> Any:
    """Five steps of conjugate gradients on `A A x = A b`, for symmetric `A`."""
    return jax.scipy.sparse.linalg.cg(
        lambda v: mv(mv(v)), mv(b), tol=0.0, atol=0.0, maxiter=5
    )[0]


def neumann(mv: Callable, b: Any) -> Any:
    """A hundred terms of `DAMPING Σ (I - DAMPING A)ᵏ b`."""

    def step(_: Any, x: Any) -> Any:
        return jax.tree.map(lambda x, b, a: x + DAMPING * (b - a), x, b, mv(x))

    first = jax.tree.map(lambda b: DAMPING * b, b)
    return jax.lax.fori_loop(0, TERMS - 1, step, first)


def maml_reference(theta: Any, kind: str) -> Any:
    """The same approximation with a dense Hessian, in NumPy."""
    flat, unravel = jax.flatten_util.ravel_pytree(theta)
    phi = jax.flatten_util.ravel_pytree(maml_adapt(theta))[0]
    inner = lambda p: maml_inner(unravel(p), theta)
    a = np.asarray(jax.jacfwd(jax.grad(inner))(phi))
    b = np.asarray(jax.grad(lambda p: maml_outer(unravel(p)))(phi))
    if kind == "neumann":
        x, term = np.zeros_like(b), DAMPING * b
        for _ in range(TERMS):
            x, term = x + term, term - DAMPING * a @ term
    else:
        x, r = np.zeros_like(b), a @ b
        p = r
        for _ in range(5):
            image = a @ (a @ p)
            step = (r @ r) / (p @ image)
            new = r - step * image
            x, p, r = x + step * p, new + (new @ new) / (r @ r) * p, new
    # d(inner gradient)/dtheta = -PROXIMAL
    return jax.tree.map(np.asarray, unravel(jnp.asarray(PROXIMAL * x)))


def imaml(kind: Literal["cg", "neumann"]) -> Workload:
    draw = np.random.default_rng(5)
    width = 40
    theta = {
        "w1": jnp.asarray(draw.normal(size=width)),
        "b1": jnp.asarray(draw.normal(size=width)),
        "w2": jnp.asarray(draw.normal(size=width) / np.sqrt(width)),
    }
    by_hand = normal_cg if kind == "cg" else neumann
    linear_solver = (
        eqi.NormalCG(max_steps=5) if kind == "cg" else eqi.Neumann(TERMS, alpha=DAMPING)
    )
    ours = eqi.ImplicitFunction(
        eqi.Minimum(maml_inner),
        lambda _, theta: maml_adapt(theta),
        eqi.ImplicitAdjoint(linear_solver),
        throw=False,
    )
    peer = (
        functools.partial(jaxopt_linear.solve_normal_cg, maxiter=5, tol=0.0)
        if kind == "cg"
        else neumann
    )

    @jaxopt.implicit_diff.custom_root(jax.grad(maml_inner), solve=peer)
    def with_jaxopt(init: Any, theta: Any) -> Any:
        del init
        return maml_adapt(theta)

    solves = {
        OURS: layer_call(ours, theta),
        BY_HAND: minimum_by_hand(maml_inner, maml_adapt, by_hand),
        "jaxopt": lambda theta: with_jaxopt(None, theta),
    }
    words = {"cg": "5 steps of normal CG", "neumann": f"{TERMS} Neumann terms"}
    return Workload(
        title=f"iMAML, {words[kind]}",
        theta=theta,
        solves=solves,
        gradients=value_and_grad(maml_outer, solves),
        reference=maml_reference(theta, kind),
        rtol=1e-6,
        limit=1.1,
    )
