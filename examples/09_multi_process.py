# %% [markdown]
# # Data-parallel training on several processes
#
# A deep equilibrium model is trained by two processes that share nothing but messages,
# as on a cluster. JAX's own distributed runtime carries them: `jax.distributed` brings
# the processes together, gloo sends between CPUs, and the layer knows nothing of it.
#
# Run it with one command; it starts its workers itself:
#
# ```sh
# python examples/09_multi_process.py
# ```
#
# On a cluster, where the launcher starts one process per node or device, each of them
# runs the function `train` below, after `jax.distributed.initialize()`.

# %%
import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import eqximplicit as eqi

PROCESSES = 2
STEPS = 60
BATCH, INPUTS, FEATURES = 64, 8, 16
TIMEOUT = 300  # seconds after which a worker counts as lost

# %% [markdown]
# ## Model
#
# The features of each example are the fixed point of a cell. The solver has
# `throw=False`: a solve then calls no host, and a failed one would show as a NaN
# gradient. No solve of this problem fails.


# %%
class Cell(eqx.Module):
    recur: jax.Array
    inject: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(z @ self.recur + x @ self.inject)


class Model(eqx.Module):
    deq: eqi.nn.DEQ
    readout: jax.Array

    def __call__(self, x):
        return self.deq(x, z0=jnp.zeros((len(x), FEATURES))) @ self.readout


def make_model():
    keys = jax.random.split(jax.random.key(0), 3)
    recur = 0.5 * jax.random.orthogonal(keys[0], FEATURES)
    cell = Cell(recur, 0.5 * jax.random.normal(keys[1], (INPUTS, FEATURES)))
    deq = eqi.nn.DEQ(
        cell,
        eqi.Anderson(rtol=1e-5, atol=1e-5),
        eqi.ImplicitAdjoint(linear_solver=eqi.HybridKrylov()),
        throw=False,
    )
    return Model(deq, 0.1 * jax.random.normal(keys[2], (FEATURES,)))


def make_data():
    """The whole data set; every process can make it, and keeps its own rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, INPUTS)).astype(np.float32)
    return x, np.sin(x[:, 0] + x[:, 1] * x[:, 2]).astype(np.float32)


# %% [markdown]
# ## Training
#
# Nothing below is special to two processes. The mesh holds all devices of all
# processes, the rows of the data are split over it, the parameters are on every device.
#
# Inside `shard_map` each device solves for its own examples, in as many steps as *they*
# need. The devices meet once per training step, to add up the loss and the gradient.
# (`check_vma=False`, because JAX's type check of what varies over devices refuses loops
# that begin with plain zeros, which solvers' loops do.)


# %%
def mean_squared_error(model, x, y, mesh):
    """The mean over all rows on all devices."""
    params, static = eqx.partition(model, eqx.is_array)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    def mean_over_devices(params, x, y):
        predicted = eqx.combine(params, static)(x)
        return jax.lax.pmean(jnp.mean((predicted - y) ** 2), "data")

    return mean_over_devices(params, x, y)


def split_rows(array, sharding):
    """An array over all processes; each hands over the rows of its own devices."""
    return jax.make_array_from_callback(array.shape, sharding, lambda rows: array[rows])


def train():
    """Trains on all devices of all processes; returns losses and parameters."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x, y = (split_rows(array, rows) for array in make_data())
    optimiser = optax.adam(1e-2)

    @eqx.filter_jit
    def step(model, opt_state, x, y):
        loss_and_gradient = eqx.filter_value_and_grad(mean_squared_error)
        loss, grads = loss_and_gradient(model, x, y, mesh)
        updates, opt_state = optimiser.update(grads, opt_state)
        model = eqx.apply_updates(model, updates)
        return eqx.filter_shard((model, opt_state, loss), everywhere)

    model = make_model()
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    model, opt_state = eqx.filter_shard((model, opt_state), everywhere)
    losses = []
    for _ in range(STEPS):
        model, opt_state, loss = step(model, opt_state, x, y)
        losses.append(float(loss))
    params = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return losses, [np.asarray(p).tolist() for p in params]


# %% [markdown]
# ## Processes
#
# A worker says where the first process listens, how many there are and which it is;
# on Slurm, Open MPI or Kubernetes `jax.distributed.initialize()` finds that out by
# itself. It must come before anything else asks JAX for a device.


# %%
def worker(rank, port, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, int(rank))
    losses, params = train()
    report = {
        "losses": losses,
        "params": params,
        "devices": jax.device_count(),
        "local_devices": jax.local_device_count(),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(report))
    jax.distributed.shutdown()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_workers(script):
    """Starts the workers, waits for them, and returns what each of them reports."""
    # One CPU device per process, whatever the environment of this one says.
    one_thread = "--xla_cpu_multi_thread_eigen=false"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_thread}
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        workers = [
            subprocess.Popen(
                [sys.executable, script, "worker", str(rank), str(port), folder],
                env=env,
            )
            for rank in range(PROCESSES)
        ]
        try:
            codes = [process.wait(timeout=TIMEOUT) for process in workers]
        finally:
            for process in workers:
                process.kill()
        assert codes == [0] * PROCESSES, codes
        files = [Path(folder, f"{rank}.json") for rank in range(PROCESSES)]
        return [json.loads(file.read_text()) for file in files]


# %%
if sys.argv[1:2] == ["worker"]:
    worker(*sys.argv[2:])
    sys.exit()

try:
    SCRIPT = Path(__file__).resolve()
except NameError:  # in a notebook, started beside the examples or one folder above
    places = (Path(folder, "09_multi_process.py") for folder in (".", "examples"))
    SCRIPT = next(place for place in places if place.exists()).resolve()
OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)

reports = run_workers(str(SCRIPT))
for rank, report in enumerate(reports):
    losses = report["losses"]
    print(
        f"process {rank}: {report['local_devices']} of {report['devices']} devices, "
        f"loss {losses[0]:.6f} -> {losses[-1]:.6f}"
    )

# %% [markdown]
# ## The same training on one process
#
# `train` runs here as well, on the devices of this process alone. The curves lie on top
# of each other: the sums are the same but for their order, hence for rounding.

# %%
alone, _ = train()

figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
axes.semilogy(reports[0]["losses"], lw=4, alpha=0.4, label="two processes")
axes.semilogy(alone, "k--", lw=1, label="one process")
axes.set(xlabel="step", ylabel="mean squared error (dimensionless)")
axes.legend()
figure.savefig(OUTPUTS / "09_multi_process.png", dpi=150)

# %%
assert all(report["devices"] == PROCESSES for report in reports)
assert all(report["local_devices"] == 1 for report in reports)
assert reports[0]["losses"] == reports[1]["losses"]  # bit for bit
assert reports[0]["params"] == reports[1]["params"]
assert reports[0]["losses"][-1] < 0.2 * reports[0]["losses"][0]
np.testing.assert_allclose(reports[0]["losses"], alone, rtol=1e-2)
np.testing.assert_allclose(reports[0]["losses"][:5], alone[:5], rtol=1e-4)
