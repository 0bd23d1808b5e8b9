"""What importing the package does, and does not do."""

import os
import subprocess
import sys

import mutations

import eqximplicit as eqi


def test_import_starts_no_backend():
    # A program may still choose platforms or join a cluster after the import.
    env = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    command = [sys.executable, "-W", "error", "-c", "import eqximplicit"]
    subprocess.run(command, env=env, check=True, timeout=120)


def test_every_public_name_has_a_docstring():
    own = [
        (name, thing)
        for name, thing in vars(eqi).items()
        if not name.startswith("_")
        and getattr(thing, "__module__", "").startswith("eqximplicit")
    ]
    assert len(own) > 30
    for name, thing in own:
        assert (thing.__doc__ or "").strip(), name


def test_every_mutant_fits_the_source():
    # The mutants run in a session of their own; here only that none has become stale.
    for mutant in mutations.MUTANTS:
        assert mutations.mutated(mutant, mutations.ROOT)
