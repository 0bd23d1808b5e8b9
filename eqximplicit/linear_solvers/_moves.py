"""JAX primitives that only move the entries of arrays, done to NumPy arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._equation import Equation

MOVES = frozenset(
    "slice transpose rev concatenate pad broadcast_in_dim reshape squeeze "
    "expand_dims".split()
)


def moved(eqn: Equation, operands: Sequence[Any]) -> Any:
    """Does to arrays of labels, or of anything, what the equation does to its own."""
    name, p, first = eqn.primitive.name, eqn.params, operands[0]
    shape = eqn.outvars[0].aval.shape
    if name == "slice":
        strides = p["strides"] or (1,) * first.ndim
        return first[tuple(map(slice, p["start_indices"], p["limit_indices"], strides))]
    if name == "transpose":
        return first.transpose(p["permutation"])
    if name == "rev":
        return np.flip(first, p["dimensions"])
    if name == "concatenate":
        return np.concatenate(operands, axis=p["dimension"])
    if name == "pad":
        return _pad(first, operands[1], p["padding_config"])
    if name == "broadcast_in_dim":
        wide = [1] * len(shape)
        for size, axis in zip(first.shape, p["broadcast_dimensions"], strict=True):
            wide[axis] = size
        return np.broadcast_to(first.reshape(wide), shape)
    # reshape, squeeze, expand_dims
    if name == "reshape" and p["dimensions"] is not None:
        first = first.transpose(p["dimensions"])
    return first.reshape(shape)


def _pad(operand: Any, fill: Any, config: Any) -> Any:
    for axis, (low, high, interior) in enumerate(config):
        size = operand.shape[axis]
        inner = size + max(size - 1, 0) * interior
        shape = list(operand.shape)
        shape[axis] = inner + max(low, 0) + max(high, 0)
        out = np.broadcast_to(fill.reshape(()), shape).astype(operand.dtype)
        at = [slice(None)] * operand.ndim
        start = max(low, 0)
        at[axis] = slice(start, start + inner, interior + 1)
        out[tuple(at)] = operand
        at[axis] = slice(max(-low, 0), shape[axis] - max(-high, 0))
        operand = out[tuple(at)]
    return operand
