"""The numbers that steer the default fixed-point solver, and those that it measures.

They are carried as one vector (`_packed.py`).
"""

import enum

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import _packed as pk
from .._packed import packed


class Kind(enum.IntEnum):
    """What a trial point is."""

    START = 0
    PLAIN = 1  # mixing alone: no history, or a rejected step to make up for
    MIXED = 2  # Anderson's
    RESCUE = 3  # plain iteration from `y0`
    PROBE = 4  # a finite difference of the residual


class Ending(enum.IntEnum):
    """Whether the solve goes on, and if not, why."""

    NONE = 0
    CONVERGED = 1
    NONFINITE_START = 2
    STUCK = 3


class Control(eqx.Module):
    """The numbers that steer the solve, all of them real. Flags are 0 or 1."""

    # The trial point: what it is for, and the length of the step in its model.
    kind: Array
    step_size: Array
    reach: Array
    rest: Array
    # The steps: `curvature` is the relative model error per distance.
    mixing: Array
    size: Array
    curvature: Array
    # The errors: `amplification` is the error per residual, and `reference` the merit
    # that a trial is compared with.
    amplification: Array
    reference: Array
    anchor_merit: Array
    start_merit: Array
    best_merit: Array
    best_residual: Array
    best_error: Array
    best_floor: Array
    # The state machine.
    num_stalled: Array
    num_rejected: Array
    num_plain: Array
    patient: Array  # whether it has come to the last resort
    probing: Array
    newton: Array
    num_rescues: Array
    num_barren: Array
    merit_at_rescue: Array
    ending: Array
    # What the last evaluation decided.
    accepted: Array
    improved: Array
    keep: Array
    slot: Array
    used: Array
    newest: Array
    moved: Array
    from_start: Array
    from_best: Array


def unpacked(vector: Float[Array, " n"]) -> Control:
    """The control of which `vector` is packed."""
    return pk.unpacked(Control, vector)


def pack(control: Control) -> Float[Array, " n"]:
    """The control as one vector."""
    return packed(control, control.size.dtype)


class Numbers(eqx.Module):
    """What an evaluation measures.

    `change` and `distance` are the lengths of the pair that it makes with the anchor;
    `scaled...` are in units of the tolerance; `floor` is the residual in roundings;
    `missed` is what the model missed; `sense` is -1 where the state is one number and a
    plain step leads it away from its fixed point, else 1.
    """

    finite: Array
    merit: Array
    change: Array
    distance: Array
    scaled: Array
    scaled_change: Array
    scaled_distance: Array
    floor: Array
    missed: Array
    sense: Array


def at_start(dtype: jnp.dtype) -> Float[Array, " n"]:
    """Returns the packed control before the first evaluation."""
    infinite = (
        "reference", "anchor_merit", "start_merit", "best_merit", "best_residual",
        "best_error", "best_floor", "merit_at_rescue",
    )  # fmt: skip
    unit = ("step_size", "mixing", "size", "amplification")
    return pk.constant(Control, infinite, unit, dtype)


class Proposal(eqx.Module):
    """What the model says about the next trial point.

    **Attributes:**

    - `new`: whether a probe leads in a new direction.
    - `error`: the full step of the model, in units of the tolerance.
    - `reach`: how far away the pairs are that it rests on.
    - `rest`: the length of what the pairs leave of the residual, if there may be enough
        of them to leave nothing; else zero.
    """

    new: Array
    error: Array
    reach: Array
    rest: Array
