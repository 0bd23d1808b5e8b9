"""The fixed-point maps by which fixed-point solvers are judged, from definitions.

Every map is `fn(y, args)` over a pytree, with a start and, where one exists, a
solution that no fixed-point solver computed (closed form, dense linear algebra or a
published number). Numbers are seeded by NumPy, so all dtypes and machines agree.
All quantities are dimensionless.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, PyTree


class FixedPointMap(NamedTuple):
    """A map, where to start, what it depends on, and its solution if known."""

    name: str
    fn: Callable[[Any, Any], Any]
    y0: PyTree[np.ndarray]
    args: PyTree[np.ndarray]
    solution: PyTree[np.ndarray] | None = None


def cast(tree: PyTree[np.ndarray], dtype: Any) -> PyTree[Array]:
    """The tree as JAX arrays, floating leaves in `dtype`."""
    return jtu.tree_map(lambda x: jnp.asarray(x, dtype=dtype), tree)


def kepler() -> FixedPointMap:
    """Contractive: Kepler's equation E = M + e sin E, eccentricity e <= 0.6."""
    e = np.linspace(0.1, 0.6, 8)
    exact = np.linspace(0.2, 3.0, 8)
    args = {"e": e, "mean": exact - e * np.sin(exact)}

    def fn(y: Float[Array, " n"], args: dict[str, Array]) -> Float[Array, " n"]:
        return args["mean"] + args["e"] * jnp.sin(y)

    return FixedPointMap("contractive (Kepler)", fn, args["mean"], args, exact)


def slow_linear() -> FixedPointMap:
    """Slow: y = A y + b, A symmetric with eigenvalues from -0.9 to 0.99."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    a = (q * np.linspace(-0.9, 0.99, 20)) @ q.T
    b = rng.normal(size=20)

    def fn(y: Float[Array, " n"], args: tuple[Array, Array]) -> Float[Array, " n"]:
        return args[0] @ y + args[1]

    exact = np.linalg.solve(np.eye(20) - a, b)
    return FixedPointMap("slow (rate 0.99)", fn, np.zeros(20), (a, b), exact)


def logistic() -> FixedPointMap:
    """Expansive: the logistic map r y (1 - y) at r = 3.5 and 4, slope 2 - r."""
    r = np.array([3.2, 3.5, 3.7, 4.0])

    def fn(y: Float[Array, " n"], r: Float[Array, " n"]) -> Float[Array, " n"]:
        return r * y * (1 - y)

    return FixedPointMap("expansive (logistic)", fn, np.full(4, 0.6), r, 1 - 1 / r)


def repelling() -> FixedPointMap:
    """Repelling: y = exp(y) - c with slope exp(y*) > 2."""
    exact = np.array([0.8, 1.0, 1.2])
    c = np.exp(exact) - exact

    def fn(y: Float[Array, " n"], c: Float[Array, " n"]) -> Float[Array, " n"]:
        return jnp.exp(y) - c

    return FixedPointMap("repelling (exp)", fn, np.array([1.0] * 3), c, exact)


def deq_cell() -> FixedPointMap:
    """A deep-equilibrium cell z = tanh(W z + u) with spectral norm 1.5."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(30, 30))
    w *= 1.5 / np.linalg.norm(w, 2)
    u = 0.3 * rng.normal(size=30)

    def fn(z: Float[Array, " n"], args: tuple[Array, Array]) -> Float[Array, " n"]:
        return jnp.tanh(args[0] @ z + args[1])

    return FixedPointMap("DEQ cell (norm 1.5)", fn, np.zeros(30), (w, u))


def self_consistent_field() -> FixedPointMap:
    """SCF: the density of the 4 lowest states of H(rho) = -Laplacian + g diag(rho)."""
    n, occupied = 20, 4
    lap = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    well = 0.02 * (np.arange(n) - 8.0) ** 2
    args = {"h": lap + np.diag(well), "coupling": np.array(3.0)}

    def fn(rho: Float[Array, " n"], args: dict[str, Array]) -> Float[Array, " n"]:
        _, vecs = jnp.linalg.eigh(args["h"] + jnp.diag(args["coupling"] * rho))
        return jnp.sum(vecs[:, :occupied] ** 2, axis=1)

    return FixedPointMap("SCF", fn, np.full(n, occupied / n), args)


def implicit_euler() -> FixedPointMap:
    """One implicit Euler step of the Van der Pol oscillator (mu = 5, h = 0.5)."""
    args = {"h": np.array(0.5), "mu": np.array(5.0), "x": np.array(2.0)}

    def fn(y: dict[str, Array], args: dict[str, Array]) -> dict[str, Array]:
        dv = args["mu"] * (1 - y["x"] ** 2) * y["v"] - y["x"]
        return {"x": args["x"] + args["h"] * y["v"], "v": args["h"] * dv}

    y0 = {"x": np.array(2.0), "v": np.array(0.0)}
    return FixedPointMap("implicit Euler", fn, y0, args)


def _random_graph(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    links = rng.random((n, n)) < 0.1
    links |= np.roll(np.eye(n, dtype=bool), 1, axis=1)
    weights = links * rng.random((n, n))
    return weights / weights.sum(axis=1, keepdims=True)


def page_rank() -> FixedPointMap:
    """PageRank with damping 0.85 on a random graph of 50 nodes."""
    n = 50
    p = _random_graph(n, 2)

    def fn(y: Float[Array, " n"], p: Float[Array, "n n"]) -> Float[Array, " n"]:
        return 0.85 * (p.T @ y) + 0.15 / y.size

    exact = np.linalg.solve(np.eye(n) - 0.85 * p.T, np.full(n, 0.15 / n))
    return FixedPointMap("PageRank", fn, np.full(n, 1 / n), p, exact)


def markov_chain() -> FixedPointMap:
    """The stationary distribution of a lazy random walk (a singular I - J)."""
    n = 30
    p = 0.5 * np.eye(n) + 0.5 * _random_graph(n, 3)

    def fn(y: Float[Array, " n"], p: Float[Array, "n n"]) -> Float[Array, " n"]:
        return p.T @ y

    system = np.concatenate([(p.T - np.eye(n))[:-1], np.ones((1, n))])
    exact = np.linalg.solve(system, np.eye(n)[-1])
    return FixedPointMap("Markov chain", fn, np.full(n, 1 / n), p, exact)


def chandrasekhar() -> FixedPointMap:
    """Chandrasekhar's H-equation at albedo c = 0.99, 50 Gauss-Legendre nodes.

    The moment sum(w H) equals 2/c (1 - sqrt(1 - c)) (Chandrasekhar, Radiative
    Transfer, 1960, section 40): a check that no solver takes part in.
    """
    nodes, weights = np.polynomial.legendre.leggauss(50)
    mu, w = (nodes + 1) / 2, weights / 2
    args = 0.5 * 0.99 * w * mu[:, None] / (mu[:, None] + mu)

    def fn(h: Float[Array, " n"], kernel: Float[Array, "n n"]) -> Float[Array, " n"]:
        return 1 + h * (kernel @ h)

    return FixedPointMap("Chandrasekhar H", fn, np.ones(50), args)


def sinkhorn() -> FixedPointMap:
    """Sinkhorn's log-domain potential for entropic transport, epsilon = 0.05."""
    rng = np.random.default_rng(4)
    cost = np.abs(rng.random((15, 1)) - rng.random(12)) ** 2
    args = {
        "m": -cost / 0.05,
        "a": np.full(15, 1 / 15),
        "b": rng.dirichlet(np.ones(12)),
    }

    def fn(u: Float[Array, " n"], args: dict[str, Array]) -> Float[Array, " n"]:
        lse = jax.scipy.special.logsumexp
        v = jnp.log(args["b"]) - lse(args["m"] + u[:, None], axis=0)
        return jnp.log(args["a"]) - lse(args["m"] + v[None, :], axis=1)

    return FixedPointMap("Sinkhorn", fn, np.zeros(15), args)


def value_iteration() -> FixedPointMap:
    """Bellman's operator with discount 0.99, 30 states and 3 actions."""
    rng = np.random.default_rng(5)
    p = np.stack([_random_graph(30, 6 + i) for i in range(3)])
    args = {"p": p, "reward": rng.normal(size=(3, 30)), "discount": np.array(0.99)}

    def fn(v: Float[Array, " n"], args: dict[str, Array]) -> Float[Array, " n"]:
        return jnp.max(args["reward"] + args["discount"] * (args["p"] @ v), axis=0)

    return FixedPointMap("value iteration (0.99)", fn, np.zeros(30), args)


def policy_iteration(args: dict[str, np.ndarray]) -> np.ndarray:
    """The exact value function by Howard's policy iteration with dense solves."""
    states = np.arange(30)
    policy = np.zeros(30, dtype=int)
    for _ in range(50):
        p, reward = args["p"][policy, states], args["reward"][policy, states]
        value = np.linalg.solve(np.eye(30) - 0.99 * p, reward)
        policy = np.argmax(args["reward"] + 0.99 * args["p"] @ value, axis=0)
    return value


def expectation_maximisation() -> FixedPointMap:
    """EM for two overlapping Gaussians in one dimension, 200 samples."""
    rng = np.random.default_rng(7)
    pick = rng.random(200) < 0.4
    data = np.where(pick, rng.normal(-1.3, 0.8, 200), rng.normal(1.3, 1.0, 200))

    def fn(y: dict[str, Array], x: Float[Array, " k"]) -> dict[str, Array]:
        z = (x[None, :] - y["mean"][:, None]) ** 2 / y["var"][:, None]
        log = jnp.log(y["weight"]) - 0.5 * jnp.log(y["var"])
        resp = jax.nn.softmax(log[:, None] - 0.5 * z, axis=0)
        mass = jnp.sum(resp, axis=1)
        mean = resp @ x / mass
        var = jnp.sum(resp * (x[None, :] - mean[:, None]) ** 2, axis=1) / mass
        return {"weight": mass / x.size, "mean": mean, "var": var}

    y0 = {
        "weight": np.array([0.5, 0.5]),
        "mean": np.array([-1.0, 1.0]),
        "var": np.array([1.0, 1.0]),
    }
    return FixedPointMap("EM (mixture)", fn, y0, data)


def riccati() -> FixedPointMap:
    """The discrete algebraic Riccati recursion of a lightly controlled system."""
    rng = np.random.default_rng(8)
    a = rng.normal(size=(4, 4))
    a *= 1.05 / np.abs(np.linalg.eigvals(a)).max()
    b = 0.3 * rng.normal(size=(4, 2))

    def fn(p: Float[Array, "n n"], args: tuple[Array, Array]) -> Float[Array, "n n"]:
        a, b = args
        gain = jnp.linalg.solve(jnp.eye(2, dtype=p.dtype) + b.T @ p @ b, b.T @ p @ a)
        return jnp.eye(4, dtype=p.dtype) + a.T @ p @ (a - b @ gain)

    exact = scipy.linalg.solve_discrete_are(a, b, np.eye(4), np.eye(2))
    return FixedPointMap("Riccati", fn, np.eye(4), (a, b), exact)


MAPS: tuple[FixedPointMap, ...] = (
    kepler(),
    slow_linear(),
    logistic(),
    repelling(),
    deq_cell(),
    self_consistent_field(),
    implicit_euler(),
    page_rank(),
    markov_chain(),
    chandrasekhar(),
    sinkhorn(),
    value_iteration(),
    expectation_maximisation(),
    riccati(),
)

# The evaluations of `scipy.optimize.anderson` (1.17) for an absolute tolerance of 1e-8.
SCIPY = {
    "contractive (Kepler)": 28,
    "slow (rate 0.99)": 751,
    "expansive (logistic)": 11,
    "repelling (exp)": 15,
    "DEQ cell (norm 1.5)": 55,
    "SCF": 14,
    "implicit Euler": 9,
    "PageRank": 186,
    "Markov chain": 97,
    "Chandrasekhar H": 16,
    "Sinkhorn": 13,
    "value iteration (0.99)": 114,
    "EM (mixture)": 31,
    "Riccati": 124,
}
