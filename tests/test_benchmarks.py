"""The comparison with the peers: its arithmetic, what it refuses, and the work all are given.

No peer is needed: the lines that their processes print are made up here.
"""

import argparse
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import commits
import environments
import simulation
from peers import harness, models, workloads

PEERS = ("FedJAX, jit", "FedJAX, pmap", "Flower, ray", "by hand, cond-2", "fax, matmul")


def line(row, seconds, workload="W2", repeat=0, **more):
    usual = dict(
        seconds=[seconds] * 12,
        first_round=9.0,
        peak_mib=100.0,
        on_devices_mib=50.0,
        loss=0.5,
        final_loss=0.1,
        cohorts=["a", "b"],
        steps=[3, 4],
        versions={"jax": "1"},
    )
    return usual | dict(row=row, workload=workload, repeat=repeat) | more


def of(table, row):
    return next(cells for cells in table["rows"] if cells[""] == row)


# Comparing


def test_ratios_are_of_the_same_repeat():
    fax, fedjax = (1.0, 10.0, 1.0), (2.0, 30.0, 4.0)
    lines = [line("fax, matmul", s, repeat=i) for i, s in enumerate(fax)]
    lines += [line("FedJAX, jit", s, repeat=i) for i, s in enumerate(fedjax)]
    row = of(simulation.compare(lines, "W2"), "FedJAX, jit")
    assert row["/ fax"] == "3.00"  # the median of 2, 3, 4; not 4 / 1
    assert row["target"] == "at least 1.8: met"
    assert row["seconds a round"] == "4.00"
    assert row["repeats"] == "2.00 to 30.0"


def test_a_repeat_that_fax_lacks_does_not_count():
    lines = [line("fax, matmul", 1.0, repeat=1), line("pfl, torch", 9.0, repeat=0)]
    lines += [line("pfl, torch", 4.0, repeat=1)]
    assert of(simulation.compare(lines, "W2"), "pfl, torch")["/ fax"] == "4.00"


@pytest.mark.parametrize(("seconds", "met"), [(1.81, True), (1.79, False)])
def test_targets_are_for_the_best_variant(seconds, met):
    lines = [line("fax, matmul", 1.0), line("FedJAX, jit", 9.0), line("FedJAX, pmap", seconds)]
    table = simulation.compare(lines, "W2")
    assert "target" not in of(table, "FedJAX, jit")
    assert of(table, "FedJAX, pmap")["target"].endswith("met" if met else "missed")


@pytest.mark.parametrize(("fax", "target"), [(1.09, "(1.09): met"), (1.2, "(1.20): missed")])
def test_what_is_written_by_hand_may_be_a_tenth_faster(fax, target):
    lines = [line("fax, matmul", fax), line("by hand, cond-2", 1.0)]
    row = of(simulation.compare(lines, "W2"), "by hand, cond-2")
    assert row["target"] == f"fax within 1.10 times {target}"


@pytest.mark.parametrize(("stock", "word"), [(1.0, "met"), (1.1, "missed")])
def test_stock_convolutions_are_held_to_matrix_products(stock, word):
    lines = [line("fax, matmul", 1.0, "W1"), line("fax, nnx", stock, "W1")]
    text = f"Stock convolutions take {stock:.2f} times as long as matrix products, at most 1.05"
    assert simulation.stock(lines, "W1") == f"{text}: {word}"
    assert simulation.stock(lines[:1], "W1") is None


def test_of_fax_too_the_fastest_variant_counts():
    lines = [
        line("fax, matmul", 1.0, "W1"),
        line("fax, nnx", 0.5, "W1"),
        line("pfl, torch", 1.0, "W1"),
    ]
    table = simulation.compare(lines, "W1")
    assert of(table, "fax, matmul")["/ fax"] == "2.00"
    assert "/ fax" not in of(table, "fax, nnx")
    assert of(table, "pfl, torch")["target"] == "at least 1.3: met"


def test_peers_that_are_missing_or_fail_have_a_row():
    lines = [line("fax, matmul", 1.0)]
    lines += [dict(row="pfl, torch", workload="W2", repeat=0, error="missing: Python 3.11")]
    lines += [dict(row="Flower, ray", workload="W2", repeat=0, error="failed: no luck")]
    table = simulation.compare(lines, "W2")
    assert of(table, "pfl, torch") == {"": "pfl, torch", "seconds a round": "missing"}
    assert of(table, "Flower, ray")["seconds a round"] == "failed"
    assert simulation.disagreements(lines) == []
    simulation.show(table)


def test_without_fax_there_are_no_ratios():
    row = of(simulation.compare([line("FedJAX, jit", 1.0)], "W2"), "FedJAX, jit")
    assert row["seconds a round"] == "1.00"
    assert "/ fax" not in row
    assert "target" not in row


@pytest.mark.parametrize(("peak", "word"), [(150.0, "met"), (151.0, "missed")])
def test_memory(peak, word):
    lines = [line("fax, matmul", 1.0, peak_mib=peak), line("FedJAX, jit", 1.0)]
    assert simulation.memory(lines, "W2").endswith(word)
    assert simulation.memory(lines[:1], "W2") is None


def test_commits_are_compared_turn_by_turn():
    """The ratio is the median over turns, and then over pairs of processes."""
    slow = {"x": [2.0, 30.0, 4.0], "new": [1.0]}, {"x": [1.0, 10.0, 1.0], "old": [1.0]}
    equal = {"x": [1.0]}, {"x": [1.0]}
    rows = commits.compare([slow, equal, equal])
    assert [row[""] for row in rows] == ["x"]
    assert rows[0]["ratio"] == "1.000"
    assert rows[0]["pairs"] == "1.000 to 3.000"
    assert rows[0]["target"] == "at most 1.03: met"
    (row,) = commits.compare([slow])
    assert (row["ms"], row["before"]) == (4000, 1000)
    assert row["target"] == "at most 1.03: missed"


def test_every_peer_with_a_target_has_a_row():
    for workload, targets in simulation.TARGETS.items():
        assert set(targets) <= {r.peer for r in simulation.ROWS if workload in r.workloads}
    assert simulation.WORKLOADS.keys() == workloads.WORKLOADS.keys()
    for name, workload in workloads.WORKLOADS.items():
        assert simulation.WORKLOADS[name] == workload.title


# Refusing


def test_agreement_is_silent():
    lines = [line(row, 1.0, repeat=repeat) for row in PEERS for repeat in range(2)]
    lines[3]["loss"] = 0.504
    assert simulation.disagreements(lines) == []


@pytest.mark.parametrize(
    ("quantity", "value", "text"),
    [
        ("cohorts", ["a", "x"], "differ in cohorts: x and b in round 1"),
        ("cohorts", ["a"], "differ in cohorts: 1 and 2 rounds"),
        ("steps", [3, 5], "differ in steps: 5 and 4 in round 1"),
        ("loss", 0.51, "which is more than 1% apart"),
        ("loss", float("nan"), "has a loss of nan"),
    ],
)
def test_disagreement_is_told(quantity, value, text):
    lines = [line(row, 1.0) for row in PEERS]
    lines[1][quantity] = value
    (told,) = simulation.disagreements(lines)
    assert told.startswith("W2, repeat 0: FedJAX, pmap and") or "FedJAX, pmap has" in told
    assert text in told


def test_dropout_draws_other_numbers_for_everybody():
    first = line("fax, matmul", 1.0, "W1", loss=2.6)
    assert simulation.disagreements([first, line("FedJAX, pmap", 1.0, "W1", loss=3.0)]) == []
    assert simulation.disagreements([first, line("FedJAX, pmap", 1.0, "W1", loss=3.5)])


def test_another_algorithm_has_another_loss_but_the_same_work():
    flower = line("Flower, ray", 1.0, loss=1.5)
    assert simulation.disagreements([line("fax, matmul", 1.0), flower]) == []
    assert simulation.disagreements([line("fax, matmul", 1.0), flower | {"steps": [1, 1]}])


def test_a_process_that_fails_says_why():
    row = simulation.Row("nobody", "no_such_peer", "none", "fax")
    result = simulation.process(sys.executable, row, "W2", 1)
    assert "No module named peers.no_such_peer" in result["error"]


def test_a_python_that_is_missing():
    with pytest.raises(environments.MissingError, match=r"Python 2\.99 is missing"):
        environments.find_python("2.99")
    this = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert environments.find_python(this) == sys.executable


def test_what_is_missing_is_an_error_in_every_line(monkeypatch, capsys):
    missing = environments.Environment("nowhere", "2.99", ())
    monkeypatch.setitem(simulation.ENVIRONMENTS, "nowhere", missing)
    row = simulation.Row("nobody", "no_such_peer", "none", "nowhere")
    lines = simulation.measure([row], ["W1", "W2"], 2, 1)
    assert [made["error"] for made in lines] == ["missing: Python 2.99 is missing"] * 4
    assert "nowhere is missing" in capsys.readouterr().out


# The work


def test_clients():
    sizes = workloads.sizes()
    assert (len(sizes), sizes.min(), sizes.max(), sizes.sum()) == (3400, 28, 500, 655454)
    x, y = workloads.examples(7)
    assert x.shape == (sizes[7], 784)
    assert x.dtype == np.float32
    assert y.dtype == np.int32
    assert (x >= 0).all()
    assert (x < 0.8).all()


@pytest.mark.parametrize(
    ("name", "checksum", "steps"),
    [("W1", "be780d5b", 92), ("W2", "8220a255", 1009), ("W3", "f8b44e9a", 541)],
)
def test_cohorts(name, checksum, steps, capsys):
    chosen = argparse.Namespace(
        name=name, variant="none", workload=workloads.WORKLOADS[name], warm_up=0, total=1
    )
    report = harness.Report(chosen, ["numpy"])
    drawn = workloads.cohort(0, chosen.workload.clients)
    for order in (drawn, drawn[::-1]):
        report.cohort(order, workloads.steps(order).sum())
    assert report.load() == sorted(drawn)
    report.run(lambda number: None, lambda: workloads.initial(chosen.workload))
    report.finish()
    told = json.loads(capsys.readouterr().out)
    assert told["cohorts"] == [checksum] * 2
    assert told["steps"] == [steps] * 2
    assert told["versions"] == {"numpy": np.__version__}
    assert told["loss"] == told["final_loss"]
    assert told["loss"] == pytest.approx(np.log(62), rel=0.1)
    assert len(told["seconds"]) == 1


def test_an_epoch_has_every_example_once():
    order = workloads.epoch_order(3, 5)
    assert sorted(order) == list(range(workloads.sizes()[5]))
    assert (order != workloads.epoch_order(4, 5)).any()


# The models


@pytest.mark.long
@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_losses_in_numpy_and_in_jax(name):
    params = workloads.initial(workloads.WORKLOADS[name])
    rng = np.random.default_rng(0)
    for layer in params:
        layer["b"] = rng.normal(size=layer["b"].shape).astype(np.float32)
    x, y = map(np.concatenate, zip(*map(workloads.examples, range(1, 6)), strict=True))
    expected = jnp.mean(models.losses(params, x, y, None))
    np.testing.assert_allclose(workloads.evaluate(params), expected, rtol=1e-4)


def test_convolutions_and_pooling():
    rng = np.random.default_rng(0)
    h, w, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 8, 3), (3, 3, 3, 5), 5))
    kinds = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(h, w, (1, 1), "VALID", dimension_numbers=kinds) + b
    convolved = models.convolve({"w": w, "b": b}, h)
    np.testing.assert_allclose(convolved, expected, rtol=1e-4, atol=1e-5)
    window = (1, 2, 2, 1)
    pooled = jax.lax.reduce_window(convolved, -jnp.inf, jax.lax.max, window, window, "VALID")
    np.testing.assert_array_equal(models.pool(convolved), pooled)


@pytest.mark.long
def test_padding_does_not_train():
    params = workloads.initial(workloads.WORKLOADS["W2"])
    key = jax.random.PRNGKey(0)
    x, y = (part[:20] for part in workloads.examples(1))
    trained, _ = models.step(params, key, x, y, np.zeros(20, np.float32))
    jax.tree.map(np.testing.assert_array_equal, trained, params)
    mask = (np.arange(20) < 7).astype(np.float32)
    short, _ = models.step(params, key, x[:7], y[:7], np.ones(7, np.float32))
    masked, _ = models.step(params, key, x, y, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), masked, short)
