"""What the opening of the default fixed-point solver remembers, and steps by.

A state of few numbers takes Anderson's step with two pairs, which is the secant method
for one number. For a larger state plain steps are kept: where the function is cheap,
the products that such a step takes cost more than they save.
"""

import functools
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jax import lax
from jaxtyping import Array, Float

from .._custom_types import PyTree
from .._entries import peak
from .._packed import packed, unpacked, where, widened
from .._reduce import total
from . import _vector_space as vs
from ._verdict import Tolerance

# So many numbers are few; and so many evaluations of them are remembered.
FEW, DEPTH = 64, 4
# An Anderson step takes back at most so many times the last changes of the image.
LONGEST = 4.0
# A robust solver needs half as many steps as plain iteration at this rate. A step at a
# greater one adds to the delay, at most this much each: one bad step is an accident, a
# second one in a row is too much.
RATE, ANDERSON_RATE, LATE, TOO_LATE = 0.5, 0.3, 1.3, 1.4
# Growth of the residual that may be an accident of an Anderson step; of a plain one,
# as the first one is, none is.
ACCIDENT = 2.0


Point = tuple[PyTree[Array], PyTree[Array]]  # and the residual there
Numbers = Float[Array, " numbers"]


class Progress(eqx.Module):
    """The numbers of an iteration; its errors are in units of the tolerance."""

    before: Array  # the residual before the last point,
    error: Array  # and there
    delay: Array  # of `error`, as a factor, behind a good contraction
    steps: Array
    near: Array  # how much of the change of the image since the last point,
    far: Array  # and since the one before, the next step takes back

    @property
    def contracts(self) -> Array:
        return (self.error > 0) & (self.delay <= TOO_LATE)

    def solved(self, target: float) -> Array:
        # |r| / (1 - rate) < target, with the rate |r| / |r before|; no division.
        slack = target * (self.before - self.error)
        return (self.error == 0) | (self.error * self.before < slack)

    @property
    def amplification(self) -> Array:
        """The error per residual, 1 / (1 - rate)."""
        gained = self.before - self.error
        return self.before / jnp.where(gained > 0, gained, jnp.inf)

    def after(self, error: Array, rate: float, growth: float) -> "Progress":
        late = jnp.minimum(error / (rate * self.error), LATE)
        most = where(self.steps > 1, growth, 1.0) * self.error
        late = where(error <= most, late, jnp.inf)
        delay = jnp.maximum(self.delay * late, 1)
        return Progress(self.error, error, delay, self.steps + 1, self.near, self.far)

    def turned(self, products: "Products", eps: float) -> "Progress":
        """With the next Anderson step, of as many pairs as there are and differ.

        The first contraction is that of a plain step, and forgiven.
        """
        p = products
        det = p.near_near * p.far_far - p.near_far**2
        near = p.r_near * p.far_far - p.r_far * p.near_far
        far = p.r_far * p.near_near - p.r_near * p.near_far
        differ = det > eps**0.5 * p.near_near * p.far_far
        short = jnp.abs(near) + jnp.abs(far) <= LONGEST * det
        two = (self.steps > 2) & differ & short
        near, far = where(two, near, p.r_near), where(two, far, 0)
        scale = where(two, det, p.near_near)
        known = two | ((self.steps > 1) & (jnp.abs(near) < LONGEST * scale))
        scale = where(known, scale, jnp.inf)
        delay = where((self.steps > 2) | ~(self.delay < jnp.inf), self.delay, 1)
        steps, before = self.steps, self.before
        return Progress(before, self.error, delay, steps, near / scale, far / scale)


class Products(eqx.Module):
    """Inner products of a residual, and of its changes since the two before it."""

    r_near: Array
    r_far: Array
    near_near: Array
    near_far: Array
    far_far: Array


class Latest(eqx.Module):
    """The last evaluation of a plain iteration."""

    y: PyTree[Array]
    residual: PyTree[Array]

    @property
    def last(self) -> Point:
        return self.y, self.residual

    def ahead(self, progress: Progress) -> PyTree[Array]:
        """Returns the point that comes next."""
        del progress
        return vs.plus(self.y, self.residual)

    def followed(
        self, tolerance: Tolerance, new: Point, numbers: Numbers
    ) -> tuple["Latest", Numbers]:
        """Returns the record, and the packed progress, with one evaluation more."""
        y, residual = new
        known = (unpacked(Progress, numbers), tolerance.measure(residual, y))
        progress, error = widened(known, numbers)
        progress = progress.after(error, RATE, 1.0)
        return Latest(y, residual), packed(progress, numbers.dtype)


class Several(eqx.Module):
    """The last evaluations of an Anderson iteration, the newest first.

    Points and residuals are kept in one array per leaf, of shape
    `(DEPTH, 2, *leaf.shape)`.
    """

    stack: PyTree[Array]

    def __getitem__(self, age: int) -> Point:
        y = jtu.tree_map(lambda x: x[age, 0], self.stack)
        return y, jtu.tree_map(lambda x: x[age, 1], self.stack)

    @property
    def last(self) -> Point:
        return self[0]

    def ahead(self, progress: Progress) -> PyTree[Array]:
        """Returns the point that comes next."""
        image, near, far = (vs.plus(*self[age]) for age in range(3))
        out = vs.add_scaled(image, -progress.near, vs.minus(image, near))
        return vs.add_scaled(out, -progress.far, vs.minus(image, far))

    def followed(
        self, tolerance: Tolerance, new: Point, numbers: Numbers
    ) -> tuple["Several", Numbers]:
        """Returns the record, and the packed progress, with one evaluation more."""
        y, residual = new
        changes = (vs.minus(residual, self[age][1]) for age in range(2))
        measures = _measures(tolerance, y, residual, *changes)
        known = (unpacked(Progress, numbers), measures)
        progress, (error, products) = widened(known, numbers)
        progress = progress.after(error, ANDERSON_RATE, ACCIDENT)
        progress = progress.turned(products, vs.resolution(y))
        stack = jtu.tree_map(_pushed, self.stack, y, residual)
        return Several(stack), packed(progress, numbers.dtype)


Record = Latest | Several


def begun(tolerance: Tolerance, y: PyTree[Array]) -> Record:
    """Returns the record of which the first point ahead is `y`."""
    if vs.size(y) > FEW or tolerance.norm is not optx.max_norm:
        return Latest(y, vs.zeros_like(y))
    stack = jtu.tree_map(lambda x: jnp.zeros((DEPTH, 2, *x.shape), x.dtype), y)
    return Several(jtu.tree_map(_pushed, stack, y, vs.zeros_like(y)))


def at_start(dtype: Any) -> Numbers:
    """Returns the packed progress before the first evaluation."""
    return jnp.asarray([np.inf, np.inf, 1.0, 0.0, 0.0, 0.0], dtype)


def _pushed(stack: Array, y: Array, residual: Array) -> Array:
    """The stack with a new first entry, and without its last one."""
    none = [(0, 0, 0)] * (stack.ndim - 1)
    older = lax.pad(stack, jnp.zeros((), stack.dtype), [(1, -1, 0), *none])
    age, part = (lax.broadcasted_iota(np.int32, stack.shape, i) for i in (0, 1))
    wide = [
        lax.broadcast_in_dim(x, stack.shape, range(2, stack.ndim))
        for x in (y, residual)
    ]
    return lax.select(age == 0, lax.select(part == 0, *wide), older)


def _measures(
    tolerance: Tolerance,
    y: PyTree[Array],
    residual: PyTree[Array],
    near: PyTree[Array],
    far: PyTree[Array],
) -> tuple[Array, Products]:
    """The error, and the inner products of the residual with its changes.

    All from one stack, for it is a kernel: with one division, which is another.
    """
    dtype = vs.real_dtype(y)

    def leaf(yi: Array, r: Array, n: Array, f: Array) -> tuple[Array, Array]:
        unit = tolerance.unit(yi)
        size = jnp.where((unit == 0) & (r != 0), jnp.inf, jnp.abs(r))
        pairs = ((r, n), (r, f), (n, n), (n, f), (f, f))
        rows = [jnp.real(jnp.conj(a) * b) for a, b in pairs]
        units = [jnp.where(unit == 0, 1, unit), *[jnp.ones_like(unit)] * len(pairs)]
        rows, units = (
            vs.in_one([row.astype(dtype) for row in x]) for x in ([size, *rows], units)
        )
        stack = rows / units
        return peak(stack[0]), total(stack[1:], range(1, stack.ndim))

    leaves = map(leaf, *map(jtu.tree_leaves, (y, residual, near, far)))
    errors, products = zip(*leaves, strict=True)
    products = Products(*vs.apart(functools.reduce(jnp.add, products)))
    return functools.reduce(jnp.maximum, errors), products
