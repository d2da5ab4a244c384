"""Callbacks: when they stop a run, what they keep through a resume, and what they do meanwhile."""

import itertools
import math
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fax
from fax import aggregators, experiment


class Run:
    """The fields of a run that callbacks read."""

    def __init__(self, rounds, folder=None, rounds_per_call=1, cohorts=None):
        self.round, self.rounds, self.rounds_per_call = 0, rounds, rounds_per_call
        self.folder, self.cohorts = folder, cohorts
        self.metrics, self.results, self.params, self.state = {}, {}, None, None
        self.history, self.evaluations = [], ("test",)

    def go(self, *callbacks, until=None, values=lambda r: ({}, {}, None)):
        """Runs rounds, and returns the reason why a callback stops them."""
        starts = [own.start(self) for own in callbacks if hasattr(own, "start")]
        if reasons := list(filter(None, starts)):
            return reasons[0]
        while self.round < (until or self.rounds):
            self.block = min(self.rounds_per_call, self.rounds - self.round)
            for _ in range(self.block):
                self.round += 1
                self.metrics, self.results, self.params = values(self.round)
                self.history.append({"round": self.round, **self.metrics, **self.results})
            self.state = self.params
            if reasons := list(filter(None, [own.after_round(self) for own in callbacks])):
                return reasons[0]
        return None


def evaluated(values, every=2):
    """Every second round has the next value as the result of an evaluation."""
    return lambda r: ({"loss": 1.0}, {} if r % every else {"test/loss": values[r // every - 1]}, 0)


@pytest.mark.parametrize(("sign", "mode"), [(1, "min"), (-1, "max")])
@pytest.mark.parametrize(
    ("values", "stops", "best"),
    [
        ([3, 2, 2.5, 1, 1, 2, 1.5, 0], 14, (1, 8)),  # equal is no improvement
        ([math.nan, math.nan, math.nan, 0], 6, (math.inf, 0)),
        ([2, math.nan, 1, math.nan, math.nan, 0.5, 3, 4], None, (0.5, 12)),
    ],
)
def test_early_stopping(sign, mode, values, stops, best):
    values = [sign * value for value in values]
    whole = experiment.EarlyStopping("test/loss", 3, mode)
    run = Run(2 * len(values))
    reason = run.go(whole, values=evaluated(values))
    assert (run.round if reason else None) == stops
    assert (whole.state["best"], whole.state["round"]) == (sign * best[0], best[1])
    if stops:
        assert f"test/loss has not improved on {sign * best[0]:.6g} in round {best[1]}" in reason

    # A run that is resumed in any round stops in the same round, with the same state.
    for middle in range(1, run.round):
        first = experiment.EarlyStopping("test/loss", 3, mode)
        part = Run(run.rounds)
        assert part.go(first, until=middle, values=evaluated(values)) is None
        second = experiment.EarlyStopping("test/loss", 3, mode)
        second.state = dict(first.state)
        for _ in range(2):  # the second time, it stays stopped
            assert part.go(second, values=evaluated(values)) == reason
            assert (part.round, second.state) == (run.round, whole.state)


def test_early_stopping_forgets_an_earlier_run():
    callback = experiment.EarlyStopping("loss", 2, "min")
    for _ in range(2):
        run = Run(5)
        assert run.go(callback, values=lambda r: ({"loss": 1.0}, {}, 0))
        assert run.round == 3


@pytest.mark.parametrize(("sign", "mode"), [(1, "min"), (-1, "max")])
def test_a_target_stops_a_run(sign, mode):
    values = [sign * x for x in (3, math.nan, 2, 1.5, 1, 0)]
    run = Run(12)
    for _ in range(2):  # the second time, it stays stopped
        reason = run.go(experiment.StopAt("test/loss", sign * 1.5, mode), values=evaluated(values))
        assert run.round == 8
        assert reason == f"test/loss is {sign * 1.5}, and the target was {sign * 1.5}"
    assert Run(4).go(experiment.StopAt("test/loss", 0, mode), values=evaluated(values)) is None


def test_all_rounds_of_a_block_are_looked_at():
    """Otherwise a run that a target did not stop would stay stopped when it is resumed."""
    losses = [3.0, 1.0, 2.0, 2.0, 2.0, 0.5]
    for callback, stops in [
        (experiment.StopAt("loss", 1.0, "min"), 3),
        (experiment.EarlyStopping("loss", 3, "min"), 6),
    ]:
        run = Run(6, rounds_per_call=3)
        for _ in range(2):
            reason = run.go(callback, values=lambda r: ({"loss": losses[r - 1]}, {}, 0))
            assert reason
            assert run.round == stops
    assert callback.state == {"best": 1.0, "round": 2, "waited": 3}


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("test/los", 2, "has 'loss' or 'test/loss'. Did you mean 'test/loss'?"),
        ("los", 1, "has 'loss' or 'test/...'. Did you mean 'loss'?"),
        ("train/loss", 1, "has 'loss' or 'test/...'."),
    ],
)
@pytest.mark.parametrize("kind", [experiment.StopAt, experiment.EarlyStopping])
def test_a_metric_that_is_not_there(kind, name, number, message):
    run = Run(4)
    with pytest.raises(ValueError, match=f"{kind.__name__}: metric is '{name}'") as error:
        run.go(kind(name, 1, "min"), values=evaluated([1, 1]))
    assert message in str(error.value)
    assert run.round == number


def test_time_stops_a_run(monkeypatch):
    clock = itertools.count(0, 900)  # it is looked at every quarter of an hour
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    callback = experiment.StopAfter(hours=1.5)
    for _ in range(2):  # a resumed run has the whole time again
        run = Run(100)
        assert run.go(callback) == "1.5 hours are over"
        assert run.round == 6


def test_all_processes_stop_when_the_time_of_process_0_is_over(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    sent = []

    def broadcast(over):  # that of process 0, while this is another one
        sent.append(int(over))
        return np.int32(len(sent) == 4)

    monkeypatch.setattr("jax.experimental.multihost_utils.broadcast_one_to_all", broadcast)
    run = Run(10)
    assert run.go(experiment.StopAfter(hours=1)) == "1 hours are over"
    assert run.round == 4
    assert sent == [0, 0, 0, 0]


@pytest.mark.parametrize("per_call", [1, 3])
def test_the_average_of_parameters(per_call):
    rng = np.random.default_rng(0)
    params = rng.normal(size=(8, 5)).astype(np.float32)
    decay, rounds = 0.8, 7

    def values(r):
        return {}, {}, {"w": jnp.array(params[r]), "half": jnp.array(params[r], jnp.bfloat16)}

    def begin(average, run, until):
        run.params = values(run.round)[2]
        run.go(average, until=until, values=values)
        return average

    whole = begin(experiment.EMA(decay), Run(rounds, rounds_per_call=per_call), rounds)
    expected = [params[0], np.array(jnp.array(params[0], jnp.bfloat16), np.float32)]
    for r in range(1, rounds + 1):
        at = params[min(-(-r // per_call) * per_call, rounds)]  # what is there after the block
        new = [at, np.array(jnp.array(at, jnp.bfloat16), np.float32)]
        expected = [decay * e + (1 - decay) * n for e, n in zip(expected, new)]
    np.testing.assert_allclose(whole.state["w"], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole.state["half"], expected[1], rtol=1e-5, atol=1e-6)
    assert {x.dtype.name for x in whole.state.values()} == {"float32"}

    run = Run(rounds, rounds_per_call=per_call)
    first = begin(experiment.EMA(decay), run, 3)
    second = experiment.EMA(decay)
    second.state = first.state
    begin(second, run, rounds)
    for name, own in whole.state.items():
        np.testing.assert_array_equal(second.state[name], own)


def test_the_average_is_sharded_as_the_parameters_are():
    mesh = fax.sharding.make_mesh(model=-1)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    params = [jax.device_put(np.full((2, 8), r, np.float32), sharding) for r in range(3)]
    run, average = Run(2), experiment.EMA(0.5)
    run.params = params[0]
    run.go(average, values=lambda r: ({}, {}, params[r]))
    assert average.state.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(average.state, np.full((2, 8), 1.25))


def test_the_average_survives_that_the_state_is_donated():
    run = Run(1)
    run.params = jnp.ones(3)
    average = experiment.EMA(0.5)
    average.start(run)
    run.params.delete()
    run.round, run.block, run.params = 1, 1, jnp.zeros(3)
    average.after_round(run)
    np.testing.assert_array_equal(average.state, [0.5, 0.5, 0.5])


@pytest.fixture
def traced(monkeypatch):
    """What is traced: the rounds and folders of traces that have ended."""
    log = types.SimpleNamespace(run=None, open=None, done=[])

    def start(folder):
        assert log.open is None
        log.open = (log.run().round, folder)

    def stop():
        first, folder = log.open
        run = log.run()
        log.open = None
        log.done.append((first, run and run.round, str(folder)))

    monkeypatch.setattr("jax.profiler.start_trace", start)
    monkeypatch.setattr("jax.profiler.stop_trace", stop)
    return log


@pytest.mark.parametrize(
    ("rounds", "per_call", "first", "expected"),
    [
        ([3, 4], 1, 0, [(2, 4)]),
        ([1, 4, 10], 1, 0, [(0, 1), (3, 4), (9, 10)]),
        ([3, 4], 4, 0, [(0, 4)]),
        ([4, 5], 4, 0, [(0, 8)]),
        ([9], 4, 0, [(8, 10)]),
        ([2, 6, 7], 1, 5, [(5, 7)]),  # resumed after round 5
        ([], 1, 0, []),
    ],
)
def test_profiles(traced, tmp_path, rounds, per_call, first, expected):
    run = Run(10, tmp_path, rounds_per_call=per_call)
    traced.run = lambda: run
    run.round = first
    run.go(experiment.Profile(rounds))
    assert traced.done == [(*own, str(tmp_path / "profile")) for own in expected]
    assert traced.open is None


def test_a_trace_ends_with_its_run(traced, tmp_path):
    run = Run(10)
    traced.run = lambda: run
    profile = experiment.Profile([5, 6], tmp_path)
    run.go(profile, until=4)  # then another callback stops it, or there is an error
    assert traced.open == (4, tmp_path)
    run = None
    assert traced.done == [(4, None, str(tmp_path))]


def test_profiles_need_a_folder_and_rounds_that_the_run_has():
    with pytest.raises(ValueError, match=r"Profile: the run has no folder, .* Pass folder=."):
        Run(10).go(experiment.Profile([5]))
    with pytest.raises(ValueError, match="rounds has 11, but the run ends after round 10"):
        Run(10).go(experiment.Profile([5, 11], "traces"))


@pytest.mark.parametrize("per_call", [1, 4])
def test_a_spent_budget_stops_a_run(per_call):
    state = aggregators.gaussian(1.0, 20.0).init(jnp.zeros(3))

    def released(r):
        return {}, {}, state._replace(noise=state.noise._replace(releases=np.int32(r)))

    def callback():
        return experiment.StopAtBudget(aggregators.Budget(0.6, 1e-5, 20.0))

    allowed = aggregators.Budget(0.6, 1e-5, 20.0).rounds
    epsilon = aggregators.epsilon(20.0, allowed // per_call * per_call, 1e-5)
    assert 5 < allowed < 20
    assert allowed % 4
    run, whole = Run(20, rounds_per_call=per_call), callback()
    reason = run.go(whole, values=released)
    assert run.round == allowed // per_call * per_call
    assert run.metrics["epsilon"] == pytest.approx(epsilon, rel=1e-6)
    assert f"epsilon is {epsilon:.4g} at delta=1e-05 after {run.round} releases" in reason

    part, first, second = Run(20, rounds_per_call=per_call), callback(), callback()
    assert part.go(first, until=4, values=released) is None
    second.state = first.state
    assert part.go(second, values=released) == reason
    assert (part.round, second.state) == (run.round, whole.state)

    again = callback()
    again.state = whole.state
    assert run.go(again, values=released) == reason
    assert run.round == part.round


WRONG = {
    "mode": (
        lambda: experiment.EarlyStopping("loss", 3, "least"),
        "EarlyStopping: mode is 'least', expected 'min' or 'max'",
    ),
    "patience": (
        lambda: experiment.EarlyStopping("loss", 0, "min"),
        "patience is 0, expected an int of at least 1",
    ),
    "metric": (lambda: experiment.StopAt(0.9, 0.9, "max"), "metric is 0.9, expected a string"),
    "target": (
        lambda: experiment.StopAt("loss", math.nan, "max"),
        "target is nan, expected a number",
    ),
    "hours": (lambda: experiment.StopAfter(0), "hours is 0, expected a number above 0"),
    "decay": (lambda: experiment.EMA(1.0), "decay is 1.0, expected a number of at least 0 and"),
    "rounds": (lambda: experiment.Profile(3), r"rounds is 3, .* as in rounds=range\(10, 13\)"),
    "folder": (lambda: experiment.Profile([3], 5), "folder is 5, expected a path"),
    "budget": (lambda: experiment.StopAtBudget(1.0), r"budget is 1.0, .*fax.aggregators.Budget"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make()
