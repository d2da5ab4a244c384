"""What has to be settled before JAX initialises: float64, and several devices on one machine."""

import collections
import functools
import itertools
import os

# Tests compile much and compute little. XLA's own passes stay on, and with them what tests assert
# on; only the machine code is less polished.
QUICKLY = "--xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
import scripts  # noqa: E402
import subsets  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def run(tmp_path):
    """Runs Python in a new folder, and returns what it printed; see `scripts.run_in`."""
    return functools.partial(scripts.run_in, tmp_path)


# What is written with operators and exported names alone, so that a version of JAX that breaks it
# breaks tests of the core, too.
ABOVE_THE_CORE = (
    *("absent_clients", "algorithms_personal", "clipping", "client_store", "cohorts"),
    *("compression", "control_variates", "diloco", "error_feedback", "fedavg", "fedopt", "init"),
    *("maml", "metrics", "metrics_exact", "models", "padding", "papa", "privacy"),
    *("privacy_attacks", "robust", "secure_sum", "streaming_diloco", "tasks"),
)
ON_THE_NEWEST = ("docs", "examples", "examples_algorithms", "examples_diloco", "examples_privacy")
# An older JAX gets one in so many of a file's tests above the core, and of a test's cases below.
ABOVE_ONE_IN, BELOW_ONE_IN = 3, 2


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run every case of every test")


def pytest_collection_modifyitems(config, items):
    """Chooses cases where all tests run: pairs of parameters, and on an older JAX fewer."""
    if config.option.all or config.args != config.getini("testpaths"):
        return
    older, left_out = jax.__version_info__ < (0, 12), set()
    by_test = collections.defaultdict(list)
    for item in items:
        by_test[item.path.stem.removeprefix("test_"), item.originalname].append(item)
    so_far: dict[str, int] = collections.Counter()
    for (name, _), own in by_test.items():
        cases = [item.callspec.params if hasattr(item, "callspec") else {} for item in own]
        keep = subsets.pairwise(cases)
        if older and name in ON_THE_NEWEST:
            keep = [False] * len(own)
        elif older and name in ABOVE_THE_CORE:
            keep = [(so_far[name] + number) % ABOVE_ONE_IN == 0 for number in range(len(own))]
        elif older:
            chosen = itertools.count()
            keep = [kept and next(chosen) % BELOW_ONE_IN == 0 for kept in keep]
        so_far[name] += len(own)
        left_out.update(item for item, kept in zip(own, keep, strict=True) if not kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]
