"""All that Python objects hold, and what these hold in turn."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Named = tuple[str, Any]
_LIMIT = 100_000  # of objects: one may make up an attribute each time


def walk(
    roots: Iterable[Named],
    parts: Callable[[Any, str], Iterable[Named]],
    apart: object = None,
) -> Iterator[Named]:
    """Each object once, with the expression that reaches it; the nearest come first.

    `parts` gives what an object holds, by its name. Nothing that only `apart` holds is
    met. No recursion: what is held may be deep, or hold itself.
    """
    left = deque(roots)
    seen = {id(apart): apart}  # which keeps it alive: an `id` could come again
    while left and len(seen) < _LIMIT:
        name, value = left.popleft()
        if id(value) not in seen:
            seen[id(value)] = value
            yield name, value
            left += parts(value, name)
