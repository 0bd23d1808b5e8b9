"""The boundary to the host: what a solver there is, and how its code is called.

A call with concrete arrays runs the host code directly. Under `jit` and `vmap` it goes
through `jax.pure_callback`, lane after lane. SciPy then evaluates your function as a
compiled JAX function from inside the callback, on the CPU. JAX's CPU client shares its
threads between the two, and large states (thousands of entries) in several programs at
once can exhaust them: keep such solves outside `jit`, where this cannot happen.
"""

import abc
import logging
import threading
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer

from .._solution import as_results, RESULTS

LOGGER = logging.getLogger("eqximplicit")
_last = threading.local()

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
OK, FAILED, MAX_STEPS, TOO_LARGE, LOCAL_MINIMUM, NONFINITE = range(len(_CODES))


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


class Report(NamedTuple):
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


class OnHost:
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


def stopped(tree: Any) -> Any:
    """The tree without derivatives, any of its leaves an array."""
    return jtu.tree_map(jax.lax.stop_gradient, tree)


def run_on_host(host: Callable[..., Any], out_struct: Any, *operands: Any) -> Any:
    """Returns `host(*operands)`, directly if nothing is traced."""
    if _is_concrete(operands):
        return jtu.tree_map(jnp.asarray, host(*operands))
    return jax.pure_callback(host, out_struct, *operands, vmap_method="sequential")


def solve_on_host(
    solver: AbstractHostSolver,
    algorithm: Callable[[OnHost, Any], Report],
    fn: Callable[[Any, Any], Any],
    y0: Any,
    args: Any,
) -> tuple[Any, RESULTS, dict[str, Any]]:
    """Returns what `algorithm` makes of `fn`, through the boundary to the host."""
    forget_failure()
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
        on_host = OnHost(compiled, arrays, np.asarray(x0))
        report = _guarded(solver, algorithm, on_host, np.asarray(x0, np.float64))
        return np.asarray(report.x, dtype), np.asarray(report[1:], np.int32)

    x0 = _flat_real(y0, dtype)
    struct = (
        jax.ShapeDtypeStruct(x0.shape, dtype),
        jax.ShapeDtypeStruct((3,), jnp.int32),
    )
    x, info = run_on_host(host, struct, *stopped((x0, arrays)))
    stats = {"num_steps": info[1], "num_evaluations": info[2]}
    return _unflat_real(x, like), as_result(info[0]), stats


def as_result(code: Any) -> RESULTS:
    """What a code from the host says."""
    result = _CODES[OK]
    for index, item in enumerate(_CODES):
        result = RESULTS.where(code == index, item, result)
    return result


def _guarded(
    solver: AbstractHostSolver,
    algorithm: Callable[[OnHost, Any], Report],
    on_host: OnHost,
    x0: Any,
) -> Report:
    """Returns the report of `algorithm`; an exception becomes one logged sentence."""
    try:
        with np.errstate(all="ignore"):
            report = algorithm(on_host, x0)
    except Exception as error:  # whatever user or SciPy code raises
        report_failure(sentence_of(solver, error))
        return Report(on_host.last, FAILED)
    if np.all(np.isfinite(report.x)):
        return report
    return report._replace(x=on_host.last, code=NONFINITE)


def report_failure(sentence: str) -> None:
    """Logs why host code failed, and keeps it for whoever raises that."""
    LOGGER.error(sentence)
    _last.sentence = sentence


def forget_failure() -> None:
    """Forgets why host code failed; a solve begins with that."""
    _last.sentence = None


def last_failure() -> str | None:
    """Why host code failed in the last solve on this thread, if by an exception."""
    return getattr(_last, "sentence", None)


def sentence_of(solver: object, error: BaseException) -> str:
    """The cause and the remedy, on one line."""
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        f"`{type(solver).__name__}` stopped on the host because of {cause}; correct "
        "the function or its starting point, or choose another method."
    )
