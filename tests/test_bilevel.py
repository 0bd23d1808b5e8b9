"""Bilevel problems: hypergradients against closed forms, and what they are good for.

Per-feature regularisers as in Pedregosa (ICML 2016) and Bertrand et al. (JMLR 2022);
the truncated Neumann series of Lorraine, Vicol & Duvenaud (AISTATS 2020); distillation
of a data set as in Blondel et al. (NeurIPS 2022).
"""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi
from eqximplicit.linear_solvers import Neumann

NEWTON = optx.Newton(rtol=1e-10, atol=1e-10)
PSD = lx.positive_semidefinite_tag
CLOSED_FORM = 1e-9


def few_relevant_features():
    """Noisy data for training and validation, in which three features of ten matter."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 10)) @ (np.eye(10) + 0.3 * rng.normal(size=(10, 10)))
    y = x @ np.array([2.0, -1.0, 1.0] + [0.0] * 7) + 6 * rng.normal(size=300)
    x, y = jnp.asarray(x), jnp.asarray(y / 6)
    return (x[:150], y[:150]), (x[150:], y[150:])


TRAIN, VAL = few_relevant_features()
THETA = jnp.linspace(-3.0, 1.0, 10)


def square_loss(w, data):
    x, y = data
    return jnp.mean((x @ w - y) ** 2) / 2


def ridge(w, theta):
    return square_loss(w, TRAIN) + jnp.sum(jnp.exp(theta) * w**2) / 2


def validation(adjoint=None):
    layer = eqi.ImplicitFunction(
        eqi.Root(jax.grad(ridge), tags=PSD), NEWTON, adjoint, throw=False
    )
    return lambda theta: square_loss(layer(jnp.zeros(10), theta), VAL)


def ridge_by_algebra(theta):
    """The validation loss of ridge regression and its gradient in theta."""
    (x, y), (x_val, y_val) = TRAIN, VAL
    penalty = np.exp(np.asarray(theta))
    hessian = np.asarray(x.T @ x / 150) + np.diag(penalty)
    w = np.linalg.solve(hessian, np.asarray(x.T @ y / 150))
    error = np.asarray(x_val) @ w - np.asarray(y_val)
    adjoint = np.linalg.solve(hessian, np.asarray(x_val).T @ error / 150)
    return np.mean(error**2) / 2, -adjoint * penalty * w


def test_hypergradient_of_ridge_is_the_closed_form():
    got = jax.jit(jax.value_and_grad(validation()))(THETA)
    for a, b in zip(got, ridge_by_algebra(THETA), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=CLOSED_FORM)


def test_hessian_in_the_hyperparameters():
    got = jax.jit(jax.hessian(validation()))(THETA)
    steps = 1e-5 * np.eye(10)
    want = [
        (ridge_by_algebra(THETA + h)[1] - ridge_by_algebra(THETA - h)[1]) / 2e-5
        for h in steps
    ]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-8)


def test_truncated_series_approaches_the_hypergradient_at_its_rate():
    _, exact = ridge_by_algebra(THETA)
    x = np.asarray(TRAIN[0])
    eigenvalues = np.linalg.eigvalsh(x.T @ x / 150 + np.diag(np.exp(THETA)))
    alpha = 1 / eigenvalues.max()
    rate = 1 - alpha * eigenvalues.min()
    errors = []
    for terms in (10, 40):
        adjoint = eqi.ImplicitAdjoint(linear_solver=Neumann(terms, alpha=alpha))
        got = jax.jit(jax.grad(validation(adjoint)))(THETA)
        errors.append(np.linalg.norm(got - exact))
    assert errors[1] > 0
    assert errors[1] < 1.01 * rate**30 * errors[0]


def newton_costs():
    """The validation loss, its gradient, and the linear systems that they cost."""
    layer = eqi.ImplicitFunction(
        eqi.Root(jax.grad(ridge), tags=PSD), NEWTON, throw=False
    )

    def loss(theta):
        solution = layer.solve(jnp.zeros(10), theta)
        return square_loss(solution.value, VAL), solution.stats["num_steps"]

    return jax.jit(loss), jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_hypergradient_descent_beats_grid_search_at_equal_cost():
    loss, gradient = newton_costs()
    theta, cost, best = jnp.zeros(10), 0, np.inf
    for _ in range(60):
        (value, steps), grads = gradient(theta)
        theta, cost, best = theta - 20 * grads, cost + int(steps) + 1, min(best, value)
    points, on_grid = 0, []
    for strength in np.linspace(-9, 5, 90):  # more systems than the descent had
        value, steps = loss(jnp.full(10, strength))
        points, on_grid = points + int(steps), [*on_grid, float(value)]
    assert points >= cost
    inner = int(np.argmin(on_grid))
    assert 0 < inner < len(on_grid) - 1  # the grid is wide enough
    assert best < min(on_grid) - 1e-3


def logistic(w, args):
    theta, (x, label) = args
    logits = x @ w
    fit = jnp.mean(jax.nn.softplus(logits) - label * logits)
    return fit + jnp.sum(jnp.exp(theta) * w**2) / 2


@pytest.mark.parametrize("solver", [None, NEWTON], ids=["default", "Newton"])
def test_hypergradient_of_logistic_regression(solver):
    x, label = TRAIN[0], (TRAIN[1] > 0).astype(float)
    if solver is None:
        condition = eqi.Minimum(logistic, tags=PSD)
    else:
        condition = eqi.Root(jax.grad(logistic), tags=PSD)
    layer = eqi.ImplicitFunction(condition, solver, throw=False)
    aim = jnp.arange(10.0)

    def outer(theta):
        w = layer(jnp.zeros(10), (theta, (x, label)))
        return aim @ w, w

    got, w = jax.jit(jax.grad(outer, has_aux=True))(THETA)
    a, w = np.asarray(x), np.asarray(w)
    p = 1 / (1 + np.exp(-a @ w))
    penalty = np.exp(np.asarray(THETA))
    assert np.max(np.abs(a.T @ (p - np.asarray(label)) / 150 + penalty * w)) < 1e-7
    hessian = (a.T * (p * (1 - p))) @ a / 150 + np.diag(penalty)
    want = -np.linalg.solve(hessian, np.asarray(aim)) * penalty * w
    np.testing.assert_allclose(got, want, rtol=0, atol=CLOSED_FORM)


def test_gradient_of_a_distilled_data_set():
    """The hyperparameters are data: three points stand for a hundred and fifty."""

    def fit(w, points):
        x, y = points
        return jnp.mean((x @ w - y) ** 2) / 2 + 0.05 * jnp.sum(w**2)

    layer = eqi.ImplicitFunction(eqi.Root(jax.grad(fit), tags=PSD), NEWTON, throw=False)

    def outer(points):
        return square_loss(layer(jnp.zeros(10), points), TRAIN)

    def by_algebra(x, y):
        hessian = x.T @ x / 3 + 0.1 * np.eye(10)
        w = np.linalg.solve(hessian, x.T @ y / 3)
        error = np.asarray(TRAIN[0]) @ w - np.asarray(TRAIN[1])
        adjoint = np.linalg.solve(hessian, np.asarray(TRAIN[0]).T @ error / 150)
        # The residual x'(x w - y) / 3 + 0.1 w, differentiated in x and in y.
        gap, along = x @ w - y, x @ adjoint
        by_x = -(np.outer(gap, adjoint) + np.outer(along, w)) / 3
        return by_x, along / 3

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 10)), rng.normal(size=3)
    got = jax.jit(jax.grad(outer))((jnp.asarray(x), jnp.asarray(y)))
    for a, b in zip(got, by_algebra(x, y), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=CLOSED_FORM)
