"""SciPy's solvers, on the host."""

import importlib
import re
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import numpy as np

from .._ranges import refuse_negative
from .._solution import RESULTS
from ._on_host import (
    AbstractHostSolver,
    FAILED,
    Kind,
    LOCAL_MINIMUM,
    LOGGER,
    MAX_STEPS,
    OK,
    OnHost,
    Report,
    solve_on_host,
    TOO_LARGE,
)

_BUDGET = re.compile(r"max|limit|too many|has reached", re.IGNORECASE)
_GRADIENT_FREE = ("nelder-mead", "powell", "cobyla", "cobyqa")
_HESSIAN_PRODUCT = ("newton-cg", "trust-ncg", "trust-krylov")
_HESSIAN = ("dogleg", "trust-exact")
_FIXED_POINT = ("del2", "iteration")
_MINPACK = ("hybr", "lm")
_QUASI_NEWTON = (
    *("broyden1", "broyden2", "anderson", "linearmixing", "diagbroyden"),
    *("excitingmixing", "krylov"),
)
_ROOT = (*_MINPACK, *_QUASI_NEWTON, "df-sane")
_MINIMIZE = (
    *("Nelder-Mead", "Powell", "CG", "BFGS", "Newton-CG", "L-BFGS-B", "TNC", "COBYLA"),
    *("COBYQA", "SLSQP", "trust-constr", "dogleg", "trust-ncg", "trust-exact"),
    "trust-krylov",
)


def _require_scipy(name: str) -> None:
    try:
        importlib.import_module("scipy.optimize")
    except ImportError as error:
        raise ImportError(
            f"`{name}` needs SciPy, an optional dependency: install it with "
            "`pip install eqximplicit[scipy]`."
        ) from error


def _refuse_unknown(name: str, method: str, known: tuple[str, ...]) -> None:
    if method.lower() not in map(str.lower, known):
        raise ValueError(
            f"`{name}` has no method {method!r}. Pass one of {', '.join(known)}."
        )


def _optimize() -> Any:
    return importlib.import_module("scipy.optimize")


def _report(solution: Any) -> Report:
    """Returns SciPy's `OptimizeResult` in our terms."""
    code = OK
    if not solution.success:
        exhausted = _BUDGET.search(str(solution.message)) is not None
        code = MAX_STEPS if exhausted else FAILED
        LOGGER.warning("SciPy: %s", " ".join(str(solution.message).split()))
    nit, nfev = solution.get("nit", -1), solution.get("nfev", -1)
    return Report(np.atleast_1d(solution.x), code, int(nit), int(nfev))


def _judged(
    report: Report, residual: Any, residual_tol: float, wrong: int = TOO_LARGE
) -> Report:
    """Returns the report, with success only for a residual that is small."""
    small = np.max(np.abs(residual), initial=0.0) <= residual_tol
    return report if small or report.code != OK else report._replace(code=wrong)


class ScipyRoot(AbstractHostSolver):
    """Root finding by `scipy.optimize.root`.

    MINPACK's methods (`"hybr"`, `"lm"`) get the Jacobian from JAX; the others
    (`"krylov"`, `"anderson"`, `"broyden1"`, `"df-sane"`, ...) take none, and go on
    until the residual is at most `residual_tol`. SciPy calls some points a success that
    are none: a largest residual above `residual_tol` is a failure here
    (`RESULTS.local_minimum` under `"lm"`, else `residual_too_large`).

    **Arguments:**

    - `method`: a method of `scipy.optimize.root`.
    - `tol`: SciPy's `tol`, of relative steps (of relative residuals for `"df-sane"`);
        `None` for its default.
    - `options`: SciPy's options of the method, as `{"maxfev": 1000}`.
    - `residual_tol`: largest absolute residual that counts as a root. Dimensionless.

    **Raises:**

    - `ImportError`: SciPy is not installed.
    - `ValueError`: a negative tolerance, or a method that SciPy does not have.

    !!! example

        ```python
        eqi.ImplicitFunction(eqi.Root(fn), solver=eqi.ScipyRoot("hybr"))
        ```
    """

    method: str = eqx.field(default="hybr", static=True)
    tol: float | None = eqx.field(default=None, static=True)
    options: dict[str, Any] | None = eqx.field(default=None, static=True)
    residual_tol: float = eqx.field(default=1e-6, static=True)
    kind: ClassVar[Kind] = "root"

    def __check_init__(self) -> None:
        _require_scipy("ScipyRoot")
        _refuse_unknown("ScipyRoot", self.method, _ROOT)
        refuse_negative("ScipyRoot", tol=self.tol, residual_tol=self.residual_tol)

    def solve(
        self, fn: Callable[[Any, Any], Any], y0: Any, args: Any
    ) -> tuple[Any, RESULTS, dict[str, Any]]:
        """Returns a point where `fn(y, args)` is zero; see `AbstractHostSolver`."""

        def algorithm(host: OnHost, x0: Any) -> Report:
            solution = _scipy_root(self, host.value, host.jacobian, x0)
            wrong = LOCAL_MINIMUM if self.method.lower() == "lm" else TOO_LARGE
            return _judged(_report(solution), solution.fun, self.residual_tol, wrong)

        return solve_on_host(self, algorithm, fn, y0, args)


def _scipy_root(
    solver: "ScipyRoot | ScipyFixedPoint", residual: Any, jacobian: Any, x0: Any
) -> Any:
    method = solver.method.lower()
    jac = jacobian if method in _MINPACK else None
    options = {**_stopping(method, solver), **(solver.options or {})}
    return _optimize().root(
        residual, x0, method=method, jac=jac, tol=solver.tol, options=options
    )


def _stopping(method: str, solver: "ScipyRoot | ScipyFixedPoint") -> dict[str, float]:
    # By default they stop at 6e-6, with a `tol` whatever the residual is, or at a
    # residual relative to the first.
    if method in _QUASI_NEWTON:
        return {"fatol": solver.residual_tol}
    if method == "df-sane" and solver.tol is None:
        return {"ftol": 0.0, "fatol": solver.residual_tol}
    return {}


class ScipyFixedPoint(AbstractHostSolver):
    """Fixed points by `scipy.optimize.fixed_point`, or by root finding on `fn(y) - y`.

    **Arguments:**

    - `method`: `"del2"` (Steffensen's acceleration, entry by entry) or `"iteration"`;
        or a method of `scipy.optimize.root`, as `"anderson"`, for `fn(y) - y`.
    - `tol`: relative error of `fixed_point`, or `tol` of `root`; `None`: its default.
    - `options`: for `fixed_point` only `{"maxiter": ...}`, else as `ScipyRoot`'s.
    - `residual_tol`: largest absolute `y - fn(y)` that counts as a fixed point.

    **Raises:**

    - `ImportError`: SciPy is not installed.
    - `ValueError`: a negative tolerance, or a method that SciPy does not have.
    """

    method: str = eqx.field(default="del2", static=True)
    tol: float | None = eqx.field(default=None, static=True)
    options: dict[str, Any] | None = eqx.field(default=None, static=True)
    residual_tol: float = eqx.field(default=1e-6, static=True)
    kind: ClassVar[Kind] = "fixed_point"

    def __check_init__(self) -> None:
        _require_scipy("ScipyFixedPoint")
        _refuse_unknown("ScipyFixedPoint", self.method, (*_FIXED_POINT, *_ROOT))
        tolerances = {"tol": self.tol, "residual_tol": self.residual_tol}
        refuse_negative("ScipyFixedPoint", **tolerances)

    def solve(
        self, fn: Callable[[Any, Any], Any], y0: Any, args: Any
    ) -> tuple[Any, RESULTS, dict[str, Any]]:
        """Returns a point that `fn(y, args)` maps to itself."""
        direct = self.method.lower() in _FIXED_POINT
        algorithm = self._steffensen if direct else self._by_root
        return solve_on_host(self, algorithm, fn, y0, args)

    def _steffensen(self, host: OnHost, x0: Any) -> Report:
        limit = dict(self.options or {}).get("maxiter", 500)
        tol = 1e-8 if self.tol is None else self.tol
        try:
            x = _optimize().fixed_point(
                host.value, x0, xtol=tol, maxiter=limit, method=self.method.lower()
            )
        except RuntimeError as error:  # SciPy's way to say "not converged"
            if "converge" not in str(error):
                raise
            return Report(host.last, MAX_STEPS)
        return _judged(Report(x, OK), x - host.value(x), self.residual_tol)

    def _by_root(self, host: OnHost, x0: Any) -> Report:
        # Of this sign: SciPy's mixing methods then iterate the map, damped.
        residual = lambda x: host.value(x) - x
        jacobian = lambda x: host.jacobian(x) - np.eye(np.size(x))
        solution = _scipy_root(self, residual, jacobian, x0)
        return _judged(_report(solution), solution.fun, self.residual_tol)


class ScipyMinimize(AbstractHostSolver):
    """Minimisation by `scipy.optimize.minimize`.

    Methods that use derivatives get them from JAX: the gradient, Hessian-vector
    products (`"Newton-CG"`, `"trust-ncg"`, `"trust-krylov"`) or the Hessian
    (`"dogleg"`, `"trust-exact"`). A complex state is minimised over its real and
    imaginary parts.

    **Arguments:**

    - `method`: a method of `scipy.optimize.minimize` without constraints.
    - `tol`: SciPy's `tol`; `None` for its default.
    - `options`: SciPy's options of the method, as `{"maxiter": 1000}`.

    **Raises:**

    - `ImportError`: SciPy is not installed.
    - `ValueError`: a negative tolerance, or a method that SciPy does not have.
    """

    method: str = eqx.field(default="BFGS", static=True)
    tol: float | None = eqx.field(default=None, static=True)
    options: dict[str, Any] | None = eqx.field(default=None, static=True)
    kind: ClassVar[Kind] = "minimise"

    def __check_init__(self) -> None:
        _require_scipy("ScipyMinimize")
        _refuse_unknown("ScipyMinimize", self.method, _MINIMIZE)
        refuse_negative("ScipyMinimize", tol=self.tol)

    def solve(
        self, fn: Callable[[Any, Any], Any], y0: Any, args: Any
    ) -> tuple[Any, RESULTS, dict[str, Any]]:
        """Returns a minimiser of the scalar `fn(y, args)`; see `AbstractHostSolver`."""

        def algorithm(host: OnHost, x0: Any) -> Report:
            solution = _optimize().minimize(
                host.value,
                x0,
                method=self.method,
                tol=self.tol,
                options=dict(self.options or {}),
                **self._derivatives(host),
            )
            return _report(solution)

        return solve_on_host(self, algorithm, fn, y0, args)

    def _derivatives(self, host: OnHost) -> dict[str, Any]:
        method = self.method.lower()
        derivatives: dict[str, Any] = {}
        if method not in _GRADIENT_FREE:
            derivatives["jac"] = host.gradient
        if method in _HESSIAN_PRODUCT:
            derivatives["hessp"] = host.hessian_product
        if method in _HESSIAN:
            derivatives["hess"] = host.hessian
        return derivatives
