"""A low-rank inverse of a Hessian, for hypergradients."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._custom_types import PyTree, ShapeDtypeStruct
from .._ranges import refuse_below
from ._measured import AbstractMeasuredSolver, approximate, Measured
from ._residual import epsilon, minus, norm, size, structure


class NystromState(eqx.Module):
    """`columns` are `C = A[:, K]`, stacked first; `core` is `(ρ W + CᵀC)⁺`."""

    operator: lx.AbstractLinearOperator
    columns: PyTree[Array]
    core: Float[Array, "k k"]
    sign: int = eqx.field(static=True)


class Nystrom(AbstractMeasuredSolver[NystromState]):
    r"""The inverse of a low-rank approximation of a symmetric operator, plus a ridge.

    For `rank` columns $K$ drawn without replacement, $C = A_{:K}$ and $W = A_{KK}$,

    $$x = (C W^{+} C^\top + \rho I)^{-1} b
        = \frac1\rho\Bigl(b - C\bigl(\rho W + C^\top C\bigr)^{-1} C^\top b\Bigr).$$

    `rank` products once, in one batch; each solve is then two thin products, with no
    iteration to converge or to diverge. Inexact by design: the result is successful if
    it is finite, and `stats["residual_norm"]` is `‖b - A x‖₂`. Exact up to the ridge
    at full rank. For a fast-decaying spectrum, as Hessians of large models have.

    **Arguments:**

    - `rank`: the number of columns, from 1 to the number of unknowns.
    - `rho`: the ridge, positive, in the units of `A`.
    - `key`: draws the columns: the same ones in every call. `jax.random.PRNGKey(0)` if
        `None`.

    ??? cite "References"

        R. Hataya, M. Yamada, "Nyström method for accurate and scalable implicit
        differentiation", AISTATS (2023), eqs. (5) and (6).
    """

    rank: int = eqx.field(static=True)
    rho: float = 0.01
    key: PRNGKeyArray | None = None

    def __check_init__(self) -> None:
        """Refuses a rank or a ridge that is not positive."""
        refuse_below("Nystrom", 1, rank=self.rank)
        if not isinstance(self.rho, Tracer) and self.rho <= 0:
            raise ValueError(
                f"`Nystrom(rho={self.rho})` must be positive: a matrix of low rank has "
                "no inverse without a ridge."
            )

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> NystromState:
        """Returns the sampled columns, and the factors of the small matrix.

        **Raises:** `ValueError` if `rank` exceeds the number of unknowns, or if the
        operator has no symmetric tag.
        """
        del options
        struct = structure(operator)
        n = size(struct)
        if self.rank > n:
            raise ValueError(
                f"`Nystrom(rank={self.rank})` exceeds the number of unknowns, {n}. "
                f"Pass a `rank` of at most {n}, or use an exact solver."
            )
        if not lx.is_symmetric(operator):
            raise ValueError(
                "`Nystrom` needs a symmetric operator (a Hessian); got one without a "
                "symmetric tag. Use `Minimum(fn)` or `tags=lx.symmetric_tag`, or "
                "`Neumann(num_terms)` for one that is not symmetric."
            )
        sign = -1 if lx.is_negative_semidefinite(operator) else 1
        key = jax.random.PRNGKey(0) if self.key is None else self.key
        chosen = jax.random.choice(key, n, (self.rank,), replace=False)
        units = _unit_vectors(chosen, struct)
        columns = jax.vmap(lambda unit: _scaled(sign, operator.mv(unit)))(units)
        cut = 10 * self.rank * epsilon(struct)
        roots, signs = _roots(_gram(units, columns), columns, cut)
        core = jnp.diag(self.rho * signs) + _gram(roots, roots)
        return NystromState(lx.linearise(operator), roots, jnp.linalg.inv(core), sign)

    def answer(
        self, state: NystromState, vector: PyTree[Array], options: dict[str, Any]
    ) -> Measured:
        """Returns the approximate solution, its result and its `residual_norm`."""
        del options
        projected = _project(state.columns, vector)
        weights = jnp.matmul(state.core, projected, precision="highest")
        lifted = jtu.tree_map(
            lambda c: jnp.tensordot(weights, c, axes=1, precision="highest"),
            state.columns,
        )
        x = jtu.tree_map(lambda b, c: state.sign * (b - c) / self.rho, vector, lifted)
        r_norm = norm(minus(vector, state.operator.mv(x)))
        return approximate(x, vector, r_norm, rank=self.rank)

    def transpose(
        self, state: NystromState, options: dict[str, Any]
    ) -> tuple[NystromState, dict[str, Any]]:
        """Returns the same state: the operator is symmetric."""
        return state, options

    def conj(
        self, state: NystromState, options: dict[str, Any]
    ) -> tuple[NystromState, dict[str, Any]]:
        """Returns the same state: the operator is real."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Whether a singular operator is a failure: no, the ridge makes it regular."""
        return False


def _scaled(sign: int, x: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda leaf: sign * leaf, x)


def _unit_vectors(
    chosen: Int[Array, " k"], struct: PyTree[ShapeDtypeStruct]
) -> PyTree[Array]:
    # Entry i of the flattened vector, without flattening: each leaf counts on.
    leaves, treedef = jtu.tree_flatten(struct)
    offset, units = 0, list[Array]()
    for leaf in leaves:
        index = jnp.arange(offset, offset + leaf.size).reshape((1, *leaf.shape))
        which = chosen.reshape((-1,) + (1,) * leaf.ndim)
        units.append((index == which).astype(leaf.dtype))
        offset += leaf.size
    return jtu.tree_unflatten(treedef, units)


def _roots(
    core: Float[Array, "k k"], columns: PyTree[Array], cut: float
) -> tuple[PyTree[Array], Float[Array, " k"]]:
    """`B` and the diagonal of `S`, of signs, for which `B S Bᵀ` is the approximation.

    With the square root of the sampled block, as its square has half of the digits.
    The block is singular where the sampled columns are dependent.
    """
    values, vectors = jnp.linalg.eigh((core + core.T) / 2)
    sizes = jnp.abs(values)
    kept = sizes > cut * jnp.max(sizes)
    inverse = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, sizes, 1)), 0)
    mixed = vectors * inverse[None, :]
    roots = jtu.tree_map(
        lambda c: jnp.tensordot(mixed.T, c, axes=1, precision="highest"), columns
    )
    return roots, jnp.where(kept & (values < 0), -1.0, 1.0).astype(core.dtype)


def _project(columns: PyTree[Array], x: PyTree[Array]) -> Float[Array, " k"]:
    terms = [
        jnp.tensordot(c, leaf, axes=leaf.ndim, precision="highest")
        for c, leaf in zip(jtu.tree_leaves(columns), jtu.tree_leaves(x), strict=True)
    ]
    return sum(terms[1:], terms[0])


def _gram(left: PyTree[Array], right: PyTree[Array]) -> Float[Array, "k k"]:
    return jax.vmap(lambda x: _project(right, x))(left)
