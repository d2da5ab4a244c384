"""Streaming DiLoCo against the paper in NumPy: fragments, delays, mixing, and four bits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import problems
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec, reshard
from jax.test_util import check_grads
from problems import SIZES, AdamW, Logistic, Nesterov, combine, numpy_batches

import fax
from fax.algorithms import diloco, layer_fragments, streaming_diloco
from fax.algorithms._fragments import cut, paste, pick
from fax.algorithms._in_flight import receive, send
from fax.algorithms._streaming_diloco import events_of

REPLICAS = len(SIZES)
INNER = 0.05
MEAN = fax.aggregators.mean()


def loss(params, batch, key):
    return Logistic.loss(params, batch, key)[0]


@pytest.fixture(scope="module")
def data():
    return problems.data()


def cohorts(data, steps, count=1, start=0):
    rounds = fax.data.cohorts(
        data,
        REPLICAS,
        2,
        sampler="stream",
        max_steps=steps,
        placement="replicas",
        start=start,
    )
    return [cohort for _, cohort in zip(range(count), rounds)]


def run(algorithm, rounds, state=None):
    state = algorithm.init(Logistic.start()) if state is None else state
    step = jax.jit(algorithm.round)
    for cohort in rounds:
        state, metrics = step(state, cohort)
    return state, metrics


# The paper, in NumPy


def numpy_e3m0(x):
    """The nearest of ±s {0, 2^-6, ..., 1}, by looking at all of them."""
    fraction, exponent = np.frexp(np.abs(x).max())  # the scale has float32's precision
    scale = np.ldexp(x.dtype.type(np.float32(fraction)), exponent)
    levels = np.array([0, *2.0 ** np.arange(-6, 1)]) * scale
    distance = np.abs(np.abs(x)[..., None] - levels)
    nearest = levels.size - 1 - distance[..., ::-1].argmin(-1)  # of two, the larger
    return np.sign(x) * levels[nearest]


def numpy_streaming(rounds, fragments, ends, steps, tau, alpha, sent=lambda x: x, heard=None):
    """Algorithm 2 of arXiv:2501.18512, from landings back to what was sent ``tau`` steps before.

    ``ends`` are the steps of a period after which fragments land; ``heard[period, i]`` is who is
    reached. Returns the outer parameters and the replicas' own.
    """
    theta, k = Logistic.start(), REPLICAS
    thetas, inner = [dict(theta) for _ in range(k)], [AdamW(INNER) for _ in range(k)]
    outer = [Nesterov(0.4, 0.9) for _ in fragments]
    after = [(theta, [dict(own) for own in thetas])]  # each step, before anything lands

    def here(period):
        return [i for i in range(k) if heard is None or heard[period, i]]

    def delta(names, at, period):
        theta, thetas = after[at]
        return {n: np.mean([sent(theta[n] - thetas[i][n]) for i in here(period)], 0) for n in names}

    for batch in [b for c in rounds for b in zip(*numpy_batches(c))]:
        for i in range(k):
            _, gradient = Logistic.losses_and_gradient(thetas[i], *batch[i])
            thetas[i] = inner[i](thetas[i], gradient)
        after.append((theta, [dict(own) for own in thetas]))
        t = len(after) - 1
        period = (t - 1) // steps
        for p, (names, end) in enumerate(zip(fragments, ends)):
            if (t - end) % steps or t < tau:
                continue
            update = delta(names, t - tau, period)
            new = outer[p]({name: theta[name] for name in names}, update)
            theta = {**theta, **new}
            for i in here(period):
                mixed = {n: alpha * thetas[i][n] + (1 - alpha) * new[n] for n in names}
                thetas[i] = {**thetas[i], **mixed}
    return theta, combine(lambda *x: np.stack(x), *thetas)


@pytest.mark.always(
    *("fragments2-ends2-3-2-0.8-True", "fragments3-ends3-4-3-0.6-False"),
    "fragments4-ends4-1-0-0.3-False",
)
@pytest.mark.parametrize(
    ("fragments", "ends", "steps", "tau", "alpha", "rounded"),
    [
        ([["w", "b"]], [3], 3, 0, 0.0, False),
        ([["w"], ["b"]], [2, 3], 3, 1, 0.5, False),  # 3 is no multiple of 2 fragments
        ([["b"], ["w"]], [2, 3], 3, 2, 0.8, True),  # the first is sent before the first step
        ([["w"], ["b"]], [4, 4], 4, 3, 0.6, False),  # both are in flight at once
        ([["w"], ["b"]], [1, 1], 1, 0, 0.3, False),  # both at once
    ],
)
def test_rounds_are_those_of_the_paper(data, fragments, ends, steps, tau, alpha, rounded):
    rounds = cohorts(data, 2 * steps, 3)
    algorithm = streaming_diloco(
        loss,
        optax.adamw(INNER),
        replicas=REPLICAS,
        steps=steps,
        fragments=fragments,
        tau=tau,
        alpha=alpha,
        aggregator=None if rounded else MEAN,
    )
    state, metrics = run(algorithm, rounds)
    sent = numpy_e3m0 if rounded else (lambda x: x)
    theta, thetas = numpy_streaming(rounds, fragments, ends, steps, tau, alpha, sent)
    problems.assert_trees_close(algorithm.params(state), theta)
    problems.assert_trees_close(state.replicas.rows.params, thetas)
    assert metrics["outer_steps"] == 2 * len(fragments)
    bits = 4 * 15 + 2 * 32 if rounded else 64 * 15
    np.testing.assert_array_equal(metrics["replicas/bits"], [2 * bits] * REPLICAS)


def test_a_replica_that_drops_out_is_neither_sent_nor_mixed(data):
    rounds, fragments = cohorts(data, 3, 3), [["w"], ["b"]]
    lost = np.isin(np.arange(REPLICAS), [1, 3])
    n = jnp.where(lost, 0, rounds[1].num_examples)
    rounds[1] = dataclasses.replace(rounds[1], num_examples=n)
    heard = np.ones((3, REPLICAS), bool)
    heard[1, lost] = False
    algorithm = streaming_diloco(
        loss, optax.adamw(INNER), replicas=REPLICAS, steps=3, fragments=fragments, aggregator=MEAN
    )
    state, _ = run(algorithm, rounds)
    theta, thetas = numpy_streaming(rounds, fragments, [2, 3], 3, 1, 0.5, heard=heard)
    problems.assert_trees_close(algorithm.params(state), theta)
    problems.assert_trees_close(state.replicas.rows.params, thetas)


# Both are compared with their papers.
@pytest.mark.long
def test_one_fragment_without_delay_is_diloco(data):
    rounds, outer = cohorts(data, 4, 2), optax.sgd(0.7, momentum=0.9, nesterov=True)
    kwargs = {"replicas": REPLICAS, "steps": 2, "weighted": True}
    one = streaming_diloco(
        loss,
        optax.adamw(INNER),
        outer,
        fragments=1,
        tau=0,
        alpha=0.0,
        aggregator=MEAN,
        **kwargs,
    )
    state, metrics = run(one, rounds)
    expected, others = run(diloco(loss, optax.adamw(INNER), outer, **kwargs), rounds)
    problems.assert_trees_close(state.params, expected.params)
    problems.assert_trees_close(state.replicas, expected.replicas)
    problems.assert_trees_close(metrics, others)


@pytest.mark.long
def test_alpha_is_the_share_of_a_replicas_own_parameters(data):
    """With 1 replicas never hear of each other, with 0 they take over what lands."""
    rounds = cohorts(data, 2)

    def rows(alpha):
        algorithm = streaming_diloco(
            loss,
            optax.sgd(INNER),
            replicas=REPLICAS,
            steps=2,
            fragments=[["w", "b"]],
            tau=0,
            alpha=alpha,
        )
        state, _ = run(algorithm, rounds)
        return state.replicas.rows.params, state.params

    own, outer = rows(1.0)
    alone = []
    for batches in numpy_batches(rounds[0]):
        params = Logistic.start()
        for x, y in batches:
            _, gradient = Logistic.losses_and_gradient(params, x, y)
            params = combine(lambda p, g: p - INNER * g, params, gradient)
        alone.append(params)
    problems.assert_trees_close(own, combine(lambda *x: np.stack(x), *alone))
    taken, same = rows(0.0)
    problems.assert_trees_close(same, outer)
    problems.assert_trees_close(taken, combine(lambda x: np.stack([x] * REPLICAS), same))


@pytest.mark.long
def test_a_state_can_be_restored_between_rounds(data):
    algorithm = streaming_diloco(
        loss, optax.adamw(INNER), replicas=REPLICAS, steps=4, fragments=[["w"], ["b"]], tau=3
    )
    expected, _ = run(algorithm, cohorts(data, 4, 4))
    state, _ = run(algorithm, cohorts(data, 4, 2))
    leaves, structure = jax.tree.flatten(state)
    restored = jax.tree.unflatten(structure, [np.asarray(x) for x in leaves])
    again, _ = run(algorithm, cohorts(data, 4, 2, start=2), restored)
    problems.assert_trees_close(again, expected)


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_every_fragment_is_sent_once_in_exactly_h_steps(steps, fragments, draw):
    tau = draw.draw(st.integers(0, steps - 1))
    events = events_of(steps, fragments, tau)
    assert events[-1].step == steps
    sent = {p: event.step for event in events for p in event.sent}
    landing = {p: event.step for event in events for p in event.landing}
    assert sorted(sent) == sorted(landing) == list(range(fragments))
    assert sum(len(event.sent) + len(event.landing) for event in events) == 2 * fragments
    # Nothing is in flight when a round ends. The order is that of the fragments.
    assert all(0 <= sent[p] == landing[p] - tau for p in range(fragments))
    assert landing[fragments - 1] == steps
    gap = math.ceil(steps / fragments)
    for p in range(1, fragments):
        between = (steps - tau - 1) / (fragments - 1) if tau > gap else steps / fragments
        assert abs(sent[p] - sent[p - 1] - between) < 1
    if tau <= gap:  # the paper's offsets, moved by gap - tau
        assert all(sent[p] == p * steps // fragments + gap - tau for p in range(fragments))
    elif fragments > 1:
        assert sent[0] == 1


# Four bits


@settings(max_examples=40)
@given(st.lists(st.floats(-8, 8, allow_subnormal=False), min_size=5, max_size=5))
def test_e3m0_takes_the_nearest_of_its_numbers(values):
    x = np.array(values)
    part = fax.aggregators.e3m0()

    @fax.program(clients=1)
    def sent(x):
        return part.update(x, jnp.ones(1), (), jax.random.key(0))[0]

    expected = numpy_e3m0(x)
    np.testing.assert_allclose(sent(x[None])[0], expected, rtol=1e-12, atol=0)
    assert len(np.unique(np.abs(expected))) <= 8


def test_low_bits_are_added_up_in_float32():
    """256 and a thousandth of it, many times: bfloat16 could not count that far."""
    aggregator = fax.aggregators.chain(fax.aggregators.e3m0())
    updates = jnp.full((64, 2), 4, jnp.bfloat16).at[0].set(256).at[:, 1].set(256)

    @fax.program(clients=64)
    def mean(updates):
        update, _, metrics = aggregator.aggregate(
            updates, jnp.ones(64), aggregator.init(None), jax.random.key(0)
        )
        return update, metrics

    update, metrics = mean(updates)
    assert update.dtype == jnp.float32
    np.testing.assert_array_equal(update, [(256 + 63 * 4) / 64, 256])
    np.testing.assert_array_equal(metrics["clients/bits"], [2 * 4 + 32] * 64)
    counts = {"n": jnp.ones((64, 2), jnp.int32)}
    with pytest.raises(ValueError, match=r"e3m0: updates\['n'\] is int32\[64,2\]"):
        mean(counts)


@pytest.mark.long
def test_parameters_of_half_precision_stay_so(data):
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), Logistic.start())
    algorithm = streaming_diloco(
        lambda params, batch, key: loss(params, {**batch, "x": batch["x"].astype("bfloat16")}, key),
        optax.sgd(INNER),
        replicas=REPLICAS,
        steps=2,
        fragments=[["w"], ["b"]],
    )
    before = algorithm.init(start)
    after, _ = jax.jit(algorithm.round)(before, cohorts(data, 4)[0])
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, before)


# Fragments

TRANSFORMER = {
    "blocks": [{"attend": {"kernel": 0}, "norm": 0} for _ in range(12)],
    "embed": {"kernel": 0, "scale": 0},
    "out": 0,
}


def names_of(fragments, params=TRANSFORMER):
    return [list(part) for part in cut("here", fragments, params)]


def test_a_number_of_fragments_strides_over_layers():
    parts = names_of(3)
    for p, part in enumerate(parts):
        blocks = {int(name.split("/")[1]) for name in part if name.startswith("blocks")}
        assert blocks == {p, p + 3, p + 6, p + 9}
    assert {"blocks/3/attend/kernel", "blocks/3/norm", "embed/kernel", "embed/scale"} <= {*parts[0]}
    assert "out" in parts[1]
    numbered = {f"layer_{i}": {"w": 0} for i in range(11)}  # sorted as text, 10 comes before 2
    assert names_of(2, numbered)[1] == [f"layer_{i}/w" for i in (1, 3, 5, 7, 9)]
    assert names_of(2, {"w": 0, "b": 0}) == [["b"], ["w"]]


def test_a_function_or_lists_say_which_leaf_is_where():
    inside = [name for part in names_of(1) for name in part if "blocks" in name]
    expected = [inside, ["embed/kernel", "embed/scale", "out"]]
    assert names_of(lambda name: int("blocks" not in name)) == expected
    assert names_of([["blocks"], ["embed", "out"]]) == expected


@pytest.mark.parametrize(
    ("fragments", "message"),
    [
        (-1, "fragments is -1, expected an int of at least 1"),
        (0, "fragments is 0, expected 1 to 14, the number of layers"),
        (15, "fragments is 15, expected 1 to 14"),
        (lambda name: None, r"fragments\('blocks/0/attend/kernel'\) returned None, expected"),
        (lambda name: 2 * (name == "out"), "fragment 1 of 3 has no leaf"),
        ([["blocks"], ["embed"]], "no fragment has 'out'. Fragments have to cover"),
        ([["blocks", "embed"], ["out", "embed/scale"]], "fragments 0 and 1 overlap: both have"),
        ([["blocks", "embed"], ["out", "head"]], "fragment 1 has the path 'head', but"),
    ],
)
def test_fragments_have_to_cover_the_parameters_once(fragments, message):
    algorithm = streaming_diloco(loss, optax.sgd(INNER), replicas=2, steps=2, fragments=fragments)
    with pytest.raises(ValueError, match=message):
        algorithm.init(jax.tree.map(float, TRANSFORMER))


STACKED = {
    "embed": np.ones((9, 4)),
    "layers": {
        "down": np.ones((6, 8, 4)),
        "scale": np.ones((6, 4)),
        "up": np.ones((6, 4, 8)),
    },
    "norm": np.ones(4),
}
LEAVES = ["layers/down", "layers/scale", "layers/up"]
SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), STACKED)
ASIDE = [np.moveaxis(x, 0, 1) for x in STACKED["layers"].values()]


def whole(part):
    """A fragment without axes: the leaves that are in it, and which indices of them."""
    return {name: span and span.indices for name, span in part.items()}


def test_stacked_layers_are_found_and_cut_as_if_they_were_not_stacked():
    names = ["scale", "up", "down"]
    unstacked = {**STACKED, "layers": [dict.fromkeys(names, 0) for _ in range(6)]}
    for count in (1, 2, 3, 4, 8):
        expected = [
            {tuple(name.split("/")[-2:]) for name in part} for part in cut("", count, unstacked)
        ]
        found = [
            {
                (str(i), name.split("/")[-1]) if name in LEAVES else (name,)
                for name, span in part.items()
                for i in (range(6) if span is None else span.indices)
            }
            for part in cut("", count, STACKED)
        ]
        assert found == expected
    with pytest.raises(ValueError, match="fragments is 9, expected 1 to 8, the number of layers"):
        cut("", 9, STACKED)
    with pytest.raises(ValueError, match="fragments is 2, expected 1, the number of layers"):
        cut("", 2, {"w": np.zeros(3)})


@pytest.mark.parametrize("pattern", ["strided", "contiguous"])
@pytest.mark.parametrize("axis", [0, 1])
def test_fragments_can_be_those_of_maxtext(pattern, axis):
    """Fragment 0 is what is not scanned. Layers are dealt out to the others."""
    params = {"decoder": SHAPES}
    if axis:
        params = {"decoder": {**STACKED, "layers": dict(zip(["down", "scale", "up"], ASIDE))}}
    found = layer_fragments(
        params, 4, pattern=pattern, others_first=True, layers={"decoder/layers": axis}
    )
    layers, per = 6, 2  # a fragment
    assert found[0] == ["decoder/embed", "decoder/norm"]
    for i in range(3):
        own = range(i, layers, 3) if pattern == "strided" else range(i * per, (i + 1) * per)
        assert found[i + 1] == [(f"decoder/{name}", axis, tuple(own)) for name in LEAVES]
    assert layer_fragments(params, 4, pattern=pattern, others_first=True) == found
    parts = cut("here", found, params)
    assert [list(part) for part in parts[1:]] == [[f"decoder/{name}" for name in LEAVES]] * 3


def test_stacks_can_be_single_leaves_and_are_not_looked_for_in_lists():
    params = {"embed": np.ones((9, 6)), "up": np.ones((4, 6, 7)), "down": np.ones((4, 7, 6))}
    found = layer_fragments(params, 2, layers={"up": 0, "down": 0})
    assert found[0] == [("down", 0, (0, 2)), "embed", ("up", 0, (0, 2))]
    square = {"kernel": np.ones((5, 5)), "other": np.ones((5, 5))}
    assert len(layer_fragments({"blocks": [square, square]}, 2)[0]) == 2
    assert layer_fragments({"layers": square}, 1, layers={}) == [["layers/kernel", "layers/other"]]
    names = ["LayerNorm_0/scale", "Dense_0/kernel", "Dense_1/kernel"]  # as flax has them
    shapes = [(4, 6), (4, 6, 7), (4, 7, 6)]
    scanned = {f"ScanBlock_0/{n}": np.ones(shape) for n, shape in zip(names, shapes)}
    for p, part in enumerate(layer_fragments(scanned, 4)):
        assert [own[1:] for own in part] == [(0, (p,))] * 3


def test_fragments_and_indices_can_be_iterators():
    """They are read when the algorithm is made, and again for each state and each round."""
    fragments = [iter(["b"]), [("w", 0, iter([0, 1, 2]))]]
    algorithm = streaming_diloco(loss, optax.sgd(0.1), replicas=2, steps=2, fragments=fragments)
    for _ in range(2):
        state = jax.eval_shape(algorithm.init, {"w": np.zeros(3), "b": np.zeros(2)})
        assert len(state.optimizers) == 2


SQUARE = {"q": np.ones((4, 5, 5)), "k": np.ones((4, 5, 5))}


@pytest.mark.parametrize(
    ("params", "arguments", "message"),
    [
        ({"layers": SQUARE}, {}, r"'layers' may have stacked layers along axis 0 \(4\) or along"),
        ({"blocks": {"w": np.ones((5, 5)), "b": np.ones(5)}}, {}, "or not be a stack. Pass fragm"),
        (
            {"blocks": {f"block_{i}": np.ones((3, 4 + i)) for i in range(2)}},
            {},
            r"may have stacked layers along axis 0 \(3\), or not be a stack.*layers=\{\}",
        ),
        (STACKED, {"layers": {"layer": 0}}, "layers has the path 'layer', but the parameters have"),
        (STACKED, {"layers": {"layers": 2}}, r"'layers/scale' has shape \(6, 4\), which has no"),
        (STACKED, {"layers": {"layers": 1}}, r"has shape \(6, 4\), expected 8 layers along"),
        (STACKED, {"layers": {"layers": 0, "layers/up": 0}}, "and is in layers twice"),
        (STACKED, {"layers": "layers"}, "layers is 'layers', expected a mapping from the path"),
        (STACKED, {"pattern": "blocks"}, "pattern is 'blocks', expected 'strided' or 'contiguous'"),
        (STACKED["layers"], {"layers": {"": 0}}, "layers has the path ''"),
        ({"layers": STACKED["layers"]}, {"others_first": True}, "all parameters are in layers"),
    ],
)
def test_layers_have_to_be_known(params, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_fragments(params, 2, **arguments)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (("layers", 0, [3, 5]), "no fragment has the indices 4 of 'layers/down' along axis 0"),
        (("layers", 0, range(4, 6)), "no fragment has the indices 3 of"),
        (("layers", 0, [2, 3, 4, 5]), "fragments 0 and 1 overlap: both have the indices 2 of"),
        (("layers", 1, range(4)), "both have parts of 'layers/down', along axis 0 and along axis"),
        ("layers", "fragments 0 and 1 overlap: both have 'layers/down'"),
        (("layers", 0, range(3, 8)), "has the indices 6-7 of 'layers/down' along axis 0, expected"),
        (
            ("layers", 2, range(4)),
            r"a part of 'layers/scale' along axis 2, but its shape is \(6, 4\)",
        ),
    ],
)
def test_parts_of_leaves_have_to_cover_them_once(second, message):
    fragments = [["embed", "norm", ("layers", 0, range(3))], [second]]
    if second[1] == 2:
        fragments = [fragments[0][:2], fragments[1]]
    algorithm = streaming_diloco(loss, optax.sgd(INNER), replicas=2, steps=2, fragments=fragments)
    with pytest.raises(ValueError, match=message):
        algorithm.init(STACKED)


@pytest.mark.always("True")
@pytest.mark.parametrize("rounded", [False, True])
def test_a_stacked_model_is_trained_as_one_that_is_not(rounded):
    """Parts of leaves against leaves that have these parts, or one layer each.

    Rounding depends on what is in a leaf, and so is compared with leaves of the same size.
    """
    rng = np.random.default_rng(3)
    stack = {"a": rng.normal(size=(5, 4, 4)) / 2, "b": rng.normal(size=(4, 5)) / 2}
    axes, indices = {"a": 0, "b": 1}, ([0, 3, 4], [1, 2])
    shards = {str(i): {"x": rng.normal(size=(6, 4))} for i in range(3)}
    start = {"layers": stack, "out": rng.normal(size=4)}
    parts = [["out", ("layers/a", 0, indices[0]), ("layers/b", 1, indices[0])]]
    parts.append([("layers/a", 0, indices[1]), ("layers/b", 1, indices[1])])
    groups = indices if rounded else [[i] for i in range(5)]

    def split(params):
        own = {
            f"{name}{g}": np.take(params["layers"][name], group, axis)
            for name, axis in axes.items()
            for g, group in enumerate(groups)
        }
        return {**own, "out": params["out"]}

    def joined(params):
        if "layers" in params:
            return params
        order = np.argsort(np.concatenate(groups))
        layers = {
            name: jnp.concatenate([params[f"{name}{g}"] for g in range(len(groups))], axis)
            for name, axis in axes.items()
        }
        layers = {name: jnp.take(layers[name], order, axis) for name, axis in axes.items()}
        return {"layers": layers, "out": params["out"]}

    def loss(params, batch, key):
        params = joined(params)

        layers, share = params["layers"], jnp.arange(1.0, 6.0)
        w, b = jnp.tensordot(share, layers["a"], 1), layers["b"] @ share
        return (jnp.tanh(batch["x"] @ w + b) @ params["out"] - 1) ** 2

    leaves = [
        [f"{name}{g}" for name in axes for g, group in enumerate(groups) if group[0] in own]
        for own in indices
    ]
    leaves[0].append("out")
    aggregator = MEAN
    if rounded:
        e3m0 = fax.aggregators.e3m0()
        aggregator = fax.aggregators.chain(fax.aggregators.error_feedback(e3m0, num_clients=3))
    states = []
    for params, fragments in ((start, parts), (split(start), leaves)):
        algorithm = streaming_diloco(
            loss,
            optax.sgd(INNER, momentum=0.9),
            replicas=3,
            steps=4,
            fragments=fragments,
            tau=3,
            aggregator=aggregator,
        )
        rounds = fax.data.cohorts(
            fax.data.InMemory(shards), 3, 2, sampler="stream", max_steps=4, placement="replicas"
        )
        state, step = algorithm.init(params), jax.jit(algorithm.round)
        for _ in range(2):
            state, metrics = step(state, next(rounds))
        states.append((state, metrics))
    (found, some), (expected, others) = states
    problems.assert_trees_close(found.params, jax.jit(joined)(expected.params), rtol=1e-9)
    own = [jax.jit(jax.vmap(joined))(state.replicas.rows.params) for state, _ in states]
    problems.assert_trees_close(*own, rtol=1e-9)
    problems.assert_trees_close(some, others, rtol=1e-9)
    if rounded:  # the aggregator remembers what was lost, for each part of a leaf
        for p in range(2):
            memory, same = (
                jax.tree.leaves(jax.device_get(state.aggregators[p])) for state, _ in states
            )
            assert [x.shape for x in memory] == [x.shape for x in same]
            assert max(np.abs(x).max() for x in memory) > 0
            problems.assert_trees_close(memory, same, rtol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "streaming_diloco: steps is 0, expected an int of at least 1"),
        ({"tau": 4}, "tau is 4, expected an int from 0 to 3, below steps=4"),
        ({"tau": -1}, "tau is -1, expected"),
        ({"alpha": 1.5}, r"alpha is 1\.5, expected a number from 0 to 1"),
        ({"fragments": 2.0}, r"fragments is 2\.0, expected a number of fragments, a function"),
        ({"fragments": [[("w", 0)]]}, r"fragment 0 has \('w', 0\), expected the path of a leaf"),
        ({"fragments": [["w"], [("b", -1, [0])]]}, r"fragment 1 has \('b', -1, \[0\]\), expected"),
        ({"fragments": [("w", 0, [1, 1])]}, "fragment 0 has an index of 'w' along axis 0 twice"),
        (
            {"fragments": [("w", 0, [True, False])]},
            r"fragment 0 has \('w', 0, \[True, False\]\), exp",
        ),
    ],
)
def test_mistakes(arguments, message):
    kwargs = {"replicas": 2, "steps": 4, "fragments": 1, **arguments}
    with pytest.raises(ValueError, match=message):
        streaming_diloco(loss, optax.sgd(INNER), **kwargs)


def test_a_period_is_never_cut_short(data):
    algorithm = streaming_diloco(loss, optax.sgd(INNER), replicas=REPLICAS, steps=4, fragments=2)
    with pytest.raises(ValueError, match="has 6 batches for each replica, expected a multiple of"):
        algorithm.round(algorithm.init(Logistic.start()), cohorts(data, 6)[0])


# Settings


def test_what_follows_a_sum_waits_for_the_steps_in_between():
    """Of two reductions, the first is needed for the second, and so is not held back."""

    def update(rows, weights):
        largest = fax.max(rows)
        shares = fax.map(jnp.divide, rows, fax.broadcast(largest))
        return {"mean": fax.mean(shares, weights=weights), "largest": largest + 1, "own": shares}

    @fax.program(replicas=3)
    def program(rows, weights, others):
        sending, _ = send(update, rows, weights)
        others = fax.map(jnp.sin, others)
        (found,), others = receive([sending], others)
        return found, others

    rows, weights, others = np.array([[1.0, 4], [3, 2], [2, 1]]), np.array([1.0, 2, 0]), np.ones(3)
    found, after = program(rows, weights, others)
    problems.assert_trees_close(after, np.sin(others))
    shares = rows / rows.max(0)
    expected = {"mean": weights @ shares / 3, "largest": rows.max(0) + 1, "own": shares}
    problems.assert_trees_close(found, expected)
    jaxpr = jax.make_jaxpr(program)(rows, weights, others).jaxpr
    made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    (barrier,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "optimization_barrier")
    held = sorted(made[var].primitive.name for var in barrier.invars)
    # The sums of products and of weights, the others after their step, and the maximum.
    assert held == ["federated_map"] * 3 + ["max"]


def test_what_comes_next_waits_for_what_is_sent_and_not_for_its_sum():
    def update(rows, ones):
        largest = fax.max(rows)
        return fax.mean(fax.map(jnp.divide, rows, fax.broadcast(largest))), fax.sum(ones)

    @fax.program(replicas=3)
    def program(rows, ones):
        sending, later = send(update, rows, ones, before=rows)
        return sending.result(), fax.map(jnp.sin, later)

    rows = np.array([[1.0, 4], [3, 2], [2, 1]])
    (mean, count), after = program(rows, np.ones(3))
    problems.assert_trees_close((mean, count), ((rows / rows.max(0)).mean(0), 3))
    problems.assert_trees_close(after, np.sin(rows))
    jaxpr = jax.make_jaxpr(program)(rows, np.ones(3)).jaxpr
    eqns = {eqn.primitive.name: eqn for eqn in jaxpr.eqns if eqn.primitive.name != "federated_map"}
    shares, sines = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "federated_map")
    barrier = eqns["optimization_barrier"]
    assert barrier.invars == [*shares.outvars, jaxpr.invars[0]]
    assert shares.invars == [jaxpr.invars[0], *eqns["max"].outvars]
    assert [*eqns["mean"].invars, *sines.invars] == barrier.outvars
    assert eqns["sum"].invars == [jaxpr.invars[1]]  # this does not depend on the rows


@pytest.mark.parametrize(("tau", "barriers"), [(3, 2), (4, 3)])
def test_the_next_steps_wait_for_what_is_sent_if_more_is_sent_before_it_lands(tau, barriers, data):
    """Of two fragments in six steps. A barrier for each receives it."""
    algorithm = streaming_diloco(
        loss, optax.sgd(INNER), replicas=REPLICAS, steps=6, fragments=[["w"], ["b"]], tau=tau
    )
    state, (cohort,) = algorithm.init(Logistic.start()), cohorts(data, 6, 1)
    jaxpr = jax.make_jaxpr(algorithm.round)(state, cohort)
    assert str(jaxpr).count("optimization_barrier") == barriers


def test_results_do_not_depend_on_where_replicas_are_and_each_fragment_is_sent_once(data):
    """They are those of the paper. A test above compares one device with it."""
    results, fragments = [], [["w"], ["b"]]
    for name in ("vectorized", "a mesh of 2"):
        context, at_once = problems.setting(name, "replicas")
        with context:
            algorithm = streaming_diloco(
                loss,
                optax.adamw(INNER),
                replicas=REPLICAS,
                steps=3,
                fragments=fragments,
                tau=1,
                vectorize=at_once,
            )
            state, (cohort,) = algorithm.init(Logistic.start()), cohorts(data, 3)
            step = jax.jit(algorithm.round).lower(state, cohort).compile()
            results.append(step(state, cohort))
            if "mesh" in name:
                found = fax.inspect.report(step).collectives
    assert {c.loops for c in found} == {0}  # and inner steps are in loops
    sent = [c for c in found if c.operation == "all-gather"]
    # Half a byte for a number, a scale and a weight, of all replicas of a device.
    assert sorted(c.bytes for c in sent) == [REPLICAS // 2 * (x + 8 + 8) for x in (2, 6)]
    assert {c.dtype for c in sent} == {"uint8"}
    others = [c for c in found if c not in sent]
    assert sum(c.bytes for c in others) <= 40  # a few numbers
    for state, metrics in results:
        bits = metrics.pop("replicas/bits")
        expected = 8 * (2 + 6 + 2 * 16) if state is results[-1][0] else 4 * 15 + 2 * 32
        np.testing.assert_array_equal(bits, [expected] * REPLICAS)
    (state, _), found = results
    problems.assert_trees_close(found, results[0], rtol=1e-9)
    theta, thetas = numpy_streaming(cohorts(data, 3), fragments, [2, 3], 3, 1, 0.5, numpy_e3m0)
    problems.assert_trees_close(state.params, theta)
    problems.assert_trees_close(state.replicas.rows.params, thetas)


@pytest.mark.long
@pytest.mark.parametrize("tau", [pytest.param(0, marks=pytest.mark.long), 1])
def test_rates_can_be_differentiated(data, tau):
    (cohort,) = cohorts(data, 2)

    def after(rates):
        algorithm = streaming_diloco(
            loss,
            optax.sgd(rates[0]),
            optax.sgd(rates[1], momentum=0.9, nesterov=True),
            replicas=REPLICAS,
            steps=2,
            fragments=[["w"], ["b"]],
            tau=tau,
            alpha=rates[2],
            aggregator=MEAN,
        )
        state, metrics = algorithm.round(algorithm.init(Logistic.start()), cohort)
        return metrics["loss"] + jnp.sum(algorithm.params(state)["w"] ** 2)

    rates = jnp.array([0.05, 0.4, 0.5])
    check_grads(jax.jit(after), (rates,), order=1, modes=("rev",), eps=1e-5, rtol=1e-6)


def test_model_state_goes_with_the_last_fragment(data):
    def with_state(params, model_state, batch, key):
        mean = 0.5 * model_state["mean"] + 0.5 * batch["x"].mean(0)
        return loss(params, batch, key), {}, {"mean": mean, "n": model_state["n"] + 1}

    algorithm = streaming_diloco(
        with_state,
        optax.sgd(INNER),
        replicas=REPLICAS,
        steps=2,
        fragments=[["w"], ["b"]],
        tau=0,
        alpha=0.25,
    )
    (cohort,) = cohorts(data, 2)
    state = algorithm.init(Logistic.start(), {"mean": np.zeros(4), "n": 0})
    state, metrics = jax.jit(algorithm.round)(state, cohort)
    bits = 4 * 15 + 2 * 32 + 64 * 4  # of the parameters, their scales, and once the mean
    np.testing.assert_array_equal(metrics["replicas/bits"], [bits] * REPLICAS)
    own = []
    for batches in numpy_batches(cohort):
        mean = np.zeros(4)
        for x, _ in batches:
            mean = 0.5 * mean + 0.5 * x.mean(0)
        own.append(mean)
    mean = np.mean(own, 0)
    np.testing.assert_allclose(state.model_state["mean"], mean, rtol=1e-10)
    rows = state.replicas.rows.model_state
    np.testing.assert_allclose(rows["mean"], 0.25 * np.array(own) + 0.75 * mean, rtol=1e-10)
    np.testing.assert_array_equal(rows["n"], [2] * REPLICAS)


@pytest.mark.long
def test_a_mesh_with_a_model_axis_keeps_fragments_sharded():
    mesh = meshes.mesh(replicas=2, model=2)
    start = {"in": np.ones((4, 6)), "out": np.ones(6)}
    shards = {str(i): {"x": np.random.default_rng(i).normal(size=(8, 4))} for i in range(2)}
    algorithm = streaming_diloco(
        lambda p, batch, key: (jnp.tanh(batch["x"] @ p["in"]) @ p["out"]) ** 2,
        optax.adamw(INNER),
        replicas=2,
        steps=2,
        fragments=[[("in", 0, [0, 2]), "out"], [("in", 0, [1, 3])]],
    )

    def one(params):
        rounds = fax.data.cohorts(
            fax.data.InMemory(shards), 2, 4, sampler="stream", max_steps=2, placement="replicas"
        )
        return jax.jit(algorithm.round)(algorithm.init(params), next(rounds))

    expected = one(start)
    with jax.set_mesh(mesh):
        params = {
            "in": meshes.put(start["in"], None, "model"),
            "out": meshes.put(start["out"], "model"),
        }
        found = one(params)
    problems.assert_trees_close(found, expected, rtol=1e-9)
    assert found[0].params["in"].sharding.shard_shape((4, 6)) == (4, 3)


def test_layers_can_be_sharded_over_explicit_axes():
    """Types can only shard evenly, but a fragment has any part of the layers."""
    fragments = [[("layers", 0, [0, 1, 3]), "out"], [("layers", 0, [2])]]
    start = {"layers": np.arange(64.0).reshape(4, 4, 4), "out": np.ones(4)}

    def loss(params, batch, key):
        layers = reshard(params["layers"], PartitionSpec())
        return batch["x"] @ layers[0] @ layers[1] @ params["out"]

    algorithm = streaming_diloco(
        loss, optax.adamw(INNER), replicas=2, steps=2, fragments=fragments, tau=0
    )
    with jax.set_mesh(meshes.mesh("explicit", replicas=2, model=2)):
        params = {**start, "layers": meshes.put(start["layers"], "model")}
        one, _ = cut("", fragments, params)
        part = pick(params, one)
        np.testing.assert_array_equal(part["layers"], start["layers"][[0, 1, 3]])
        found = paste(params, one, {"layers": -part["layers"], "out": part["out"]})["layers"]
        sign = np.array([-1, -1, 1, -1])[:, None, None]
        np.testing.assert_array_equal(found, sign * start["layers"])
        x = fax.data.InMemory({str(i): {"x": np.ones((8, 4))} for i in range(2)})
        rounds = fax.data.cohorts(x, 2, 4, sampler="stream", max_steps=2, placement="replicas")
        state = algorithm.init(params)
        new, _ = jax.eval_shape(algorithm.round, state, next(rounds))
        for layers in (found, state.params["layers"], new.params["layers"]):
            assert jax.typeof(layers).sharding.spec == PartitionSpec("model", None, None)
