"""Metrics against scikit-learn and cases worked by hand, merged in any grouping."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from subsets import alike

import fax
from fax import metrics as fm

CLASSES, DOMAINS, LENGTH = 5, 3, 6
EOS, OOV = 2, 4
SIZES = [3, 17, 1, 8, 30, 5, 2]


def examples(n, seed=0):
    """Classified examples, among whose scores are equal ones."""
    rng = np.random.default_rng(seed)
    batch = {"y": rng.integers(0, CLASSES, n), "domain": rng.integers(0, DOMAINS, n)}
    return batch, rng.integers(-3, 4, (n, CLASSES)) / 2


def sequences(n, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(1, CLASSES, (n, LENGTH))
    y[np.arange(LENGTH) >= rng.integers(0, LENGTH + 1, n)[:, None]] = 0
    return {"y": y}, rng.integers(-3, 4, (n, LENGTH, CLASSES)) / 2


CLASSIFICATION = {
    "loss": fm.CrossEntropy(),
    "accuracy": fm.Accuracy(),
    "top2": fm.TopK(2),
    "confusion": fm.ConfusionMatrix(CLASSES),
    "by domain": fm.PerDomain(fm.Accuracy(), DOMAINS),
    "confusion by domain": fm.PerDomain(fm.ConfusionMatrix(CLASSES), DOMAINS),
}
SEQUENCES = {
    "token loss": fm.TokenLoss(),
    "sequence loss": fm.SequenceLoss(),
    "accuracy": fm.TokenAccuracy(),
    "accuracy in vocabulary": fm.TokenAccuracy(ignore=(0, EOS), exclude=(0, EOS, OOV)),
    "top2": fm.TokenTopK(2),
    "top2 in vocabulary": fm.TokenTopK(2, ignore=(0, EOS), exclude=(0, EOS, OOV)),
    "oov": fm.OOVRate((OOV,)),
    "truncated": fm.TruncationRate(EOS),
    "tokens": fm.TokenCount(),
    "sequences": fm.SequenceCount(),
    "length": fm.SequenceLength(),
}


def results(metrics, batch, scores):
    """Of metrics by name, in one program."""
    return jax.jit(
        lambda batch, scores: {k: m(batch, scores).sum().result() for k, m in metrics.items()}
    )(batch, scores)


# Against scikit-learn


def test_classification_is_that_of_scikit_learn():
    batch, scores = examples(200)
    y, classes = batch["y"], np.arange(CLASSES)
    scores += np.random.default_rng(1).normal(size=scores.shape) / 100  # no two are equal
    guess = scores.argmax(1)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    expected = {
        "loss": sklearn.metrics.log_loss(y, p, labels=classes),
        "accuracy": sklearn.metrics.accuracy_score(y, guess),
        "top2": sklearn.metrics.top_k_accuracy_score(y, scores, k=2, labels=classes),
        "confusion": sklearn.metrics.confusion_matrix(y, guess, labels=classes),
        "by domain": [
            sklearn.metrics.accuracy_score(y[own], guess[own])
            for own in (batch["domain"] == d for d in range(DOMAINS))
        ],
        "confusion by domain": [
            sklearn.metrics.confusion_matrix(y[own], guess[own], labels=classes)
            for own in (batch["domain"] == d for d in range(DOMAINS))
        ],
    }
    found = results(CLASSIFICATION, batch, scores)
    for name in CLASSIFICATION:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 9])
def test_top_k_takes_the_first_of_equal_scores(k):
    batch, scores = examples(300)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    expected = (order == batch["y"][:, None]).any(1).mean()
    found = results({"top": fm.TopK(k), "accuracy": fm.Accuracy()}, batch, scores)
    np.testing.assert_allclose(found["top"], expected, rtol=1e-6)
    if k == 1:
        np.testing.assert_allclose(found["accuracy"], expected, rtol=1e-6)


def test_the_best_score_may_be_infinite():
    scores = np.stack(np.meshgrid(*[[-np.inf, 0, np.inf]] * 3), -1).reshape(-1, 3)
    every = np.arange(-1, 4)  # two of which are not classes
    batch = {"y": np.repeat(every, len(scores))}
    of_each = fm.Accuracy()(batch, jnp.asarray(np.tile(scores, (len(every), 1))))
    expected = scores.argmax(1) == every[:, None]
    np.testing.assert_array_equal(of_each.result(), expected.reshape(-1))


# Worked by hand


def test_sequences_worked_by_hand():
    # Guesses: 1 3 4 0 | 2 2 1 1 | (all padding)
    scores = jnp.log(
        jnp.array(
            [
                [[1, 4, 1, 1, 1], [1, 1, 1, 4, 1], [1, 1, 1, 1, 4], [4, 1, 1, 1, 1]],
                [[1, 2, 4, 0.5, 0.5], [1, 1, 4, 1, 1], [1, 4, 1, 1, 1], [1, 4, 1, 1, 1]],
                [[1, 1, 1, 1, 1]] * 4,
            ]
        )
    )
    batch = {"y": jnp.array([[1, 3, 4, 2], [1, 4, 1, 0], [0, 0, 0, 0]])}
    half, eighth, quarter = math.log(2), math.log(8), math.log(4)
    losses = [[half, half, half, eighth], [quarter, eighth, half]]
    expected = {
        "token loss": (sum(losses[0]) + sum(losses[1])) / 7,
        "sequence loss": (sum(losses[0]) + sum(losses[1])) / 2,
        "accuracy": 4 / 7,  # 1, 3, 4 and 1
        # Labels 1 3 4 | 1 4 1; guesses without 0, 2 and 4: 1 3 . | 1 . 1
        "accuracy in vocabulary": 4 / 6,
        "top2": 5 / 7,  # and the 1 that comes second
        "top2 in vocabulary": 4 / 6,
        "oov": 2 / 7,
        "truncated": 1 / 2,
        "tokens": 7,
        "sequences": 2,
        "length": 7 / 2,
    }
    others = {
        "two out of vocabulary": fm.OOVRate((OOV, 3)),
        "some ignored": fm.TokenCount(ignore=(0, 1)),
        "none ignored": fm.TokenCount(ignore=()),
    }
    expected |= {"two out of vocabulary": 3 / 7, "some ignored": 4, "none ignored": 12}
    found = results(SEQUENCES | others, batch, scores)
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, err_msg=name)


def test_what_is_excluded_counts_as_a_mistake_even_if_nothing_else_is_left():
    scores = jnp.zeros((1, 1, 3)).at[0, 0, 1].set(-jnp.inf)
    batch = {"y": jnp.array([[2]])}
    top, best = fm.TokenTopK(3, exclude=(0, 2)), fm.TokenAccuracy(exclude=(0, 1, 2))
    assert results({"top": top, "best": best}, batch, scores) == {"top": 0, "best": 0}


def test_scores_that_are_not_numbers_are_no_hits():
    batch, scores = examples(4)
    scores = np.full_like(scores, np.nan)
    batch["y"][:] = [0, 1, 2, 3]
    metrics = {"top": fm.TopK(2), "any": fm.TopK(CLASSES + 1), "loss": fm.CrossEntropy()}
    found = results(metrics, batch, scores)
    assert found["top"] == found["any"] == 0
    assert np.isnan(found["loss"])


def test_labels_of_8_bits():
    """Neither 256 classes nor the tokens 300 and -100 can be written as uint8."""
    tokens = np.array([[44, 200], [156, 255]], np.uint8)
    own = [
        *(fm.TokenLoss(), fm.TokenAccuracy(), fm.TokenTopK(300), fm.OOVRate((300, 255))),
        *(fm.TruncationRate(300), fm.TokenCount(ignore=(-100, 44))),
    ]
    scores = jax.nn.one_hot(tokens, 256)
    found = results({str(i): metric for i, metric in enumerate(own)}, {"y": tokens}, scores)
    expected = [np.log(np.e + 255) - 1, 1, 1, 1 / 4, 1, 3]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-6)


# Statistics


ALL = [
    *((name, metric, examples) for name, metric in CLASSIFICATION.items()),
    *((name, metric, sequences) for name, metric in SEQUENCES.items()),
]


@pytest.mark.parametrize(("name", "metric", "make"), ALL)
def test_of_nothing(name, metric, make):

    @jax.jit
    def statistics(batch, scores):
        of_each = metric(batch, scores)
        some = of_each.sum()
        of_none = metric({k: v[:0] for k, v in batch.items()}, scores[:0]).sum()
        nothing = {"masked": of_each.sum(np.zeros(4, bool)), "empty": of_none, "zero": some.zero()}
        merged = [(stat.merge(some), some.merge(stat)) for stat in nothing.values()]
        return some, merged, {how: stat.result() for how, stat in nothing.items()}

    some, merged, found = statistics(*make(4))
    for how, value in found.items():
        assert np.isnan(value).all() if isinstance(some, fm.Mean) else not value.any(), how
    for stat in (stat for pair in merged for stat in pair):
        jax.tree.map(np.testing.assert_array_equal, stat, some)


@functools.cache
def of_pieces(name, make, n):
    """A metric's statistic of each of n examples, on the host."""
    metric = next(m for own, m, maker in ALL if (own, maker) == (name, make))
    batch, scores = make(n, seed=n)
    return jax.tree.map(np.asarray, jax.jit(metric)(batch, scores))


sums = jax.jit(lambda of_each, mask: of_each.sum(mask))
merge = jax.jit(lambda one, other: one.merge(other))
result = jax.jit(lambda stat: stat.result())


def sum_of(of_each, own, mask):
    """The statistic of some examples. Others fill up the batch, so that one program does for all.

    They are masked.
    """
    rows = np.resize(own, len(mask)) if len(own) else np.arange(len(mask))
    return sums(
        jax.tree.map(lambda x: x[rows], of_each), mask[rows] & (np.arange(len(mask)) < len(own))
    )


@st.composite
def groupings(draw, n=12):
    """A mask, an order of examples, where they are cut, and a tree in which parts are merged."""
    mask = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    order = draw(st.permutations(range(n)))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    merges = draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=5))
    return np.array(mask), np.array(order), cuts, merges


@settings(max_examples=25)
@given(groupings(), st.sampled_from([(name, make) for name, _, make in ALL]))
def test_merged_in_any_grouping(grouping, which):
    mask, order, cuts, merges = grouping
    of_each = of_pieces(*which, len(mask))
    whole = sums(of_each, mask)
    parts = [sum_of(of_each, own, mask) for own in np.split(order, cuts)]
    for a, b in merges:
        if len(parts) > 1:
            one = parts.pop(a % len(parts))
            other = parts.pop(b % len(parts))
            parts.append(merge(one, other))
    merged = functools.reduce(merge, parts)
    for found, expected in zip(jax.tree.leaves(merged), jax.tree.leaves(whole), strict=True):
        if np.asarray(expected).dtype.kind == "i":  # counts are equal to the last digit
            np.testing.assert_array_equal(found, expected)
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(result(merged), result(whole), rtol=1e-12)


def test_statistics_merge_under_jit_and_by_fax_sum():
    stats = fm.Mean(jnp.array([1.0, 2.0, 3.0]), jnp.array([1, 2, 3]))

    @jax.jit
    @fax.program(clients=3)
    def total(stats):
        return fax.sum(stats)

    assert total(stats).result() == 1.0
    assert jax.jit(lambda a, b: a.merge(b).result())(total(stats), stats.sum()) == 1.0


def test_statistics_without_equality_are_merged():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True, eq=False)
    class Total(fm.Statistic):
        total: np.ndarray

    np.testing.assert_array_equal(Total(np.ones(2)).merge(Total(np.arange(2))).total, [1, 2])


def test_statistics_that_do_not_fit_are_not_merged():
    with pytest.raises(TypeError, match=r"cannot merge a Sum of shapes \[\(\)\] with a Mean"):
        fm.Mean(1.0, 1).merge(fm.Sum(1))
    with pytest.raises(TypeError, match=r"of shapes \[\(2,\)\] with a Sum of shapes \[\(\)\]"):
        fm.Sum(1).merge(fm.Sum(np.ones(2)))
    per_example = fm.Sum(np.array([True, False]))
    np.testing.assert_array_equal(per_example.merge(per_example).result(), [2, 0])


# Evaluation


def linear(params, batch):
    return batch["x"] @ params["w"]


def table(params, batch):
    return params["w"][batch["x"]]


def population(kind):
    clients = {}
    rng = np.random.default_rng(3)
    for i, n in enumerate(SIZES):
        if kind == "classes":
            batch, _ = examples(n, i)
            clients[f"client {i}"] = {**batch, "x": rng.normal(size=(n, 4))}
        else:
            batch, _ = sequences(n, i)
            clients[f"client {i}"] = {**batch, "x": rng.integers(0, CLASSES, (n, LENGTH))}
    return fax.data.InMemory(clients)


def case(kind):
    rng = np.random.default_rng(4)
    if kind == "classes":
        return population(kind), linear, {"w": rng.normal(size=(4, CLASSES))}, CLASSIFICATION
    return population(kind), table, {"w": rng.normal(size=(CLASSES, CLASSES))}, SEQUENCES


def of_clients(data, apply, params, metrics, personal=False):
    """Each client's statistics, by NumPy, from those of all clients' examples one by one."""
    clients = [data.client(client) for client in data.client_ids()]
    whose = np.repeat(np.arange(len(clients)), [len(client["x"]) for client in clients])
    batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), *map(dict, clients))

    @jax.jit
    def statistics(params, batch):
        if personal:
            scores = jax.vmap(apply)(jax.tree.map(lambda x: x[whose], params), batch)
        else:
            scores = apply(params, batch)
        return {name: metric(batch, scores) for name, metric in metrics.items()}

    of_each = jax.device_get(statistics(params, batch))
    return [
        jax.tree.map(lambda x, own=own: x[whose == own].sum(0), of_each)
        for own in range(len(clients))
    ]


@functools.cache
def of_case(kind):
    return of_clients(*case(kind))


@pytest.mark.always("7-classes-auto")
@pytest.mark.kinds(mesh=lambda mesh: mesh is None, kind=alike, batch_size=alike)
@pytest.mark.parametrize("mesh", [None, "auto", "explicit"])
@pytest.mark.parametrize("kind", ["classes", "sequences"])
@pytest.mark.parametrize("batch_size", [7, 1000])
def test_evaluation_is_the_merge_of_clients(kind, batch_size, mesh):
    data, apply, params, metrics = case(kind)
    own = of_case(kind)
    stacked = jax.tree.map(lambda x: np.stack([x] * len(SIZES)), params)
    with jax.set_mesh(meshes.mesh(mesh or "auto", clients=3 if mesh else 1)):
        found = fm.evaluate(apply, params, data, metrics, batch_size=batch_size)
        each = fm.evaluate_clients(apply, params, data, metrics, batch_size=batch_size)
        ready = fm.prepare(data, batch_size=batch_size)
        for name, value in fm.evaluate(apply, params, ready, metrics).items():
            np.testing.assert_array_equal(value, found[name])
        for name, value in fm.evaluate_clients(apply, params, ready, metrics).items():
            np.testing.assert_array_equal(value, each[name])
        personal = fm.evaluate_clients(
            apply, stacked, data, metrics, batch_size=batch_size, personal=True
        )
    for name in metrics:
        total = functools.reduce(lambda a, b: a.merge(b), [stats[name] for stats in own])
        np.testing.assert_allclose(found[name], total.result(), rtol=1e-6, err_msg=name)
        rows = [stats[name].result() for stats in own]
        np.testing.assert_allclose(each[name], rows, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(personal[name], rows, rtol=1e-6, err_msg=name)
    assert found["confusion" if kind == "classes" else "tokens"].dtype == np.int64


def test_models_of_clients_own():
    data, apply, params, metrics = case("classes")
    rng = np.random.default_rng(5)
    own = {"w": rng.normal(size=(len(SIZES), *params["w"].shape))}
    found = fm.evaluate_clients(apply, own, data, metrics, personal=True, batch_size=4)
    for row, stats in enumerate(of_clients(data, apply, own, metrics, personal=True)):
        for name in metrics:
            np.testing.assert_allclose(found[name][row], stats[name].result(), rtol=1e-6)


def test_many_clients_with_models_of_their_own_come_in_groups():
    sizes = np.random.default_rng(0).integers(1, 9, 150)
    data = fax.data.InMemory({i: {"x": np.full(n, float(i))} for i, n in enumerate(sizes)})
    params = np.arange(150.0)[::-1].copy()

    def total(batch, scores):
        return fm.Sum(scores)

    found = fm.evaluate_clients(
        lambda p, batch: batch["x"] + p, params, data, {"sum": total}, personal=True, batch_size=4
    )
    np.testing.assert_allclose(found["sum"], 149.0 * sizes)


def test_held_out_clients():
    data, apply, params, metrics = case("classes")
    _, held_out = fax.data.split(data, held_out=0.4, seed=1)
    own = of_clients(held_out, apply, params, metrics)
    found = fm.evaluate(apply, params, held_out, metrics)
    total = functools.reduce(lambda a, b: a.merge(b), [stats["loss"] for stats in own])
    np.testing.assert_allclose(found["loss"], total.result(), rtol=1e-6)


def test_one_shape_is_compiled_and_batches_are_full():
    shapes = []

    def apply(params, batch):
        shapes.append(batch["x"].shape)
        return batch["x"] @ params["w"]

    data, _, params, metrics = case("classes")
    for _ in range(2):
        fm.evaluate(apply, params, data, {"loss": metrics["loss"]}, batch_size=10)
    # 66 examples in 7 batches of 10. One of the traces looks at the scores' shape alone.
    assert set(shapes) == {(1, 4), (10, 4)}
    assert len(shapes) == 2


def test_evaluation_is_a_federated_program():
    from fax.metrics._packing import PackedBatches
    from fax.metrics._programs import stats_of_batches

    mask, slots = np.ones((4, 8), bool), np.zeros((4, 8), np.int32)
    rows = PackedBatches({"x": np.ones((4, 8, 4)), "y": np.ones((4, 8), int)}, mask, slots)
    metrics = (("accuracy", fm.Accuracy()),)
    params = {"w": np.ones((4, CLASSES))}
    with jax.set_mesh(meshes.mesh(clients=4)):
        text = (
            stats_of_batches.lower(linear, metrics, None, "clients", params, rows)
            .compile()
            .as_text()
        )
    assert sum(" all-reduce(" in line for line in text.splitlines()) <= 2
    assert "all-gather" not in text
    jaxpr = jax.make_jaxpr(stats_of_batches, static_argnums=(0, 1, 2, 3))(
        linear, metrics, None, "clients", params, rows
    )
    assert "federated_map" in str(jaxpr)


def test_counts_are_added_up_in_64_bits():
    data = fax.data.InMemory({"a": {"x": np.full(4, 2**30, np.int32)}})

    def big(batch, scores):
        return fm.Sum(batch["x"])

    with jax.enable_x64(False):
        found = fm.evaluate(lambda p, b: b["x"], None, data, {"sum": big}, batch_size=1)
    assert found["sum"] == 2**32


@pytest.mark.parametrize("personal", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(y=7), r"client 'client 2', feature 'y' has 7, expected numbers from 0 to 4"),
        (dict(y=-1), r"client 'client 2', feature 'y' has -1, expected numbers from 0 to 4"),
        (dict(domain=3), r"client 'client 2', feature 'domain' has 3, expected numbers from 0 to"),
    ],
)
def test_labels_out_of_range(change, message, personal):
    data, apply, params, metrics = case("classes")
    (feature, value) = next(iter(change.items()))

    def spoil(client_id, own):
        bad = np.full_like(own[feature], value) if client_id == "client 2" else own[feature]
        return {**own, feature: bad}

    data = fax.data.map(data, spoil)
    if personal:
        params = jax.tree.map(lambda x: np.stack([x] * len(SIZES)), params)
    with pytest.raises(fax.data.DataError, match=message):
        fm.evaluate_clients(apply, params, data, metrics, personal=personal)


class Nobody:
    def client_ids(self):
        return ()

    def num_examples(self, client_id):
        raise KeyError(client_id)

    client = num_examples

    def __len__(self):
        return 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(metrics={}), r"fax.metrics.evaluate: metrics is {}, expected a mapping from names"),
        (
            dict(metrics={"a": fm.Accuracy}),
            r"metric 'a' is the class .*as fax.metrics.Accuracy",
        ),
        (
            dict(metrics={"a": lambda b, s: s.mean()}),
            r"metric 'a' returned .*expected a statistic, such as fax.metrics.Mean",
        ),
        (
            dict(metrics={"a": lambda b, s: fm.Mean(s.mean(), 1)}),
            r"metric 'a' returned .total of shape \(\), expected \(66, ...\), a statistic of each",
        ),
        (dict(metrics={"a": fm.Accuracy("z")}), r"metric 'a' needs the feature 'z', but clients"),
        (
            dict(metrics={"a": fm.ConfusionMatrix(9)}),
            r"num_classes is 9, but there are scores of",
        ),
        (
            dict(
                metrics={
                    "a": lambda b, s: fm.CalibrationError()({"y": b["y"][:, None]}, s[:, None])
                }
            ),
            r"CalibrationError: feature 'y' has shape \(66, 1\), expected \(batch,\), a label for",
        ),
        (dict(batch_size=0), "batch_size is 0, expected an int of at least 1"),
        (dict(data=Nobody()), "data has no clients"),
        (
            dict(data=fax.data.from_torch({"ann": [{"x": 1.0}], "bob": []})),
            "evaluate: client 'bob' has no examples. Leave such clients out",
        ),
    ],
)
def test_mistakes(change, message):
    data, apply, params, metrics = case("classes")
    args = dict(apply=apply, params=params, data=data, metrics=metrics)
    with pytest.raises(ValueError, match=message):
        fm.evaluate(**{**args, **change})


def test_ignored_labels_have_no_limits():
    """Many tokenizers pad with -100, or with a number beyond the model's tokens."""

    def tokens(y):
        return fax.data.InMemory({"a": {"y": y[:2]}, "b": {"y": y[2:]}})

    def apply(params, batch):
        return jnp.zeros((*batch["y"].shape, 5)) + params

    data = tokens(np.array([[1, 2, -100], [3, -100, -100], [999, 4, 1]]))
    every = fm.PerDomain(fm.TokenLoss(ignore=(-100, 999), label="y"), 1, "domain")
    data = fax.data.map(data, lambda _, own: {**own, "domain": np.zeros(len(own["y"]), int)})
    metrics = {"loss": every, "count": fm.TokenCount(ignore=(-100, 999))}
    found = fm.evaluate(apply, 0.0, data, metrics)
    assert found["count"] == 5
    np.testing.assert_allclose(found["loss"], [np.log(5)])
    for one in (data, fm.prepare(data)):
        with pytest.raises(fax.data.DataError, match=r"'b', feature 'y' has 999, expected"):
            fm.evaluate(apply, 0.0, one, {"loss": fm.TokenLoss(ignore=(-100,))})
    hidden = fm.prepare(tokens(np.array([[1, 2, -100], [999, 3, 0], [1, 7, -100]])))
    with pytest.raises(fax.data.DataError, match=r"'b', feature 'y' has 7, expected numbers from"):
        fm.evaluate(apply, 0.0, hidden, {"count": fm.TokenCount(ignore=(-100, 999))})


def test_params_without_a_row_for_each_client():
    data, apply, params, metrics = case("classes")
    with pytest.raises(ValueError, match=r"params\['w'\] has shape \(4, 5\), expected a row for"):
        fm.evaluate_clients(apply, params, data, metrics, personal=True)


def test_prepared_data_cannot_be_used_for_something_else(monkeypatch):
    data, apply, params, metrics = case("classes")
    ready = fm.prepare(data)
    with pytest.raises(ValueError, match=r"batch_size=3 has no effect on prepared data"):
        fm.evaluate(apply, params, ready, metrics, batch_size=3)
    with (
        jax.set_mesh(meshes.mesh(clients=2)),
        pytest.raises(ValueError, match="prepared under another mesh or placement"),
    ):
        fm.evaluate(apply, params, ready, metrics)
    own = jax.tree.map(lambda x: np.stack([x] * len(SIZES)), params)
    with pytest.raises(ValueError, match="personal=True evaluates clients one by one"):
        fm.evaluate_clients(apply, own, ready, metrics, personal=True)
    few = {"a": fm.PerDomain(fm.Accuracy(), 2)}
    with pytest.raises(fax.data.DataError, match=r"feature 'domain' has 2, expected numbers from"):
        fm.evaluate(apply, params, ready, few)
    monkeypatch.setattr("fax.metrics._packing.fits", lambda rows, bytes_per_row, spread: False)
    with pytest.raises(fax.data.DataError, match="GiB on each device, which does not"):
        fm.prepare(data)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_numbers_of_metrics(bad):
    for make in (fm.TopK, fm.TokenTopK, fm.ConfusionMatrix):
        with pytest.raises(ValueError, match="expected an int of at least 1"):
            make(bad)
    with pytest.raises(ValueError, match="num_domains is"):
        fm.PerDomain(fm.Accuracy(), bad)
