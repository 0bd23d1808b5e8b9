"""Small loops as one kernel: the same numbers, and only where XLA can make one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax import lax

import eqximplicit as eqi
from eqximplicit import _one_kernel
from eqximplicit._one_kernel import in_one_kernel

# Other versions of XLA get no marks; the numbers are the same.
KNOWN = _one_kernel._is_known()
MARK = 'xla_cpu_small_call="true"'
N = 20


def draw(shape, dtype=jnp.float64, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x = x + 1j * rng.normal(size=shape)
    return jnp.asarray(x, dtype)


def looped(fn, y, *args, steps=3):
    """`fn` a few times, with a sum that an optimisation cannot foresee."""
    keep = lambda new: jax.tree.map(lambda a, b: a.astype(b.dtype), new, y)
    return lax.fori_loop(0, steps, lambda _, y: keep(fn(y, *args)), y)


def both(fn, *args):
    """The results of a loop over `fn` with and without a kernel, and the program."""
    kernel = jax.jit(lambda *args: in_one_kernel(lambda: looped(fn, *args)))
    compiled = kernel.lower(*args).compile()
    plain = jax.jit(lambda *args: looped(fn, *args))(*args)
    return compiled(*args), plain, compiled.as_text()


def is_marked(program):
    """Whether a call has both attributes: XLA gives the second one to loops alone."""
    return bool(marked_calls(program))


def marked_calls(program):
    calls = [line for line in program.splitlines() if " call(" in line]
    return [line for line in calls if MARK in line and 'inlineable="false"' in line]


def assert_same(got, wanted, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = (np.asarray(x).astype(np.complex128) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


INDICES = jnp.asarray(np.random.default_rng(1).integers(0, N, N))
FUNCTIONS = {
    "dense layer": lambda y: jnp.tanh(draw((N, N)).astype(y.dtype) @ y / N),
    "row times matrix": lambda y: jnp.tanh(y @ draw((N, N)).astype(y.dtype) / N),
    "batched": lambda y: (
        jnp.einsum("bij,bj->bi", draw((4, 5, 5)), y.reshape(4, 5)).ravel() / 9
    ),
    "inner product": lambda y: y / (1 + jnp.vdot(y, y)),
    "softmax": jax.nn.softmax,
    "norms": lambda y: y / (jnp.max(jnp.abs(y)) + jnp.linalg.norm(y) + jnp.var(y)),
    "axis sums": lambda y: (y.reshape(4, 5) - y.reshape(4, 5).mean(1)[:, None]).ravel(),
    "shapes": lambda y: jnp.roll(y, 1) / 2 + jnp.pad(y[1:-1], 1)[::-1] / 3,
    "concatenated": lambda y: (
        jnp.concatenate([y[5:], y[:5] / 2]).reshape(4, 5).T.ravel()
    ),
    "gather": lambda y: y[INDICES] / 2,
    "sliced": lambda y: y / 2 + lax.dynamic_slice(y, (jnp.argmax(y),), (1,)),
    "updated": lambda y: lax.dynamic_update_slice(y / 2, y[:2], (jnp.argmin(y),)),
    "cond": lambda y: lax.cond(y[0] > 0, lambda y: y / 2, lambda y: -jnp.sin(y), y),
    "switch": lambda y: lax.switch(
        jnp.argmax(y), [lambda y: y / 2, jnp.sin, lambda y: y + 1], y
    ),
    "scan": lambda y: lax.scan(lambda c, x: (c / 2 + x, c), y[0], y)[1] / 2,
    "while": lambda y: lax.while_loop(lambda y: jnp.max(y) > 0.1, lambda y: y / 2, y),
    "elementwise": lambda y: jnp.exp(-(y**2)) + jnp.log1p(jnp.abs(y)) * jnp.cos(y),
    "powers": lambda y: jnp.where(y > 0, jnp.abs(y) ** 1.3, -y / 3) + jnp.cbrt(y),
    "special": lambda y: jax.scipy.special.erf(y) + jax.scipy.special.gammaln(2 + y**2),
    "rounded": lambda y: jnp.floor(y) / 2 + jnp.round(y) / 3 + jnp.mod(y, 0.3),
    "integers": lambda y: y / 2 + ((y * 8).astype(int) // 3 % 4 << 1).astype(y.dtype),
    "sorted": lambda y: jnp.sort(y) / 2,
    "scattered": lambda y: y.at[INDICES].add(1) / 2,
    "product of matrices": lambda y: (draw((N, N)) @ draw((N, N), seed=2) @ y) / N**2,
    "matrix state": lambda y: jnp.tanh(jnp.outer(y, y) @ jnp.outer(y, y))[0],
    "cumulative": lambda y: jnp.cumsum(y) / N,
    "convolution": lambda y: jnp.convolve(y, y[:3], mode="same") / 9,
    "solve": lambda y: jnp.linalg.solve(draw((N, N)) + N * jnp.eye(N), y),
    "eigenvalues": lambda y: jnp.linalg.eigvalsh(jnp.outer(y, y)) / N,
    "fft": lambda y: jnp.fft.fft(y).real / N,
    "callback": lambda y: jax.pure_callback(
        lambda y: y / 2, y, y, vmap_method="sequential"
    ),
}
NEVER = (
    "product of matrices",
    "sorted",
    "scattered",
    "matrix state",
    "cumulative",
    "convolution",
    "solve",
)
NEVER += ("eigenvalues", "fft", "callback")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_are_those_of_the_plain_program(name):
    got, wanted, program = both(FUNCTIONS[name], draw(N))
    assert_same(got, wanted, 1e-12)
    assert is_marked(program) == (KNOWN and name not in NEVER)


DTYPES = ("float16", "bfloat16", "float32", "complex64", "complex128")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["row times matrix", "norms", "elementwise"])
def test_any_dtype(name, dtype):
    fn = FUNCTIONS[name]
    if "complex" in dtype and name != "row times matrix":
        fn = lambda y: jnp.exp(-(y**2)) / (2 + y) + jnp.sqrt(y) / jnp.sum(y)
    got, wanted, program = both(fn, draw(N, dtype))
    assert_same(got, wanted, 20 * float(jnp.finfo(dtype).eps))
    assert is_marked(program) == KNOWN


@pytest.mark.parametrize("size", [1, 63, 64, 181, 300, 400])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_matrices_of_any_size(size, dtype):
    matrix, y = draw((size, size), dtype) / size, draw(size, dtype)
    got, wanted, _ = both(lambda y, a: jnp.tanh(a @ y), y, matrix)
    assert_same(got, wanted, 20 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 5000, 20_000])
@pytest.mark.parametrize("fn", [jnp.sum, jnp.max, jnp.any, jnp.linalg.norm])
def test_reductions_of_any_size(size, fn):
    y = draw(size)
    if fn is jnp.max and size == 0:
        return
    part = lambda y: fn(y).astype(y.dtype) / (1 + size)
    got, wanted, _ = both(lambda y: y / 2 + part(y), y)
    assert_same(got, wanted, 1e-10)


def contraction(matrix, y):
    return lax.while_loop(
        lambda c: c[1] < 30, lambda c: (jnp.tanh(c[0] @ matrix + y), c[1] + 1), (y, 0)
    )[0]


KERNEL = lambda matrix, y: in_one_kernel(lambda: contraction(matrix, y))
CONSTANT = np.asarray(draw((50, 50))) / 50
# XLA moves constants into the function that is called, whose argument is left without
# a place, and ends the process where a kernel is made of it.
CONTEXTS = {
    "constant": lambda y: KERNEL(jnp.asarray(CONSTANT), y),
    "folded": lambda y: KERNEL(2 * jnp.asarray(CONSTANT).T, y),
    "all constant": lambda y: y + KERNEL(jnp.asarray(CONSTANT), jnp.ones(50)),
    "of zeros": lambda y: KERNEL(jnp.zeros((50, 50)), y),
    "twice": lambda y: KERNEL(jnp.asarray(CONSTANT), KERNEL(jnp.asarray(CONSTANT), y)),
    "scan": lambda y: lax.scan(
        lambda y, _: (KERNEL(jnp.asarray(CONSTANT), y), None), y, None, length=3
    )[0],
    "cond": lambda y: lax.cond(
        y[0] > 9, lambda y: y, lambda y: KERNEL(jnp.asarray(CONSTANT), y), y
    ),
    "given back": lambda y: in_one_kernel(
        lambda: (contraction(jnp.asarray(CONSTANT), y), jnp.asarray(CONSTANT), y)
    )[0],
    "unused": lambda y: in_one_kernel(
        lambda: contraction(jnp.asarray(CONSTANT), y) + jnp.where(False, y[::-1], 0)
    ),
    "nested": lambda y: in_one_kernel(lambda: KERNEL(jnp.asarray(CONSTANT), y) + 1),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_constants_and_surroundings(name, monkeypatch):
    y, fn = draw(50), CONTEXTS[name]
    compiled = jax.jit(fn).lower(y).compile()
    assert is_marked(compiled.as_text()) == KNOWN
    monkeypatch.setattr(_one_kernel, "_is_known", lambda: False)
    plain = jax.jit(lambda y: fn(y)).lower(y).compile()
    assert not is_marked(plain.as_text())
    assert_same(compiled(y), plain(y), 1e-12)
    assert_same(fn(y), plain(y), 1e-12)  # without jit


# XLA finds that `t` is of no use: no kernel has an argument like that.
SUPERFLUOUS = {
    "unused": lambda y, t: 0.0 * y[0],
    "dead": lambda y, t: (jnp.where(t > 0, 1.0, 2.0), y[0])[1],
    "never chosen": lambda y, t: jnp.where(False, t, y[0]),
    "branch": lambda y, t: lax.cond(jnp.bool_(True), lambda t: 0.1, lambda t: t, t),
    "times zero": lambda y, t: (t.astype(int) * 0).astype(float),
    "no entry": lambda y, t: jnp.sum(jnp.broadcast_to(t, (0,))),
    "of one entry": lambda y, t: y[:1][jnp.clip(t.astype(int), 0, 0)],
    "to the power zero": lambda y, t: t**0,
    "loop": lambda y, t: lax.fori_loop(
        *(0, 3, lambda _, c: (c[0] / 2, c[1] * 2), (y[0], t))
    )[0],
}


@pytest.mark.parametrize("name", SUPERFLUOUS)
def test_superfluous_arguments(name):
    step = SUPERFLUOUS[name]
    fn = lambda y, args: jnp.cos(y) * args[0] + 0.1 * step(y, args[1])
    solver = optx.FixedPointIteration(1e-9, 1e-9)
    layer = eqi.ImplicitFunction(eqi.FixedPoint(fn), solver, throw=False)
    solve = lambda a, t: layer(jnp.ones(2), (a, t))
    a, t = jnp.asarray(0.3), jnp.asarray(2.0)
    y = solve(a, t)  # without jit all of it is the kernel
    np.testing.assert_allclose(fn(y, (a, t)), y, atol=1e-8)
    lanes = jax.jit(jax.vmap(solve, in_axes=(0, None)))(jnp.stack([a, a]), t)
    assert_same(lanes, jnp.stack([y, y]), 1e-12)
    gradient = jax.grad(lambda a, t: jnp.sum(solve(a, t)), argnums=(0, 1))
    assert_same(jax.jit(gradient)(a, t), gradient(a, t), 1e-9)
    assert gradient(a, t)[1] == 0


@pytest.mark.parametrize("other", [True, 3, 1j, np.zeros(0)])
def test_arguments_of_any_kind(other):
    fn = lambda y, args: jnp.cos(y) * args[0]
    args = jnp.asarray(0.3), jnp.asarray(other)
    solver = optx.FixedPointIteration(1e-9, 1e-9)
    y = eqi.ImplicitFunction(eqi.FixedPoint(fn), solver)(jnp.ones(2), args)
    np.testing.assert_allclose(fn(y, args), y, atol=1e-8)


def test_under_transformations():
    matrix, y = jnp.asarray(CONSTANT), draw(50)
    lanes = jnp.stack([y, 2 * y, -y])
    wanted = jnp.stack([contraction(matrix, lane) for lane in lanes])
    assert_same(jax.jit(jax.vmap(KERNEL, (None, 0)))(matrix, lanes), wanted, 1e-12)
    mapped = jax.jit(lambda ys: lax.map(lambda y: KERNEL(matrix, y), ys))
    assert_same(mapped(lanes), wanted, 1e-12)
    found = jax.jvp(lambda y: KERNEL(matrix, y), (y,), (jnp.ones(50),))
    assert_same(
        found, jax.jvp(lambda y: contraction(matrix, y), (y,), (jnp.ones(50),)), 1e-12
    )


def test_lanes_of_any_number_and_axis_of_one_program():
    matrix = draw((N, N), seed=1) / N
    step = lambda y, scale: jnp.sin(matrix @ y) * scale
    plain = lambda y, scale: looped(step, y, scale)
    # A program that JAX keeps, and what it contains with it.
    kernel = jax.jit(lambda y, scale: in_one_kernel(lambda: plain(y, scale)))
    for lanes, axes in ((3, (0, 0)), (5, (0, 0)), (5, (1, 0)), (5, (0, None))):
        shape = (lanes, N) if axes[0] == 0 else (N, lanes)
        args = draw(shape), draw((lanes,), seed=2) if axes[1] == 0 else jnp.asarray(2.0)
        assert_same(jax.vmap(kernel, axes)(*args), jax.vmap(plain, axes)(*args), 1e-14)


def test_a_branch_under_vmap_is_batched_once():
    sizes = []
    scaled = jax.custom_batching.custom_vmap(jnp.multiply)

    @scaled.def_vmap
    def _(size, batched, y, scale):
        sizes.append(size)
        return y * scale[:, None], True

    def branch(y, scale):
        loop = lambda: looped(jnp.sin, scaled(y, scale))
        return lax.cond(jnp.asarray(True), lambda: in_one_kernel(loop), lambda: y)

    jax.make_jaxpr(jax.vmap(branch))(draw((7, N)), draw((7,)))
    assert sizes == [7]  # where the rule of `cond` asks twice


def test_what_does_not_depend_on_the_lane_has_none():
    def fn(y):
        return in_one_kernel(
            lambda: (contraction(jnp.asarray(CONSTANT), y), jnp.ones(3))
        )

    lanes = jnp.stack([draw(50), draw(50, seed=1)])
    _, ones = jax.vmap(fn, out_axes=(0, None))(lanes)
    assert ones.shape == (3,)


def test_what_nobody_reads_is_not_computed():
    def fn(y):
        wanted, other = in_one_kernel(lambda: (looped(jnp.sin, y), looped(jnp.cos, y)))
        del other
        return wanted

    program = jax.jit(fn).lower(draw(N)).as_text()
    assert "sine" in program
    assert "cosine" not in program


def test_a_layer_is_one_kernel_and_a_rule_with_a_loop_another():
    matrix = draw((N, N)) / N
    layer = eqi.ImplicitFunction(
        eqi.FixedPoint(lambda z, x: jnp.tanh(z @ matrix + x)),
        eqi.Broyden(rtol=1e-9, atol=1e-9),
        eqi.ImplicitAdjoint(eqi.Neumann(rtol=1e-9)),
    )
    loss = lambda x: jnp.sum(layer(jnp.zeros(N), x) ** 2)
    program = jax.jit(jax.grad(loss)).lower(draw(N)).compile().as_text()
    assert len(marked_calls(program)) == 2 * KNOWN


def test_a_program_for_other_platforms_or_of_unknown_size_has_no_marks():
    y = draw(50)
    on_cpu = jax.export.export(jax.jit(CONTEXTS["constant"]), platforms=("cpu",))(y)
    assert bool(re.search("small_call", on_cpu.mlir_module())) == KNOWN
    both_platforms = jax.export.export(
        jax.jit(CONTEXTS["constant"]), platforms=("cpu", "cuda")
    )(y)
    assert not re.search("small_call", both_platforms.mlir_module())
    (n,) = jax.export.symbolic_shape("n")
    loop = jax.jit(lambda y: in_one_kernel(lambda: looped(jnp.sin, y)))
    exported = jax.export.export(loop)(jax.ShapeDtypeStruct((n,), y.dtype))
    assert not re.search("small_call", exported.mlir_module())
    assert_same(exported.call(y), looped(jnp.sin, y), 1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [("EQXIMPLICIT_ONE_KERNEL", "0"), ("XLA_FLAGS", "--xla_cpu_use_onednn=true")],
)
def test_the_environment_may_forbid_it(name, value, monkeypatch):
    fresh = _one_kernel._is_known.__wrapped__
    assert fresh() == KNOWN
    monkeypatch.setenv(name, value)
    assert not fresh()


@pytest.mark.parametrize("n", [2, 10, 100])
def test_opening_and_what_goes_on_from_there_are_a_kernel_each(n):
    # The second is what a first call by default waits for: see `docs/design.md`.
    matrix = 0.5 * draw((n, n)) / n**0.5
    fn = lambda y, a: jnp.tanh(matrix @ y + a)
    layer = eqi.ImplicitFunction(eqi.FixedPoint(fn), throw=False)
    solve = jax.jit(lambda a: layer(jnp.zeros(n), a))
    program = solve.lower(jnp.ones(n)).compile().as_text()
    assert len(marked_calls(program)) == 2 * KNOWN
