"""Solvers that run in Python on the host: SciPy's, and any callable of yours.

A call with concrete arrays runs the host code directly. Under `jit` and `vmap` it goes
through `jax.pure_callback`, lane after lane. SciPy then evaluates your function as a
compiled JAX function from inside the callback, on the CPU. JAX's CPU client shares its
threads between the two, and large states (thousands of entries) in several programs at
once can exhaust them: keep such solves outside `jit`, where this cannot happen.
"""

import abc
import importlib
import logging
import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer

from .._solution import as_results, RESULTS
from ._verdict import refuse_negative

LOGGER = logging.getLogger("eqximplicit")

Kind = Literal["root", "fixed_point", "minimise", "any"]

# What a host solver may report; its index is what the callback returns.
_CODES: tuple[RESULTS, ...] = (
    RESULTS.successful,
    RESULTS.host_failure,
    as_results(RESULTS.nonlinear_max_steps_reached),
    RESULTS.residual_too_large,
    RESULTS.local_minimum,
    as_results(RESULTS.nonfinite),
)
_OK, _FAILED, _MAX_STEPS, _TOO_LARGE, _LOCAL_MINIMUM, _NONFINITE = range(len(_CODES))
_BUDGET = re.compile(r"max|limit|too many|has reached", re.IGNORECASE)

_GRADIENT_FREE = ("nelder-mead", "powell", "cobyla", "cobyqa")
_HESSIAN_PRODUCT = ("newton-cg", "trust-ncg", "trust-krylov")
_HESSIAN = ("dogleg", "trust-exact")
_FIXED_POINT = ("del2", "iteration")


class AbstractHostSolver(eqx.Module):
    """A solver whose steps are taken by Python code on the host.

    **Attributes:**

    - `kind`: what the function given to `solve` is: `"root"` the residual that is to
        vanish, `"fixed_point"` the map, `"minimise"` the objective, `"any"` not used.
    """

    kind: ClassVar[Kind]

    @abc.abstractmethod
    def solve(
        self, fn: Callable[[Any, Any], Any], y0: Any, args: Any
    ) -> tuple[Any, RESULTS, dict[str, Any]]:
        """Returns the best point found, how the solve ended, and its statistics.

        Never raises for what happens on the host: an exception there is logged in one
        sentence (logger `eqximplicit`) and becomes `RESULTS.host_failure`, with the
        last finite point that was evaluated, or `y0`.

        **Arguments:**

        - `fn`: traceable by JAX, `fn(y, args) -> out`; its meaning is `kind`.
        - `y0`: the initial guess, a pytree of inexact arrays.
        - `args`: any pytree.

        **Returns:** `(y, result, stats)`; `y` has the structure, shapes and dtypes of
        `y0`. `stats` has `num_steps` and `num_evaluations` (int arrays, shape `()`,
        `-1` if the solver does not tell).
        """


class _Report(NamedTuple):
    """What a host solve found, on a flat real vector `x`."""

    x: np.ndarray[Any, Any]
    code: int
    num_steps: int = -1
    num_evaluations: int = -1


class _Compiled(NamedTuple):
    """The function on a flat real vector, as compiled JAX functions."""

    value: Callable[..., Any]
    jacobian: Callable[..., Any]
    gradient: Callable[..., Any]
    hessian: Callable[..., Any]
    hessian_product: Callable[..., Any]


class _OnHost:
    """The function as SciPy wants it: float64 NumPy in and out, remembering `x`."""

    def __init__(self, compiled: _Compiled, operands: Any, x0: Any):
        self._compiled = compiled
        self._operands = operands
        self._dtype = x0.dtype
        self.last = np.asarray(x0)

    def _call(self, which: Callable[..., Any], x: Any, *rest: Any) -> Any:
        point = np.asarray(x, self._dtype)
        rest = tuple(np.asarray(r, self._dtype) for r in rest)
        out = np.asarray(which(point, self._operands, *rest), np.float64)
        if np.all(np.isfinite(out)):
            self.last = point
        return out

    def value(self, x: Any) -> Any:
        return self._call(self._compiled.value, x)

    def jacobian(self, x: Any) -> Any:
        return self._call(self._compiled.jacobian, x)

    def gradient(self, x: Any) -> Any:
        return self._call(self._compiled.gradient, x)

    def hessian(self, x: Any) -> Any:
        return self._call(self._compiled.hessian, x)

    def hessian_product(self, x: Any, v: Any) -> Any:
        return self._call(self._compiled.hessian_product, x, v)


def _flat_real(tree: Any, dtype: Any) -> Any:
    """Returns all entries in one real vector; a complex leaf gives two parts."""
    parts: list[Any] = []
    for leaf in jtu.tree_leaves(tree):
        halves = (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)
        parts.extend(jnp.ravel(half).astype(dtype) for half in halves)
    return jnp.concatenate(parts) if parts else jnp.zeros((0,), dtype)


def _unflat_real(x: Any, like: Any) -> Any:
    """Returns the inverse of `_flat_real`, shaped as `like`."""
    leaves, structure = jtu.tree_flatten(like)
    out: list[Any] = []
    for leaf in leaves:
        real, x = x[: leaf.size].reshape(leaf.shape), x[leaf.size :]
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            imag, x = x[: leaf.size].reshape(leaf.shape), x[leaf.size :]
            real = jax.lax.complex(real, imag)
        out.append(real.astype(leaf.dtype))
    return jtu.tree_unflatten(structure, out)


def _widest(tree: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(
            jnp.float32,
            *(jnp.finfo(leaf.dtype).dtype for leaf in jtu.tree_leaves(tree)),
        )


def _compile(flat_fn: Callable[[Any, Any], Any]) -> _Compiled:
    def hessian_product(x: Any, operands: Any, v: Any) -> Any:
        return jax.jvp(lambda x_: jax.grad(flat_fn)(x_, operands), (x,), (v,))[1]

    return _Compiled(
        jax.jit(flat_fn),
        jax.jit(jax.jacfwd(flat_fn)),
        jax.jit(jax.grad(flat_fn)),
        jax.jit(jax.hessian(flat_fn)),
        jax.jit(hessian_product),
    )


def _is_concrete(tree: Any) -> bool:
    return not any(isinstance(leaf, Tracer) for leaf in jtu.tree_leaves(tree))


def _stopped(tree: Any) -> Any:
    return jtu.tree_map(jax.lax.stop_gradient, tree)


def _run(host: Callable[..., Any], out_struct: Any, *operands: Any) -> Any:
    """Returns `host(*operands)`, directly if nothing is traced."""
    if _is_concrete(operands):
        return jtu.tree_map(jnp.asarray, host(*operands))
    return jax.pure_callback(host, out_struct, *operands, vmap_method="sequential")


def _solve_on_host(
    solver: AbstractHostSolver,
    algorithm: Callable[[_OnHost, Any], _Report],
    fn: Callable[[Any, Any], Any],
    y0: Any,
    args: Any,
) -> tuple[Any, RESULTS, dict[str, Any]]:
    """Returns what `algorithm` makes of `fn`, through the boundary to the host."""
    dtype = _widest(y0)
    closed = eqx.filter_closure_convert(fn, y0, args)
    arrays, static = eqx.partition((closed, args), eqx.is_array)
    like = jax.eval_shape(lambda: y0)

    def flat_fn(x: Any, arrays: Any) -> Any:
        fn_, args_ = eqx.combine(arrays, static)
        out = fn_(_unflat_real(x, like), args_)
        flat = _flat_real(out, dtype)
        return flat[0] if solver.kind == "minimise" else flat

    compiled = _compile(flat_fn)

    def host(x0: Any, arrays: Any) -> Any:
        on_host = _OnHost(compiled, arrays, np.asarray(x0))
        report = _guarded(solver, algorithm, on_host, np.asarray(x0, np.float64))
        return np.asarray(report.x, dtype), np.asarray(report[1:], np.int32)

    x0 = _flat_real(y0, dtype)
    struct = (
        jax.ShapeDtypeStruct(x0.shape, dtype),
        jax.ShapeDtypeStruct((3,), jnp.int32),
    )
    x, info = _run(host, struct, *_stopped((x0, arrays)))
    stats = {"num_steps": info[1], "num_evaluations": info[2]}
    return _unflat_real(x, like), _result(info[0]), stats


def _result(code: Any) -> RESULTS:
    result = _CODES[_OK]
    for index, item in enumerate(_CODES):
        result = RESULTS.where(code == index, item, result)
    return result


def _guarded(
    solver: AbstractHostSolver,
    algorithm: Callable[[_OnHost, Any], _Report],
    on_host: _OnHost,
    x0: Any,
) -> _Report:
    """Returns the report of `algorithm`; an exception becomes one logged sentence."""
    try:
        with np.errstate(all="ignore"):
            report = algorithm(on_host, x0)
    except Exception as error:  # whatever user or SciPy code raises
        LOGGER.error(_sentence(solver, error))
        return _Report(on_host.last, _FAILED)
    if np.all(np.isfinite(report.x)):
        return report
    return report._replace(x=on_host.last, code=_NONFINITE)


def _sentence(solver: object, error: BaseException) -> str:
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        f"`{type(solver).__name__}` stopped on the host because of {cause}; correct "
        "the function or its starting point, or choose another method."
    )


def _require_scipy(name: str) -> None:
    try:
        importlib.import_module("scipy.optimize")
    except ImportError as error:
        raise ImportError(
            f"`{name}` needs SciPy, an optional dependency: install it with "
            "`pip install eqximplicit[scipy]`."
        ) from error


def _optimize() -> Any:
    return importlib.import_module("scipy.optimize")


def _report(solution: Any) -> _Report:
    """Returns SciPy's `OptimizeResult` in our terms."""
    code = _OK
    if not solution.success:
        exhausted = _BUDGET.search(str(solution.message)) is not None
        code = _MAX_STEPS if exhausted else _FAILED
        LOGGER.warning("SciPy: %s", " ".join(str(solution.message).split()))
    nit, nfev = solution.get("nit", -1), solution.get("nfev", -1)
    return _Report(np.atleast_1d(solution.x), code, int(nit), int(nfev))


def _judged(
    report: _Report, residual: Any, residual_tol: float, wrong: int = _TOO_LARGE
) -> _Report:
    """Returns the report, with success only for a residual that is small."""
    small = np.max(np.abs(residual), initial=0.0) <= residual_tol
    return report if small or report.code != _OK else report._replace(code=wrong)


class ScipyRoot(AbstractHostSolver):
    """Root finding by `scipy.optimize.root`.

    MINPACK's methods (`"hybr"`, `"lm"`) get the Jacobian from JAX; the others
    (`"krylov"`, `"anderson"`, `"broyden1"`, `"df-sane"`, ...) take none. SciPy calls
    some points a success that are none: a largest residual above `residual_tol` is a
    failure here (`RESULTS.local_minimum` under `"lm"`, else `residual_too_large`).

    **Arguments:**

    - `method`: a method of `scipy.optimize.root`.
    - `tol`: SciPy's `tol`; `None` for its default.
    - `options`: SciPy's options of the method, as `{"maxfev": 1000}`.
    - `residual_tol`: largest absolute residual that counts as a root. Dimensionless.

    **Raises:**

    - `ImportError`: SciPy is not installed.
    - `ValueError`: a negative tolerance.

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
        refuse_negative("ScipyRoot", tol=self.tol, residual_tol=self.residual_tol)

    def solve(
        self, fn: Callable[[Any, Any], Any], y0: Any, args: Any
    ) -> tuple[Any, RESULTS, dict[str, Any]]:
        """Returns a point where `fn(y, args)` is zero; see `AbstractHostSolver`."""

        def algorithm(host: _OnHost, x0: Any) -> _Report:
            solution = _scipy_root(self, host.value, host.jacobian, x0)
            wrong = _LOCAL_MINIMUM if self.method == "lm" else _TOO_LARGE
            return _judged(_report(solution), solution.fun, self.residual_tol, wrong)

        return _solve_on_host(self, algorithm, fn, y0, args)


def _scipy_root(
    solver: "ScipyRoot | ScipyFixedPoint", residual: Any, jacobian: Any, x0: Any
) -> Any:
    jac = jacobian if solver.method in ("hybr", "lm") else None
    options = dict(solver.options or {})
    return _optimize().root(
        residual, x0, method=solver.method, jac=jac, tol=solver.tol, options=options
    )


class ScipyFixedPoint(AbstractHostSolver):
    """Fixed points by `scipy.optimize.fixed_point`, or by root finding on `y - fn(y)`.

    **Arguments:**

    - `method`: `"del2"` (Steffensen's acceleration, entry by entry) or `"iteration"`;
        or a method of `scipy.optimize.root`, as `"anderson"`, for `y - fn(y)`.
    - `tol`: relative error of `fixed_point`, or `tol` of `root`; `None`: its default.
    - `options`: for `fixed_point` only `{"maxiter": ...}`, else as `ScipyRoot`'s.
    - `residual_tol`: largest absolute `y - fn(y)` that counts as a fixed point.

    **Raises:**

    - `ImportError`: SciPy is not installed.
    - `ValueError`: a negative tolerance.
    """

    method: str = eqx.field(default="del2", static=True)
    tol: float | None = eqx.field(default=None, static=True)
    options: dict[str, Any] | None = eqx.field(default=None, static=True)
    residual_tol: float = eqx.field(default=1e-6, static=True)
    kind: ClassVar[Kind] = "fixed_point"

    def __check_init__(self) -> None:
        _require_scipy("ScipyFixedPoint")
        tolerances = {"tol": self.tol, "residual_tol": self.residual_tol}
        refuse_negative("ScipyFixedPoint", **tolerances)

    def solve(
        self, fn: Callable[[Any, Any], Any], y0: Any, args: Any
    ) -> tuple[Any, RESULTS, dict[str, Any]]:
        """Returns a point that `fn(y, args)` maps to itself."""
        algorithm = self._steffensen if self.method in _FIXED_POINT else self._by_root
        return _solve_on_host(self, algorithm, fn, y0, args)

    def _steffensen(self, host: _OnHost, x0: Any) -> _Report:
        limit = dict(self.options or {}).get("maxiter", 500)
        tol = 1e-8 if self.tol is None else self.tol
        try:
            x = _optimize().fixed_point(
                host.value, x0, xtol=tol, maxiter=limit, method=self.method
            )
        except RuntimeError as error:  # SciPy's way to say "not converged"
            if "converge" not in str(error):
                raise
            return _Report(host.last, _MAX_STEPS)
        return _judged(_Report(x, _OK), x - host.value(x), self.residual_tol)

    def _by_root(self, host: _OnHost, x0: Any) -> _Report:
        residual = lambda x: x - host.value(x)
        jacobian = lambda x: np.eye(np.size(x)) - host.jacobian(x)
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
    - `ValueError`: a negative tolerance.
    """

    method: str = eqx.field(default="BFGS", static=True)
    tol: float | None = eqx.field(default=None, static=True)
    options: dict[str, Any] | None = eqx.field(default=None, static=True)
    kind: ClassVar[Kind] = "minimise"

    def __check_init__(self) -> None:
        _require_scipy("ScipyMinimize")
        refuse_negative("ScipyMinimize", tol=self.tol)

    def solve(
        self, fn: Callable[[Any, Any], Any], y0: Any, args: Any
    ) -> tuple[Any, RESULTS, dict[str, Any]]:
        """Returns a minimiser of the scalar `fn(y, args)`; see `AbstractHostSolver`."""

        def algorithm(host: _OnHost, x0: Any) -> _Report:
            solution = _optimize().minimize(
                host.value,
                x0,
                method=self.method,
                tol=self.tol,
                options=dict(self.options or {}),
                **self._derivatives(host),
            )
            return _report(solution)

        return _solve_on_host(self, algorithm, fn, y0, args)

    def _derivatives(self, host: _OnHost) -> dict[str, Any]:
        method = self.method.lower()
        derivatives: dict[str, Any] = {}
        if method not in _GRADIENT_FREE:
            derivatives["jac"] = host.gradient
        if method in _HESSIAN_PRODUCT:
            derivatives["hessp"] = host.hessian_product
        if method in _HESSIAN:
            derivatives["hess"] = host.hessian
        return derivatives


class HostSolver(AbstractHostSolver):
    """Any Python callable as a solver: a loop, another library, a simulation program.

    `HostSolver(solver)(y0, args)` gives `solver` NumPy pytrees and returns what it
    returns, as JAX arrays. It can be traced by `jit` and `vmap` (lane by lane).
    `ImplicitFunction` attaches its derivative; by itself it has none.

    **Arguments:**

    - `solver`: `solver(y0, args) -> y`, NumPy in and out; `y` is structured and shaped
        as `y0`. A module's arrays arrive as NumPy too. It must be a pure function: JAX
        may call it more than once.

    !!! example

        ```python
        solver = eqi.HostSolver(lambda y0, args: my_library.solve(y0, **args))
        eqi.ImplicitFunction(eqi.Root(fn), solver=solver)(y0, args)
        ```
    """

    solver: Callable[[Any, Any], Any]
    kind: ClassVar[Kind] = "any"

    def __check_init__(self) -> None:
        if not callable(self.solver):
            raise TypeError(
                "`HostSolver(solver)` needs a callable `(y0, args) -> y`; got "
                f"{self.solver!r}."
            )

    def __call__(self, y0: Any, args: Any) -> Any:
        """Returns the solver's answer.

        **Raises:**

        - `RuntimeError`: the host code raised; one sentence, with its error as cause.
        - `TypeError`: it is differentiated, instead of an `ImplicitFunction` of it.
        """
        return _opaque(self, y0, args)[0]

    def solve(
        self, fn: Callable[[Any, Any], Any], y0: Any, args: Any
    ) -> tuple[Any, RESULTS, dict[str, Any]]:
        """Returns the solver's answer and whether it raised; `fn` is not used."""
        del fn
        y, code = _call_host(self, y0, args, throw=False)
        unknown = jnp.asarray(-1, jnp.int32)
        stats = {"num_steps": unknown, "num_evaluations": unknown}
        return y, _result(code), stats


@eqx.filter_custom_jvp
def _opaque(solver: HostSolver, y0: Any, args: Any) -> Any:
    return _call_host(solver, y0, args, throw=True)


@_opaque.def_jvp
def _refuse(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise TypeError(
        "`HostSolver` has no derivative of its own. Differentiate "
        "`eqi.ImplicitFunction(condition, solver=HostSolver(...))(y0, args)` instead, "
        "or pass `jax.lax.stop_gradient` of the inputs."
    )


def _call_host(solver: HostSolver, y0: Any, args: Any, *, throw: bool) -> Any:
    """Returns `(y, code)` from the host, `y` shaped as `y0`."""
    arrays, static = eqx.partition((solver.solver, y0, args), eqx.is_array)
    y_arrays = jtu.tree_map(jnp.asarray, y0)
    struct = (jax.eval_shape(lambda: y_arrays), jax.ShapeDtypeStruct((), jnp.int32))

    def host(arrays: Any) -> Any:
        arrays = jtu.tree_map(np.asarray, arrays)
        call, guess, args_ = eqx.combine(arrays, static)
        try:
            return _fitted(call(guess, args_), struct[0]), np.int32(_OK)
        except Exception as error:  # whatever the user's code raises
            sentence = _sentence(solver, error)
            if throw:
                raise RuntimeError(sentence) from error
            LOGGER.error(sentence)
            return _fitted(guess, struct[0]), np.int32(_FAILED)

    return _run(host, struct, _stopped(arrays))


def _fitted(y: Any, struct: Any) -> Any:
    """Returns `y` as NumPy arrays, which must have the structure of `struct`."""
    if jtu.tree_structure(y) != jtu.tree_structure(struct):
        raise ValueError(
            f"the solver returned {jtu.tree_structure(y)} for a guess of "
            f"{jtu.tree_structure(struct)}"
        )

    def fit(leaf: Any, like: Any) -> Any:
        array = np.asarray(leaf)
        if array.shape != like.shape:
            raise ValueError(
                f"the solver returned shape {array.shape} for a guess of {like.shape}"
            )
        return array.astype(like.dtype)

    return jtu.tree_map(fit, y, struct)
