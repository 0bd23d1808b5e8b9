"""Functions and solvers that return `(out, aux)`, and whether that has been said."""

from collections.abc import Callable
from typing import Any

import jax.tree_util as jtu

from ._state import describe


def split_pair(out: Any, who: str, pair: str) -> tuple[Any, Any]:
    """The two parts of what `who`, said to have auxiliary output, has returned.

    **Raises:** `ValueError` if it is no pair.
    """
    if isinstance(out, tuple) and len(out) == 2:
        return out
    raise ValueError(
        f"`has_aux=True` needs a {who} that returns a pair `{pair}`; got "
        f"{_described(out)}. Return a pair or drop `has_aux`."
    )


def check_no_pair(check: Callable[[Any], None], out: Any, who: str) -> None:
    """Runs `check(out)` on what `who`, without auxiliary output, has returned.

    **Raises:** the error of `check`; another one if a part of `out` would pass it.
    """
    try:
        check(out)
    except (ValueError, TypeError) as error:
        if not isinstance(out, tuple) or len(out) != 2 or not _passes(check, out[0]):
            raise
        raise type(error)(
            f"The {who} returns a pair of which the first part alone fits the state: "
            f"{_described(out)}. Pass `has_aux=True` if the second is auxiliary output."
        ) from None


def _passes(check: Callable[[Any], None], out: Any) -> bool:
    try:
        check(out)
    except (ValueError, TypeError):
        return False
    return True


def _described(out: Any) -> str:
    return str(jtu.tree_map(describe, out)).replace("'", "")
