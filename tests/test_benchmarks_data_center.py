"""The benchmark of data-center training: its programs, compiled for two slices, and its sums."""

import pathlib
import sys

import jax
import numpy as np
import pytest
import tpus

import fax
from fax.inspect import Collective

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import data_center
import data_center_programs as programs

# DrJAX looks for a mesh where JAX no longer keeps it.
pytestmark = pytest.mark.filterwarnings("ignore:jax.interpreters.pxla:DeprecationWarning")

TINY = programs.Model(2, 128, 256, 4, 4, 32, 512)
SMALL = data_center.Size(TINY, "v5p:2x2x1", chips=4, batch=2)


# Programs


def compiled(monkeypatch, way):
    monkeypatch.setattr(data_center, "SIZES", {"tiny": SMALL})
    monkeypatch.setattr(data_center, "TENSOR", 2)
    monkeypatch.setattr(data_center, "LENGTH", 128)
    monkeypatch.setattr(data_center, "STEPS", 10)
    monkeypatch.setattr(data_center, "TAU", 2)
    with jax.enable_x64(False):
        return data_center.measure("tiny", 2, way)


@pytest.mark.long
def test_replicas_on_two_slices_send_each_parameter_once_a_period(monkeypatch):
    tpus.require()
    row = compiled(monkeypatch, "DiLoCo")
    part = 4 * TINY.size() / SMALL.chips / 10
    assert part <= row["passed_bytes"] < 1.1 * part
    assert row["sent_bytes"] == row["passed_bytes"]  # of a sum over two, one
    assert row["dtypes"] == ["all-reduce float32"]
    # Parameters and two moments of a replica; outer parameters and momentum.
    assert row["argument_bytes"] >= 5 * 4 * TINY.size() / SMALL.chips


@pytest.mark.long
@pytest.mark.parametrize(
    ("way", "least", "most"),
    [
        ("data-parallel", 2, 4),  # gradients in half precision, in every step
        (programs.DRJAX, 0.4, 0.6),  # float32 in every tenth
        ("Streaming", 0.4, 0.5),
        ("Streaming, 4 bits", 0.05, 0.07),
    ],
)
def test_bytes_for_each_parameter_of_a_chip(way, least, most, monkeypatch):
    tpus.require()
    if way == programs.DRJAX:
        pytest.importorskip("drjax")
    found = compiled(monkeypatch, way)["passed_bytes"]
    assert least <= found / (TINY.size() / SMALL.chips) < most


@pytest.mark.long
def test_drjax_gets_the_same_work():
    pytest.importorskip("drjax")
    rng = np.random.default_rng(0)
    tokens = rng.integers(TINY.vocabulary, size=(2, 2, 2, 9)).astype(np.int32)
    with jax.enable_x64(False):
        task = programs.work(TINY, replicas=2, batch=2, length=8, steps=2)
        with jax.set_mesh(fax.sharding.make_mesh(replicas=2, data=2, model=2)):
            mine, (state, cohort), _ = programs.WAYS["DiLoCo"](task)
            theirs, (*kept, _), _ = programs.WAYS[programs.DRJAX](task)
            state, kept = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (state, kept))
            params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape), state.params)
            params = jax.tree.map(np.float32, params)
            rows = jax.tree.map(lambda x: np.stack([x, x]), params)
            replica = state.replicas.rows._replace(params=rows)
            state = state._replace(params=params, replicas=fax.aggregators.PerClient(replica))

            def full(x, small):
                return {4: tokens, 3: np.ones(x.shape, bool)}.get(x.ndim, small)

            after, metrics = mine(state, jax.tree.map(full, cohort, task.cohort))
            _, _, momentum, _, states = kept
            kept, losses = (np.int32(1), params, momentum, rows, states), []
            for step in range(2):
                *kept, loss = theirs(*kept, tokens[:, step])
                losses.append(loss)
    # As far as bfloat16 allows: where a gradient is nearly 0, a step of AdamW may go either way.
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=2**-9)
    for mine, peer, before in zip(*map(jax.tree.leaves, (after.params, kept[1], params))):
        own, other = np.asarray(mine) - before, np.asarray(peer) - before
        assert np.sum(own * other) > 0.98 * np.linalg.norm(own) * np.linalg.norm(other)
        np.testing.assert_allclose(np.linalg.norm(own), np.linalg.norm(other), rtol=0.01)


# Arithmetic


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("all-reduce", 1.5),
        ("reduce-scatter", 0.75),
        ("all-gather", 3),
        ("all-to-all", 0.75),
        ("collective-permute", 1),
    ],
)
def test_what_leaves_a_chip(operation, expected):
    of_four = Collective(operation, ("replicas",), "float32", 8, 5, 4, True, 0, 0, False, None)
    assert data_center.sent(of_four) == 8 * expected


def test_fragments_have_all_parameters():
    for size in data_center.SIZES.values():
        first, second = data_center.shares(size.model)
        assert first + second == pytest.approx(1)
        assert 0.4 < second < 0.6


def test_the_bandwidth_that_is_needed():
    """In closed form: what a period sends, in the time that hides it and that chips may wait."""
    size = data_center.SIZES["8B"]
    row = dict(sent_bytes=1e6)
    gbits = 8 * row["sent_bytes"] * size.chips / 1e9
    steps = data_center.STEPS
    hidden = {"data-parallel": 2 / 3 * steps, "DiLoCo": 0}
    hidden["Streaming"] = data_center.TAU * data_center.FRAGMENTS
    for way, some in hidden.items():
        for target in (0.8, data_center.TARGET):
            expected = gbits * steps / (size.compute * (some + (1 / target - 1) * steps))
            found = data_center.needed(size, way, row, target)
            assert found == pytest.approx(expected, rel=0.005)
        assert data_center.needed(size, way, row) == found


def test_tables_and_a_figure(monkeypatch, tmp_path):
    monkeypatch.setattr(data_center, "drjax", None)

    def measure(name, slices, way):
        memory = dict(argument_bytes=2**30, temporary_bytes=2**31, peak_bytes=3 * 2**30)
        traffic = dict(passed_bytes=2**20, sent_bytes=slices * 2**20, dtypes=["all-reduce"])
        return memory | traffic | dict(cpu_seconds=2.0)

    monkeypatch.setattr(data_center, "measure", measure)
    compiled = data_center.Compiled(tmp_path / "figures.json")
    sizes, sent, bandwidths = data_center.tables(compiled, ["1B", "8B"], [2, 8])
    assert [row["million parameters"] for row in sizes["rows"]] == ["1,100", "8,030"]
    assert len(sent["rows"]) == 2 * 2 * 4
    assert sent["rows"][0]["GB from a slice"] == f"{64 * 2**21 / 1e9:.3g}"
    assert sent["rows"][0]["at most, GiB"] == 3
    for row, needs in zip(sent["rows"], bandwidths["rows"], strict=True):
        assert row["Gbit/s for 95 %"] == needs["95 %"]
    monkeypatch.setattr(data_center, "measure", None)  # what is in the file is not compiled again
    path = tmp_path / "figure.png"
    data_center.draw(data_center.Compiled(tmp_path / "figures.json"), ["1B", "8B"], 8, path)
    assert path.stat().st_size > 10_000
