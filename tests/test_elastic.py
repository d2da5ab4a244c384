"""Learners that come and go: the server and the learners without processes, event by event."""

import dataclasses
import random
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flower_learners_app.learning.learner import cohorts, own_part
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fax
from fax import deploy
from fax.deploy import Grace, Send, _connected, _merges
from fax.deploy import _client as runtime

H = 6


class Room:
    """A server and learners, to which every message is passed at once, as bytes."""

    def __init__(self, server, learners):
        self.server, self.learners = server, learners
        self.merges, self.windows, self.sent = [], [], []
        for name in learners:
            self.join(name)

    def join(self, name):
        self.learners[name].prepare(passed(self.server.settings))
        self.carry_out(self.server.joined(name))

    def carry_out(self, actions):
        for action in actions:
            if isinstance(action, Send):
                for name in action.to:
                    self.learners[name].receive(passed(action.message))
            elif isinstance(action, Grace):
                self.windows.append(action.number)
            else:
                self.merges.append(action)

    def advance(self, name):
        if not self.learners[name].waiting:
            for update in self.learners[name].advance():
                self.sent.append((name, update))
                self.carry_out(self.server.received(name, passed(update)))


def passed(message):
    return runtime.decode(runtime.encode(message))


# Together they are as one program

X = np.random.default_rng(0).normal(size=(2, 48, 4))
Y = np.random.default_rng(1).normal(size=(2, 48, 2))


def loss(params, batch, key):
    hidden, mesh = jnp.tanh(batch["x"] @ params["in"]), jax.sharding.get_abstract_mesh()
    if mesh.auto_axes:
        hidden = jax.lax.with_sharding_constraint(hidden, P("data", "model"))
    own = P() if mesh.explicit_axes else None
    found = jnp.matmul(hidden, params["out"], out_sharding=own)
    return jnp.sum((found + params["bias"] - batch["y"]) ** 2, axis=1)


def start():
    rng = np.random.default_rng(2)
    return {"bias": np.zeros(2), "in": rng.normal(size=(4, 4)), "out": rng.normal(size=(4, 2))}


SHARDING = {"bias": P(), "in": P(None, "model"), "out": P("model")}
INNER = optax.adamw(optax.linear_schedule(0.05, 0.01, 20))


def data(step):
    return cohorts([{"x": x, "y": y} for x, y in zip(X, Y, strict=True)], 4, H, step)


@pytest.mark.parametrize(
    ("fragments", "tau", "alpha", "kind"),
    [
        # DiLoCo is Streaming DiLoCo with one fragment, which is not in flight.
        pytest.param(1, 0, 0.0, AxisType.Auto, marks=pytest.mark.long),
        ([["bias", ("in", 0, [0, 2])], ["out", ("in", 0, [1, 3])]], 2, 0.25, AxisType.Explicit),
        # All are in flight at once.
        pytest.param([["out"], ["bias"], ["in"]], 3, 0.5, AxisType.Auto, marks=pytest.mark.long),
    ],
)
def test_in_step_they_are_diloco_and_streaming_diloco(fragments, tau, alpha, kind):
    """On learners with 1 and 3 tokens in an example, of which each has a mesh of 1 x 2 devices."""
    outer = optax.sgd(0.5, momentum=0.9, nesterov=True)
    common = dict(replicas=2, steps=H, weighted=True)
    if fragments == 1:
        algorithm = fax.algorithms.diloco(loss, INNER, outer, **common)
    else:
        algorithm = fax.algorithms.streaming_diloco(
            loss,
            INNER,
            outer,
            fragments=fragments,
            tau=tau,
            alpha=alpha,
            aggregator=fax.aggregators.mean(),
            **common,
        )
    state, step, expected = algorithm.init(start()), jax.jit(algorithm.round), []
    for _, cohort in zip(range(3), data(0)):
        cohort = dataclasses.replace(cohort, num_examples=np.array([1, 3], np.int32))
        state, metrics = step(state, cohort)
        expected.append(jax.tree.map(np.asarray, algorithm.params(state)))

    devices = jax.devices()[:2]
    with jax.set_mesh(jax.make_mesh((1, 2), ("data", "model"), (kind,) * 2, devices=devices)):
        learners = {
            i: deploy.Learner(
                loss, INNER, own_part(i, data), start(), sharding=SHARDING, tokens=1 + 2 * i
            )
            for i in range(2)
        }
        server = deploy.Elastic(
            start(), outer, steps=H, fragments=fragments, tau=tau, alpha=alpha, quorum=2
        )
        room = Room(server, learners)
        for params in expected:
            for _ in range(H):
                for i in learners:
                    room.advance(i)
            for name, x in params.items():
                np.testing.assert_allclose(server.params[name], x, rtol=1e-9, atol=1e-12)
        rows = learners[0]._rows
    for tree in (rows.params, *rows.optimizer[0][1:]):
        for name, x in tree.items():
            spec = P(None, *SHARDING[name])
            assert x.sharding.is_equivalent_to(jax.NamedSharding(x.sharding.mesh, spec), x.ndim)
    compiled = learners[0]._computations
    learners[0].prepare(passed(server.settings))  # as when it joins again
    assert learners[0].waiting
    assert learners[0]._computations is compiled
    assert not room.windows
    assert all(not merge.late and len(merge.tokens) == 2 for merge in room.merges)
    if fragments == 1:
        assert [merge.tokens for merge in room.merges] == [{0: 4 * H, 1: 12 * H}] * 3
        np.testing.assert_allclose(  # all examples count alike
            room.merges[-1].loss, metrics["loss"], rtol=1e-9
        )


@given(st.integers(1, 20), st.integers(1, 8), st.data())
def test_fragments_are_sent_when_the_offsets_of_streaming_diloco_say_so(steps, fragments, draw):
    tau = draw.draw(st.integers(0, steps - 1))
    gap = -(-steps // fragments)

    def offset(p):
        if tau <= gap:
            return p * steps // fragments + gap - tau
        return 1 + p * (steps - tau - 1) // (fragments - 1)

    expected = [
        (t, p)
        for t in range(1, 3 * steps + 1)
        for p in range(fragments)
        if (t - offset(p)) % steps == 0
    ]
    assert len(expected) == 3 * fragments
    sequence = _merges.Sequence(steps, fragments, tau)
    found = [(sequence.step(n), sequence.fragment(n)) for n in range(3 * fragments)]
    assert found == expected
    gaps = [sequence.gap(n) for n in range(3 * fragments)]
    np.testing.assert_array_equal(np.cumsum(gaps), [t for t, _ in expected])


def test_the_longest_delay_of_the_papers_offsets_against_numpy():
    """With τ = ceil(H / P), nothing is sent before the first step, and one merge is in flight."""
    steps, tau, alpha, rate, momentum = 4, 2, 0.25, 0.1, 0.9
    targets, names = np.array([[1.0, -2.0], [3.0, 5.0]]), ["a", "b"]
    offsets = {"a": 0, "b": 2}  # floor(p H / P)

    def quadratic(params, batch, key):
        x = jnp.stack([params["a"], params["b"]])
        return jnp.sum((x - batch["x"]) ** 2, axis=1) / 2

    def learner_of(i):
        rows = fax.data.InMemory({"own": {"x": np.tile(targets[i], (8, 1))}})

        def data(step):
            return fax.data.cohorts(rows, 1, 2, sampler="stream", max_steps=steps)

        return deploy.Learner(quadratic, optax.sgd(rate), data, start)

    start = {name: np.zeros(()) for name in names}
    outer = optax.sgd(0.5, momentum)
    options = dict(steps=steps, fragments=[["a"], ["b"]], tau=tau, alpha=alpha, quorum=2)
    server = deploy.Elastic(start, outer, **options)
    room = Room(server, {i: learner_of(i) for i in range(2)})

    own = np.zeros((2, 2))  # by learner and fragment
    theta, velocity, landing = np.zeros(2), np.zeros(2), {}
    for t in range(1, 3 * steps + 1):
        own -= rate * (own - targets)
        for p, name in enumerate(names):
            if (t - offsets[name]) % steps == 0:
                velocity[p] = momentum * velocity[p] + theta[p] - own[:, p].mean()
                theta[p] -= 0.5 * velocity[p]
                landing[t + tau] = p, theta[p]
        if t in landing:
            p, new = landing[t]
            own[:, p] = alpha * own[:, p] + (1 - alpha) * new
        for i in range(2):
            room.advance(i)
        found = [server.params[name] for name in names]
        np.testing.assert_allclose(found, theta, rtol=1e-12)
    assert [merge.fragment for merge in room.merges] == [1, 0, 1, 0, 1, 0]


# What the server does, event by event


def update(number, value, tokens=1, **others):
    return {"number": number, "values": [np.full(2, value)], "tokens": tokens, **others}


def sends(actions, do):
    """Who gets a message of this kind, and the number in it."""
    return [
        (set(a.to), a.message.get("number"))
        for a in actions
        if isinstance(a, Send) and a.message["do"] == do
    ]


def merge_of(actions):
    (merge,) = [a for a in actions if isinstance(a, deploy.Merge)]
    return merge


def test_quorum_grace_late_updates_and_learners_that_leave():
    """One learner after another misses a merge; the means are those of a transcription."""
    rate, momentum = 0.5, 0.9
    outer = optax.sgd(rate, momentum, nesterov=True)
    server = deploy.Elastic(np.zeros(2), outer, steps=10, quorum=2)
    theta, velocity = 0.0, 0.0

    def expect(*updates):
        nonlocal theta, velocity
        gradient = -sum(c * u for u, c in updates) / sum(c for _, c in updates)
        velocity = momentum * velocity + gradient
        theta -= rate * (gradient + momentum * velocity)
        np.testing.assert_allclose(server.params, [theta, theta], rtol=1e-12)

    (welcome,) = server.joined("ann")
    assert welcome.message["next"] == welcome.message["step"] == 0
    for name in "bob", "cleo", "dora":
        server.joined(name)

    # A quorum calls the others, and the merge waits for them.
    assert server.received("ann", update(0, 1.0, 100)) == []
    actions = server.received("bob", update(0, 2.0, 50, loss=(30.0, 10.0)))
    assert sends(actions, "call") == [({"cleo", "dora"}, 0)]
    assert Grace(0) in actions
    assert server.received("cleo", update(0, 4.0, 10, loss=(10.0, 10.0))) == []
    actions = server.received("dora", update(0, 8.0, 1, steps=7, seconds=0.5))
    expect((1.0, 100), (2.0, 50), (4.0, 10), (8.0, 1))
    assert sends(actions, "land") == [({"ann", "bob", "cleo", "dora"}, 0)]
    merge = merge_of(actions)
    assert merge == (0, 0, {"ann": 100, "bob": 50, "cleo": 10, "dora": 1}, set(), 7, 0.5, 2.0)
    assert server.grace_over(0) == []  # it was not needed

    # Two do not answer, and are not waited for.
    for name in "ann", "bob":
        server.received(name, update(1, 1.0))
    actions = server.grace_over(1)
    expect((1.0, 1), (1.0, 1))
    assert sends(actions, "land") == [({"ann", "bob"}, 1)]
    assert server.grace_over(1) == []

    # Cleo is late: the update counts in the next merge, and she continues at once. Dora dies.
    actions = server.received("cleo", update(1, 16.0, 3))
    assert sends(actions, "land") == [({"cleo"}, 1)]
    assert actions[0].message["next"] == 2
    np.testing.assert_array_equal(actions[0].message["values"][0], server.params)
    assert server.left("dora") == []
    server.received("ann", update(2, 1.0))
    actions = server.received("bob", update(2, 1.0))
    assert sends(actions, "call") == [({"cleo"}, 2)]  # she sends another one
    # Whoever joins now gets all, and the call.
    actions = server.joined("dora again")
    assert sends(actions, "welcome") == [({"dora again"}, None)]
    assert sends(actions, "call") == [({"dora again"}, 2)]
    assert actions[0].message["next"] == 2
    assert actions[0].message["step"] == 20
    np.testing.assert_array_equal(actions[0].message["values"][0][0], server.params)
    server.received("cleo", update(2, 2.0, 4))
    merge = merge_of(server.received("dora again", update(2, 0.0)))
    assert merge.late == {"cleo"}
    assert merge.tokens["cleo"] == 7
    expect((1.0, 1), (1.0, 1), (16.0, 3), (2.0, 4), (0.0, 1))

    # Messages that are sent twice change nothing.
    server.received("ann", update(3, 1.0))
    assert server.received("ann", update(3, 100.0)) == []
    actions = server.received("bob", update(2, 100.0))
    assert sends(actions, "land") == [({"bob"}, 2)]
    server.left("cleo"), server.left("cleo"), server.left("dora again")
    assert server.received("cleo", update(3, 100.0)) == []

    # What a learner had sent counts, even if it is gone. Nobody is left to wait for.
    server.left("ann")
    actions = server.received("bob", update(3, 3.0))
    assert sends(actions, "land") == [({"bob"}, 3)]
    assert merge_of(actions).tokens == {"ann": 1, "bob": 1}
    expect((1.0, 1), (3.0, 1))

    # With fewer learners than the quorum, nothing is merged.
    assert server.received("bob", update(4, 3.0)) == []
    assert server.grace_over(4) == []
    server.joined("eve")
    merge_of(server.received("eve", update(4, 1.0)))
    expect((3.0, 1), (1.0, 1))

    # An update that missed two merges is discarded, and the learner starts again.
    server.joined("fay")
    for number in 5, 6, 7:
        for name in "bob", "eve":
            server.received(name, update(number, 1.0))
        server.grace_over(number)
        expect((1.0, 1), (1.0, 1))
    actions = server.received("fay", update(5, 100.0))
    assert sends(actions, "welcome") == [({"fay"}, None)]
    assert server.discarded == 1
    assert server.learners == {"bob", "eve", "fay"}


def test_a_learner_that_joins_again_under_its_name():
    """What it sent before counts, and what it sends then."""
    server = deploy.Elastic(np.zeros(2), optax.sgd(1.0), steps=10, quorum=2)
    server.joined("ann"), server.joined("bob")
    server.received("ann", update(0, 1.0, 2))
    server.left("ann"), server.joined("ann")
    server.received("ann", update(0, 4.0, 3))
    merge = merge_of(server.received("bob", update(0, 1.0)))
    assert merge.tokens == {"ann": 5, "bob": 1}
    np.testing.assert_allclose(server.params, (2 * 1.0 + 3 * 4.0 + 1.0) / 6, rtol=1e-12)


def test_a_merge_without_tokens_changes_nothing():
    """Not even by momentum, as in `fax.algorithms.diloco`."""
    server = deploy.Elastic(np.zeros(2), steps=10)
    server.joined("ann")
    server.received("ann", update(0, 1.0))
    before = jax.tree.map(np.asarray, server.state)
    assert np.all(before.params != 0)
    merge = merge_of(server.received("ann", update(1, 1.0, tokens=0)))
    assert merge.tokens == {"ann": 0}
    jax.tree.map(np.testing.assert_array_equal, server.state, before._replace(merges=2))


class Anybody:
    """What learners know of a server, and what its merges say."""

    def __init__(self):
        self.window, self.counted, self.merges = None, 0, []
        self.next, self.answered = {}, {}  # of each learner

    def take(self, actions):
        for action in actions:
            if isinstance(action, Grace):
                self.window = action.number
            elif isinstance(action, deploy.Merge):
                self.counted += sum(action.tokens.values())
                self.merges.append(action.fragment)
            else:
                for name in action.to:
                    self.receive(name, action.message)

    def receive(self, name, message):
        number = message.get("next", message.get("number"))
        if message["do"] == "welcome":
            self.next[name], self.answered[name] = number, number - 1
        else:
            self.next[name] = max(self.next[name], number)
            if message["do"] == "land":
                self.answered[name] = max(self.answered[name], message["number"])


@pytest.mark.parametrize("quorum", [1, 2, 3])
@pytest.mark.parametrize("fragments", [1, 3])
def test_every_update_counts_once_or_is_discarded(fragments, quorum):
    """Events at random, and updates that are unit vectors: the parameters say what has counted."""
    rng, size = random.Random(10 * fragments + quorum), 400
    params = {f"f{p}": np.zeros(size) for p in range(fragments)}
    server = deploy.Elastic(
        params,
        optax.sgd(1.0),
        steps=6,
        fragments=[[name] for name in params],
        tau=2,
        quorum=quorum,
    )
    others, accepted = Anybody(), 0
    for event in range(size):
        kind = rng.random()
        name = rng.choice([*others.next, None])
        if kind < 0.1 or name is None:
            others.take(server.joined(event))
        elif kind < 0.15:
            del others.next[name]
            others.take(server.left(name))
        elif kind < 0.25 and others.window is not None:
            others.take(server.grace_over(others.window))
        elif others.next[name] - others.answered[name] <= fragments:  # it does not wait
            number, before = others.next[name], server.discarded
            others.next[name] += 1
            message = {"number": number, "values": [np.eye(1, size, event)[0]], "tokens": 1}
            others.take(server.received(name, message))
            accepted += server.discarded == before
            if rng.random() < 0.2:
                others.take(server.received(name, message))
    waiting = sum(len(own) for own in server._updates.values())
    assert others.counted + waiting == accepted
    assert server.discarded > 0 or quorum == 3
    assert server.state.merges == len(others.merges) > 10
    for p, x in enumerate(server.params.values()):  # each merge adds 1, in equal parts
        assert np.all((x >= 0) & (x <= 1))
        np.testing.assert_allclose(np.sum(x), others.merges.count(p), rtol=1e-9)
    assert sum(np.sum(x > 0) for x in server.params.values()) == others.counted


def test_a_server_continues_from_its_state():
    def train(server, numbers):
        server.joined("ann")
        for number in numbers:
            server.received("ann", update(number, 1.0 + number))
        return server

    def new():
        return deploy.Elastic(np.zeros(2), steps=2)

    whole, first, second = train(new(), range(4)), train(new(), range(2)), new()
    second.state = jax.tree.map(np.asarray, first.state)
    np.testing.assert_array_equal(train(second, range(2, 4)).params, whole.params)
    assert second.state.merges == 4
    # What learners sent that have left since was for other parameters.
    third = deploy.Elastic(np.zeros(2), steps=2, quorum=2)
    train(third, range(1))
    third.left("ann")
    third.state = new().state
    third.joined("bob")
    assert third.received("bob", update(0, 1.0)) == []
    with pytest.raises(ValueError, match="state is not that of a server with the same parameters"):
        second.state = first.state
    with pytest.raises(ValueError, match="state is not that of a server with the same parameters"):
        new().state = deploy.Elastic(np.zeros(3), steps=2).state


# Learners at their own pace


def test_learners_at_their_own_pace_against_numpy():
    """SGD on quadratics. Bob takes a step for two of ann's, and is started again in the midst.

    The outer parameters, bob's learning rate and his data continue where all learners are.
    """
    targets = {"ann": np.array([1.0, -2.0]), "bob": np.array([3.0, 5.0])}
    asked = []

    def schedule(count):
        return 0.2 - 0.015 * jnp.minimum(count, 12).astype(float)

    def quadratic(params, batch, key):
        return jnp.sum((params["w"] - batch["x"]) ** 2, axis=1) / 2

    def of(name, batch_size):
        rows = {name: {"x": np.tile(targets[name], (24, 1))}}

        def data(step):
            asked.append((name, step))
            rounds = fax.data.cohorts(
                fax.data.InMemory(rows), 1, batch_size, seed=0, sampler="stream", max_steps=1
            )
            return (next(rounds) for _ in range(5))  # then it is made again

        return data

    learners = {
        name: deploy.Learner(
            quadratic, optax.sgd(schedule), of(name, size), {"w": np.zeros(2)}, tokens=2
        )
        for name, size in [("ann", 4), ("bob", 12)]
    }
    server = deploy.Elastic({"w": np.zeros(2)}, optax.sgd(1.0), steps=4)
    room = Room(server, learners)
    theta, own = np.zeros(2), {name: np.zeros(2) for name in learners}
    taken = dict.fromkeys(learners, 0)
    tokens = {"ann": 0, "bob": 0}

    def step(name):
        rate = 0.2 - 0.015 * min(taken[name], 12)
        taken[name] += 1
        own[name] = own[name] - rate * (own[name] - targets[name])
        tokens[name] += {"ann": 8, "bob": 24}[name]
        room.advance(name)

    for number in range(3):
        for turn in range(4):
            step("ann")
            if turn % 2:
                step("bob")
        # Ann has sent hers after four steps, and called bob, who sends his after his second.
        assert room.windows == [*range(number + 1)]
        assert room.merges[-1].tokens == tokens == {"ann": 32, "bob": 48}
        assert room.merges[-1].steps == 4 + 2
        theta = sum(c * own[name] for name, c in tokens.items()) / 80
        own, tokens = dict.fromkeys(own, theta), dict.fromkeys(tokens, 0)
        np.testing.assert_allclose(server.params["w"], theta, rtol=1e-12)
        if number == 1:
            room.carry_out(server.left("bob"))
            room.carry_out(server.joined("bob"))
            taken["bob"] = 8

    # Bob misses a merge. His update counts in the next one, with what he does until then.
    for _ in range(4):
        step("ann")
    room.carry_out(server.grace_over(3))
    assert room.merges[-1].tokens == {"ann": 32}
    before, theta = theta, own["ann"]
    np.testing.assert_allclose(server.params["w"], theta, rtol=1e-12)
    step("bob")
    late, own["bob"] = own["bob"] - before, theta
    for _ in range(4):
        step("ann")
    step("bob")
    assert room.merges[-1].tokens == {"ann": 32, "bob": 24 + 24}
    assert room.merges[-1].late == {"bob"}
    change = 32 * (own["ann"] - theta) + 24 * (own["bob"] - theta) + 24 * late
    np.testing.assert_allclose(server.params["w"], theta + change / 80, rtol=1e-12)

    assert ("ann", 5) in asked  # after the five cohorts of the first iterator
    assert ("bob", 8) in asked


class Scripted(_connected.ConnectedLearners):
    """Learners for which a script says what happens, and after how many seconds."""

    def __init__(self, clock, script, **options):
        super().__init__(**options)
        self.clock, self.script, self.sent = clock, iter(script), []

    def stop(self):
        pass

    def _next_event(self, wait):
        seconds, event = next(self.script)
        self.clock[0] += seconds
        return event

    def _send(self, messages):
        self.sent += [(names, message["do"]) for names, message in messages]

    def _reachable(self):
        return []

    def _statuses(self):
        return ""


def test_a_caller_who_is_slow_between_two_merges(monkeypatch):
    """By then everything has been sent, and after that, learners have time to answer."""
    clock = [0.0]
    monkeypatch.setattr(_connected, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    ann, bob = _connected.Name(1, 0), _connected.Name(2, 0)
    joins = [_connected.Received(name, {"do": "join"}) for name in (ann, bob)]

    def updates(number):
        return _connected.Received(ann, {"do": "update", "with": update(number, 1.0)})

    script = [
        *((0, _connected.Connected(ann)), (0, joins[0]), (0, updates(0))),
        # A window opens, and ends without bob.
        *((1, None), (0, joins[1]), (0, updates(1)), (9, None), (1, None)),
        *((1, None), (0, updates(2))),
        *((99, None), (2, None)),
    ]
    learners = Scripted(clock, script, grace=10.0, timeout=100.0)
    merges = learners.train(deploy.Elastic(np.zeros(2), steps=1))
    expected = [
        [((), "settings"), ((ann,), "settings"), ((ann,), "welcome"), ((ann,), "land")],
        [((bob,), "welcome"), ((bob,), "call"), ((ann,), "land")],
        [((ann,), "land")],
    ]
    for number, sent in enumerate(expected):
        assert next(merges).number == number
        assert learners.sent == sent
        learners.sent.clear()
        clock[0] += 1000.0
    with pytest.raises(deploy.ClientError, match="No learner sent anything for 100 seconds"):
        next(merges)
    assert next(learners.script, None) is None


def test_mistakes_are_explained():
    ann = deploy.Learner(lambda p, b, k: b["x"], optax.sgd(1.0), iter, {"w": np.zeros(2)})
    for params, message in [
        ({"w": np.zeros(3)}, "float64[2] for 'w' in a fragment where the server has float64[3]"),
        ({"v": np.zeros(2)}, "only the server has params with a leaf 'v'"),
    ]:
        settings = passed(deploy.Elastic(params, steps=2).settings)
        with pytest.raises(ValueError, match=re.escape(message)):
            ann.prepare(settings)
    server = deploy.Elastic({"w": np.zeros(2)}, steps=2)
    server.joined("ann")
    for wrong, message in [
        (dict(number=5), "Learner 'ann' sent an update for merge 5, but 0 is the next one"),
        (dict(number=-1), "an update for merge -1"),
        (dict(number=None), "Learner 'ann' sent an update for merge None"),
        (dict(values=3), "Learner 'ann' sent what is not an update: TypeError"),
        (dict(loss=["a"]), "Learner 'ann' sent what is not an update: ValueError"),
        (dict(steps=float("inf")), "Learner 'ann' sent what is not an update: OverflowError"),
        (dict(values=[]), "sent an update of no leaves, expected w: float64[2]"),
        (dict(values=[np.zeros(3)]), "sent an update of w: float64[3], expected w: float64[2]"),
        (dict(values=[np.zeros(2)] * 2), "sent an update of 2 leaves, expected w: float64[2]"),
        (dict(tokens=-1), "tokens is -1, expected an int of at least 0"),
    ]:
        with pytest.raises(deploy.ClientError, match=re.escape(message)):
            server.received("ann", {**update(0, 1.0), **wrong})
    for wrong, message in [
        (dict(steps=0), "fax.deploy.Elastic: steps is 0, expected an int of at least 1"),
        (dict(tau=2), "tau is 2, expected an int from 0 to 1, below steps=2"),
        (dict(alpha=1.5), "alpha is 1.5, expected a number from 0 to 1"),
        (dict(quorum=0), "quorum is 0, expected an int of at least 1"),
        (dict(fragments=2), "fragments"),
        (dict(params={"w": np.zeros(2, int)}), "params['w'] is int64[2]"),
        (dict(params={"w": np.zeros(2, complex)}), "an array of real floats"),
    ]:
        options = {"params": {"w": np.zeros(2)}, "steps": 2} | wrong
        with pytest.raises(ValueError, match=re.escape(message)):
            deploy.Elastic(**options)
