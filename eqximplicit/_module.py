"""JOIN, object-oriented: a module that says what it solves and how, in two methods."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, TYPE_CHECKING

import equinox as eqx

from ._adjoint import AbstractAdjoint, ImplicitAdjoint
from ._condition import AbstractCondition, FixedPoint, Minimum, Root
from ._function import ImplicitFunction

_CONDITIONS: dict[str, Callable[[Any], AbstractCondition[Any, Any]]] = {
    "objective": Minimum,
    "optimality": Root,
    "fixed_point_map": FixedPoint,
}


class AbstractImplicitModule(eqx.Module):
    """A module whose call is the solution of its own condition.

    A subclass defines `solve`, and exactly one of `objective`, `optimality` and
    `fixed_point_map`. All four are called as `method(self, y, *args)`. The arrays of
    the module are the parameters with respect to which the solution is differentiated;
    the code in `solve` is never differentiated.

    **Attributes:**

    - `adjoint`: how the solution is differentiated; override it as a class attribute
        or as a field.
    - `has_aux`: whether `solve` returns `(y, aux)`; override it as a class attribute.

    !!! example

        ```python
        class Inner(eqi.AbstractImplicitModule):
            meta_net: eqx.nn.Linear

            def objective(self, net, batch):
                return fit(net, batch) + distance(net, self.meta_net)

            def solve(self, net0, batch):
                ...  # any code

        net = Inner(meta_net)(net0, batch)
        ```
    """

    if TYPE_CHECKING:
        adjoint: ClassVar[AbstractAdjoint]
    else:
        # Without an annotation: a field of a subclass keeps its place after the others.
        adjoint = ImplicitAdjoint()
    has_aux: ClassVar[bool] = False

    # The most general signature: a static checker then takes a subclass's own.
    @abc.abstractmethod
    def solve(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the solution found from the initial guess `y0`, by any means."""

    def __check_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            names = ", ".join(f"`{name}`" for name in _CONDITIONS)
            found = " and ".join(f"`{name}`" for name in given) or "none of them"
            raise TypeError(
                f"`{type(self).__name__}` must define exactly one of {names}; it "
                f"defines {found}."
            )

    def _given(self) -> list[str]:
        return [name for name in _CONDITIONS if hasattr(type(self), name)]

    @property
    def condition(self) -> AbstractCondition[Any, Any]:
        """The condition that the module's one defining method states."""
        (name,) = self._given()
        return _CONDITIONS[name](_OnSelf(self, name))

    def __call__(self, y0: Any, *args: Any) -> Any:
        """Returns the solution (or `(solution, aux)`), differentiable in the module.

        **Arguments:**

        - `y0`: the initial guess, any pytree; it has no derivative.
        - `args`: passed on to `solve` and to the condition; differentiable.
        """
        layer = ImplicitFunction(
            self.condition,
            _SolveSelf(self),
            self.adjoint,
            throw=False,
            has_aux=self.has_aux,
        )
        solution = layer.solve(y0, args)
        return (solution.value, solution.aux) if self.has_aux else solution.value


class _OnSelf(eqx.Module):
    module: AbstractImplicitModule
    method: str = eqx.field(static=True)

    def __call__(self, y: Any, args: tuple[Any, ...]) -> Any:
        return getattr(self.module, self.method)(y, *args)


class _SolveSelf(eqx.Module):
    module: AbstractImplicitModule

    def __call__(self, y0: Any, args: tuple[Any, ...]) -> Any:
        return self.module.solve(y0, *args)
