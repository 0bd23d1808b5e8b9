r"""THE RULE, as JAX sees it: two primitives that know their derivative and transpose.

    attach(y, θ) = y             ẏ  =  tangent(y, θ, θ̇)
    solve(S, c, b) = A⁻¹ b       ẋ  =  solve(S, c, ḃ - Ȧ x)       b̄  =  solveᵀ(S, c, x̄)

`S` is what a linear solver has computed from `A`, which is the linear map `apply(c, ·)`
of the coefficients `c`; `S` carries no derivative, `c` does. Everything is a flat list
of arrays here; `_implicit.py` and `_linear.py` know the pytrees.

Why primitives: a `custom_jvp` is replaced by its body where JAX evaluates a program
partially (reverse mode inside a `scan` does so twice), and the body of `attach` has no
derivative; and `jax.lax.custom_linear_solve` traces the solve and its transpose at
once, where one of them is used. These are traced when a program comes to need them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

# Of arrays; as a rule is called by JAX, constants may have become numbers.
Leaves = Sequence[Any]
Moving = tuple[bool, ...]
# tangent(moving, y, rest, t_moving) is ẏ; `moving` tells which leaves of θ, the first
# ones of `rest`, have a tangent, and `t_moving` holds those tangents.
Tangent = Callable[[Moving, Leaves, Leaves, Leaves], Leaves]

_attach_p = Primitive("implicit_attach")
_attach_p.multiple_results = True
_solve_p = Primitive("implicit_linear_solve")
_solve_p.multiple_results = True


class Flat(NamedTuple):
    """A pytree as its array leaves, and what it takes to put it together again."""

    leaves: list[Array]
    structure: "Structure"


class Structure(NamedTuple):
    """What is left of a pytree without its arrays."""

    dtypes: list[Any]
    treedef: Any
    static: Any

    def restored(self, leaves: Leaves) -> Any:
        pairs = zip(leaves, self.dtypes, strict=True)
        arrays = [_as_array(leaf, dtype) for leaf, dtype in pairs]
        return eqx.combine(jtu.tree_unflatten(self.treedef, arrays), self.static)


def flatten(tree: Any) -> Flat:
    """The array leaves of a pytree, which may hold anything else as well."""
    arrays, static = eqx.partition(tree, eqx.is_array)
    leaves, treedef = jtu.tree_flatten(arrays)
    return Flat(leaves, Structure([leaf.dtype for leaf in leaves], treedef, static))


def _as_array(leaf: Any, dtype: Any) -> Array:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf, dtype)


def attach(y: Leaves, theta: Leaves, rest: Leaves, tangent: Tangent) -> list[Array]:
    """Returns `y`, with the derivative `tangent(moving, y, theta + rest, t_moving)`."""
    sizes = len(y), len(theta)
    return _attach_p.bind(*y, *theta, *rest, sizes=sizes, tangent=tangent)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearSystem:
    """The callables of one linear system; all from flat lists to flat lists.

    **Attributes:**

    - `apply`: `A v` from the coefficients and `v`.
    - `solve`, `solve_transposed`: `A⁻¹ b` and `A⁻ᵀ b` from the factors and `b`.
    - `transposed`: whether this stands for the system of `Aᵀ`.
    - `cancels`: whether `b` is a difference, which may be no more than its rounding.
    """

    apply: Callable[[Leaves, Leaves], Leaves]
    solve: Callable[[Leaves, Leaves], Leaves]
    solve_transposed: Callable[[Leaves, Leaves], Leaves]
    transposed: bool = False
    cancels: bool = False

    def flip(self) -> "LinearSystem":
        return dataclasses.replace(self, transposed=not self.transposed)

    def image(self, coefficients: Leaves, vector: Leaves) -> Leaves:
        if not self.transposed:
            return self.apply(coefficients, vector)
        transpose = jax.linear_transpose(lambda v: self.apply(coefficients, v), vector)
        return transpose(vector)[0]

    def solution(self, factors: Leaves, vector: Leaves) -> Leaves:
        solve = self.solve_transposed if self.transposed else self.solve
        return solve(factors, list(map(once, vector)) if self.cancels else vector)


def once(x: Array) -> Array:
    """`x`, which XLA computes once: a quotient is not repeated in all that uses it.

    What is only rounding is another number each time, and no solution fits them all.
    """
    one, two = (jax.lax.full_like(x, value) for value in (1, 2))
    return x / jax.lax.select(x != x, two, one)


def linear_solve(
    factors: Leaves, coefficients: Leaves, vector: Leaves, system: LinearSystem
) -> list[Array]:
    """Returns the solution of `system`, linear in `vector`."""
    sizes = len(factors), len(coefficients)
    return _solve_p.bind(*factors, *coefficients, *vector, sizes=sizes, system=system)


def _split(leaves: Sequence[Any], sizes: tuple[int, int]) -> tuple[list[Any], ...]:
    first, second = sizes[0], sizes[0] + sizes[1]
    return list(leaves[:first]), list(leaves[first:second]), list(leaves[second:])


def moving_part(
    leaves: Leaves, moving: Moving
) -> tuple[Callable[[Leaves], list[Any]], list[Any]]:
    """The leaves that move, and how all leaves are had from those."""

    def from_moving(moved: Leaves) -> list[Any]:
        new = iter(moved)
        pairs = zip(leaves, moving, strict=True)
        return [next(new) if moves else leaf for leaf, moves in pairs]

    moved = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
    return from_moving, moved


def _pushed_forward(
    fn: Callable[[Leaves], Any], leaves: Leaves, moving: Moving, t_moving: Leaves
) -> Any:
    """The tangent of `fn(leaves)` along the tangents of those leaves that move."""
    from_moving, moved = moving_part(leaves, moving)
    return jax.jvp(lambda at: fn(from_moving(at)), (moved,), (list(t_moving),))[1]


def _moves(tangent: Any) -> bool:
    return type(tangent) is not ad.Zero and tangent.dtype != jax.dtypes.float0


def _zeros(primals: Leaves) -> list[Any]:
    zero: Any = ad.Zero
    return [zero.from_primal_value(x) for x in primals]


def _mapped(axis: Any, fn: Callable[..., Any], *dims: list[Any]) -> Callable[..., Any]:
    """`fn` for a batch: its arguments are lists, mapped over `dims`."""
    names = {"axis_name": axis.name, "spmd_axis_name": axis.spmd_name}
    return jax.vmap(fn, in_axes=dims, axis_size=axis.size, **names)


# --- attach ---------------------------------------------------------------------------


def _attach_impl(*leaves: Any, sizes: tuple[int, int], tangent: Tangent) -> Leaves:
    del tangent
    return list(leaves[: sizes[0]])


def _attach_jvp(
    primals: Leaves,
    tangents: Sequence[Any],
    *,
    sizes: tuple[int, int],
    tangent: Tangent,
) -> tuple[Leaves, Sequence[Any]]:
    # y* moves with θ, so that higher derivatives are right; its own tangent, that of
    # the solver, is none.
    y = _attach_p.bind(*primals, sizes=sizes, tangent=tangent)
    _, t_theta, _ = _split(tangents, sizes)
    moving = tuple(map(_moves, t_theta))
    if not any(moving):
        return y, _zeros(y)
    t_moving = [t for t in t_theta if _moves(t)]
    return y, tangent(moving, y, primals[sizes[0] :], t_moving)


def _attach_batch(
    axis: Any,
    leaves: Leaves,
    dims: Sequence[Any],
    *,
    sizes: tuple[int, int],
    tangent: Tangent,
) -> tuple[Leaves, Sequence[Any]]:
    if all(d is None for d in dims):
        out = _attach_p.bind(*leaves, sizes=sizes, tangent=tangent)
        return out, [None] * len(out)
    y, rest = list(leaves[: sizes[0]]), leaves[sizes[0] :]
    y_dims, rest_dims = list(dims[: sizes[0]]), list(dims[sizes[0] :])
    y = _mapped(axis, lambda y: y, y_dims)(y)

    def batched(moving: Moving, y: Leaves, rest: Leaves, t_moving: Leaves) -> Leaves:
        theta_dims = rest_dims[: sizes[1]]
        t_dims = [d for d, moves in zip(theta_dims, moving, strict=True) if moves]
        fn = lambda y, rest, t: tangent(moving, y, rest, t)
        mapped = _mapped(axis, fn, [0] * len(y), rest_dims, t_dims)
        return mapped(list(y), list(rest), list(t_moving))

    out = _attach_p.bind(*y, *rest, sizes=sizes, tangent=batched)
    return out, [0] * len(out)


# --- solve ----------------------------------------------------------------------------


def _solve_impl(
    *leaves: Any, sizes: tuple[int, int], system: LinearSystem
) -> list[Array]:
    factors, _, vector = _split(leaves, sizes)
    return list(system.solution(factors, vector))


def _solve_jvp(
    primals: Leaves,
    tangents: Sequence[Any],
    *,
    sizes: tuple[int, int],
    system: LinearSystem,
) -> tuple[Leaves, Sequence[Any]]:
    factors, coefficients, vector = _split(primals, sizes)
    _, t_coefficients, t_vector = _split(tangents, sizes)
    x = linear_solve(factors, coefficients, vector, system)
    moving = tuple(map(_moves, t_coefficients))
    if not any(moving) and not any(map(_moves, t_vector)):
        return x, _zeros(x)
    t_b = [ad.instantiate_zeros(t) for t in t_vector]  # ḃ
    if any(moving):  # - Ȧ x
        along = [t for t in t_coefficients if _moves(t)]
        image = lambda c: system.image(c, x)
        drift = _pushed_forward(image, coefficients, moving, along)
        t_b = [a - b for a, b in zip(t_b, drift, strict=True)]
        system = dataclasses.replace(system, cancels=True)
    return x, linear_solve(factors, coefficients, t_b, system)


def _solve_transpose(
    cotangents: Sequence[Any],
    *leaves: Any,
    sizes: tuple[int, int],
    system: LinearSystem,
) -> list[Any]:
    factors, coefficients, vector = _split(leaves, sizes)
    if all(type(ct) is ad.Zero for ct in cotangents):
        return [None] * len(leaves)
    cts = [ad.instantiate_zeros(ct) for ct in cotangents]
    found = linear_solve(factors, coefficients, cts, system.flip())
    wanted = map(ad.is_undefined_primal, vector)
    ct_vector = [ct if w else None for ct, w in zip(found, wanted, strict=True)]
    return [None] * (len(factors) + len(coefficients)) + ct_vector


def _solve_batch(
    axis: Any,
    leaves: Leaves,
    dims: Sequence[Any],
    *,
    sizes: tuple[int, int],
    system: LinearSystem,
) -> tuple[Leaves, Sequence[Any]]:
    factors, coefficients, vector = _split(leaves, sizes)
    f_dims, c_dims, b_dims = _split(dims, sizes)
    if all(d is None for d in dims):
        return linear_solve(factors, coefficients, vector, system), b_dims
    vector = _mapped(axis, lambda b: b, b_dims)(vector)
    zeros = [0] * len(vector)
    batched = LinearSystem(
        apply=_mapped(axis, system.apply, c_dims, zeros),
        solve=_mapped(axis, system.solve, f_dims, zeros),
        solve_transposed=_mapped(axis, system.solve_transposed, f_dims, zeros),
        transposed=system.transposed,
        cancels=system.cancels,
    )
    return linear_solve(factors, coefficients, vector, batched), zeros


# --- registration ---------------------------------------------------------------------


def _attach_aval(*avals: Any, sizes: tuple[int, int], tangent: Tangent) -> list[Any]:
    del tangent
    return list(avals[: sizes[0]])


def _solve_aval(*avals: Any, sizes: tuple[int, int], system: LinearSystem) -> list[Any]:
    del system
    return list(avals[sum(sizes) :])


_attach_p.def_impl(_attach_impl)
_attach_p.def_abstract_eval(_attach_aval)
ad.primitive_jvps[_attach_p] = _attach_jvp
batching.fancy_primitive_batchers[_attach_p] = _attach_batch
mlir.register_lowering(_attach_p, mlir.lower_fun(_attach_impl, multiple_results=True))

_solve_p.def_impl(_solve_impl)
_solve_p.def_abstract_eval(_solve_aval)
ad.primitive_jvps[_solve_p] = _solve_jvp
ad.primitive_transposes[_solve_p] = _solve_transpose
batching.fancy_primitive_batchers[_solve_p] = _solve_batch
mlir.register_lowering(_solve_p, mlir.lower_fun(_solve_impl, multiple_results=True))
