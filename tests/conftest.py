"""What has to be settled before JAX initialises: float64, and several devices on one machine."""

import collections
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


# What is written with operators and exported names alone, so that a version of JAX that breaks it
# breaks tests of the core, too.
ABOVE_THE_CORE = (
    *("absent_clients", "algorithms_personal", "client_store", "cohorts", "compression"),
    *("control_variates", "clipping", "error_feedback"),
    *("diloco", "fedavg", "fedopt", "maml", "metrics", "models", "papa", "privacy", "robust"),
    *("row_file", "secure_sum", "streaming_diloco"),
)
ON_THE_NEWEST = ("docs", "examples_algorithms", "examples_diloco", "examples_privacy")


def pytest_collection_modifyitems(config, items):
    """Of the whole suite, an older JAX gets every other case of the tests above the core."""
    if jax.__version_info__ >= (0, 12) or config.args != config.getini("testpaths"):
        return
    kept, left_out, cases = [], [], collections.Counter()
    for item in items:
        name, keep = item.path.stem.removeprefix("test_"), True
        if name in ON_THE_NEWEST:
            keep = False
        elif name in ABOVE_THE_CORE and hasattr(item, "callspec"):
            test = name, item.originalname
            keep = cases[test] % 2 == 0
            cases[test] += 1
        (kept if keep else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
