"""Arguments of constructors that are out of range."""

from typing import Any

import numpy as np
from jax.core import Tracer


def refuse_negative(name: str, **values: Any) -> None:
    """Refuses what is negative, NaN or infinite, by its name; a traced one passes."""
    for field, value in values.items():
        if value is None or isinstance(value, Tracer):
            continue
        if not np.all((np.asarray(value) >= 0) & np.isfinite(value)):
            raise ValueError(
                f"`{name}({field}=...)` must be at least 0 and finite; got {value}."
            )


def refuse_zero(name: str, **values: Any) -> None:
    """Refuses zero, NaN and infinity, by its name; a traced one passes."""
    for field, value in values.items():
        if isinstance(value, Tracer):
            continue
        if not np.all((np.asarray(value) != 0) & np.isfinite(value)):
            raise ValueError(
                f"`{name}({field}=...)` must be finite and not 0; got {value}."
            )


def refuse_below(name: str, least: int, **counts: Any) -> None:
    """Refuses what is no whole number, or less than `least`; `None` passes."""
    for field, count in counts.items():
        whole = isinstance(count, (int, np.integer))
        if count is not None and (not whole or count < least):
            raise ValueError(
                f"`{name}({field}={count!r})` must be a whole number of at least "
                f"{least}."
            )
