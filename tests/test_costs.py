"""What a derivative costs, counted in the program, compiled or not.

Nothing here is timed: operations, temporary bytes and compilations are the same on any
machine. The opponent is the `custom_vjp` that one would write by hand.
"""

import functools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqximplicit as eqi
from eqximplicit import _one_kernel

N = 40  # above the size up to which the default solves densely at once
STEPS = (100, 1_000, 10_000, 100_000)
DRAW = np.random.default_rng(0)
W = DRAW.normal(size=(N, N)) / (2 * np.sqrt(N))
X = DRAW.normal(size=N)
TOL = 1e-8
# 2.7 times the lines by hand: the rule adds what turns a failed solve into NaN, the
# function is linearised once for the solve and once for the parameters, and what an
# optimistix solver claims is held against the residual.
LINES = 3.0


def cell(z, theta):
    w, x = theta
    return jnp.tanh(w @ z + x)


def layer_of(solver=None, linear_solver=None, **kwargs):
    adjoint = None if linear_solver is None else eqi.ImplicitAdjoint(linear_solver)
    condition = eqi.FixedPoint(cell)
    return eqi.ImplicitFunction(condition, solver, adjoint, throw=False, **kwargs)


def picard():
    return optx.FixedPointIteration(rtol=TOL, atol=TOL)


def text(fn, *args):
    return jax.jit(fn).lower(*args).as_text()


def kernels(fn, *args):
    """How many there are, with the calls of libraries."""
    program = jax.jit(fn).lower(*args).compile().as_text()
    return len(re.findall(r" (?:fusion|dot|copy|custom-call)\(", program))


def loops(fn, *args):
    """How many the compiler keeps."""
    return jax.jit(fn).lower(*args).compile().as_text().count(" while(")


# LAPACK's names of LU, Cholesky, QR, and of eigen- and singular values.
NAMES = "getrf|potrf|geqrf|syevd|gesdd"
FACTORISATION = re.compile(
    rf'= \(?f64\[([\d,]+)\][^\n]*custom_call_target="lapack_d(?:{NAMES})_'
)


def factorisations(fn, *args):
    """Matrices that are factorised: each lane of a batch counts, and each branch."""
    program = jax.jit(fn).lower(*args).compile().as_text()
    shapes = [shape.split(",") for shape in FACTORISATION.findall(program)]
    return sum(math.prod(map(int, shape[:-2])) for shape in shapes)


def temp_bytes(fn, *args):
    memory = jax.jit(fn).lower(*args).compile().memory_analysis()
    return memory.temp_size_in_bytes


@functools.cache
def default_program(n):
    """The default solve of `n` unknowns, without a derivative."""
    w = DRAW.normal(size=(n, n)) / (2 * np.sqrt(n))
    solve = lambda x: layer_of()(jnp.zeros(n), (jnp.asarray(w), x))
    return jax.jit(solve).lower(jnp.ones(n)).compile().as_text()


def test_a_branch_not_taken_holds_few_masks():
    # There were seventy: each constant of a program is laid out in each call.
    program = default_program(100)
    assert "conditional(" in program
    masks = re.findall(r"= pred\[\d+\]\S* constant\(", program)
    assert len(masks) < 10


# What is neither a kernel nor a copy.
FREE = "parameter|constant|tuple|get-tuple-element|bitcast"


@pytest.mark.parametrize("n", [10, 100], ids=["Anderson", "plain"])
def test_the_opening_is_one_kernel(n):
    program = default_program(n)
    entry = program[program.index("\nENTRY") :]
    assert " while(" not in entry
    (call,) = re.findall(r" call\([^\n]*to_apply=%([\w.]+),[^\n]*small_call", entry)
    start = program.index(f"\n%{call} (")
    assert " while(" in program[start : program.index("\n}", start)]


@pytest.mark.parametrize("n", [10, 100], ids=["Anderson", "plain"])
def test_the_loop_of_the_opening_is_short(n, monkeypatch):
    # Where it is not one kernel, as for a function that multiplies matrices.
    monkeypatch.setattr(_one_kernel, "_is_known", lambda: False)
    program = default_program.__wrapped__(n)
    (body,) = re.findall(
        r" while\(.*body=%([\w.]+)", program[program.index("\nENTRY") :]
    )
    start = program.index(f"\n%{body} (")
    lines = program[start : program.index("\n}", start)]
    assert "tanh" in lines
    work = re.findall(rf"= \S+ (?!(?:{FREE})\()([a-z-]+)\(", lines)
    assert 0 < len(work) <= 8, work


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev], ids=["fwd", "rev"])
@pytest.mark.parametrize(
    "linear_solver",
    [eqi.AutoLinearSolver(), eqi.DirectLU(), lx.AutoLinearSolver(well_posed=True)],
    ids=["default", "LU", "lineax"],
)
def test_whole_jacobian_takes_one_factorisation(transform, linear_solver):
    layer = layer_of(picard(), linear_solver)
    jacobian = transform(lambda x: layer(jnp.zeros(N), (jnp.asarray(W), x)))
    assert factorisations(jacobian, X) == 1


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev], ids=["fwd", "rev"])
def test_whole_jacobian_of_a_minimum_takes_one_factorisation(transform):
    matrix = jnp.asarray(W @ W.T + np.eye(N))

    def objective(y, x):
        return y @ matrix @ y / 2 + jnp.sum(jnp.cosh(y)) - x @ y

    def solution(x):
        condition = eqi.Minimum(objective)
        found = jax.lax.stop_gradient(jnp.linalg.solve(matrix, x))
        adjoint = eqi.DirectSymmetric()
        return eqi.implicit_solution(condition, found, x, linear_solver=adjoint)

    # One for the solution, one for all columns, and a pseudo-inverse that is a branch.
    assert factorisations(transform(solution), X) == 3


def test_factorisations_are_counted():
    solve = jax.jit(jnp.linalg.solve)
    assert factorisations(lambda a, b: solve(a, b) + solve(a.T, b), W, X) == 2
    assert factorisations(jax.vmap(solve), jnp.stack([W] * 7), jnp.stack([X] * 7)) == 7
    assert factorisations(jnp.linalg.cholesky, W) == 1


def test_memory_of_the_gradient_is_independent_of_the_number_of_steps():
    def implicit(steps):
        never = optx.FixedPointIteration(rtol=0.0, atol=0.0)
        layer = layer_of(never, eqi.Neumann(8), max_steps=steps)
        return lambda w: jnp.sum(layer(jnp.zeros(N), (w, X)))

    used = [temp_bytes(jax.grad(implicit(steps)), W) for steps in STEPS]
    # Beyond 4096 steps the loop is cut in chunks, whose counters are some bytes.
    assert max(used) - min(used) <= 1024
    assert max(used) < 20 * W.nbytes


def test_memory_of_the_unrolled_gradient_grows():
    def unrolled(steps):
        def solve(w):
            step = lambda z, _: (cell(z, (w, X)), None)
            return jnp.sum(jax.lax.scan(step, jnp.zeros(N), length=steps)[0])

        return solve

    few, many = (temp_bytes(jax.grad(unrolled(steps)), W) for steps in (100, 10_000))
    assert many > 50 * few


@pytest.mark.parametrize("solver", [None, picard()], ids=["default", "picard"])
def test_gradient_without_throw_calls_no_host(solver):
    layer = layer_of(solver)
    loss = lambda w: jnp.sum(layer(jnp.zeros(N), (w, X)))
    assert "callback" not in text(jax.value_and_grad(loss), W)


def test_forward_throw_calls_the_host_and_the_backward_pass_adds_none():
    layer = eqi.ImplicitFunction(eqi.FixedPoint(cell), picard(), throw=True)
    loss = lambda w: jnp.sum(layer(jnp.zeros(N), (w, X)))
    calls = re.compile(r"custom_call @\w*callback")
    forward = len(calls.findall(text(loss, W)))
    assert forward > 0
    assert len(calls.findall(text(jax.value_and_grad(loss), W))) == forward


def test_second_call_compiles_nothing():
    traced = []

    def counted(z, theta):
        traced.append(None)
        return cell(z, theta)

    adjoint = eqi.ImplicitAdjoint(eqi.Neumann())
    condition = eqi.FixedPoint(counted)
    layer = eqi.ImplicitFunction(condition, picard(), adjoint, throw=False)
    step = eqx.filter_jit(
        eqx.filter_value_and_grad(lambda w: jnp.sum(layer(jnp.zeros(N), (w, X))))
    )
    _, first = step(jnp.asarray(W))
    count = len(traced)
    _, second = step(jnp.asarray(W / 2))
    assert len(traced) == count > 0
    assert not jnp.allclose(first, second)


def by_hand(solve_adjoint):
    """The fixed point of `cell` with a `custom_vjp`."""

    def iterate(fn, z0, tol):
        def step(carry):
            new = fn(carry[0])
            return new, jnp.max(jnp.abs(new - carry[0])), carry[2] + 1

        def unfinished(carry):
            return (carry[1] > tol) & (carry[2] < 512)

        start = (z0, jnp.array(jnp.inf), jnp.array(0))
        return jax.lax.while_loop(unfinished, step, start)[0]

    @jax.custom_vjp
    def solve(theta):
        return iterate(lambda z: cell(z, theta), jnp.zeros(N), TOL)

    def forward(theta):
        z = solve(theta)
        return z, (z, theta)

    def backward(residuals, ct):
        _, pullback = jax.vjp(cell, *residuals)
        u = solve_adjoint(lambda u: pullback(u)[0], ct, iterate)
        return (pullback(u)[1],)

    solve.defvjp(forward, backward)
    return solve


def picard_adjoint(transposed, ct, iterate):
    return iterate(lambda u: ct + transposed(u), ct, TOL * jnp.max(jnp.abs(ct)))


def dense_adjoint(transposed, ct, iterate):
    del iterate
    rows = jax.vmap(transposed)(jnp.eye(N))
    return jnp.linalg.solve((jnp.eye(N) - rows).T, ct)


@pytest.mark.parametrize(
    ("adjoint", "linear_solver", "most"),
    # Kernels, which take the time of the compiler: elimination is watched, too.
    [(picard_adjoint, eqi.Neumann(rtol=TOL), 1), (dense_adjoint, eqi.DirectLU(), 1.3)],
    ids=["picard", "dense"],
)
def test_program_is_not_much_longer_than_by_hand(
    adjoint, linear_solver, most, monkeypatch
):
    # As where a loop is not one kernel: what is in one is not compiled by itself.
    monkeypatch.setattr(_one_kernel, "_is_known", lambda: False)
    layer, hand = layer_of(picard(), linear_solver), by_hand(adjoint)
    theta = jnp.asarray(W), jnp.asarray(X)
    ours = jax.value_and_grad(lambda t: jnp.sum(layer(jnp.zeros(N), t) ** 2))
    theirs = jax.value_and_grad(lambda t: jnp.sum(hand(t) ** 2))
    a, b = jax.jit(ours)(theta), jax.jit(theirs)(theta)
    assert jnp.allclose(a[0], b[0], rtol=1e-6)
    assert jnp.allclose(a[1][0], b[1][0], rtol=1e-5, atol=1e-6)
    assert loops(ours, theta) <= loops(theirs, theta)
    mine, hers = text(ours, theta), text(theirs, theta)
    assert len(mine.splitlines()) <= LINES * len(hers.splitlines())
    assert kernels(ours, theta) <= most * kernels(theirs, theta)


def test_the_norm_of_an_optimistix_solver_is_one_kernel():
    solve = jax.jit(lambda x: layer_of(picard())(jnp.zeros(N), (jnp.asarray(W), x)))
    assert "reduce-window" not in solve.lower(X).compile().as_text()
