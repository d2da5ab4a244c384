"""What has to be settled before JAX initialises: float64, and several devices on one machine."""

import functools
import os

# Tests compile much and compute little. XLA's own passes stay on, and with them what tests assert
# on; only the machine code is less polished.
QUICKLY = "--xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
import scripts  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def run(tmp_path):
    """Runs Python in a new folder, and returns what it printed; see `scripts.run_in`."""
    return functools.partial(scripts.run_in, tmp_path)
