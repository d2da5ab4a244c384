"""Runs of many rounds: stopped and resumed, restored elsewhere, refused, and what they write."""

import json

import jax
import numpy as np
import pytest
import tpus

from fax import experiment
from fax.experiment import _outputs

ROUNDS = 5


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures have tests of their own."""
    monkeypatch.setattr(_outputs, "draw", lambda folder: None)


class StoppedError(Exception):
    pass


class StopAt:
    """Ends the run by an error after a round, before anything of it is saved."""

    def __init__(self, number):
        self.number = number

    def after_round(self, run):
        if run.round == self.number:
            raise StoppedError


def assert_same_state(one, other):
    """Bits, dtypes, weak types and structure."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert jax.typeof(x).dtype == jax.typeof(y).dtype
        assert jax.typeof(x).weak_type == jax.typeof(y).weak_type
        x, y = np.asarray(x), np.asarray(y)
        assert x.tobytes() == y.tobytes()


def assert_same_run(one, other):
    assert_same_state(one.state, other.state)
    # NaN is equal to NaN here
    assert json.dumps(one.history) == json.dumps(other.history)


# Every algorithm, with an aggregator that it can have: each of them comes up.
PAIRS = {
    "agnostic_fedavg": "adaptive_clip",
    "apfl": "error_feedback",
    "branch_train_merge": None,
    "diloco": "power_sgd",
    "ditto": "drive",
    "fedavg": "gaussian",
    "fedbn": "e3m0",
    "feddyn": "hadamard",
    "fednova": "geometric_median",
    "fedopt": "dp_ftrl",
    "fedper": "krum",
    "fedprox": "laplace",
    "hyp_cluster": "mean",
    "local_sgd": "median",
    "maml": "multi_krum",
    "mime": "clip_by_norm",
    "mime_lite": "secure_sum",
    "papa": "top_k",
    "papa_2": None,
    "papa_all": "trimmed_mean",
    "qfedavg": "terngrad",
    "reptile": "non_finite",
    "scaffold": "uniform_quantization",
    "streaming_diloco": "error_feedback",
}
# Of states of one kind, one runs always: rows of clients, noise, those of replicas, several models.
ALWAYS = ("apfl", "diloco", "fedavg", "fedopt", "hyp_cluster", "mime", "streaming_diloco")


def test_every_algorithm_and_aggregator_is_resumed():
    assert set(PAIRS) == set(tpus.ALGORITHMS)
    assert set(PAIRS.values()) - {None} == set(tpus.AGGREGATORS)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n not in ALWAYS)) for n in PAIRS]
)
def test_a_resumed_run_is_that_without_interruption(name, tmp_path):
    own = {} if PAIRS[name] is None else {"aggregator": tpus.AGGREGATORS[PAIRS[name]]}
    algorithm = tpus.ALGORITHMS[name](**own)
    state = algorithm.init(tpus.TWO if name == "hyp_cluster" else tpus.PARAMS)
    of_replicas = dict(placement="replicas", sampler="stream")

    def run(folder, *callbacks):
        with tpus.cohorts(**of_replicas if name in tpus.OF_REPLICAS else {}) as cohorts:
            return experiment.run(
                algorithm,
                state,
                cohorts,
                rounds=ROUNDS,
                folder=folder,
                every=2,
                callbacks=callbacks,
            )

    expected = run(tmp_path / "one")
    with pytest.raises(StoppedError):
        run(tmp_path / "two", StopAt(4))
    found = run(tmp_path / "two")
    assert_same_run(found, expected)
    one, two = ((tmp_path / x / "metrics.csv").read_bytes() for x in ("one", "two"))
    assert one == two
    assert len(one.splitlines()) == 1 + ROUNDS
