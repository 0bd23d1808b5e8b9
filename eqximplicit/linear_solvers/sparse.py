"""A direct solver that finds the sparsity of its operator by itself."""

import sys
from typing import Any, get_args, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Inexact

from .._custom_types import PyTree, ShapeDtypeStruct
from .._entries import every
from ._dense import MAX_BYTES
from ._measured import AbstractDirectSolver, Measured
from ._pattern import (
    detect_structure as detect_structure,
    flat_size,
    Structure as Structure,
)
from ._plan import AbstractPlan, generic_vector, is_regular
from ._residual import check_bytes
from ._rounding import rounding_of_products
from ._sparse_plans import Backend, plan_for


class _Layout(NamedTuple):
    """The shapes and dtypes of a pytree of arrays, hashable."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    def flatten(self, tree: PyTree[Array], dtype: Any) -> Inexact[Array, " n"]:
        leaves = jtu.tree_leaves(tree)
        return jnp.concatenate([x.astype(dtype).reshape(-1) for x in leaves])

    def unflatten(self, flat: Inexact[Array, " n"]) -> PyTree[Array]:
        sizes = [int(np.prod(s, dtype=np.int64)) for s in self.shapes]
        parts = jnp.split(flat, np.cumsum(sizes)[:-1].tolist())
        leaves = [
            _cast(part.reshape(shape), dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
        return jtu.tree_unflatten(self.treedef, leaves)


def _layout(struct: PyTree[ShapeDtypeStruct]) -> _Layout:
    leaves, treedef = jtu.tree_flatten(struct)
    dtypes = tuple(np.dtype(x.dtype) for x in leaves)
    return _Layout(treedef, tuple(x.shape for x in leaves), dtypes)


def _cast(x: Array, dtype: Any) -> Array:
    real = not jnp.issubdtype(dtype, jnp.complexfloating)
    return (x.real if real and jnp.iscomplexobj(x) else x).astype(dtype)


def _working_dtype(*layouts: _Layout) -> np.dtype:
    dtypes = [d for layout in layouts for d in layout.dtypes]
    if len({jnp.issubdtype(d, jnp.complexfloating) for d in dtypes}) > 1:
        raise ValueError(
            "`SparseDirect` needs a state whose leaves are all real or all complex; "
            f"got {sorted({str(d) for d in dtypes})}. Split complex leaves into their "
            "real and imaginary parts."
        )
    out = np.dtype(np.float32)
    for dtype in dtypes:
        out = np.promote_types(out, dtype)
    return out


class _SparseState(eqx.Module):
    """The entries of the operator, and what is static about them."""

    values: Any
    agrees: Bool[Array, ""]
    plan: AbstractPlan = eqx.field(static=True)
    domain: _Layout = eqx.field(static=True)
    codomain: _Layout = eqx.field(static=True)
    transposed: bool = eqx.field(static=True)


class SparseDirect(AbstractDirectSolver[_SparseState]):
    r"""A sparse direct solver; the sparsity is found from the operator's jaxpr.

    Entries come from as many products as the pattern has colours; those of diagonals,
    where only shifts and scalings make them, from the jaxpr, without any. Diagonal and
    tridiagonal operators are solved by LAPACK's (cuSPARSE's) tridiagonal LU with
    partial pivoting, others on CPU by KLU (`pip install eqximplicit[sparse]`), and
    elsewhere, or without klujax, by a block LU in plain JAX. The pattern is found once
    per structure of the jaxpr and holds for all values, hence under `jit` and `vmap`.

    The result is checked, not assumed. One more product, with a quasi-random vector,
    compares entries read off products with the operator (else `breakdown`). Rows and
    columns are scaled to entries of at most one; then both the right-hand side $b$ and
    a generic vector are solved for, and the solve has failed unless for both

    $\|Ax - b\|_\infty \le \epsilon^{3/4} (\|x\|_\infty + \|b\|_\infty)$ and
    $\|x\|_\infty \le \epsilon^{-4/5} \|b\|_\infty$

    (a small backward error and a condition number that leaves digits; the generic
    vector tells a singular system with a consistent right-hand side). If the second
    fails, the result is `singular`; else elimination has lost the digits, and it is
    `breakdown`. The LU in blocks is refined, and the first is asked of each row. A
    failed solution is NaN, but that of zero is zero.

    **Arguments:**

    - `backend`: `"auto"`; `"klu"` to insist on KLU; `"blocks"` for the LU in JAX.
    - `max_bytes`: the largest array of products, one for each colour, in bytes per
        lane. A dense row together with a dense column takes as many colours as columns.

    **Raises:** in `init`, `ValueError` for an operator that is not square, mixes real
    and complex leaves, is dense with more than 1000 unknowns, or has an operation that
    asdex does not know (an FFT, say); `ImportError` when an optional dependency is
    needed and missing.

    !!! example

        ```python
        solution = lx.linear_solve(operator, vector, SparseDirect())
        adjoint = ImplicitAdjoint(linear_solver=SparseDirect())
        ```

    ??? cite "References"

        Curtis, Powell and Reid, 1974, "On the estimation of sparse Jacobian
        matrices". Davis and Palamadai Natarajan, 2010, "Algorithm 907: KLU".
    """

    backend: Backend = eqx.field(static=True, default="auto")
    max_bytes: int = eqx.field(default=MAX_BYTES, static=True)

    def __check_init__(self) -> None:
        """Refuses a backend that there is not."""
        if self.backend not in get_args(Backend):
            raise ValueError(
                f"`SparseDirect` has no backend {self.backend!r}; it has "
                f"{', '.join(map(repr, get_args(Backend)))}."
            )

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> _SparseState:
        """The scaled entries of the operator, from one product per colour."""
        del options
        plan = plan_for(_sparse_structure(operator), self.backend)
        domain = _layout(operator.in_structure())
        codomain = _layout(operator.out_structure())
        dtype = _working_dtype(domain, codomain)
        count, size = plan.colouring.count, operator.in_size()
        check_bytes(count, size, dtype.itemsize, self.max_bytes, "SparseDirect")
        values, agrees = _entries(operator, plan, domain, codomain, dtype)
        return _SparseState(values, agrees, plan, domain, codomain, transposed=False)

    def answer(
        self, state: _SparseState, vector: PyTree[Array], options: dict[str, Any]
    ) -> Measured:
        """The solution, NaN if it is none, with its measured residual."""
        del options
        b = state.codomain.flatten(vector, _working_dtype(state.codomain, state.domain))
        solved = state.plan.solve(state.values, b, state.transposed)
        good = state.agrees & solved.trusted
        solution = jnp.where(good, solved.x, jnp.nan)
        stats = {
            "residual_norm": solved.residual,
            "condition_estimate": solved.condition,
        }
        singular = state.agrees & ~is_regular(solved.condition)
        x, result = state.domain.unflatten(solution), _result(good, singular)
        return Measured(x, ~every(b == 0), good, result, stats)

    def transpose(
        self, state: _SparseState, options: dict[str, Any]
    ) -> tuple[_SparseState, dict[str, Any]]:
        """The same entries, read the other way round."""
        flipped = _SparseState(
            values=state.values,
            agrees=state.agrees,
            plan=state.plan,
            domain=state.codomain,
            codomain=state.domain,
            transposed=not state.transposed,
        )
        return flipped, options

    def conj(
        self, state: _SparseState, options: dict[str, Any]
    ) -> tuple[_SparseState, dict[str, Any]]:
        """The conjugated entries."""
        values = jtu.tree_map(jnp.conj, state.values)
        return eqx.tree_at(lambda s: s.values, state, values), options

    def assume_full_rank(self) -> bool:
        """`True`: a singular operator is a failure."""
        return True


def _sparse_structure(operator: lx.AbstractLinearOperator) -> Structure:
    try:
        structure = detect_structure(operator, fallback_size=sys.maxsize)
    except NotImplementedError as error:  # asdex's, and of nothing else here
        cause = str(error).split(". ")[0]
        raise ValueError(
            f"`SparseDirect` cannot find the sparsity of this operator ({cause}). Pass "
            "another `linear_solver`, for example `AutoLinearSolver()`, or write the "
            "function with other operations."
        ) from error
    if structure is None:
        raise ImportError(
            "`SparseDirect` cannot follow this operator's jaxpr by itself and needs "
            "asdex. Install it with `pip install eqximplicit[sparse]`."
        )
    if structure.kind == "dense":
        raise ValueError(
            f"`SparseDirect` got a dense operator ({structure}): every unknown depends "
            "on (nearly) every other. Pass an iterative `linear_solver`, or write the "
            "coupling (a mean, a norm) as an unknown of its own."
        )
    return structure


def _entries(
    operator: lx.AbstractLinearOperator,
    plan: AbstractPlan,
    domain: _Layout,
    codomain: _Layout,
    dtype: np.dtype,
) -> tuple[Any, Bool[Array, ""]]:
    """The entries, and whether the operator agrees with them."""
    size = flat_size(operator.in_structure())

    def forward(v: Array) -> Array:
        return codomain.flatten(operator.mv(domain.unflatten(v)), dtype)

    def backward(v: Array) -> Array:
        image = operator.transpose().mv(codomain.unflatten(v))
        return domain.flatten(image, dtype)

    derived = plan.derived(forward, jax.ShapeDtypeStruct((size,), dtype))
    if derived is not None:
        return derived
    generic = generic_vector(size)
    seeds, probe = plan.colouring.seeds(dtype), jnp.asarray(generic.astype(dtype))
    if plan.colouring.mode == "rev":
        values, image = plan.read(jax.vmap(backward)(seeds)), forward(probe)
    else:
        products = jax.vmap(forward)(jnp.concatenate([seeds, probe[None]]))
        values, image = plan.read(products[:-1]), products[-1]
    # With room for half of the digits to cancel: an entry that the pattern lacks shows.
    close = rounding_of_products(operator) ** 0.5
    return values, plan.agrees(values, generic, image, close)


def _result(good: Bool[Array, ""], singular: Bool[Array, ""]) -> lx.RESULTS:
    failed = lx.RESULTS.where(singular, lx.RESULTS.singular, lx.RESULTS.breakdown)
    return lx.RESULTS.where(good, lx.RESULTS.successful, failed)
