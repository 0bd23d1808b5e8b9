"""Sums and maxima, beside NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqximplicit._entries import all_finite, every, max_abs, peak
from eqximplicit._reduce import anywhere, largest, total
from eqximplicit.linear_solvers._residual import dot

SHAPES = [
    *[(), (0,), (1,), (3,), (16,), (17,), (33,), (1000,), (1025,), (4095,), (5000,)],
    *[(5, 3), (3, 40), (40, 3), (2, 3, 4), (2, 50, 40), (3, 2000)],
]
DRAW = np.random.default_rng(3)


def axes_of(shape):
    every_one = tuple(range(len(shape)))
    return [
        None,
        every_one,
        *every_one,
        *[-1][: len(shape)],
        *[every_one[1:]][: len(shape) > 1],
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_sum_and_maximum(shape, dtype):
    x = jnp.asarray(DRAW.normal(size=shape), dtype)
    exact = np.asarray(x, np.float64)
    rtol = 1e-2 if dtype == "bfloat16" else 1e-5
    for axis in axes_of(shape):
        both = lambda x, axis=axis: (total(x, axis), largest(jnp.abs(x), axis))
        found, top = jax.jit(both)(x)
        assert found.dtype == top.dtype == x.dtype
        np.testing.assert_allclose(
            np.asarray(found, np.float64), exact.sum(axis=axis), rtol, atol=rtol
        )
        np.testing.assert_array_equal(
            np.asarray(top, np.float64), np.abs(exact).max(axis=axis, initial=0)
        )


@pytest.mark.parametrize("n", [1, 5, 16, 17, 100, 1000, 4095, 5000])
def test_one_entry_that_is_not_finite_is_seen_wherever_it_is(n):
    for value in (np.nan, np.inf, -np.inf):
        for place in (0, n // 2, n - 1):
            x = jnp.ones(n).at[place].set(value)
            assert np.isnan(jax.jit(peak)(x))
            assert not jax.jit(lambda x: every(jnp.isfinite(x)))(x)
    assert every(jnp.isfinite(jnp.ones(n)))


def test_derivatives_and_lanes():
    x = jnp.asarray(DRAW.normal(size=(7, 6)))
    np.testing.assert_array_equal(jax.grad(lambda x: total(x[0]))(x)[0], np.ones(6))
    np.testing.assert_allclose(jax.vmap(total)(x), np.asarray(x).sum(1))
    np.testing.assert_allclose(jax.vmap(largest)(x**2), (np.asarray(x) ** 2).max(1))
    transposed = jax.linear_transpose(lambda x: total(x, 1), x)
    np.testing.assert_array_equal(
        transposed(jnp.arange(7.0))[0], np.arange(7.0)[:, None] * np.ones(6)
    )
    second = jax.vmap(lambda x: total(x, 0), in_axes=1, out_axes=1)
    cube = jnp.asarray(DRAW.normal(size=(3, 4, 5)))
    np.testing.assert_allclose(second(cube), np.asarray(cube).sum(0).T)


@pytest.mark.parametrize("n", [1, 16, 32, 33, 100, 4095, 5000])
def test_flags_that_are_set_anywhere(n):
    flags = lambda *places: jnp.zeros(n, bool).at[jnp.array(places, int)].set(True)
    found = jax.jit(anywhere)(flags(), flags(n - 1), flags(n // 2, 0))
    assert [bool(x) for x in found] == [False, True, True]
    rows = jnp.stack([flags(), flags(n // 3)])
    (first, second) = jax.jit(jax.vmap(anywhere))(rows, ~rows)
    np.testing.assert_array_equal(first, [False, True])
    np.testing.assert_array_equal(second, [True, n > 1])


@pytest.mark.parametrize("n", [33, 100, 1000, 4095])
def test_one_kernel_where_the_compiler_makes_three(n):
    def windows(fn):
        program = jax.jit(fn).lower(jnp.ones(n)).compile().as_text()
        return program.count(" reduce-window(")

    assert windows(jnp.sum) >= 1  # else there is no need for `_reduce.py`
    assert windows(total) == windows(peak) == 0
    assert windows(lambda x: anywhere(x > 0, x < 0)) == 0


# --- Several leaves -------------------------------------------------------------------

KERNELS = (" fusion(", " call(", " dot(", " reduce(", " copy(")
TREES = [
    *[((40,), (40,), (40,)), ((17, 3), (), (20,)), ((40,), (0,), (40,))],
    *[((3,), (4,)), ((30,), (40,), (5000,)), ((600,), (600,))],
]


def tree_of(shapes, dtype="float64"):
    draw = np.random.default_rng(len(shapes))
    return [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in tree])


@pytest.mark.parametrize("shapes", TREES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_leaves_together(shapes, dtype):
    tree = tree_of(shapes, dtype)
    product, top = jax.jit(lambda x: (dot(x, x), max_abs(x)))(tree)
    assert product.dtype == top.dtype == dtype
    np.testing.assert_allclose(product, (flat(tree) ** 2).sum(), rtol=1e-5)
    assert float(top) == np.abs(flat(tree)).max()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_leaf_that_is_not_finite_is_seen_beside_others(value):
    tree, seen = tree_of(TREES[0]), jax.jit(lambda x: (all_finite(x), max_abs(x)))
    assert seen(tree)[0]
    for number, place in ((0, 0), (1, 20), (2, 39)):
        bad = list(tree)
        bad[number] = tree[number].at[place].set(value)
        finite, top = seen(bad)
        assert not finite
        assert np.isnan(top)


@pytest.mark.parametrize("lanes", [3, 300])
def test_lanes_of_leaves_together(lanes):
    first, second = tree_of([(lanes, 40), (30,)])
    third = jnp.asarray(DRAW.normal(size=(20, lanes)))

    def found(*leaves):
        return dot(leaves, leaves), max_abs(leaves), all_finite(leaves)

    bad = first.at[1, 7].set(jnp.nan)
    lane_by_lane = jax.jit(jax.vmap(found, (0, None, 1)))
    square, top, finite = lane_by_lane(bad, second, third)
    rows = [flat([bad[i], second, third[:, i]]) for i in range(lanes)]
    np.testing.assert_allclose(square, [(row**2).sum() for row in rows])
    worst = [np.abs(row).max() for row in rows]  # NaN of a row that has one
    np.testing.assert_array_equal(top, worst)
    np.testing.assert_array_equal(finite, np.isfinite(worst))
    nested = jax.jit(jax.vmap(jax.vmap(found, (None, 0, None)), (None, None, 1)))
    square, _, finite = nested(second[:20], jnp.stack([second, 2 * second]), third)
    total = (flat([second[:20]]) ** 2).sum() + (flat([third[:, 1]]) ** 2).sum()
    np.testing.assert_allclose(square[1, 1], total + 4 * (flat([second]) ** 2).sum())
    assert finite.all()


def test_derivatives_of_leaves_together():
    tree = tree_of(TREES[0])
    np.testing.assert_allclose(
        flat(jax.grad(lambda x: dot(x, x))(tree)), 2 * flat(tree)
    )
    ones = [jnp.ones_like(x) for x in tree]
    value, slope = jax.jvp(lambda x: dot(x, ones), (tree,), (ones,))
    np.testing.assert_allclose(value, flat(tree).sum())
    assert slope == 120
    largest_at = np.abs(flat(tree)).argmax()
    slopes = flat(jax.jit(jax.grad(max_abs))(tree))
    assert slopes[largest_at] == np.sign(flat(tree)[largest_at])
    assert np.count_nonzero(slopes) == 1


def test_leaves_together_are_one_kernel():
    def kernels(fn, *shapes):
        program = jax.jit(fn).lower(tree_of(shapes)).compile().as_text()
        entry = program[program.index("ENTRY ") :]
        return sum(op in line for line in entry.splitlines() for op in KERNELS)

    square = lambda x: dot(x, x)
    for fn in (max_abs, square, all_finite):
        assert kernels(fn, *TREES[0]) <= kernels(fn, (120,)) <= 2
