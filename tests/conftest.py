"""What has to be settled before JAX initializes: float64, and several devices on one machine."""

import collections
import functools
import gc
import itertools
import os
import platform
import random

# Tests compile much and compute little. XLA's own passes stay on, and with them what tests assert
# on; LLVM makes machine code without optimizing it, which takes little more than half as long.
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if platform.machine() in ("x86_64", "AMD64"):
    # Without optimization, some products and sums are fused and others not, and where XLA computes
    # a value twice, as in the derivative of `jnp.min`, the two differ. AVX has no fused ones.
    QUICKLY += " --xla_cpu_max_isa=AVX"
os.environ["XLA_FLAGS"] = f"{QUICKLY} {os.environ.get('XLA_FLAGS', '')}".strip()
# Tests run on CPUs, whatever else a machine has. Otherwise JAX loads libtpu to look for TPUs, where
# it is installed, and only one process at a time can do that.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402
import scripts  # noqa: E402
import subsets  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)
# JAX computes the key of every program in its persistent cache, even if it has no folder for that.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_enable_compilation_cache", False)
# Of each operation, XLA is told the name, but not the lines of Python that it comes from.
jax.config.update("jax_traceback_in_locations_limit", 0)
# Tests leave many objects that live on, in JAX's caches. The garbage collector looks through them
# less often than by default.
gc.set_threshold(10_000, 20, 20)


@pytest.fixture
def run(tmp_path):
    """Runs Python in a new folder, and returns what it printed; see `scripts.run_in`."""
    return functools.partial(scripts.run_in, tmp_path)


@pytest.fixture
def no_figures(monkeypatch):
    """Runs draw no figures, which have tests of their own."""
    monkeypatch.setattr("fax.experiment._outputs.draw", lambda folder: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of `runs.train` without interruption, and its folder."""
    import runs

    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fax.experiment._outputs.draw", lambda folder: None)
        return runs.train(folder), folder


# For --core: what is written with operators and exported names of JAX alone. What differs between
# versions of JAX is in the core, whose tests notice it in more detail.
ABOVE_THE_CORE = (
    *("absent_clients", "algorithms_personal", "client_store", "clipping", "cohorts"),
    *("command_shows", "compression", "control_variates", "data_libraries", "data_messages"),
    *("data_sources", "deploy_algorithms", "diloco", "downloads", "drjax", "error_feedback"),
    *("experiment", "experiment_callbacks", "experiment_figures", "experiment_output"),
    *("experiment_refused", "fedavg", "federated", "fedopt", "fedper", "heterogeneous"),
    *("hostile_files", "init", "inner_steps", "learner_worker", "maml", "meeting", "metrics"),
    *("metrics_by_name", "models", "packed", "padding", "papa", "partition"),
    *("personal_parts", "privacy", "recipes", "robust", "row_file"),
    *("secure_attacks", "secure_crypto", "secure_sum", "secure_sums", "sharded_transformer"),
    *("streaming_diloco", "tasks"),
)
# For --core, these are left out: documents, benchmarks, what looks at files alone, and whole runs,
# in processes of their own or above the core, whose programs are those of other tests.
NOT_OF_THE_CORE = (
    *("docs", "examples", "examples_algorithms", "examples_diloco", "examples_privacy"),
    *("benchmarks", "benchmarks_accelerators", "benchmarks_data_center", "house", "mutants"),
    *("project", "site", "subsets", "cohorts_processes", "command", "command_processes"),
    *("command_settings", "data_names", "deploy_failures", "deploy_processes", "elastic"),
    *("elastic_processes", "experiment_failures", "experiment_kills", "meeting_processes"),
    *("metrics_exact", "privacy_attacks", "secure_processes"),
)
# With --core, one in so many of a file's tests above the core runs, and of a test's cases below.
ABOVE_ONE_IN, BELOW_ONE_IN = 30, 8
# Files with the longest tests come first, so that no process is left alone with one at the end.
FIRST = (
    *("examples_algorithms", "examples_diloco", "examples", "examples_privacy", "distributed"),
    *("docs", "command", "command_processes"),
    *("deploy_algorithms", "mesh_branches", "random_programs", "models", "privacy_attacks"),
    *("memory", "fedavg", "absent_clients", "cohorts_processes", "tasks"),
)
MARKERS = (
    "long: takes long, and runs with --all or if its file is named; something shorter runs always",
    "always(*ids): the cases of a test that run always; the others are long",
    "docs: an example of the documentation, which runs with --docs, --all, or if its file is named",
    "kinds(**of): which values of parameters are alike, see subsets.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """For ``-n auto``, one more than there are cores: some tests mostly wait for processes."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # as xdist does
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(usable(0)) + 1


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run every case of every test")
    parser.addoption("--core", action="store_true", help="run what depends on the version of JAX")
    parser.addoption("--docs", action="store_true", help="run the documentation's examples alone")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if config.pluginmanager.hasplugin("hypothesispytest"):
        choose_examples(config.option)


def choose_examples(option):
    """Every run of `make test` has the same random examples, and of `make test-all` new ones."""
    import hypothesis

    same = dict(max_examples=10, derandomize=True, database=None)
    how = dict(max_examples=60, print_blob=True) if option.all else same
    hypothesis.settings.register_profile("fax", deadline=None, **how)
    hypothesis.settings.load_profile("fax")
    if option.all and option.hypothesis_seed is None:
        option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))


def pytest_report_header(config):
    seed = getattr(config.option, "hypothesis_seed", None)
    return f"random examples: --hypothesis-seed={seed} repeats them" if seed else None


def name_of(item):
    return item.path.stem.removeprefix("test_")


def pytest_collection_modifyitems(config, items):
    """Chooses cases where all tests run: those that cover, and with --core fewer."""
    if config.option.docs:
        leave_out(config, items, [item for item in items if not item.get_closest_marker("docs")])
        shorter = ["test_pages", "test_docstrings"]  # than examples
        items.sort(key=lambda item: [item.originalname == name for name in reversed(shorter)])
        return
    if config.args != config.getini("testpaths"):
        return
    items.sort(key=lambda item: name_of(item) not in FIRST)
    if config.option.all:
        return
    left_out = []
    by_test = collections.defaultdict(list)
    for item in items:
        by_test[name_of(item), item.originalname].append(item)
    so_far: dict[str, int] = collections.Counter()
    for (name, _), own in by_test.items():
        keep = chosen(own)
        if config.option.core and name in NOT_OF_THE_CORE:
            keep = [False] * len(own)
        elif config.option.core:
            above = name in ABOVE_THE_CORE
            one_in = ABOVE_ONE_IN if above else BELOW_ONE_IN
            # The first case of one test, the second of the next: most tests begin with the easiest.
            first = so_far[name] % max(1, min(one_in, sum(keep)))
            number = itertools.count(so_far[name] if above else -first)
            so_far[name] += sum(keep) if above else 1
            keep = [kept and next(number) % one_in == 0 for kept in keep]
        left_out += [item for item, kept in zip(own, keep, strict=True) if not kept]
    leave_out(config, items, left_out)


def chosen(cases):
    """Which cases of a test `make test` runs."""
    always, kinds = (cases[0].get_closest_marker(name) for name in ("always", "kinds"))
    if always:
        ids = [item.callspec.id for item in cases]
        if unknown := set(always.args).difference(ids):
            raise pytest.UsageError(f"{cases[0].nodeid}: no cases are {unknown}, of {ids}")
        keep = [id in always.args for id in ids]
    else:
        parameters = [item.callspec.params if hasattr(item, "callspec") else {} for item in cases]
        keep = subsets.covering(parameters, kinds.kwargs if kinds else {})
    others = [any(item.get_closest_marker(name) for name in ("long", "docs")) for item in cases]
    return [kept and not other for kept, other in zip(keep, others, strict=True)]


def leave_out(config, items, left_out):
    config.hook.pytest_deselected(items=left_out)
    left_out = set(left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish():
    """What has been imported stays, so that the garbage collector need not look at it."""
    gc.collect()
    gc.freeze()
