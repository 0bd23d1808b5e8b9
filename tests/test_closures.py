"""Arrays captured by closure, in the condition and in the solver."""

import array
import collections
import contextvars
import dataclasses
import functools
import types
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from problems import assert_close, EXACT

import eqximplicit as eqi

NEWTON = {"rtol": 1e-10, "atol": 1e-10}
# The reference values of the particles have 1e-7, by their own account.
PARTICLES = 1e-7


def cubic_root(b):
    """The real root of `y³ + y = b`, by Cardano's formula."""
    s = np.sqrt(b**2 / 4 + 1 / 27)
    return np.cbrt(b / 2 + s) + np.cbrt(b / 2 - s)


# y³ + y = b has y' = 1 / (3 y² + 1) and y'' = -6 y y'³; at b = 2 it is y = 1.
SLOPE, CURVATURE = 1 / 4, -6 / 64


def newton_while(residual, y0):
    """Newton's method in a `while_loop`, on a function that it captured."""

    def unfinished(carry):
        return (carry[1] > 1e-14) & (carry[2] < 50)

    def step(carry):
        y, _, n = carry
        change = residual(y) / jax.grad(residual)(y)
        return y - change, jnp.abs(change), n + 1

    return jax.lax.while_loop(unfinished, step, (y0, jnp.array(jnp.inf), 0))[0]


def solved_by_closure(b):
    """Both the condition and the solver see `b` by closure only."""

    def residual(y, _=None):
        return y**3 + y - b

    def solver(y0, _):
        return newton_while(residual, y0)

    return eqi.ImplicitFunction(eqi.Root(residual), solver)(jnp.array(0.5))


@functools.cache
def closure_derivatives():
    """Jitted value and derivatives of `solved_by_closure`, to third order."""

    @jax.jit
    def run(b):
        f = solved_by_closure
        return {
            "value": f(b),
            "forward": jax.jacfwd(f)(b),
            "reverse": jax.grad(f)(b),
            "nested": jax.grad(jax.grad(f))(b),
            "hessian": jax.hessian(f)(b),
        }

    return run


def test_gradient_flows_to_an_array_captured_by_condition_and_solver():
    got = closure_derivatives()(jnp.array(2.0))
    expected = {
        "value": 1.0,
        "forward": SLOPE,
        "reverse": SLOPE,
        "nested": CURVATURE,
        "hessian": CURVATURE,
    }
    assert_close(got, expected)


def test_gradient_flows_to_a_captured_array_without_jit():
    assert_close(jax.grad(solved_by_closure)(jnp.array(2.0)), SLOPE)


def test_gradient_flows_to_a_captured_array_under_vmap():
    bs = jnp.array([2.0, -1.0, 0.3])
    gradient = jax.jit(jax.vmap(jax.grad(solved_by_closure)))(bs)
    assert_close(gradient, 1 / (3 * cubic_root(np.asarray(bs)) ** 2 + 1))


def test_loop_over_a_captured_array_carries_no_tangents():
    jaxpr = str(jax.make_jaxpr(jax.grad(solved_by_closure))(jnp.array(2.0)))
    assert jaxpr.count("while[") == 1


def captured_by_optimistix(b):
    def residual(y, _):
        return y**3 + y - b

    layer = eqi.ImplicitFunction(eqi.Root(residual), optx.Newton(**NEWTON))
    return layer(jnp.array(0.5))


def test_gradient_flows_to_a_captured_array_under_an_optimistix_solver():
    @jax.jit
    def run(b):
        f = captured_by_optimistix
        return jax.jacfwd(f)(b), jax.grad(f)(b), jax.grad(jax.grad(f))(b)

    assert_close(run(jnp.array(2.0)), (SLOPE, SLOPE, CURVATURE))


def test_captured_array_and_argument_both_have_a_derivative():
    def solution(b, c):
        layer = eqi.ImplicitFunction(
            eqi.Root(lambda y, c: y**3 + y - b * c), optx.Newton(**NEWTON)
        )
        return layer(jnp.array(0.5), c)

    gradient = jax.jit(jax.grad(solution, argnums=(0, 1)))(jnp.array(4.0), 0.5)
    assert_close(gradient, (0.5 * SLOPE, 4.0 * SLOPE))


def test_layer_inside_the_objective_of_another_layer():
    # z minimises (z - y(b))², so z = y(b), with y from the inner layer.
    def outer(b):
        def objective(z, _):
            return (z - solved_by_closure(b)) ** 2

        layer = eqi.ImplicitFunction(
            eqi.Minimum(objective), lambda z0, _: solved_by_closure(b)
        )
        return layer(jnp.array(0.0))

    assert_close(jax.jit(jax.grad(outer))(jnp.array(2.0)), SLOPE)


def test_python_solver_reads_the_value_of_an_array_that_it_captured():
    def solved(b):
        def solver(y0, _):
            y = float(y0)
            while abs(y**3 + y - float(b)) > 1e-13:  # needs a value
                y = y - (y**3 + y - float(b)) / (3 * y**2 + 1)
            return jnp.array(y)

        condition = eqi.Root(lambda y, _: y**3 + y - b)
        return eqi.ImplicitFunction(condition, solver)(0.5)

    assert_close(jax.grad(solved)(jnp.array(2.0)), SLOPE)
    assert_close(jax.jvp(solved, (jnp.array(2.0),), (jnp.array(1.0),))[1], SLOPE)
    assert_close(jax.grad(jax.grad(solved))(jnp.array(2.0)), CURVATURE)


class PythonSolver(eqx.Module):
    target: jax.Array

    def run(self, y0, _):
        del y0
        return jnp.array(cubic_root(float(self.target)))


@pytest.mark.parametrize(
    "make",
    [
        lambda b: lambda y0, _: jnp.array(cubic_root(float(b))),
        lambda b: lambda y0, _, bound=b: jnp.array(cubic_root(float(bound))),
        lambda b: functools.partial(
            lambda b, y0, _: jnp.array(cubic_root(float(b))), b
        ),
        lambda b: jax.tree_util.Partial(
            lambda b, y0, _: jnp.array(cubic_root(float(b))), b
        ),
        lambda b: PythonSolver(b).run,
        lambda b: (lambda inner: lambda y0, _: inner(y0))(
            lambda y0: jnp.array(cubic_root(float(b)))
        ),
    ],
    ids=["closure", "default", "partial", "Partial", "bound method", "nested closure"],
)
def test_python_solver_gets_concrete_values_however_it_carries_an_array(make):
    def solved(b):
        condition = eqi.Root(lambda y, _: y**3 + y - b)
        return eqi.ImplicitFunction(condition, make(b))(jnp.array(0.5))

    assert_close(jax.grad(solved)(jnp.array(2.0)), SLOPE)


def test_solver_may_keep_a_count_in_an_outer_variable():
    count = 0

    def solved(b):
        def solver(y0, _):
            nonlocal count
            count += 1
            return jnp.array(cubic_root(float(b)))

        condition = eqi.Root(lambda y, _: y**3 + y - b)
        return eqi.ImplicitFunction(condition, solver)(jnp.array(0.5))

    jax.grad(solved)(jnp.array(2.0))
    assert count == 1


def test_error_names_the_tracer_that_an_untraceable_solver_captured():
    def solved(stiffness):
        def solver(y0, _):
            return jnp.array(cubic_root(float(stiffness)))

        condition = eqi.Root(lambda y, _: y**3 + y - stiffness)
        return eqi.ImplicitFunction(condition, solver)(jnp.array(0.5))

    with pytest.raises(ValueError, match=r"`stiffness \(captured.*`, float64\[\]"):
        jax.jit(jax.grad(solved))(jnp.array(2.0))
    with pytest.raises(ValueError, match="stiffness"):
        jax.vmap(solved)(jnp.array([1.0, 2.0]))


LOAD = {"now": None}


class Slotted:
    __slots__ = ("stiffness", "unset")

    def __init__(self, stiffness):
        self.stiffness = stiffness


def solver_that_reads_a_global(stiffness):
    LOAD["now"] = [stiffness]

    def value():
        return float(LOAD["now"][0])

    return lambda y0, _: jnp.array(cubic_root(value()))


def solver_that_reads_a_slot(stiffness):
    held = Slotted(stiffness)
    return lambda y0, _: jnp.array(cubic_root(float(held.stiffness)))


HIDDEN = {
    "global": (solver_that_reads_a_global, r"LOAD\['now'\]\[0\]"),
    "slot": (solver_that_reads_a_slot, "held.stiffness"),
}


@pytest.mark.parametrize("transform", [jax.jit, jax.grad], ids=["jit", "grad"])
@pytest.mark.parametrize("case", HIDDEN)
def test_error_names_a_tracer_in_a_global_or_a_slot(case, transform):
    make, name = HIDDEN[case]

    def solved(stiffness):
        condition = eqi.Root(lambda y, _: y**3 + y - stiffness)
        return eqi.ImplicitFunction(condition, make(stiffness))(jnp.array(0.5))

    with pytest.raises(ValueError, match=rf"`{name} \(captured.*`, float64\[\]"):
        transform(solved)(jnp.array(2.0))
    LOAD["now"] = None


def test_looking_for_tracers_takes_each_object_once():
    held = lambda: None
    for _ in range(60):  # two ways to each, so 2⁶⁰ paths
        held = lambda a=held, b=held: None

    def solved(stiffness):
        def solver(y0, _, held=held):
            return jnp.array(cubic_root(float(stiffness)))

        condition = eqi.Root(lambda y, _: y**3 + y - stiffness)
        return eqi.ImplicitFunction(condition, solver)(jnp.array(0.5))

    with pytest.raises(ValueError, match="`stiffness"):
        jax.jit(solved)(jnp.array(2.0))


def test_error_names_the_traced_argument_of_an_untraceable_solver():
    def solver(y0, args):
        return jnp.array(cubic_root(float(args["load"][0])))

    layer = eqi.ImplicitFunction(
        eqi.Root(lambda y, args: y**3 + y - args["load"][0]), solver
    )
    with pytest.raises(ValueError, match=r"`args\['load'\]`, float64\[1\]"):
        jax.jit(lambda args: layer(jnp.array(0.5), args))({"load": jnp.array([2.0])})


def test_condition_that_captured_an_integer_array_and_a_key():
    index, key = jnp.array([1, 0]), jax.random.key(0)
    noise = jax.random.normal(key, (2,))

    def solved(b):
        def residual(y, _):
            return y - b[index] * (1 + jax.random.normal(key, (2,)))

        y = jax.lax.stop_gradient(b)[index] * (1 + noise)
        return jnp.sum(eqi.implicit_solution(eqi.Root(residual), y))

    gradient = jax.jit(jax.grad(solved))(jnp.array([1.0, 2.0]))
    assert_close(gradient, (1 + noise)[jnp.array([1, 0])])


# --- particles: soft spheres in a periodic box ---------------------------------------

BOX = 4.83045891539648
MINIMUM = np.array(
    [
        [2.639258839135211, 4.388855860544396],
        [3.042546749314376, 2.45458039598961],
        [1.268021170993117, 3.017618192402303],
        [1.831058967405809, 1.243092614081045],
        [4.727242418247504, 1.64638052426021],
        [4.323954508068338, 3.580655988814996],
        [0.7049833745804247, 4.792143770723562],
    ]
)
ENERGY = 0.061594302734025386
# Row 0 of each gradient with respect to the (7, 7) parameters.
BY_ROW = {
    "energy": (
        [
            0.0,
            0.00297984491793,
            0.00736627062396,
            0.0153539954649,
            0.0,
            0.0153539954649,
            0.00297984491793,
        ],
        [
            0.0,
            -0.000178949543077,
            -0.000922006865309,
            -0.00348098533602,
            0.0,
            -0.00348098533602,
            -0.000178949543077,
        ],
    ),
    "contact": (
        [
            0.0,
            1.98381138483,
            2.9342599796,
            -1.02783872071,
            0.0,
            -1.02783872071,
            1.98381138483,
        ],
        [
            0.0,
            -0.216688262452,
            -0.663367422421,
            0.423532789524,
            0.0,
            0.423532789524,
            -0.216688262452,
        ],
    ),
}


@jax.jit
def squared_distances(positions):
    shift = positions[:, None] - positions[None]
    shift = jnp.mod(shift + BOX / 2, BOX) - BOX / 2
    return jnp.sum(shift**2, axis=-1) + jnp.eye(7)  # no zero under the root


@jax.jit
def energy(positions, sigma, alpha):
    """`½ Σ (1 - r/σ)^α / α` over ordered pairs that overlap."""
    distance = jnp.sqrt(squared_distances(positions))
    overlap = (distance < sigma) & ~jnp.eye(7, dtype=bool)
    depth = jnp.where(overlap, 1 - distance / sigma, 1.0)
    return jnp.sum(jnp.where(overlap, depth**alpha / alpha, 0.0)) / 2


@jax.jit
def contact(positions, sigma, alpha):
    """`Σ r²` over ordered pairs with `r < 2`: not minimal, unlike the energy."""
    del sigma, alpha
    squared = squared_distances(positions)
    return jnp.sum(jnp.where((squared < 4) & ~jnp.eye(7, dtype=bool), squared, 0.0))


_force = jax.jit(jax.grad(energy))
_hessian = jax.jit(jax.hessian(energy))


def relaxed(start, sigma, alpha):
    """Newton's method in NumPy on the forces; it closes over nothing traced."""
    positions = np.array(start)
    for _ in range(20):
        force = np.asarray(_force(positions, sigma, alpha)).ravel()
        if float(np.abs(force).max()) < 1e-13:
            break
        hessian = np.asarray(_hessian(positions, sigma, alpha)).reshape(14, 14)
        step = np.linalg.lstsq(hessian, force, rcond=1e-8)[0]
        positions = positions - step.reshape(7, 2)
    return positions


@pytest.mark.parametrize(
    ("outer", "rows"),
    [(energy, "energy"), (contact, "contact")],
    ids=["energy", "contact"],
)
def test_particle_gradients_need_the_implicit_term_or_not(outer, rows):
    # The gradient of the energy itself is right even without the implicit term: the
    # force vanishes. That of the contacts is not, and is zero without it.
    sigma, alpha = jnp.full((7, 7), 2.0), jnp.full((7, 7), 2.0)
    start = MINIMUM + 0.01 * np.sin(np.arange(14.0)).reshape(7, 2)

    def loss(sigma, alpha):
        # The way the field writes it: everything by closure, no argument at all.
        def force(positions, _):
            return jax.grad(energy)(positions, sigma, alpha)

        def solver(positions, _):
            return relaxed(positions, np.asarray(sigma), np.asarray(alpha))

        # Translations cost nothing: the Hessian has two zero modes.
        adjoint = eqi.ImplicitAdjoint(linear_solver=lx.SVD(rcond=1e-8))
        layer = eqi.ImplicitFunction(eqi.Root(force), solver, adjoint)
        return outer(layer(start), sigma, alpha)

    value, (by_sigma, by_alpha) = jax.value_and_grad(loss, argnums=(0, 1))(sigma, alpha)
    expected_value = {"energy": ENERGY, "contact": 125.31538607910302}[rows]
    assert_close(value, expected_value, tol=EXACT)
    assert_close(
        (by_sigma[0], by_alpha[0]), [np.array(r) for r in BY_ROW[rows]], PARTICLES
    )


class Spring:
    """A plain Python object, that JAX and Equinox know nothing of."""

    scale = 1.0

    def __init__(self, stiffness):
        self.stiffness, self.parts, self.traces = stiffness, [stiffness], 0

    def _force(self, y):
        return self.stiffness * self.scale * y

    def residual(self, y, a):
        self.traces += 1
        return self._force(y) - a


class Holder(eqx.Module):
    spring: Spring

    def __call__(self, y, a):
        return self.spring.residual(y, a)


STIFFNESS = jnp.array(2.0)


def _global_force(y):
    return STIFFNESS * y


def _rebind_global(k):
    global STIFFNESS
    STIFFNESS = jnp.array(k)


def _rebound_attribute():
    spring = Spring(jnp.array(2.0))
    return spring.residual, lambda k: setattr(spring, "stiffness", jnp.array(k))


def _rebound_number():
    spring = Spring(2.0)
    return spring.residual, lambda k: setattr(spring, "stiffness", k)


def _class_attribute():
    class Scaled(Spring):
        pass

    return Scaled(2.0).residual, lambda k: setattr(Scaled, "scale", k / 2)


def _object_in_a_module():
    spring = Spring(jnp.array(2.0))
    return Holder(spring), lambda k: setattr(spring, "stiffness", jnp.array(k))


def _object_given_to_a_helper():
    spring = Spring(jnp.array(2.0))
    force = lambda s, y: s.stiffness * y
    return (
        lambda y, a: force(spring, y) - a,
        lambda k: setattr(spring, "stiffness", jnp.array(k)),
    )


def _rebound_cell():
    stiffness = jnp.array(2.0)

    def change(k):
        nonlocal stiffness
        stiffness = jnp.array(k)

    return lambda y, a: stiffness * y - a, change


def _global_of_a_helper():
    _rebind_global(2.0)
    return lambda y, a: _global_force(y) - a, _rebind_global


def _array_changed_in_place():
    stiffness = np.array([2.0, 0.0])
    return (
        lambda y, a: jnp.asarray(stiffness)[0] * y - a,
        lambda k: stiffness.__setitem__(0, k),
    )


def _container_changed_in_place():
    held = {"k": [jnp.array(2.0)]}
    return (
        functools.partial(lambda h, y, a: h["k"][0] * y - a, held),
        lambda k: held.update(k=[jnp.array(k)]),
    )


CHANGES = [
    _rebound_attribute,
    _rebound_number,
    _class_attribute,
    _object_in_a_module,
    _object_given_to_a_helper,
    _rebound_cell,
    _global_of_a_helper,
    _array_changed_in_place,
    _container_changed_in_place,
]


@pytest.mark.parametrize("case", CHANGES)
def test_eager_layer_sees_a_change_of_what_its_function_reads(case):
    fn, change = case()
    layer = eqi.ImplicitFunction(eqi.Root(fn), optx.Newton(**NEWTON))
    solve = lambda a: layer(jnp.array(0.5), a)
    for k in (2.0, 4.0):
        change(k)
        assert_close(solve(jnp.array(1.0)), 1 / k)
        assert_close(jax.grad(solve)(jnp.array(1.0)), 1 / k)


class Special:
    """Its stiffness is read by special methods only, and code names none of them."""

    def __init__(self, k):
        self._k = k

    def __matmul__(self, y):
        return self._k * y

    def __rmul__(self, y):
        return self._k * y

    def __neg__(self):
        return -self._k

    def __getitem__(self, key):
        return {"k": self._k}[key]

    def __iter__(self):
        yield self._k

    def __getattr__(self, name):
        if name != "stiffness":
            raise AttributeError(name)
        return self._k

    def __eq__(self, other):
        return (np.asarray(self._k).item() > 3) == other

    __hash__ = None


class Derived(Special):
    """Has the special methods from a base."""

    __slots__ = ("unused",)


class Described:
    """A descriptor."""

    def __get__(self, owner, cls=None):
        return owner._k


class WithDescriptor:
    k = Described()

    def __init__(self, k):
        self._k = k


class Meta(type):
    @property
    def of_all(cls):
        return cls.hidden

    def __getitem__(cls, key):
        return cls.held[key]


class WithMeta(metaclass=Meta):
    hidden, held = 2.0, [2.0]


class Makes:
    """Reads a global where it is made."""

    def __init__(self, factor):
        self.k = factor * STIFFNESS


class Named(dict):
    """A dictionary with an attribute and a method."""

    def force(self, y):
        return self.factor * self["k"] * y


class Weight(float):
    """A number with an attribute."""

    def __mul__(self, y):
        return self.factor * y


@dataclasses.dataclass
class Config:
    k: object
    steps: int = 0

    def __matmul__(self, y):
        return self.k * y


@jax.tree_util.register_pytree_node_class
class Node:
    """A pytree with an attribute that is no leaf of it."""

    def __init__(self, k):
        self.k = k

    def tree_flatten(self):
        return (), self.k

    @classmethod
    def tree_unflatten(cls, aux, children):
        del children
        return cls(aux)


SPECIAL = {
    "matmul": lambda o, y: o @ y,
    "reflected": lambda o, y: y * o,
    "neg": lambda o, y: -(-o * y),
    "getitem": lambda o, y: o["k"] * y,
    "iter": lambda o, y: sum(k * y for k in o),
    "getattr": lambda o, y: o.stiffness * y,
    "eq": lambda o, y: (4.0 if o == True else 2.0) * y,  # noqa: E712
}


def _special(kind, cls):
    force, held = SPECIAL[kind], cls(jnp.array(2.0))
    return (
        lambda y, a: force(held, y) - a,
        lambda k: setattr(held, "_k", jnp.array(k)),
    )


def _held(held, read, change):
    """A function of what is held: `read(held)` is the stiffness."""
    return lambda y, a: read(held) * y - a, functools.partial(change, held)


def _set_item(held, k):
    held[0] = k


def _context_variable():
    variable = contextvars.ContextVar("k", default=2.0)
    return lambda y, a: variable.get() * y - a, variable.set


def _mapping_proxy():
    held = {"k": 2.0}
    shown = types.MappingProxyType(held)
    return lambda y, a: shown["k"] * y - a, lambda k: held.update(k=k)


def _values_of_a_dictionary():
    held = {"k": 2.0}
    shown = held.values()
    return lambda y, a: sum(k * y for k in shown) - a, lambda k: held.update(k=k)


def _weak_reference(refer):
    spring = Spring(2.0)

    def change(k, spring=spring):
        spring.stiffness = k

    referred = refer(spring)
    get = lambda: referred() if isinstance(referred, weakref.ref) else referred
    return lambda y, a: get().stiffness * y - a, change


def _rebound_slice():
    part = slice(1, 2)

    def change(k):
        nonlocal part
        part = slice(int(k) - 1, int(k))

    values = np.arange(1.0, 9.0)
    return lambda y, a: jnp.sum(jnp.asarray(values[part])) * y - a, change


def _order_of_the_same_fields():
    fields = [lambda: 2.0, lambda: 4.0, lambda: 2.0]
    order = [fields[0], fields[1], fields[0]]

    def change(k):
        order[2] = fields[int(k) // 2 - 1]

    return lambda y, a: order[2]() * y - a, change


def _function_attribute():
    def residual(y, a):
        return residual.stiffness * y - a

    return residual, functools.partial(setattr, residual, "stiffness")


def _attribute_of_a_metaclass():
    return (
        lambda y, a: WithMeta.of_all * y - a,
        lambda k: setattr(WithMeta, "hidden", k),
    )


def _value_of_a_metaclass():
    class WithScale(type):
        scale = 2.0

    class Scaled(metaclass=WithScale):
        pass

    return lambda y, a: Scaled.scale * y - a, functools.partial(
        setattr, WithScale, "scale"
    )


def _item_of_a_metaclass():
    return (
        lambda y, a: WithMeta[0] * y - a,
        lambda k: WithMeta.held.__setitem__(0, k),
    )


def _global_of_a_constructor():
    return lambda y, a: Makes(1.0).k * y - a, _rebind_global


def _attribute_of_a_dictionary():
    held = Named(k=1.0)
    held.factor = 2.0
    return lambda y, a: held.force(y) - a, functools.partial(setattr, held, "factor")


def _attribute_of_a_number():
    held = Weight(1.0)
    held.factor = 2.0
    return lambda y, a: held * y - a, functools.partial(setattr, held, "factor")


def _byte_view():
    held = bytearray([2, 0])
    shown = memoryview(held)
    return lambda y, a: float(shown[0]) * y - a, lambda k: _set_item(held, int(k))


def _deep_list():
    held = [2.0]
    deep = held
    for _ in range(3000):  # more than may recurse
        deep = [deep]

    def residual(y, a):
        inner = deep
        while isinstance(inner[0], list):
            inner = inner[0]
        return inner[0] * y - a

    return residual, functools.partial(_set_item, held)


def _cycle():
    held = collections.deque([2.0])
    held.append(held)
    return _held(held, lambda h: h[1][0], _set_item)


def _object_array():
    held = np.array([jnp.array(2.0), None], dtype=object)
    return _held(held, lambda h: h[0], lambda h, k: _set_item(h, jnp.array(k)))


UNNAMED = {
    **{
        f"{kind} of {cls.__name__}": functools.partial(_special, kind, cls)
        for kind, cls in [(kind, Special) for kind in SPECIAL] + [("matmul", Derived)]
    },
    "dataclass": lambda: _held(
        Config(2.0), lambda h: h @ 1.0, lambda h, k: setattr(h, "k", k)
    ),
    "descriptor": lambda: _held(
        WithDescriptor(2.0), lambda h: h.k, lambda h, k: setattr(h, "_k", k)
    ),
    "pytree": lambda: _held(Node(2.0), lambda h: h.k, lambda h, k: setattr(h, "k", k)),
    "deque": lambda: _held(collections.deque([2.0]), lambda h: h[0], _set_item),
    "chain": lambda: _held(
        collections.ChainMap({}, {0: 2.0}),
        lambda h: h[0],
        lambda h, k: _set_item(h.maps[1], k),
    ),
    "user list": lambda: _held(collections.UserList([2.0]), lambda h: h[0], _set_item),
    "bytearray": lambda: _held(
        bytearray([2]), lambda h: float(h[0]), lambda h, k: _set_item(h, int(k))
    ),
    "array": lambda: _held(array.array("d", [2.0]), lambda h: h[0], _set_item),
    "objects": _object_array,
    "context variable": _context_variable,
    "mapping proxy": _mapping_proxy,
    "values": _values_of_a_dictionary,
    "weak reference": functools.partial(_weak_reference, weakref.ref),
    "weak proxy": functools.partial(_weak_reference, weakref.proxy),
    "slice": _rebound_slice,
    "order": _order_of_the_same_fields,
    "function attribute": _function_attribute,
    "property of a metaclass": _attribute_of_a_metaclass,
    "value of a metaclass": _value_of_a_metaclass,
    "item of a metaclass": _item_of_a_metaclass,
    "constructor": _global_of_a_constructor,
    "dictionary with an attribute": _attribute_of_a_dictionary,
    "number with an attribute": _attribute_of_a_number,
    "memoryview": _byte_view,
    "deep": _deep_list,
    "cycle": _cycle,
}


# The others go the same ways.
QUICK = {
    *("matmul of Special", "neg of Special", "getitem of Special", "iter of Special"),
    *("getattr of Special", "descriptor", "deque", "chain", "bytearray", "objects"),
    *("context variable", "mapping proxy", "value of a metaclass"),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, case in UNNAMED.items()
    ],
)
def test_eager_layer_sees_a_change_of_what_no_code_names(case):
    test_eager_layer_sees_a_change_of_what_its_function_reads(case)


class Watched:
    """Counts each call of a method that looking might run."""

    def __init__(self):
        self.k, self.calls = 2.0, 0

    def __matmul__(self, y):
        return self.k * y

    def _called(self, *args):
        self.calls += 1
        raise AttributeError(args)

    __iter__ = __getattr__ = __len__ = __repr__ = __bool__ = __array__ = _called


def test_looking_for_a_change_runs_no_method_of_an_object():
    watched, traced = Watched(), []

    def residual(y, a):
        traced.append(y)
        return watched @ y - a

    layer = eqi.ImplicitFunction(eqi.Root(residual), optx.Newton(**NEWTON))
    for _ in range(2):
        assert_close(layer(jnp.array(0.5), jnp.array(1.0)), 0.5)
    assert watched.calls == 0


def test_eager_layer_compiles_once_where_an_unread_field_changes():
    config, traces = Config(2.0), []

    def residual(y, a):
        traces.append(None)
        return config @ y - a

    layer = eqi.ImplicitFunction(eqi.Root(residual), optx.Newton(**NEWTON))
    counts = []
    for _ in range(3):
        assert_close(layer(jnp.array(0.5), jnp.array(1.0)), 0.5)
        counts.append(len(traces))
        config.steps += 1
    assert counts == [counts[0]] * 3


def test_gradient_through_an_attribute_may_be_taken_again():
    spring = Spring(jnp.array(1.0))

    def loss(k):
        spring.stiffness = k
        return eqi.root_find(spring.residual, jnp.array(0.5), jnp.array(1.0)).value

    for k in (2.0, 3.0):
        assert_close(jax.grad(loss)(jnp.array(k)), -1 / k**2)


def test_eager_layer_compiles_once_where_nothing_that_is_read_changes():
    spring = Spring(jnp.array(2.0))
    traced = []
    for i in range(3):
        layer = eqi.ImplicitFunction(eqi.Root(spring.residual), optx.Newton(**NEWTON))
        assert_close(layer(jnp.array(0.5), jnp.array(1.0)), 0.5)
        traced.append(spring.traces)
        spring.parts.append(i)  # no function reads this
    assert traced == [traced[0]] * 3
