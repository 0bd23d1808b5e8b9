"""Solves sharded over eight simulated devices; prints what happened as JSON.

`test_sharding.py` runs this in a process of its own, because the number of devices is
fixed when JAX starts. `python tests/_sharded_program.py table` prints the table of
`docs/scale_out.md` instead.
"""

import collections
import functools
import json
import os
import sys

import _hlo as hlo
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import eqximplicit as eqi
from eqximplicit._placement import by_placement

BATCH, FEATURES = 16, 136
TOL = {"rtol": 1e-12, "atol": 1e-12}
ROWS, COLUMNS, WHOLE = P("d", None), P(None, "d"), P(None, None)


def dense_cell(z, args):
    """Each row of `z` by itself: a layer of a neural network."""
    w, x = args
    return jnp.tanh(jnp.matmul(z, w) + x)


def coupled_cell(z, args):
    """Features that see each other through their mean: no matrix to be gathered."""
    w, x = args
    mean = jnp.mean(z, axis=1, keepdims=True)
    return jnp.tanh(0.5 * z + 0.3 * mean + jnp.diagonal(w)[None, :] + x)


def energy(z, args):
    """A quadratic form of each row; its minimum is `z H = x`."""
    w, x = args
    return jnp.sum(z * (0.5 * jnp.matmul(z, hessian(w)) - x))


def hessian(w):
    return np.eye(FEATURES) + 0.2 * (w + w.T)


def loss(solver, linear_solver, cell, w, x):
    layer = eqi.ImplicitFunction(
        eqi.Minimum(cell) if cell is energy else eqi.FixedPoint(cell),
        solver,
        eqi.ImplicitAdjoint(linear_solver=linear_solver),
        throw=False,
    )
    return jnp.mean(layer(jnp.zeros_like(x), (w, x)) ** 2)


def data():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(FEATURES, FEATURES))
    return 0.8 * w / np.linalg.norm(w, 2), rng.normal(size=(BATCH, FEATURES))


def reference(cell, w, x):
    """The loss and its gradients by NumPy: iterate long, then solve densely by row."""
    if cell is energy:
        # z = x H⁻¹, so x̄ = 2 z / N H⁻¹ and H̄ = -zᵀ x̄.
        inverse = np.linalg.inv(hessian(w))
        z = x @ inverse
        x_bar = 2 * z / z.size @ inverse
        return np.mean(z**2), (-0.2 * (z.T @ x_bar + x_bar.T @ z), x_bar)
    z, eye = np.zeros_like(x), np.eye(FEATURES)

    def before_tanh(z):
        if cell is dense_cell:
            return z @ w + x
        return 0.5 * z + 0.3 * z.mean(axis=1, keepdims=True) + np.diag(w) + x

    for _ in range(400):
        z = np.tanh(before_tanh(z))
    # z = tanh(z A + ...): the cotangent u of the argument of tanh solves
    # u = (2 z / N + u Aᵀ) (1 - z²).
    a = w if cell is dense_cell else 0.5 * eye + 0.3 / FEATURES
    slope = 1 - z**2
    u = np.stack(
        [np.linalg.solve(eye - s[:, None] * a, s * c)
         for s, c in zip(slope, 2 * z / z.size, strict=True)]
    )  # fmt: skip
    w_bar = z.T @ u if cell is dense_cell else np.diag(u.sum(axis=0))
    return np.mean(z**2), (w_bar, u)


def measure(fn, args, specs, mesh, expected):
    """Compiles `fn` for sharded arguments, runs it, and compares with `expected`.

    Its gradients are asked for in the shardings of the arguments.
    """
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    compiled = (
        jax.jit(fn, in_shardings=shardings, out_shardings=(None, shardings))
        .lower(*args)
        .compile()
    )
    value, grads = compiled(*jax.device_put(args, shardings))
    text = compiled.as_text()
    exact, exact_grads = expected
    errors = [
        float(np.max(np.abs(np.asarray(g) - e)) / np.max(np.abs(e)))
        for g, e in zip(grads, exact_grads, strict=True)
    ]
    return {
        "value_error": float(abs(value - exact)),
        "errors": errors,
        "collectives": hlo.collectives(text),
        "loops": hlo.loops(text),
        "custom_calls": hlo.custom_calls(text),
    }


def jitted(solver, linear_solver, *, cell=dense_cell, specs=(WHOLE, ROWS), devices=8):
    mesh = jax.make_mesh((devices,), ("d",), devices=jax.devices()[:devices])
    mesh = jax.sharding.Mesh(mesh.devices, ("d",))  # automatic sharding
    fn = functools.partial(loss, solver, linear_solver, cell)
    w, x = data()
    return measure(
        jax.value_and_grad(fn, argnums=(0, 1)),
        (w, x),
        specs,
        mesh,
        reference(cell, w, x),
    )


def explicit(solver, linear_solver):
    """A mesh of explicit axes; the layer is entered by `auto_axes`."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))

    @jax.sharding.auto_axes
    def deq(w, x):
        layer = eqi.ImplicitFunction(
            eqi.FixedPoint(dense_cell),
            solver,
            eqi.ImplicitAdjoint(linear_solver=linear_solver),
            throw=False,
        )
        return layer(jnp.zeros_like(x), (w, x))

    def fn(w, x):
        z = deq(w, x, out_sharding=ROWS)
        assert jax.typeof(z).sharding.spec == ROWS
        return jnp.mean(z**2)

    w, x = data()
    with jax.set_mesh(mesh):
        out = measure(
            jax.value_and_grad(fn, argnums=(0, 1)),
            (w, x),
            (WHOLE, ROWS),
            mesh,
            reference(dense_cell, w, x),
        )
    return out


def mapped(solver, linear_solver):
    """`shard_map`: every device solves its own rows."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(WHOLE, ROWS), out_specs=P(), check_vma=False
    )
    def fn(w, x):
        return jax.lax.pmean(loss(solver, linear_solver, dense_cell, w, x), "d")

    w, x = data()
    return measure(
        jax.value_and_grad(fn, argnums=(0, 1)),
        (w, x),
        (WHOLE, ROWS),
        mesh,
        reference(dense_cell, w, x),
    )


def small_states():
    """The largest entry by which mapped and plain gradients of two unknowns differ."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    matrix, x = jnp.array([[0.3, 0.1], [-0.2, 0.4]]), data()[1][:16, :2]
    image = lambda y, a: a[0] @ jnp.tanh(y) + a[1]
    conditions = eqi.FixedPoint(image), eqi.Root(lambda y, a: y - image(y, a))

    def gap(condition):
        layer = eqi.ImplicitFunction(condition, throw=False)

        def total(w, x):
            return jnp.sum(jax.vmap(lambda x: layer(jnp.zeros(2), (w, x)))(x))

        def mapped_total(w):
            fn = lambda w, x: jax.lax.psum(total(w, x), "d")
            specs = {"in_specs": (P(), P("d")), "out_specs": P()}
            return jax.shard_map(fn, mesh=mesh, check_vma=False, **specs)(w, x)

        mapped_gradient = jax.jit(jax.grad(mapped_total))(matrix)
        plain = jax.jit(jax.grad(lambda w: total(w, x)))(matrix)
        return float(jnp.max(jnp.abs(mapped_gradient - plain)))

    return [gap(condition) for condition in conditions]


def extrema():
    """The largest entry by which mapped and plain gradients of default minima differ.

    Of few and of many unknowns: in closed form, and by Cholesky. On a mesh of one
    device: simulated devices that are more than the cores may wait for each other here.
    """
    mesh = jax.make_mesh(
        (1,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]
    )
    conditions = (
        eqi.Minimum(lambda y, a: jnp.sum((y - a) ** 2 + 0.1 * y**4)),
        eqi.LeastSquares(lambda y, a: (y - a, 0.3 * y**2)),
    )

    def gap(condition, size):
        layer = eqi.ImplicitFunction(condition, throw=False)

        def total(x):
            return jnp.sum(jax.vmap(lambda x: layer(jnp.ones(size), x))(x))

        x = jnp.linspace(1.0, 2.0, 8 * size).reshape(8, size)
        specs = {"in_specs": P("d"), "out_specs": P("d"), "check_vma": False}
        mapped_gradient = jax.jit(jax.shard_map(jax.grad(total), mesh=mesh, **specs))(x)
        return float(jnp.max(jnp.abs(mapped_gradient - jax.jit(jax.grad(total))(x))))

    return [gap(condition, size) for condition in conditions for size in (2, 40)]


def checked_mapping():
    """What `shard_map` says with its check of varying values on, or `None`."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    def solve(x):
        layer = eqi.ImplicitFunction(
            eqi.FixedPoint(lambda y, x: 0.5 * jnp.cos(y) + x), throw=False
        )
        return layer(jnp.zeros_like(x), x)

    try:
        jax.eval_shape(solve, jnp.ones(8))
    except TypeError as error:
        return str(error)
    return None


def waiting():
    """Evaluations of the function on each device, where some lanes need more."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rates = jnp.linspace(0.1, 0.95, 8)
    counts = collections.Counter()

    def solve(rate, device, counted):
        def fn(y, args):
            if counted:
                jax.debug.callback(lambda i: counts.update([int(i)]), args[1][0])
            return args[0] * jnp.cos(y)

        layer = eqi.ImplicitFunction(
            eqi.FixedPoint(fn), optx.FixedPointIteration(**TOL), throw=False
        )
        solution = layer.solve(jnp.zeros_like(rate), (rate, device))
        return solution.value, solution.stats["num_steps"][None]

    def over_devices(counted):
        fn = functools.partial(solve, counted=counted)
        specs = (P("d"), P("d"))
        return jax.jit(
            jax.shard_map(
                fn, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False
            )
        )

    devices = jnp.arange(8)
    _, steps = over_devices(True)(rates, devices)
    jax.block_until_ready(steps)
    jax.effects_barrier()
    text = over_devices(False).lower(rates, devices).compile().as_text()
    alone = [int(solve(rates[i : i + 1], devices, False)[1][0]) for i in range(8)]
    _, together = jax.jit(functools.partial(solve, counted=False))(rates, devices)
    return {
        "steps": [int(n) for n in steps],
        "evaluations": [counts[i] for i in range(8)],
        "alone": alone,
        "together": int(together[0]),
        "collectives": hlo.kinds(text),
    }


def chain(spec, devices, size=4096, solver=None):
    """A state in which neighbours see each other, by the default linear solver."""
    mesh = jax.make_mesh((devices,), ("d",), devices=jax.devices()[:devices])
    mesh = jax.sharding.Mesh(mesh.devices, ("d",))
    coupling = 0.3
    solver = PICARD if solver is None else solver

    def cell(z, x):
        wide = jnp.pad(z, 1)
        return jnp.tanh(coupling * (wide[:-2] - wide[2:]) + x)

    def fn(x):
        layer = eqi.ImplicitFunction(eqi.FixedPoint(cell), solver, throw=False)
        return jnp.sum(layer(jnp.zeros_like(x), x) ** 2)

    x = np.random.default_rng(0).normal(size=size)
    z = np.zeros(size)
    for _ in range(200):
        wide = np.pad(z, 1)
        z = np.tanh(coupling * (wide[:-2] - wide[2:]) + x)
    # u = (2 z + Bᵀ u) (1 - z²), with B the coupling.
    u, slope = np.zeros(size), 1 - z**2
    for _ in range(200):
        wide = np.pad(u, 1)
        u = (2 * z + coupling * (wide[2:] - wide[:-2])) * slope
    gradient = lambda x: (fn(x), (jax.grad(fn)(x),))
    return measure(gradient, (x,), (spec,), mesh, (np.sum(z**2), (u,)))


def placements():
    """What the compiler says of programs for one device and for several."""
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=(AxisType.Auto,) * 2)
    split = jax.device_put(jnp.zeros(8), NamedSharding(mesh, P("d")))
    answer = lambda x: by_placement(lambda x: x + 1, lambda x: x, x)

    def mapped(axes):
        specs = {"in_specs": P("d"), "out_specs": P("d"), "axis_names": axes}
        return jax.shard_map(answer, mesh=mesh, check_vma=False, **specs)

    found = {
        "one": jax.jit(answer)(jnp.zeros(8)),
        "several": jax.jit(answer)(split),
        "mapped": jax.jit(mapped({"d", "e"}))(split),
        "mapped in part": jax.jit(mapped({"d"}))(split),
    }
    return {name: float(jnp.max(x)) for name, x in found.items()}


def host_calls(throw):
    """The custom calls of one unsharded solve."""
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(dense_cell), optx.FixedPointIteration(**TOL), throw=throw
    )
    w, x = data()
    compiled = jax.jit(lambda w, x: layer(jnp.zeros_like(x), (w, x))).lower(w, x)
    return hlo.custom_calls(compiled.compile().as_text())


PICARD = optx.FixedPointIteration(**TOL)
KRYLOV = eqi.HybridKrylov(rtol=1e-12)
TIGHT = {"rtol": 0.0, "atol": 1e-13}

CASES = {
    "jit, rows, Anderson, HybridKrylov": lambda: jitted(eqi.Anderson(**TOL), KRYLOV),
    "jit, rows, Broyden, Neumann": lambda: jitted(
        eqi.Broyden(**TOL), eqi.Neumann(rtol=1e-12)
    ),
    "jit, rows, AutoFixedPoint, BiCGStab": lambda: jitted(
        eqi.AutoFixedPoint(**TOL), lx.BiCGStab(1e-12, 1e-12)
    ),
    "jit, features without a matrix, Anderson, HybridKrylov": lambda: jitted(
        eqi.Anderson(**TOL), KRYLOV, cell=coupled_cell, specs=(WHOLE, COLUMNS)
    ),
    "jit, rows, sharded parameters, Picard, NormalCG": lambda: jitted(
        PICARD, eqi.NormalCG(rtol=1e-12), specs=(ROWS, ROWS)
    ),
    "jit, features with a matrix, Broyden, HybridKrylov": lambda: jitted(
        eqi.Broyden(**TOL), KRYLOV, specs=(COLUMNS, COLUMNS)
    ),
    "jit, rows, FIRE, HybridKrylov": lambda: jitted(
        eqi.FIRE(**TIGHT), KRYLOV, cell=energy
    ),
    "explicit, rows, AutoFixedPoint, AutoLinearSolver": lambda: explicit(
        eqi.AutoFixedPoint(**TOL), eqi.AutoLinearSolver(rtol=1e-12)
    ),
    "shard_map, rows, AutoFixedPoint, AutoLinearSolver": lambda: mapped(
        eqi.AutoFixedPoint(**TOL), eqi.AutoLinearSolver(rtol=1e-12)
    ),
}


def main():
    report = {"cases": {name: case() for name, case in CASES.items()}}
    report["direct"] = jitted(PICARD, eqi.DirectLU())
    small = eqi.AutoLinearSolver(rtol=1e-12, fallback_size=4096)
    report["with_fallback"] = jitted(PICARD, small)
    report["two_devices"] = jitted(eqi.Anderson(**TOL), KRYLOV, devices=2)
    report["waiting"] = waiting()
    report["checked_mapping"] = checked_mapping()
    report["small_states"] = small_states()
    report["extrema"] = extrema()
    report["chain"] = {devices: chain(P("d"), devices) for devices in (1, 8)}
    auto = eqi.AutoFixedPoint(**TOL)
    report["short_chain"] = {n: chain(P("d"), 8, n, auto) for n in (40, 504)}
    report["placements"] = placements()
    report["host_calls"] = {str(t): host_calls(t) for t in (False, True)}
    print(json.dumps(report))


def table():
    solvers = {
        "Picard": PICARD,
        "Anderson": eqi.Anderson(**TOL),
        "Broyden": eqi.Broyden(**TOL),
        "AutoFixedPoint": eqi.AutoFixedPoint(**TOL),
    }
    for name, solver in solvers.items():
        for devices in (1, 2, 4, 8):
            out = jitted(solver, KRYLOV, devices=devices)
            print(name, devices, json.dumps(out["loops"]), flush=True)
    for devices in (1, 2, 4, 8):
        out = jitted(eqi.FIRE(**TIGHT), KRYLOV, cell=energy, devices=devices)
        print("FIRE", devices, json.dumps(out["loops"]), flush=True)


def configure():
    flags = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    assert jax.device_count() == 8


if __name__ == "__main__":
    configure()
    table() if sys.argv[1:] == ["table"] else main()
