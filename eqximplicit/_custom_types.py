"""Types that a static checker and the run-time checker see differently."""

from typing import Any, Generic, TYPE_CHECKING, TypeAlias, TypeVar

import equinox as eqx
import lineax as lx

_Leaf = TypeVar("_Leaf")
_State = TypeVar("_State")

if TYPE_CHECKING:
    # A static checker cannot follow nested containers: their contents are anything.
    PyTree: TypeAlias = _Leaf | Any
    # JAX's has type parameters that its users cannot name.
    ShapeDtypeStruct: TypeAlias = Any

    class AbstractLinearSolver(eqx.Module, Generic[_State]):
        """lineax's, which ships no types."""

        def init(self, operator: Any, options: dict[str, Any]) -> _State: ...
        def compute(
            self, state: _State, vector: Any, options: dict[str, Any]
        ) -> tuple[Any, Any, dict[str, Any]]: ...
        def transpose(
            self, state: _State, options: dict[str, Any]
        ) -> tuple[_State, dict[str, Any]]: ...
        def conj(
            self, state: _State, options: dict[str, Any]
        ) -> tuple[_State, dict[str, Any]]: ...
        def assume_full_rank(self) -> bool: ...

    LinearSolver: TypeAlias = lx.AbstractLinearSolver[Any] | AbstractLinearSolver[Any]
else:
    from jax import ShapeDtypeStruct as ShapeDtypeStruct
    from jaxtyping import PyTree as PyTree
    from lineax import AbstractLinearSolver as AbstractLinearSolver

    LinearSolver = AbstractLinearSolver


def check_no_class(name: str, given: object) -> None:
    """Refuses a class where an instance belongs.

    **Raises:** `TypeError` naming the class.
    """
    if isinstance(given, type):
        raise TypeError(
            f"`{name}` is the class `{given.__name__}`. Pass an instance, "
            f"`{given.__name__}(...)`."
        )


def check_instance(name: str, given: object, kind: type, wanted: str) -> None:
    """Refuses what is not of the kind; there is no static checker for everybody.

    **Raises:** `TypeError` naming what was given and what is wanted.
    """
    check_no_class(name, given)
    if not isinstance(given, kind):
        theirs = type(given)
        raise TypeError(
            f"`{name}` must be {wanted}; got an object of type "
            f"`{theirs.__module__.partition('.')[0]}.{theirs.__name__}`."
        )
