"""Partitions of central arrays: every example has one client, and mixes are what they should be."""

import fractions

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fax.data import DataError, partition
from fax.data._assignment import examples_by_client

N, LABELS = 1200, 10
RNG = np.random.default_rng(0)
ARRAYS = {
    "number": np.arange(N),
    "image": RNG.normal(size=(N, 2, 2)).astype(np.float32),
    "y": RNG.permutation(np.arange(N) % LABELS),
    "author": np.array([f"author{i:02}" for i in RNG.integers(0, 25, N)]),
}


def sizes(data):
    return np.array([data.num_examples(i) for i in data.client_ids()])


def mixes(data):
    """How many examples of each label a client has, [clients, labels]."""
    clients = (data.client(i)["y"] for i in data.client_ids())
    return np.array([np.bincount(labels, minlength=LABELS) for labels in clients])


def assert_each_example_once(data, arrays=ARRAYS):
    numbers = np.concatenate([data.client(i)["number"] for i in data.client_ids()])
    np.testing.assert_array_equal(np.sort(numbers), np.arange(len(arrays["number"])))
    for client_id in data.client_ids():
        examples = data.client(client_id)
        for name, x in arrays.items():
            np.testing.assert_array_equal(examples[name], x[examples["number"]])


MAKERS = {
    "iid": lambda a, n, seed: partition.iid(a, n, seed=seed),
    "dirichlet": lambda a, n, seed: partition.dirichlet(a, n, alpha=0.3, seed=seed),
    "balanced": lambda a, n, seed: partition.dirichlet(a, n, alpha=0.3, balanced=True, seed=seed),
    "shards": lambda a, n, seed: partition.shards(a, n, seed=seed),
    "by_quantity": lambda a, n, seed: partition.by_quantity(a, n, alpha=0.3, seed=seed),
}


@pytest.mark.parametrize("name", MAKERS)
def test_partitions(name):
    make = MAKERS[name]
    data = make(ARRAYS, 30, 0)
    assert data.client_ids() == tuple(f"{i:02}" for i in range(30))
    assert_each_example_once(data)
    same, other = make(ARRAYS, 30, np.int64(0)), make(ARRAYS, 30, 1)
    numbers = [
        [d.client(i)["number"].tolist() for i in d.client_ids()] for d in (data, same, other)
    ]
    assert numbers[0] == numbers[1] != numbers[2]
    # The clients are slices of one copy.
    bases = {id(data.client(i)["image"].base.base) for i in data.client_ids()}
    bases |= {id(data.client(i)["image"].base) for i in data.client_ids()}
    spans = [data.client(i)["image"].__array_interface__["data"][0] for i in data.client_ids()]
    assert np.diff(spans).tolist() == (sizes(data)[:-1] * 16).tolist()


@settings(max_examples=60)
@given(
    st.sampled_from(["iid", "dirichlet", "balanced", "by_quantity"]),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(0, 30),
    st.floats(1e-3, 1e3),
    st.integers(0, 1000),
)
def test_small_partitions(name, clients, least, extra, alpha, seed):
    n = clients * least + extra
    arrays = {"number": np.arange(n), "y": np.random.default_rng(seed).integers(0, 4, n)}
    options = dict(seed=seed)
    if name != "iid":
        options |= dict(alpha=alpha, min_examples=least)
    if name == "balanced":
        options |= dict(balanced=True)
    data = getattr(partition, "dirichlet" if name == "balanced" else name)(
        arrays, clients, **options
    )
    assert_each_example_once(data, arrays)
    assert len(data) == clients
    assert sizes(data).min() >= (1 if name == "iid" else least)
    if name in ("iid", "balanced"):
        assert np.ptp(sizes(data)) <= 1


def test_iid_mixes_are_those_of_a_draw_without_replacement():
    counts = mixes(partition.iid(ARRAYS, 20))
    assert set(sizes(partition.iid(ARRAYS, 7))) == {171, 172}
    # Of a client's 60 examples, 6 have a label on average: hypergeometric, with this variance.
    variance = 60 * 0.1 * 0.9 * (N - 60) / (N - 1)
    assert abs(counts - 6).max() < 5 * np.sqrt(variance)
    assert counts.var() == pytest.approx(variance, rel=0.3)


@pytest.mark.parametrize("balanced", [False, True])
def test_dirichlet_tends_to_iid_and_to_one_label(balanced):
    def make(alpha):
        return mixes(partition.dirichlet(ARRAYS, 10, alpha=alpha, balanced=balanced, seed=3))

    alike = make(1e6)
    assert abs(alike - 12).max() <= (2 if not balanced else 14)
    single = make(1e-4)
    top = single.max(axis=1) / single.sum(axis=1)
    if balanced:  # 120 of each label for clients of 120 examples
        np.testing.assert_array_equal(top, 1)
    else:  # a label has one owner, but for single examples for those that had none
        assert (single.max(axis=0) >= 120 - 9).all()
        assert single.sum(axis=1).min() >= 1


def test_dirichlet_proportions_have_the_moments_of_the_distribution():
    """Var p = m (1 - m) / (c + 1), where m is the mean and c the sum of the concentrations."""
    n, clients, alpha = 40_000, 20, 0.7
    arrays = {"y": np.arange(n) % 4}

    def shares(**options):
        drawn = []
        for seed in range(40):
            data = partition.dirichlet(arrays, clients, alpha=alpha, seed=seed, **options)
            drawn.append([np.bincount(data.client(i)["y"], minlength=4) for i in data.client_ids()])
        return np.array(drawn)

    p = shares() / (n / 4)
    assert p.mean() == pytest.approx(1 / clients)
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert p.var() == pytest.approx(expected, rel=0.1)

    q = shares(balanced=True)[:, :8] / (n / clients)  # before labels run out
    assert q.mean() == pytest.approx(1 / 4)
    assert q.var() == pytest.approx(0.25 * 0.75 / (alpha + 1), rel=0.1)


def test_dirichlet_in_unequal_labels_follows_their_frequencies():
    labels = np.repeat([0, 1], [9000, 1000])
    data = partition.dirichlet({"y": labels}, 20, alpha=1e5, balanced=True)
    shares = [data.client(i)["y"].mean() for i in data.client_ids()]
    assert shares[:15] == pytest.approx([0.1] * 15, abs=0.06)  # the last ones take what is left


def test_dirichlet_gives_the_poor_from_the_rich():
    for least in (1, 5, 12):
        data = partition.dirichlet(ARRAYS, 100, alpha=0.01, min_examples=least)
        assert sizes(data).min() == least
        assert_each_example_once(data)
    with pytest.raises(
        DataError, match="1200 examples are too few for 100 clients with at least 13"
    ):
        partition.dirichlet(ARRAYS, 100, alpha=0.01, min_examples=13)


def one_by_one(owner, clients, least, rng):
    """The reference: one example after the other moves from whoever has most."""
    parts = [list(np.flatnonzero(owner == i)) for i in range(clients)]
    for poor in [part for part in parts if len(part) < least]:
        while len(poor) < least:
            rich = max(parts, key=len)
            poor.append(rich.pop(rng.integers(len(rich))))
    return parts


@settings(max_examples=100)
@given(
    st.sampled_from([np.random.PCG64, np.random.MT19937, np.random.Philox]),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 60),
    st.floats(0.1, 3),
    st.integers(0, 1000),
)
def test_gifts_are_those_of_one_after_the_other(generator, clients, least, extra, skew, seed):
    n = clients * least + extra
    shares = np.random.default_rng(seed).dirichlet(np.full(clients, skew))
    owner = np.random.default_rng(seed).choice(clients, n, p=shares)
    rngs = [np.random.Generator(generator(seed)) for _ in range(2)]
    found = examples_by_client(owner, clients, least, rngs[0])
    expected = one_by_one(owner, clients, least, rngs[1])
    assert [part.tolist() for part in found] == expected
    assert rngs[0].random() == rngs[1].random()  # as many draws


def test_thousands_of_gifts():
    """Everybody needs many, and a few have nearly everything."""
    owner = np.random.default_rng(0).integers(0, 3, 8000)
    found = examples_by_client(owner, 1000, 8, np.random.default_rng(1))
    expected = one_by_one(owner, 1000, 8, np.random.default_rng(1))
    assert [part.tolist() for part in found] == expected


def test_draws_stay_as_they_were():
    arrays = {"x": np.arange(12), "y": np.arange(12) % 3}
    uneven = partition.by_quantity(arrays, 4, alpha=0.1, min_examples=2, seed=5)
    mixed = partition.dirichlet(arrays, 4, alpha=0.1, balanced=True, seed=5)
    found = [[data.client(i)["x"].tolist() for i in data.client_ids()] for data in (uneven, mixed)]
    assert found == [
        [[0, 2, 3, 5, 7, 11], [10, 8], [9, 1], [4, 6]],
        [[5, 2, 8], [10, 1, 4], [6, 0, 11], [9, 3, 7]],
    ]


def test_shards():
    counts = mixes(partition.shards(ARRAYS, 60))
    assert (counts.sum(axis=1) == 20).all()
    assert ((counts > 0).sum(axis=1) <= 2).all()  # 12 shards are one label exactly
    assert (counts % 10 == 0).all()
    assert (mixes(partition.shards(ARRAYS, 120, shards_per_client=1)) > 0).sum() == 120
    with pytest.raises(DataError, match="too few"):
        partition.shards(ARRAYS, 601)


def test_by_column():
    data = partition.by_column(ARRAYS, "author", keep=True)
    assert_each_example_once(data)
    assert data.client_ids() == tuple(sorted(set(ARRAYS["author"])))
    for author in data.client_ids():
        expected = np.flatnonzero(ARRAYS["author"] == author)
        np.testing.assert_array_equal(data.client(author)["number"], expected)
        without = partition.by_column(ARRAYS, "author").client(author)
        assert without.keys() == ARRAYS.keys() - {"author"}
        np.testing.assert_array_equal(without["number"], expected)
    assert partition.by_column(ARRAYS, "y").client_ids() == tuple("0123456789")
    names = np.array([b"b", b"a", b"b"], object)
    assert partition.by_column({"name": names}, "name", keep=True).client_ids() == ("a", "b")
    ordered = np.repeat(np.arange(3), 4)
    data = partition.by_column({"x": ordered}, "x", keep=True)
    assert np.shares_memory(data.client("1")["x"], ordered)  # nothing to move, nothing copied


def test_by_quantity():
    shares = np.array(
        [sizes(partition.by_quantity(ARRAYS, 10, alpha=2.0, seed=s)) for s in range(100)]
    ) / len(ARRAYS["y"])
    assert shares.mean() == pytest.approx(0.1)
    assert shares.var() == pytest.approx(0.1 * 0.9 / (10 * 2.0 + 1), rel=0.1)
    even = partition.by_quantity(ARRAYS, 10, alpha=1e7)
    assert np.ptp(sizes(even)) <= 2
    uneven = partition.by_quantity(ARRAYS, 10, alpha=1e-3, min_examples=3)
    assert sorted(sizes(uneven))[:5] == [3] * 5
    assert abs(mixes(even) - 12).max() < 17  # labels are mixed


def test_an_alpha_of_any_kind_of_scalar():
    for alpha in (jnp.float32(0.5), np.float16(0.5), np.array(0.5), fractions.Fraction(1, 2)):
        for make in (partition.dirichlet, partition.by_quantity):
            found, expected = make(ARRAYS, 9, alpha=alpha), make(ARRAYS, 9, alpha=0.5)
            assert sizes(found).tolist() == sizes(expected).tolist()
    for alpha in (1e-100, 1e100):
        for options in ({}, {"balanced": True}):
            assert_each_example_once(partition.dirichlet(ARRAYS, 9, alpha=alpha, **options))
        assert_each_example_once(partition.by_quantity(ARRAYS, 9, alpha=alpha))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.iid(ARRAYS, 0), "iid: clients is 0, expected an int of at least 1"),
        (lambda: partition.iid(ARRAYS, 2.5), "clients is 2.5"),
        (lambda: partition.iid(ARRAYS, True), "clients is True"),
        (lambda: partition.iid(ARRAYS, 1201), "iid: 1200 examples are too few for 1201 clients"),
        (lambda: partition.iid([1, 2], 1), "iid: arrays is a list, expected a mapping"),
        (lambda: partition.iid({}, 1), "iid: arrays has no features"),
        (
            lambda: partition.iid({"x": np.ones(3), "y": np.ones(4)}, 1),
            "arrays has 3 examples by feature 'x', but 4 by 'y'",
        ),
        (lambda: partition.dirichlet(ARRAYS, 3, alpha=0), "dirichlet: alpha is 0, expected"),
        (lambda: partition.dirichlet(ARRAYS, 3, alpha=np.inf), "alpha is inf.*partition.iid"),
        (lambda: partition.dirichlet(ARRAYS, 3, alpha="1"), "alpha is '1'"),
        (lambda: partition.dirichlet(ARRAYS, 3, alpha=True), "alpha is True"),
        (lambda: partition.dirichlet(ARRAYS, 3, alpha=[0.5]), r"alpha is \[0.5\]"),
        (lambda: partition.by_quantity(ARRAYS, 3, alpha=1e-320), "alpha is 1e-320, .* 1e-100 to"),
        (lambda: partition.by_quantity(ARRAYS, 3, alpha=1e308), "1e.308, expected"),
        (lambda: partition.by_quantity(ARRAYS, 3, alpha=np.nan), "alpha is nan"),
        (lambda: partition.iid(ARRAYS, 3, seed=-1), "iid: seed is -1, expected an int from 0 to"),
        (lambda: partition.dirichlet(ARRAYS, 3, alpha=1, seed=0.5), "dirichlet: seed is 0.5"),
        (lambda: partition.shards(ARRAYS, 3, seed="a"), "shards: seed is 'a'"),
        (lambda: partition.by_quantity(ARRAYS, 3, alpha=1, seed=[-1]), r"seed is \[-1\]"),
        (lambda: partition.shards(ARRAYS, 3, label=["y"]), r"no feature \['y'\]. The arrays"),
        (lambda: partition.by_column({"x": [1]}, "x"), "'x' is the only feature.*keep=True"),
        *(
            (make, "arrays, feature 'y' mixes str and bytes")
            for labels in (["a", b"a", "b"], np.array(["a", b"a", "b"], object))
            for make in (
                lambda labels=labels: partition.by_column({"y": labels}, "y"),
                lambda labels=labels: partition.shards({"y": labels}, 1),
                lambda labels=labels: partition.dirichlet({"y": labels}, 1, alpha=1),
            )
        ),
        (lambda: partition.dirichlet(ARRAYS, 3, alpha=1, min_examples=0), "min_examples is 0"),
        (
            lambda: partition.dirichlet(ARRAYS, 3, alpha=1, label="z"),
            "no feature 'z'. The arrays",
        ),
        (
            lambda: partition.dirichlet(ARRAYS, 3, alpha=1, label="image"),
            r"'image' has shape \(1200, 2, 2\), expected one value",
        ),
        (lambda: partition.shards(ARRAYS, 3, shards_per_client=0), "shards_per_client is 0"),
        (
            lambda: partition.by_column({"x": [0.5]}, "x"),
            "by_column: feature 'x' has dtype float64",
        ),
    ],
)
def test_bad_partitions(call, message):
    with pytest.raises(DataError, match=message):
        call()
