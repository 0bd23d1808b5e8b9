"""Reference system: soft spheres in a periodic box, minimised by FIRE.

The references were computed without implicit differentiation: by finite differences
that track the minimum, by a pseudo-inverse of the Hessian, and by an unrolled loop.
All quantities are dimensionless.
"""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jaxtyping import Array, Bool, Float, Int

import eqximplicit as eqi
from eqximplicit.solvers import FIRE

PATH = Path(__file__).parent / "references" / "seed000.json"
SMALL, LARGE, SCALED = (
    json.loads(PATH.read_text())[name] for name in ("small", "large", "scaled")
)
FORCE_TOL = 1e-12
ENERGY = 1e-10  # the gradient of the energy: exact up to rounding
CONTACT = 1e-7  # relative: the residual of 1e-12 over the softest mode, with a margin


def fire(**changes):
    settings = {"rtol": 0.0, "atol": FORCE_TOL, "dt_start": 0.001, "dt_max": 0.005}
    return FIRE(**(settings | changes))


def distance(delta, box):
    delta = delta - box * jnp.round(delta / box)  # to the nearest periodic image
    square = jnp.sum(delta**2, axis=-1)
    apart = square > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)


def distances(positions, box):
    return distance(positions[:, None] - positions[None, :], box)


def soft_sphere(r, sigma, alpha):
    touching = (r > 0) & (r < sigma)
    overlap = jnp.where(touching, 1 - r / sigma, 0.5)
    return jnp.where(touching, jnp.exp(alpha * jnp.log(overlap)) / alpha, 0.0)


def total_energy(positions, params, box):
    r = distances(positions, box)
    return 0.5 * jnp.sum(soft_sphere(r, params["sigma"], params["alpha"]))


def contact_r2(positions, box, diameter=2.0):
    r = distances(positions, box)
    return jnp.sum(jnp.where((r > 0) & (r < diameter), r**2, 0.0))


class System:
    """Inputs of one reference system, and what is observed of its minimum."""

    def __init__(self, reference):
        self.box = reference["inputs"]["box_size"]
        self.start = jnp.asarray(reference["inputs"]["R_init"])
        full = jnp.full(2 * self.start.shape[:1], 2.0)
        self.params = {"sigma": full, "alpha": full}

    def energy(self, positions, params):
        return total_energy(positions, params, self.box)

    def layer(self, solver=None, **settings):
        settings = {"max_steps": None} | settings
        solver = fire() if solver is None else solver
        return eqi.ImplicitFunction(eqi.Minimum(self.energy), solver, **settings)

    def observe(self, positions, params):
        return self.energy(positions, params), contact_r2(positions, self.box)

    def observe_minimum(self, params):
        solution = self.layer().solve(self.start, params)
        return self.observe(solution.value, params), solution


class Found(eqx.Module):
    energy: Float[Array, ""]
    contact: Float[Array, ""]
    grad_energy: dict[str, Array]
    grad_contact: dict[str, Array]
    positions: Float[Array, "n 2"]
    stats: dict[str, Array]


def find(system):
    """One solve, and the gradients of both observables through it."""

    @jax.jit
    def run(params):
        values, pull, solution = jax.vjp(system.observe_minimum, params, has_aux=True)
        one, zero = jnp.ones(()), jnp.zeros(())
        by_energy, by_contact = pull((one, zero))[0], pull((zero, one))[0]
        return Found(*values, by_energy, by_contact, solution.value, solution.stats)

    return run(system.params)


@pytest.fixture(scope="module")
def small():
    return System(SMALL)


@pytest.fixture(scope="module")
def found(small):
    return find(small)


def assert_close(actual, expected, *, rtol=0.0, atol=0.0):
    np.testing.assert_allclose(actual, np.asarray(expected), rtol=rtol, atol=atol)


def test_fire_minimises_to_rounding_in_the_published_number_of_steps(found):
    assert found.stats["residual_norm"] < FORCE_TOL
    assert_close(found.energy, SMALL["computed"]["energy"], atol=1e-14)
    steps = SMALL["computed"]["fire_steps_while_loop_cpu"]
    assert_close(found.stats["num_steps"], steps, rtol=0.01)


@pytest.mark.parametrize("name", ["sigma", "alpha"])
def test_gradient_of_the_energy(found, name):
    expected = SMALL["computed"][f"denergy_d{name}"]
    assert_close(found.grad_energy[name], expected, atol=ENERGY)
    printed = SMALL["printed"][f"denergy_d{name}_row0"]
    assert_close(found.grad_energy[name][0], printed, atol=5.1e-9)


@pytest.mark.parametrize("name", ["sigma", "alpha"])
def test_gradient_that_needs_the_implicit_term(found, name):
    reference = SMALL["computed"]["contact_r2"]
    assert_close(found.contact, reference["value"], rtol=1e-11)
    expected = reference[f"d_d{name}"]
    assert_close(found.grad_contact[name], expected, rtol=CONTACT, atol=1e-9)


def test_only_the_contacts_can_tell_a_rule_that_drops_the_implicit_term(small, found):
    """The envelope theorem: the energy is stationary in the positions.

    Its gradient at fixed positions is right already, so it cannot test a rule.
    """
    energy, contact = jax.jacrev(small.observe, argnums=1)(
        found.positions, small.params
    )
    for name in ("sigma", "alpha"):
        assert_close(energy[name], SMALL["computed"][f"denergy_d{name}"], atol=ENERGY)
        assert not np.any(contact[name])
        assert np.max(np.abs(found.grad_contact[name])) > 0.6


def test_derivative_of_a_translation_invariant_minimum_has_least_norm(small, found):
    hessian = jax.hessian(small.energy)(found.positions, small.params)
    values = np.linalg.eigvalsh(hessian.reshape(14, 14))
    assert np.sum(values > 1e-10) == SMALL["computed"]["hessian_rank"] == 12
    direction = {
        name: jax.random.normal(jax.random.key(i), (7, 7))
        for i, name in enumerate(("sigma", "alpha"))
    }

    @jax.jit
    def tangent(direction):
        def attached(params):
            condition = eqi.Minimum(small.energy)
            return eqi.implicit_solution(condition, found.positions, params)

        return jax.jvp(attached, (small.params,), (direction,))[1]

    t_positions = tangent(direction)
    assert_close(jnp.sum(t_positions, axis=0), np.zeros(2), atol=1e-12)
    gradient = jax.grad(contact_r2)(found.positions, small.box)
    forward = jnp.sum(gradient * t_positions)
    both = (jnp.vdot(found.grad_contact[k], direction[k]) for k in direction)
    assert_close(forward, sum(both), rtol=1e-10)


def gradient_bytes(system, adjoint, max_steps):
    layer = system.layer(adjoint=adjoint, max_steps=max_steps)

    def contact(params):
        return contact_r2(layer(system.start, params), system.box)

    compiled = jax.jit(jax.grad(contact)).lower(system.params).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_number_of_steps(small):
    few, many = (
        gradient_bytes(small, eqi.ImplicitAdjoint(), n) for n in (10_000, 1_000_000)
    )
    assert few == many < 100_000
    short, long = (
        gradient_bytes(small, eqi.UnrolledAdjoint(checkpoints=n), n) for n in (100, 200)
    )
    assert long - short > 100 * 14 * 8  # at least one state per step


class NeighbourList(eqx.Module):
    """Pairs `i < j` that may touch soon, padded with `(0, 0)` to a fixed capacity."""

    pairs: Int[Array, "2 capacity"]
    built_at: Float[Array, "n 2"]
    overflowed: Bool[Array, ""]
    capacity: int = eqx.field(static=True)
    reach: float = eqx.field(static=True)


class PairSystem:
    """The same spheres, with a neighbour list; each pair is counted once."""

    reach, skin = 2.0, 0.1

    def __init__(self, system):
        self.box, self.start, self.params = system.box, system.start, system.params

    def near(self, positions):
        r = distances(positions, self.box)
        return jnp.triu(r < self.reach + 2 * self.skin, 1)

    def build(self, positions, capacity):
        near = self.near(positions)
        pairs = jnp.stack(jnp.nonzero(near, size=capacity, fill_value=0))
        overflowed = jnp.sum(near) > capacity
        return NeighbourList(pairs, positions, overflowed, capacity, self.reach)

    def allocate(self, positions):
        count = int(jnp.sum(self.near(positions)))
        return self.build(positions, count + count // 4)

    def update(self, positions, neighbours):
        """The list at `positions`; the old one where nobody has moved far."""
        moved = distance(positions - neighbours.built_at, self.box)
        return jax.lax.cond(
            jnp.any(moved > self.skin),
            lambda: self.build(positions, neighbours.capacity),
            lambda: neighbours,
        )

    def energy(self, positions, params, neighbours):
        i, j = neighbours.pairs
        r = distance(positions[i] - positions[j], self.box)
        sigma, alpha = (params[name][i, j] for name in ("sigma", "alpha"))
        return jnp.sum(soft_sphere(r, sigma, alpha))


def python_loop(system):
    """A solver that no compiler can trace: it allocates memory as it goes."""
    solver = fire(dt_max=0.05)  # a tenth of the steps

    def objective(positions, args):
        return system.energy(positions, *args), None

    def begin(positions, params, neighbours):
        struct = jax.ShapeDtypeStruct((), positions.dtype)
        args = params, neighbours
        return solver.init(objective, positions, args, {}, struct, None, frozenset())

    @jax.jit
    def advance(positions, state, params, neighbours):
        neighbours = system.update(positions, neighbours)
        args = params, neighbours
        step = solver.step(objective, positions, args, {}, state, frozenset())
        return *step[:2], neighbours

    def solve(positions, params):
        neighbours = system.allocate(positions)
        state = begin(positions, params, neighbours)
        steps, allocations = 0, 1
        while float(state.force_norm) > FORCE_TOL:
            moved, next_state, neighbours = advance(
                positions, state, params, neighbours
            )
            if neighbours.overflowed:
                neighbours = system.allocate(positions)
                allocations += 1
            else:
                positions, state = moved, next_state
                steps += 1
        aux = {"neighbours": neighbours, "steps": steps, "allocations": allocations}
        return positions, aux

    return solve


@pytest.fixture(scope="module")
def with_neighbours(small):
    """The value, the auxiliary output and both gradients of one Python-loop solve."""
    system = PairSystem(small)

    @jax.jit
    def pair_energy(positions, params, neighbours):
        return system.energy(positions, params, neighbours)

    def energy(positions, params, aux):
        return pair_energy(positions, params, aux["neighbours"])

    condition = eqi.Minimum(energy, takes_aux=True)
    layer = eqi.ImplicitFunction(condition, python_loop(system), has_aux=True)

    def observe(params):
        solution = layer.solve(system.start, params)
        observed = energy(solution.value, params, solution.aux)
        return (observed, contact_r2(solution.value, system.box)), solution

    values, pull, solution = eqx.filter_vjp(observe, system.params, has_aux=True)
    by_energy, by_contact = (
        pull((jnp.asarray(e), jnp.asarray(c)))[0] for e, c in ((1.0, 0.0), (0.0, 1.0))
    )
    return values, solution, by_energy, by_contact


def test_python_loop_returns_its_neighbour_list_and_step_count(small, with_neighbours):
    (energy, _), solution, _, _ = with_neighbours
    assert_close(energy, SMALL["computed"]["energy"], atol=1e-14)
    assert type(solution.aux["steps"]) is int
    assert 1000 < solution.aux["steps"] < 3000
    assert solution.aux["allocations"] > 1
    neighbours = solution.aux["neighbours"]
    assert neighbours.pairs.shape == (2, neighbours.capacity)
    touching = np.argwhere(np.triu(distances(solution.value, small.box) < 2.0, 1))
    listed = set(map(tuple, np.asarray(neighbours.pairs).T.tolist()))
    assert set(map(tuple, touching.tolist())) <= listed


@pytest.mark.parametrize("name", ["sigma", "alpha"])
def test_gradient_through_the_neighbour_list_counts_each_pair_once(
    with_neighbours, name
):
    _, _, by_energy, by_contact = with_neighbours
    reference = SMALL["computed"]
    dense = 2 * np.triu(reference[f"denergy_d{name}"])
    assert_close(by_energy[name], dense, atol=ENERGY)
    printed = SMALL["printed"][f"neighbor_list_denergy_d{name}_row0"]
    assert_close(by_energy[name][0], printed, atol=5.1e-9)
    dense = 2 * np.triu(reference["contact_r2"][f"d_d{name}"])
    assert_close(by_contact[name], dense, rtol=CONTACT, atol=1e-9)


def test_decorated_python_loop_has_the_same_gradient(small, with_neighbours):
    system = PairSystem(small)

    def gradient(positions, aux, params):
        return jax.grad(system.energy)(positions, params, aux["neighbours"])

    # The minimum is known here, so the loop ends at once.
    minimum = with_neighbours[1].value
    decorate = eqi.custom_root(
        gradient, has_aux=True, takes_aux=True, tags=lx.symmetric_tag
    )
    solve = decorate(python_loop(system))

    def contact(params):
        positions, aux = solve(minimum, params)
        return contact_r2(positions, system.box), aux

    by_contact, aux = jax.grad(contact, has_aux=True)(system.params)
    assert aux["steps"] == 0
    for name in ("sigma", "alpha"):
        assert_close(by_contact[name], with_neighbours[3][name], rtol=1e-9, atol=1e-11)


def scaled_minimum(diameter, *, stop_box=False):
    """A box that depends on the differentiated diameter, and jits inside jits."""
    box = 4.5 * diameter
    box = jax.lax.stop_gradient(box) if stop_box else box
    start = box * jnp.asarray(SCALED["inputs"]["u"])

    @jax.jit
    def energy(positions, _):
        r = distances(positions, box)
        return 0.5 * jnp.sum(jax.jit(soft_sphere)(r, diameter, 2.0))

    @jax.jit
    def shift(positions, step):
        return jnp.mod(positions + step, box)

    layer = eqi.ImplicitFunction(eqi.Minimum(energy), fire(shift=shift), max_steps=None)
    positions = layer(start)
    return energy(positions, None), contact_r2(positions, box, diameter)


SCALED_CASES = {
    "box scales": (False, "denergy_dD_box_scales", "dcontact_r2_dD_box_scales"),
    "box stopped": (
        True,
        "denergy_dD_box_stop_gradient",
        "dcontact_r2_dD_box_fixed",
    ),
}


@pytest.mark.parametrize("case", SCALED_CASES)
def test_box_may_depend_on_the_differentiated_diameter(case):
    """If all lengths scale with the diameter, the energy cannot depend on it."""
    stop_box, energy_key, contact_key = SCALED_CASES[case]
    reference = SCALED["computed"]

    def observe(diameter):
        return scaled_minimum(diameter, stop_box=stop_box)

    diameter = SCALED["inputs"]["D"]
    (energy, contact), pull = jax.vjp(jax.jit(observe), diameter)
    assert_close(energy, reference["energy"], rtol=1e-12)
    assert_close(contact, reference["contact_r2"], rtol=1e-10)
    one, zero = jnp.ones(()), jnp.zeros(())
    assert_close(pull((one, zero))[0], reference[energy_key], rtol=1e-8, atol=1e-9)
    assert_close(pull((zero, one))[0], reference[contact_key], rtol=1e-8)


def test_box_that_scales_needs_no_jit_around_the_gradient():
    diameter = SCALED["inputs"]["D"]
    contact, slope = jax.value_and_grad(lambda d: scaled_minimum(d)[1])(diameter)
    assert_close(slope, 2 * contact / diameter, rtol=1e-8)  # it scales as D^2
    assert_close(slope, SCALED["computed"]["dcontact_r2_dD_box_scales"], rtol=1e-8)


def assert_large_gradient(gradient, key):
    """Compared up to the numbering: the path decides which particle ends where.

    A force of 1e-12 displaces the softest mode (curvature 2.7e-4) by 4e-9, hence a
    tolerance relative to the largest entry of a row instead of to each.
    """
    reference = LARGE["computed"]
    norm, total = jnp.linalg.norm(gradient), jnp.sum(gradient)
    assert_close(norm, reference[f"{key}_fro"], rtol=1e-6)
    assert_close(total, reference[f"{key}_sum"], rtol=1e-6)
    row = np.sort(reference[f"{key}_row0"])
    rows = np.sort(gradient, axis=1)
    nearest = rows[np.argmin(np.max(np.abs(rows - row), axis=1))]
    atol = 1e-9 if key.startswith("denergy") else 1e-6 * np.max(np.abs(row))
    assert_close(nearest, row, atol=atol)


@pytest.mark.slow
def test_large_system_after_hundreds_of_thousands_of_steps():
    found, reference = find(System(LARGE)), LARGE["computed"]
    assert found.stats["num_steps"] > 150_000
    assert found.stats["residual_norm"] < FORCE_TOL
    assert_close(found.energy, reference["energy"], atol=1e-12)
    assert_close(found.contact, reference["contact_r2"], rtol=1e-9)
    for name in ("sigma", "alpha"):
        assert_large_gradient(found.grad_energy[name], f"denergy_d{name}")
        assert_large_gradient(found.grad_contact[name], f"dcontact_r2_d{name}")


@pytest.mark.slow
def test_large_system_has_the_same_gradient_however_its_minimum_is_found():
    """Small steps into the basin, then large ones: a derivative knows no path."""
    system = System(LARGE)
    near = system.layer(fire(atol=1e-2))
    polish = system.layer(fire(atol=1e-13, dt_start=0.1, dt_max=0.4))

    @jax.jit
    def contact(params):
        positions = polish(near(system.start, params), params)
        return contact_r2(positions, system.box)

    value, gradient = jax.value_and_grad(contact)(system.params)
    assert_close(value, LARGE["computed"]["contact_r2"], rtol=1e-9)
    for name in ("sigma", "alpha"):
        assert_large_gradient(gradient[name], f"dcontact_r2_d{name}")
