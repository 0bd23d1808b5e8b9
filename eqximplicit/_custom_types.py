"""Types that a static checker and the run-time checker see differently."""

from typing import Any, TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    _Leaf = TypeVar("_Leaf")
    # A static checker cannot follow nested containers: their contents are anything.
    PyTree: TypeAlias = _Leaf | Any
else:
    from jaxtyping import PyTree as PyTree
