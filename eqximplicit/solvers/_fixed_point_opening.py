"""The opening of the default fixed-point solver: an iteration that costs little.

What it steps by, and what it remembers, is in `_fixed_point_record.py`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._custom_types import PyTree
from .._lanes import in_every_lane
from .._packed import unpacked
from .._problem import IteratedFn
from . import _vector_space as vs
from ._fixed_point_record import at_start, begun, Latest, Progress, Record
from ._opening import Opened
from ._verdict import Tolerance

# In additions: a step of the robust solver costs that of a small state some 5 us more.
DEAR = 1e4
# The parts of the tolerance that plain steps and Anderson steps go for, since the error
# is an estimate. The residuals of the latter shrink less evenly.
PLAIN, MIXED = 0.2, 0.3


class Iterates(eqx.Module):
    """How far an iteration has come.

    **Attributes:** where it began; its last evaluations; the auxiliary output of the
    function at the last point but one, and at the last; and how it does, packed.
    """

    start: PyTree[Array]
    record: Record
    last_aux: Any
    aux: Any
    numbers: Float[Array, " numbers"]

    @property
    def progress(self) -> Progress:
        return unpacked(Progress, self.numbers)


def opening(
    fn: IteratedFn,
    y: PyTree[Array],
    args: Any,
    aux: Any,
    tolerance: Tolerance,
    max_steps: int | None,
) -> Opened | None:
    r"""Iterates until the estimated error is within the tolerance.

    There is no opening where evaluations are dear: it takes some more of them.

    The error is the residual over $1 - \rho$ for a residual that shrinks by $\rho$. It
    is that of the point returned, which has been evaluated.
    """
    record = begun(tolerance, y)
    plain = isinstance(record, Latest)
    if not plain and fn.num_operations > DEAR:
        return None
    target = PLAIN if plain else MIXED

    def unfinished(c: Iterates) -> Bool[Array, ""]:
        wanted = c.progress.contracts & ~c.progress.solved(target)
        return wanted if max_steps is None else wanted & (c.progress.steps < max_steps)

    def step(c: Iterates) -> Iterates:
        ahead = c.record.ahead(c.progress)
        image, aux = fn(ahead, args)
        residual = vs.minus(image, ahead)
        record, numbers = c.record.followed(tolerance, (ahead, residual), c.numbers)
        return Iterates(y, record, c.aux, aux, numbers)

    first = Iterates(y, record, aux, aux, at_start(vs.real_dtype(y)))
    first = in_every_lane(first, (fn, args))
    last = jax.lax.while_loop(unfinished, step, first)
    return _opened(last, tolerance, target)


def _opened(c: Iterates, tolerance: Tolerance, target: float) -> Opened:
    progress, (y, residual) = c.progress, c.record.last
    solved, steps = progress.solved(target), progress.steps.astype(int)
    stats = {
        "residual_norm": vs.norm_of(tolerance.norm, residual, vs.real_dtype(y)),
        "scaled_error": progress.error,
        "amplification": progress.amplification,
        "num_rescues": jnp.zeros((), jnp.int32),
    }
    found = vs.select(solved, y, c.start)
    return Opened(found, c.aux, solved, steps, steps, stats, c)
