"""The default number of vectorized clients against the figures of all numbers that were compiled.

The figures are the TPU compiler's estimates, in benchmarks/tpu_schedule.json. Nothing is compiled.
"""

import json
import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import tpu_schedule

FIGURES = json.loads(tpu_schedule.FILE.read_text())
V4, V5E, V5P, V6E = KINDS = ("v4", "v5e", "v5p", "v6e")
# What the rule decides on v4, v5e, v5p and v6e.
DECISIONS = {
    "logistic": (64, 64, 64, 64),
    "dense": (64, 32, 64, 64),
    "dense, gradient": ((64, 32), 32, 64, (64, 32)),
    "dense, DRIVE": (64, 16, 64, 32),
    "dense, PowerSGD": (64, 32, 64, 64),
    "MLP 1 M": (16, 4, 32, 16),
    "MLP 2 M": (8, 2, 16, 8),
    "MLP 3.5 M": (4, 1, 8, 4),
    "MLP 4.4 M": (1, 1, 1, 1),
    "MLP 4.4 M, gradient": (1, 1, 1, 1),
    "MLP 17 M": (1, 1, 1, 1),
    "EMNIST CNN": (4, 4, 8, 4),
    "ResNet-18": (1, 1, 1, 1),
    "Shakespeare LSTM": (32, 32, 64, 64),
    "Stack Overflow LSTM": (1, 1, 1, 1),
    "transformer 10 M": (1, 1, 1, 1),
    "transformer 100 M": (1, 1, 1, 1),
}
LARGE = [task for task, chosen in DECISIONS.items() if chosen == (1,) * 4]
# Where the default takes more than 1.15 times as many cycles as the best.
BEHIND = {("EMNIST CNN", V4), ("EMNIST CNN", V5P), ("ResNet-18", V6E)}


def found(kind, task):
    """The figures of a task by number of vectorized clients, those of the default by None."""
    numbers = {None: "default"} | {n: n for n in tpu_schedule.VECTORIZED}
    keys = {n: f"{kind} | {task} | {name} | auto" for n, name in numbers.items()}
    return {n: FIGURES[key] for n, key in keys.items() if key in FIGURES}


def test_every_task_has_a_decision():
    assert {*DECISIONS} == {*tpu_schedule.ROUNDS}


@pytest.mark.always("dense, gradient", "dense, DRIVE", "dense, PowerSGD", "MLP 4.4 M")
@pytest.mark.parametrize("task", DECISIONS)
def test_the_default_of_measured_clients(task):
    maps = tpu_schedule.rounds(task)
    for kind, expected in zip(KINDS, DECISIONS[task], strict=True):
        chosen = tpu_schedule.defaults(kind, maps)
        assert chosen == [*expected] if isinstance(expected, tuple) else [expected]


def test_how_far_the_default_is_from_the_best():
    behind = set()
    for task, decisions in DECISIONS.items():
        for kind, chosen in zip(KINDS, decisions, strict=True):
            figures = found(kind, task)
            own = figures.get(None if isinstance(chosen, tuple) else chosen)
            if own is None or len(figures) < 2:
                continue  # not compiled
            if task in LARGE:  # compared with what needs no more memory than one client at a time
                most = tpu_schedule.MOST_MEMORY * figures[1]["temporary_bytes"]
                figures = {n: x for n, x in figures.items() if x["temporary_bytes"] <= most}
            ratio = own["cycles"] / min(x["cycles"] for x in figures.values())
            assert ratio <= 1.3, (task, kind)
            if ratio > 1.15:
                behind.add((task, kind))
    assert behind == BEHIND
