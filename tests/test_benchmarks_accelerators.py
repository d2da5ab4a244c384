"""The benchmarks for accelerators: their programs, their arithmetic, and what they leave out."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import optax
import pytest

import fax

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import gpu
import tpu

# DrJAX looks for a mesh where JAX no longer keeps it.
pytestmark = pytest.mark.filterwarnings("ignore:jax.interpreters.pxla:DeprecationWarning")

SMALL = tpu.Task(
    title="small",
    model="dense",
    options=dict(sizes=(4, 5, 3)),
    x=(2, 2),
    y=(),
    examples=8,
    batch=4,
    clients=3,
    client_rate=0.5,
    server=optax.adam(0.1),
    paper="a second",
)


# On TPU


def test_drjax_gets_the_same_work():
    pytest.importorskip("drjax")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("float32"), SMALL.params())
    x = rng.normal(size=SMALL.x).astype("float32")

    def alike(batches):
        """Examples that are all the same, so that their order does not matter."""
        return {"x": np.broadcast_to(x, batches["x"].shape), "y": np.ones_like(batches["y"])}

    mine, (state, cohort) = tpu.with_fax(SMALL, 3)
    examples = alike(tpu.features(SMALL, 3 * SMALL.examples))
    cohort = dataclasses.replace(
        cohort, batches=dataclasses.replace(cohort.batches, examples=examples)
    )
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    after, metrics = mine(zeros._replace(params=params), cohort)

    mesh = fax.sharding.make_mesh(devices=jax.devices()[:1], clients=1)
    theirs, shapes = tpu.with_drjax(SMALL, 3, mesh)
    keys, batches, mask, counts = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes[2:])
    assert mask.shape == cohort.mask.shape
    peer, _, totals = theirs(params, zeros.optimizer, keys, alike(batches), mask, counts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after.params, peer)
    np.testing.assert_allclose(metrics["loss"], totals[0] / totals[2], rtol=1e-5)
    assert totals[2] == 3 * SMALL.examples


class Made:
    """Figures that are made up: a second for each client of a core. DrJAX fits one client."""

    def of(self, who, name, cores, clients, vectorize=None):
        if who == "DrJAX" and clients > cores:
            return dict(cycles=None)
        seconds = clients / cores * (2 if who == "DrJAX" else 1)
        return dict(cycles=7e8 * seconds, seconds=seconds, temporary_bytes=3 * 2**20)


def test_tables_for_tpus(monkeypatch, tmp_path):
    monkeypatch.setattr(tpu, "peers", lambda: ("fax", "DrJAX"))
    monkeypatch.setattr(tpu, "TASKS", {"small": SMALL})
    one, eight = tpu.paper(Made())[0]["rows"]
    assert (one["fax, s a round"], eight["fax, s a round"]) == ("3", "0.375")
    assert one["1,500 rounds, min"] == "75.0"
    assert (one["DrJAX, s a round"], one["DrJAX, MiB"]) == (tpu.OUT_OF_MEMORY, "")
    assert eight["DrJAX, s a round"] == "0.75"
    numbers = 4 * 5 + 5 + 5 * 3 + 3
    assert one["fax, models"] == f"{3 * 2**20 / (4 * numbers):.1f}"
    (by_clients,) = tpu.clients(Made())
    assert [row["fax, 8 cores"] for row in by_clients["rows"]] == ["1.25", "6.25", "18.8", "62.5"]
    (by_vectorized,) = tpu.vectorize(Made())
    assert [row["million cycles"] for row in by_vectorized["rows"]] == [2100] * 4 + [None]


def test_what_is_in_the_file_is_not_compiled_again(monkeypatch, tmp_path):
    made = []

    def measure(*what):
        made.append(what)
        return dict(cycles=len(made))

    monkeypatch.setattr(tpu, "measure", measure)
    path = tmp_path / "figures.json"
    for _ in range(2):
        figures = tpu.Rounds(path)
        found = [figures.of("fax", "small", 1, 3, v)["cycles"] for v in (None, 2, None)]
        assert found == [1, 2, 1]
    assert len(made) == len(json.loads(path.read_text())) == 2


# On GPU, or on whatever there is


@pytest.mark.long
def test_rounds_by_hand_are_those_of_fax():
    task = gpu.TASKS["logistic"]()
    args = gpu.arguments(task, 3, 2)
    first, *others = (jax.jit(gpu.round_of(task, way))(*args) for way in gpu.ways(3, ()).values())
    assert len(others) >= 2
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), first, other)


@pytest.mark.long
def test_every_way_is_measured_while_there_is_time(monkeypatch):
    monkeypatch.setattr(gpu, "TURNS", 2)  # before each run, the garbage of all tests is collected
    found = gpu.run(["logistic"], [2], 1, (1, 4), 1e6)
    (own,) = found.values()
    assert list(own) == list(gpu.ways(2, (1,)))  # with two clients, not more are vectorized
    assert all(x["ms"] > 0 and x["mib"] > 0 for x in own.values())
    assert gpu.missing(found) == []
    kept = []
    later = gpu.run(["logistic"], [2], 1, (1, 4), 0, kept.append)
    assert kept == []  # nothing was measured
    assert gpu.missing(later) == [f"logistic, 2 clients: {way}" for way in own]


def test_what_a_device_cannot_run_is_in_the_table(monkeypatch, capsys):
    errors = iter(["RESOURCE_EXHAUSTED: out of memory", "UNKNOWN: CUDNN_STATUS_NOT_SUPPORTED"])

    class Unable:
        def lower(self, *args):
            raise jax.errors.JaxRuntimeError(next(errors))

    monkeypatch.setattr(gpu, "ways", lambda clients, vectorized: {"a": None, "b": None})
    monkeypatch.setattr(gpu, "round_of", lambda task, way: None)
    monkeypatch.setattr(jax, "jit", lambda fn: Unable())
    kept = []
    found = gpu.run(["logistic"], [2], 1, (), 1e6, kept.append)
    assert found == {"logistic, 2 clients": {"a": "out of memory", "b": "failed"}}
    assert kept == [found]
    assert gpu.missing(found) == []
    times, _ = gpu.tables(found)
    assert times["rows"] == [{"": "logistic, 2 clients", "a": "out of memory", "b": "failed"}]
    assert "CUDNN_STATUS_NOT_SUPPORTED" in capsys.readouterr().err


def test_the_default_is_compared_with_the_best():
    own = {
        gpu.DEFAULT: dict(ms=6.0, mib=1.0),
        "DrJAX": dict(ms=1.0, mib=9.0),
        "fax, 4": dict(ms=4.0, mib=2.0),
        "fax, 16": gpu.OUT_OF_MEMORY,
        "fax, 64": None,
    }
    times, memory = gpu.tables({"dense, 100 clients": own})
    assert times["rows"][0]["default / best"] == 1.5
    assert times["rows"][0]["fax, 16"] == memory["rows"][0]["fax, 16"] == gpu.OUT_OF_MEMORY
    assert gpu.missing({"dense": own}) == ["dense: fax, 64"]
