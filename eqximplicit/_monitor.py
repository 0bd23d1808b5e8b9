"""Watching a solve: the history of its residual, a progress bar, a plot.

What is not asked for costs nothing: without a monitor the loop of a solver is compiled
as if this module did not exist.
"""

import importlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._solution import Solution

Norm = Callable[[Any], Float[Array, ""]]


def _optional(module: str, extra: str, wanted_by: str) -> Any:
    """The optional package, or an `ImportError` that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise ImportError(
            f"{wanted_by} needs {name}, which is not installed. Install it with "
            f'`pip install "eqximplicit[{extra}]"`.'
        ) from error


class Monitor(eqx.Module):
    """What to watch during the solve of an optimistix solver.

    What is watched is the largest absolute entry of the condition's residual
    (dimensionless) at the point that the solver holds after each step: one more
    evaluation of the condition per step that is watched.

    **Arguments:**

    - `history`: how many residuals to keep. They are `stats["residual_history"]` of the
        solution, a float array of shape `(history,)`, in the order of the steps, NaN
        where there were fewer steps. Of more steps the last are kept.
    - `progress_every`: show a progress bar (tqdm) that moves every so many steps;
        `None` for no bar. Under `jax.vmap` one bar shows the slowest lane, and the
        largest residual of all lanes. Derivatives of an unrolled solve show none.

    **Raises:**

    - `ValueError`: a negative `history`, or `progress_every` below 1.
    - `ImportError`: `progress_every` without tqdm, the extra `progress`.

    !!! example

        ```python
        monitor = eqi.Monitor(history=100)
        layer = eqi.ImplicitFunction(eqi.FixedPoint(cell), monitor=monitor)
        eqi.plot_convergence(layer.solve(y0))
        ```
    """

    history: int = eqx.field(static=True, default=0)
    progress_every: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if self.history < 0:
            raise ValueError(
                f"`Monitor(history=...)` must be at least 0; got {self.history}."
            )
        every = self.progress_every
        if every is not None:
            if every < 1:
                raise ValueError(
                    f"`Monitor(progress_every=...)` must be at least 1; got {every}."
                )
            _optional("tqdm", "progress", "`Monitor(progress_every=...)`")


class _Bar:
    """A progress bar on the host; one for every solve that is traced."""

    def __init__(self, total: int | None):
        self.total = total
        self.bar: Any = None

    def update(self, step: Any, residual: Any) -> None:
        """Moves the bar to a step, and opens one if there is none."""
        if self.bar is None:
            tqdm = _optional("tqdm", "progress", "A progress bar")
            self.bar = tqdm.tqdm(total=self.total, desc="solve", unit="step")
        self.bar.set_postfix(residual=f"{float(residual):.1e}", refresh=False)
        self.bar.update(int(step) - self.bar.n)

    def close(self, step: Any) -> None:
        """Moves the bar to the last step and leaves it there."""
        if self.bar is not None:
            self.bar.update(int(step) - self.bar.n)
            self.bar.close()
            self.bar = None


def _one_of_a_batch(call: Callable[..., None]) -> Callable[..., tuple[()]]:
    """The callback, called once for a whole batch, with the largest values in it."""

    @jax.custom_batching.custom_vmap
    def once(*values: Array) -> tuple[()]:
        call(*values)
        return ()

    @once.def_vmap
    def _(axis_size: Any, in_batched: list[bool], *values: Array) -> Any:
        del axis_size
        largest = [
            jnp.max(value, axis=0) if batched else value
            for value, batched in zip(values, in_batched, strict=True)
        ]
        return once(*largest), ()

    return once


def _only_once(call: Callable[..., Any]) -> Callable[..., tuple[()]]:
    """The callback, not called again where a step is differentiated."""

    @jax.custom_jvp
    def primal(*values: Array) -> tuple[()]:
        call(*values)
        return ()

    @primal.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        return (), ()

    return primal


class Watch(eqx.Module):
    """One monitored solve.

    **Arguments:** the monitor; the norm of the residual at a point; and the progress
    bar, if there is one.
    """

    monitor: Monitor
    norm: Norm = eqx.field(static=True)
    bar: _Bar = eqx.field(static=True)

    def __init__(self, monitor: Monitor, norm: Norm, max_steps: int | None):
        self.monitor = monitor
        self.norm = norm
        self.bar = _Bar(max_steps)

    def begin(self, dtype: Any) -> Float[Array, " history"]:
        """Returns the record of no steps."""
        return jnp.full(self.monitor.history, jnp.nan, dtype)

    def after_step(
        self, record: Float[Array, " history"], num_steps: Int[Array, ""], y: Any
    ) -> Float[Array, " history"]:
        """Returns the record with one more step, and moves the bar."""
        size, every = self.monitor.history, self.monitor.progress_every
        if size > 0:
            norm = jax.lax.stop_gradient(self.norm(y)).astype(record.dtype)
            slot = jax.lax.rem(num_steps - 1, jnp.full_like(num_steps, size))
            record = jax.lax.dynamic_update_index_in_dim(record, norm, slot, 0)
        if every is not None:
            self._show(num_steps, y, every)
        return record

    def _show(self, num_steps: Int[Array, ""], y: Any, every: int) -> None:
        def is_due(step: Array) -> Array:
            return jax.lax.rem(step, jnp.full_like(step, every)) == 0

        def call(step: Array, residual: Array) -> None:
            jax.lax.cond(
                is_due(step),
                lambda: jax.debug.callback(self.bar.update, step, residual),
                lambda: None,
            )

        residual = jax.lax.cond(
            is_due(num_steps),
            lambda: self.norm(y).astype(float),
            lambda: jnp.zeros((), float),
        )
        _only_once(_one_of_a_batch(call))(num_steps, residual)

    def stats(
        self, record: Float[Array, " history"], num_steps: Int[Array, ""]
    ) -> dict[str, Array]:
        """Returns what goes into the statistics, and closes the bar."""
        size = self.monitor.history
        if self.monitor.progress_every is not None:
            close = lambda step: jax.debug.callback(self.bar.close, step)
            _one_of_a_batch(close)(num_steps)
        if size == 0:
            return {}
        oldest = jnp.where(num_steps > size, num_steps, 0)
        oldest = jax.lax.rem(oldest, jnp.full_like(oldest, size))
        return {"residual_history": jnp.roll(record, -oldest)}


def plot_convergence(solution: Solution[Any, Any], ax: Any = None) -> Any:
    """Returns matplotlib axes with the residual of each step of a solve.

    **Arguments:**

    - `solution`: of a layer with `monitor=Monitor(history=...)`; solved under
        `jax.vmap`, it gives one line per lane.
    - `ax`: the matplotlib `Axes` to draw in; by default, of a new figure.

    **Returns:** the `Axes`: the largest absolute entry of the residual (dimensionless,
    logarithmic) over the number of the step.

    **Raises:** `ValueError` for a solution without a history; `ImportError` without
    matplotlib, the extra `plot`.
    """
    if "residual_history" not in solution.stats:
        raise ValueError(
            "`plot_convergence` needs a residual history, and this solution has none. "
            "Ask for one with `ImplicitFunction(..., monitor=Monitor(history=...))`."
        )
    if ax is None:
        plt = _optional("matplotlib.pyplot", "plot", "`plot_convergence`")
        ax = plt.subplots(layout="constrained")[1]
    history = np.asarray(solution.stats["residual_history"])
    num_steps = np.asarray(solution.stats["num_steps"]).reshape(-1)
    lanes = history.reshape(-1, history.shape[-1])
    for lane, count in zip(lanes, num_steps, strict=True):
        kept = min(int(count), lane.size)
        steps = np.arange(count - kept, count) + 1
        ax.semilogy(steps, lane[:kept], "o-", markersize=3)
    ax.set(xlabel="solver step", ylabel="residual (dimensionless)")
    return ax
