"""Attacks on what private and masked aggregators promise, each of which fails."""

import collections
import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fax
from fax import aggregators, algorithms
from fax.aggregators import _noise, _secure_sum, chain, gaussian, releases

SGD = optax.sgd(0.1)
KEY = jax.random.key(3)
PARAMS = {"w": jnp.zeros((3, 3)), "b": jnp.zeros(2)}


def population(clients, examples=2):
    rng = np.random.default_rng(0)
    return fax.data.InMemory(
        {
            str(i): {"x": rng.normal(size=(examples, 2)), "domain": np.zeros(examples, int)}
            for i in range(clients)
        }
    )


def cohort(clients, **kwargs):
    with fax.data.cohorts(population(clients), clients, 1, **kwargs) as rounds:
        return next(rounds)


def loss(params, batch, key):
    return jnp.sum((batch["x"] - params["b"]) ** 2, 1) + (jnp.sum(params["w"]) - 1) ** 2


# Keys


class Keys:
    """What keys were used for, while a program ran, by what they hold."""

    DRAWS = ("normal", "uniform", "bits", "laplace", "randint")

    def __init__(self, monkeypatch):
        self.drawn, self.derived, self.of_losses = [], set(), set()
        for name in (*self.DRAWS, "fold_in", "split"):
            monkeypatch.setattr(jax.random, name, self._watched(getattr(jax.random, name), name))

    def _watched(self, fn, name):
        @functools.wraps(fn)
        def watched(key, *args, **kwargs):
            jax.debug.callback(functools.partial(self._note, name), words(key))
            if name not in self.DRAWS:
                return fn(key, *args, **kwargs)
            like = jax.eval_shape(lambda: fn(key, *args, **kwargs))
            return jnp.full(like.shape, 0.25, like.dtype)  # compiles quicker than what it is

        return watched

    def _note(self, name, key):
        key = tuple(key.tolist())
        if name in self.DRAWS:
            self.drawn.append((name, key))
        else:
            self.derived.add(key)

    def loss(self, params, batch, key):
        jax.debug.callback(lambda key: self.of_losses.add(tuple(key.tolist())), words(key))
        return loss(params, batch, key)

    def check(self):
        """That no key was drawn from twice, or for two uses; and forgets all of them."""
        jax.effects_barrier()
        assert self.drawn
        assert self.of_losses
        drawn = {key for _, key in self.drawn}
        assert len(drawn) == len(set(self.drawn))
        for (name, _), count in collections.Counter(self.drawn).items():
            # Who is in a pair of secure_sum has the same mask: one adds it, one subtracts it.
            assert count == (2 if name == "bits" else 1)
        # JAX's generators make of a key what they make of its children.
        assert not drawn & self.derived
        assert not drawn & self.of_losses
        assert not self.of_losses & self.derived
        for seen in (self.drawn, self.derived, self.of_losses):
            seen.clear()


def words(key):
    return jax.random.key_data(key)


def everything():
    """What draws for each client or for the server."""
    rotated = aggregators.hadamard(aggregators.uniform_quantization(4))
    return chain(rotated, aggregators.terngrad(), aggregators.drive(), aggregators.power_sgd(1))


def masked():
    return chain(aggregators.terngrad(), aggregators.terngrad(), aggregators.secure_sum(4.0, 9))


def adaptive():
    return gaussian(1.0, 1.0, quantile=0.5, count_noise=3.0)


def ftrl():
    return aggregators.dp_ftrl(1.0, 1.0, num_clients=3, separation=1, participations=9)


MODELS = jax.tree.map(lambda x: jnp.stack([x, x + 1]), PARAMS)
STREAM = dict(sampler="stream", max_steps=4, placement="replicas")
REPLICAS = dict(replicas=3)
# What makes the algorithm of a loss and an aggregator, the start, and the arguments of cohorts.
CASES = {
    "fedavg": (lambda loss, a: algorithms.fedavg(loss, SGD, aggregator=a), PARAMS, {}),
    "scaffold": (
        lambda loss, a: algorithms.scaffold(loss, 0.1, num_clients=3, aggregator=a),
        PARAMS,
        {},
    ),
    "mime": (lambda loss, a: algorithms.mime(loss, SGD, aggregator=a), PARAMS, {}),
    "agnostic_fedavg": (
        lambda loss, a: algorithms.agnostic_fedavg(
            loss, SGD, num_domains=1, domain_learning_rate=0.1, aggregator=a
        ),
        PARAMS,
        {},
    ),
    "apfl": (
        lambda loss, a: algorithms.apfl(loss, SGD, num_clients=3, aggregator=a),
        PARAMS,
        {},
    ),
    "hyp_cluster": (
        lambda loss, a: algorithms.hyp_cluster(loss, SGD, num_clusters=2, aggregator=a),
        MODELS,
        {},
    ),
    "diloco": (
        lambda loss, a: algorithms.diloco(loss, SGD, steps=2, aggregator=a, **REPLICAS),
        PARAMS,
        STREAM,
    ),
    "streaming_diloco": (
        lambda loss, a: algorithms.streaming_diloco(
            loss, SGD, steps=2, fragments=2, aggregator=a, **REPLICAS
        ),
        PARAMS,
        STREAM,
    ),
    "papa": (
        lambda loss, a: algorithms.papa(loss, SGD, steps=2, aggregator=a, **REPLICAS),
        PARAMS,
        STREAM,
    ),
    "papa_2": (
        lambda loss, a: algorithms.papa_2(loss, SGD, steps=2, **REPLICAS),
        PARAMS,
        STREAM,
    ),
}
RELEASES = {"fedavg": 1, "apfl": 1, "hyp_cluster": 1, "diloco": 2, "streaming_diloco": 4}


@pytest.mark.always("fedavg", "streaming_diloco")
@pytest.mark.parametrize("name", CASES)
def test_no_two_uses_of_randomness_share_a_key(name, monkeypatch):
    make, start, kwargs = CASES[name]
    many = cohort(3, **kwargs)
    runs = [(masked, many)] * (name != "papa_2") + [(adaptive, many)] * (name in RELEASES)
    one = cohort(1)  # whose key is the sum of all clients' keys
    if name == "fedavg":
        runs += [(ftrl, one), (everything, many)]
    if name == "apfl":
        runs += [(functools.partial(aggregators.laplace, 1.0, 1.0), one), (ftrl, many)]
    runs = runs or [(aggregators.mean, many)]
    keys = Keys(monkeypatch)
    for aggregator, own in runs:
        algorithm = make(keys.loss, aggregator())
        state, _ = jax.jit(algorithm.round)(algorithm.init(start), own)
        keys.check()
        if aggregator is adaptive:
            assert releases(state) == RELEASES[name]


def test_losses_that_weigh_clients_have_keys_of_their_own(monkeypatch):
    """q-FedAvg measures a loss before it trains; both draw, and independently of each other."""
    keys, many = Keys(monkeypatch), cohort(3)
    algorithm = algorithms.qfedavg(keys.loss, SGD, q=1.0, lipschitz=1.0)
    jax.block_until_ready(jax.jit(algorithm.round)(algorithm.init(PARAMS), many))
    jax.effects_barrier()
    assert len(keys.of_losses) == 2 * np.any(many.mask, axis=2).sum()


class Split:
    """Two models, and clients that all pick the first, or one each."""

    @staticmethod
    def start():
        return {"b": jnp.array([0.0, 9.0])}

    @staticmethod
    def loss(params, batch, key):
        return (batch["x"][:, 0] - params["b"]) ** 2

    @staticmethod
    def cohort(*values):
        data = {str(i): {"x": np.full((1, 1), value)} for i, value in enumerate(values)}
        with fax.data.cohorts(fax.data.InMemory(data), len(values), 1) as rounds:
            return next(rounds)


def test_noise_of_clusters_does_not_cancel_and_hides_who_has_nobody():
    private = gaussian(1.0, 100.0, key=KEY)
    algorithm = algorithms.hyp_cluster(Split.loss, SGD, num_clusters=2, aggregator=private)
    cohort = Split.cohort(1.0, 2.0, 2.5, 0.5)  # nobody picks the second model

    @jax.jit
    @jax.vmap
    def moves(words):
        state = algorithm.init(Split.start())
        noise = state.aggregator.noise._replace(key=words)
        state = state._replace(aggregator=state.aggregator._replace(noise=noise))
        after, metrics = algorithm.round(state, cohort)
        return after.params["b"] - state.params["b"], metrics["clients/cluster"]

    found, chosen = moves(jax.random.bits(KEY, (2000, 2), jnp.uint32))
    assert not chosen.any()
    # The clipped sum of at most 4, and noise of 100, by 4 clients: in both models, independent.
    np.testing.assert_allclose(found.std(0), 25, rtol=0.1)
    np.testing.assert_allclose(np.corrcoef(found.T)[0, 1], 0, atol=0.1)
    assert abs(found[:, 1].mean()) < 4 * 25 / 2000**0.5
    assert (found != 0).all()


def test_words_of_a_client_for_two_clusters_do_not_open_each_other(monkeypatch):
    seen = {}
    masked = _secure_sum.with_masks

    def watched(words, key, neighbors):
        sent = masked(words, key, neighbors)

        def note(plain, sent):
            seen[len(seen)] = np.asarray(plain), np.asarray(sent)

        jax.debug.callback(note, *fax.collect((words, sent)), ordered=False)
        return sent

    monkeypatch.setattr(_secure_sum, "with_masks", watched)
    secret = aggregators.secure_sum(max_value=4.0, max_weight=4)
    algorithm = algorithms.hyp_cluster(Split.loss, SGD, num_clusters=2, aggregator=secret)
    jax.block_until_ready(
        jax.jit(algorithm.round)(algorithm.init(Split.start()), Split.cohort(1.0, 2.0, 9.5))
    )
    jax.effects_barrier()
    (one, one_sent), (other, other_sent) = seen.values()
    assert (one != other).any(axis=1).all()  # every client has an update in one of them only
    assert ((one_sent - other_sent) != (one - other)).all()  # as uint32, mod 2^32


# Noise


def test_two_trainings_have_different_noise_unless_it_is_asked_for():
    secret = algorithms.fedavg(loss, SGD, aggregator=gaussian(1.0, 10.0))
    known = algorithms.fedavg(loss, SGD, aggregator=gaussian(1.0, 10.0, key=KEY))

    def trained(data, algorithm=secret):
        rounds = fax.data.cohorts(data, 3, 1)
        # What is asked for is in the state, so that the rounds are the same program.
        state, _ = algorithms.many_rounds(secret, algorithm.init(PARAMS), rounds, 2)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)])

    clients = {name: population(3).client(name) for name in population(3).client_ids()}
    other = fax.data.InMemory({**clients, "1": {**clients["1"], "x": clients["1"]["x"] + 5}})
    mine = fax.data.InMemory(clients)
    # What a client changes in two rounds, by 3 clients, is at most 2 / 3 each way; the noise is 5.
    difference = trained(mine) - trained(other)
    assert np.linalg.norm(difference) > 2 * 2 / 3
    # With a key in common nothing of it is left.
    one = trained(mine, known)
    assert np.linalg.norm(one - trained(other, known)) <= 2 * 2 / 3
    np.testing.assert_array_equal(one, trained(mine, known))


def all_normals():
    """The 2^23 numbers that float32 normals of JAX can be, in order."""
    bits = jnp.arange(2**23, dtype=jnp.uint32) | jnp.uint32(0x3F800000)
    unit = jax.lax.bitcast_convert_type(bits, jnp.float32) - 1
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(least, unit * (1 - least) + least)
    return np.asarray(jnp.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform))


@functools.cache
def laws(ratio):
    """The probabilities of all integers, mod 2^24, that `normal` and `laplace` draw, exactly."""
    z = np.asarray(jax.jit(_noise.normals_of)(np.arange(2**23, dtype=np.uint32) << 9))
    two_normals = jax.jit(_noise.two_normals, static_argnums=(1, 2))
    drawn = np.concatenate(two_normals(KEY, (500,), jnp.float32))
    assert (z[np.searchsorted(z, drawn)] == drawn).all()  # z is sorted
    assert (z == -z[::-1]).all()

    def law_of(parts):
        return np.bincount(np.asarray(parts, np.int32) & (2**24 - 1), minlength=2**24) / len(z)

    half = np.float32(ratio / 2)
    one = np.fft.rfft(law_of(np.round(z * half)))
    square = np.fft.rfft(law_of(np.round(z * z * np.float32(half / 4))))
    single = law_of(np.round(z * (2 * half)))
    two, difference = one * one, square.real**2 + square.imag**2
    return np.fft.irfft(two * two), np.fft.irfft(difference * difference), single


def phi(x):
    return math.erfc(-x / 2**0.5) / 2


def divergence(law, shift, eps):
    """The delta of two laws that are shifted against each other; the larger of both ways."""
    ways, moved = np.zeros(2), np.roll(law, shift)
    for p, q in zip(np.split(law, 512), np.split(moved, 512)):  # parts that fit into a cache
        ways += [(p - math.exp(eps) * q).clip(0).sum(), (q - math.exp(eps) * p).clip(0).sum()]
    return ways.max()


def test_the_law_of_the_noise_is_as_private_as_epsilon_says():
    """All that noise can be is counted, with how often, for neighbors that differ by a norm."""
    ratio = 1.37 * 2**20
    normal, laplace, single = laws(ratio)
    for z, eps in ((10.0, 0.1), (3.0, 3.0), (1.0, 1.0)):
        shift, mu = round(ratio / z), 1 / z
        exact = phi(mu / 2 - eps / mu) - math.exp(eps) * phi(-mu / 2 - eps / mu)
        assert abs(divergence(normal, shift, eps) - exact) < 1e-6
    # One float32 normal on the same grid: that is what there was.
    assert divergence(single, shift, eps) > exact + 0.05
    for z in (10.0, 1.0):
        assert divergence(laplace, round(ratio / 4 / z), 1 / z) < 1e-5


def test_draws_are_integers_of_this_law():
    ratio = jnp.float32(1.37 * 2**20)
    for law, of in zip((_noise.normal_integers, _noise.laplace_integers), laws(1.37 * 2**20)):
        found = np.asarray(
            law(KEY, (4000,), ratio if law is _noise.normal_integers else ratio / 4), float
        )
        assert (found == np.round(found)).all()
        assert np.abs(found).max() < 2**24
        # The share of draws below each of some quantiles, which is binomial.
        below = np.cumsum(np.roll(of, 2**23))
        for q in (0.01, 0.2, 0.5, 0.8, 0.99):
            at = np.searchsorted(below, q) - 2**23
            assert abs(np.mean(found <= at) - q) < 5 * (q * (1 - q) / 4000) ** 0.5


def test_the_bits_of_a_sum_do_not_tell_who_took_part():
    """Which of two neighboring sums can an output have come from? Mironov, CCS 2012."""
    trials, numbers, z = 40, 8, 10.0
    assert 0.34 < fax.aggregators.epsilon(z, 1, 1e-5) < 0.345
    rng = np.random.default_rng(0)
    others, own = (x / np.linalg.norm(x) for x in rng.normal(size=(2, numbers)).astype(np.float32))
    private = fax.aggregators.gaussian(1.0, z, expected_clients=1.0, key=KEY)

    @jax.jit
    @jax.vmap
    @fax.program(clients=2)
    def outputs(here, key):
        updates = jnp.asarray(np.stack([others, own]))
        weights = jnp.stack([1, here])
        return private.aggregate(updates, weights, private.init(own), key)[0]

    here = rng.integers(0, 2, trials)
    new = np.asarray(outputs(here, jax.random.split(KEY, trials)))
    sums = others, others + own
    normals = np.asarray(jax.random.normal(KEY, new.shape, jnp.float32))
    old = np.where(here[:, None], sums[1], sums[0]) + np.float32(z) * normals
    known, unit = all_normals(), 2.0 ** (math.floor(math.log2(z)) - 20)
    law = laws(1.37 * 2**20)[0]

    def possible_old(output, total):
        near = np.searchsorted(known, (output - total) / np.float32(z))[:, None]
        tried = known[np.clip(near + np.arange(-40, 41), 0, len(known) - 1)]
        return (total[:, None] + np.float32(z) * tried == output[:, None]).any(1).all()

    def possible_new(output, total):
        integers = (np.float64(output) - np.round(np.float64(total) / unit) * unit) / unit
        assert (integers == np.round(integers)).all()
        return (law[integers.astype(int)] > 1e-15).all()

    for output, possible, succeeds in ((old, possible_old, True), (new, possible_new, False)):
        can = np.array([[possible(y, total) for total in sums] for y in output])
        assert can[np.arange(trials), here].all()
        only = can.sum(1) == 1
        assert only.all() if succeeds else not only.any()


# What goes past the aggregator

PRIVATE = gaussian(1.0, 1.0, key=KEY)
REFUSED = {
    "scaffold": lambda a: algorithms.scaffold(loss, 0.1, num_clients=3, aggregator=a),
    "mime": lambda a: algorithms.mime(loss, SGD, aggregator=a),
    "mime_lite": lambda a: algorithms.mime_lite(loss, SGD, aggregator=a),
    "agnostic_fedavg": lambda a: algorithms.agnostic_fedavg(
        loss, SGD, num_domains=1, domain_learning_rate=0.1, aggregator=a
    ),
    "fednova": lambda a: algorithms.fednova(loss, SGD, aggregator=a),
    "feddyn": lambda a: algorithms.feddyn(loss, SGD, alpha=1.0, num_clients=3, aggregator=a),
    "qfedavg": lambda a: algorithms.qfedavg(loss, SGD, q=1, lipschitz=1.0, aggregator=a),
    "papa": lambda a: algorithms.papa(loss, SGD, aggregator=a, **REPLICAS),
    "papa_all": lambda a: algorithms.papa_all(loss, SGD, aggregator=a, **REPLICAS),
}
# All of what these send is an update, but for the state of a model.
TAKEN = {
    "fedavg": lambda a, loss=loss: algorithms.fedavg(loss, SGD, aggregator=a),
    "fedopt": lambda a, loss=loss: algorithms.fedopt(loss, SGD, SGD, aggregator=a),
    "fedprox": lambda a, loss=loss: algorithms.fedprox(loss, SGD, mu=0.1, aggregator=a),
    "reptile": lambda a, loss=loss: algorithms.reptile(loss, SGD, SGD, aggregator=a),
    "maml": lambda a, loss=loss: algorithms.maml(loss, SGD, SGD, aggregator=a),
    "apfl": lambda a, loss=loss: algorithms.apfl(loss, SGD, num_clients=3, aggregator=a),
    "ditto": lambda a, loss=loss: algorithms.ditto(loss, SGD, mu=1, num_clients=3, aggregator=a),
    "fedper": lambda a, loss=loss: algorithms.fedper(
        loss, SGD, personal="b", num_clients=3, aggregator=a
    ),
    "fedbn": lambda a, loss=loss: algorithms.fedbn(
        loss, SGD, layers="b", num_clients=3, aggregator=a
    ),
    "hyp_cluster": lambda a, loss=loss: algorithms.hyp_cluster(
        loss, SGD, num_clusters=2, aggregator=a
    ),
    "local_sgd": lambda a, loss=loss: algorithms.local_sgd(loss, SGD, aggregator=a, **REPLICAS),
    "diloco": lambda a, loss=loss: algorithms.diloco(loss, SGD, aggregator=a, **REPLICAS),
    "streaming_diloco": lambda a, loss=loss: algorithms.streaming_diloco(
        loss, SGD, steps=2, fragments=1, aggregator=a, **REPLICAS
    ),
}


def stateful(params, model_state, batch, key):
    return loss(params, batch, key), {}, model_state


def test_no_algorithm_sends_more_than_a_private_aggregator_sees():
    with_aggregators = {
        name
        for name, make in vars(algorithms).items()
        if inspect.isfunction(make) and "aggregator" in inspect.signature(make).parameters
    }
    made_by_it = {"federated"}  # all of them
    assert with_aggregators - made_by_it == REFUSED.keys() | TAKEN.keys()
    for make in REFUSED.values():
        make(aggregators.mean())
        for private in (PRIVATE, chain(aggregators.clip_by_norm(1.0), ftrl())):
            with pytest.raises(ValueError, match=r"aggregator is private, but .* without it, so"):
                make(private)
    for name, make in TAKEN.items():
        start = MODELS if name == "hyp_cluster" else PARAMS
        state, count = {"mean": jnp.zeros(2)}, {"count": jnp.zeros(2, jnp.int32)}
        make(aggregators.mean(), stateful).init(start, state)
        make(PRIVATE, stateful).init(start, count)  # it stays what it is
        with pytest.raises(ValueError, match=r"private, but model_state\['mean'\] is averaged"):
            make(PRIVATE, stateful).init(start, state)


def test_no_transformation_before_noise_has_a_state_of_all():
    algorithm = TAKEN["fedavg"](chain(aggregators.adaptive_clip(), PRIVATE))
    with pytest.raises(ValueError, match="part 0 has a state that all clients share"):
        algorithm.init(PARAMS)
    own = aggregators.error_feedback(aggregators.top_k(1), num_clients=3)
    TAKEN["fedavg"](chain(own, PRIVATE)).init(PARAMS)


def test_there_is_noise_where_nobody_takes_part():
    algorithm = algorithms.diloco(loss, SGD, SGD, steps=2, aggregator=PRIVATE, **REPLICAS)
    own = cohort(3, **STREAM)
    nobody = dataclasses.replace(own, num_examples=jnp.zeros_like(own.num_examples))
    after, metrics = jax.jit(algorithm.round)(algorithm.init(PARAMS), nobody)
    assert (after.params["b"] != 0).all()
    assert metrics["outer_steps"] == releases(after) == 2
