"""Evaluation adds up exactly, whatever the dtype of a metric, and tells of scores that are NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fax
from fax import metrics as fm

SIZES = [30_000, 1, 7, 169_992]  # of clients
OFTEN = sum(SIZES)


def apply(params, batch):
    return floats(batch["scores"]) if "scores" in batch else batch["x"]


def evaluations(arrays, sizes, metrics, batch_size):
    """Metrics of everybody, of each client, and of each client with a model of its own."""
    ends = np.cumsum(sizes)[:-1]
    parts = {name: np.split(x, ends) for name, x in arrays.items()}
    clients = {str(i): {name: p[i] for name, p in parts.items()} for i in range(len(sizes))}
    data, own = fax.data.InMemory(clients), np.zeros(len(sizes), np.float32)

    with jax.enable_x64(False):
        yield fm.evaluate(apply, own[0], data, metrics, batch_size=batch_size)
        yield fm.evaluate_clients(apply, own[0], data, metrics, batch_size=batch_size)
        yield fm.evaluate_clients(apply, own, data, metrics, batch_size=batch_size, personal=True)


def floats(bits):
    """Data may not hold NaN, but the bits of one."""
    return lax.bitcast_convert_type(bits, jnp.float32)


# Of integers from 0 to 2**31 - 1. In 32 bits bfloat16 stops at 256 and float32 at 2**24, and
# integers start over.
TERMS = {
    "bool": lambda x: x % 2 == 0,
    "uint8": lambda x: (x % 251).astype("uint8"),
    "int8": lambda x: (x % 3 - 2).astype("int8"),
    "int32": lambda x: x,
    "negative": lambda x: -x,
    "uint32": lambda x: x.astype("uint32") + np.uint32(2**31),
    "bfloat16": lambda x: (x % 256).astype("bfloat16"),
    "float16": lambda x: (x % 2).astype("float16"),
    "tenths": lambda x: (0 * x).astype("float32") + np.float32(0.1),
    "far apart": lambda x: (x % 4096).astype("float32") * x.astype("float32"),
}

SUMS = {name: lambda batch, _, of=of: fm.Sum(of(batch["x"])) for name, of in TERMS.items()}


@pytest.mark.always("200000")
@pytest.mark.parametrize("batch_size", [1000, OFTEN])
def test_sums_are_those_of_64_bits(batch_size):
    x = np.random.default_rng(0).integers(0, 2**31, OFTEN, np.int32)
    x[:2] = 2**31 - 1, 0
    whole, each, personal = evaluations({"x": x}, SIZES, SUMS, batch_size)
    for name, of in TERMS.items():
        terms = of(x)
        exact = terms.dtype.kind in "biu"
        terms = terms.astype(np.int64 if exact else np.float64)
        expected = np.array([own.sum() for own in np.split(terms, np.cumsum(SIZES)[:-1])])
        for found, sums in ((whole, expected.sum()), (each, expected), (personal, expected)):
            assert found[name].dtype == (np.int64 if exact else np.float64)
            np.testing.assert_allclose(found[name], sums, rtol=0 if exact else 5e-8, err_msg=name)


def test_a_share_in_bfloat16_is_exact():
    hits = (np.arange(1202) % 2).astype("bfloat16")

    def share(batch, scores):
        return fm.Mean(batch["x"], jnp.ones_like(batch["x"]))

    for found in evaluations({"x": hits}, [602, 600], {"share": share}, 600):
        np.testing.assert_array_equal(found["share"], 0.5)


def test_what_is_not_finite_stays_so_and_goes_no_further():
    x = np.array([1, np.inf, 2, np.nan, 3, 3e38, 3e38], np.float32)

    def total(batch, scores):
        return fm.Sum(floats(batch["x"]))

    whole, *each = evaluations({"x": x.view(np.int32)}, [1, 2, 2, 1, 1], {"total": total}, 3)
    assert np.isnan(whole["total"])
    for found in each:
        np.testing.assert_array_equal(found["total"], [1, np.inf, np.nan, x[5], x[6]])


def test_statistics_of_short_dtypes_are_added_up_in_longer_ones():
    each = fm.Mean(jnp.ones(1000, "bfloat16"), jnp.ones(1000, "bfloat16"))
    assert each.sum().weight == each.sum().merge(each.sum()).weight / 2 == 1000
    counts = fm.Sum(jnp.full(3, 200, jnp.uint8))
    np.testing.assert_array_equal(counts.merge(counts).result(), 400)
    host = fm.Sum(np.full(2, 2**31 - 1, np.int32))
    np.testing.assert_array_equal(host.merge(host).result(), 2**32 - 2)
    with jax.enable_x64(False):  # a total on the host is not cut to the 32 bits of a batch's
        host, device = fm.Sum(2**31), fm.Sum(jnp.int32(5))
        assert host.merge(device).result() == device.merge(host).result() == 2**31 + 5
    zero = jax.jit(lambda stat: stat.zero())(fm.Sum(jnp.full(2, jnp.nan)))
    np.testing.assert_array_equal(zero.result(), 0)


def test_scores_that_are_nan_are_wrong_and_counted():
    scores = np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 0, 1]]
    scores[1, 2] = scores[4] = np.nan  # of which NumPy's argmax would make class 2 and 0
    scores[2, 0] = -np.inf  # says "never"
    scores[5, 1] = np.inf
    y = np.array([0, 2, 1, 0, 0, 1])
    metrics = {
        "accuracy": fm.Accuracy(),
        "top2": fm.TopK(2),
        "confusion": fm.ConfusionMatrix(3),
        "token": lambda b, s: fm.TokenAccuracy(ignore=())({"y": b["y"][:, None]}, s[:, None]),
    }
    found = list(evaluations({"scores": scores.view(np.int32), "y": y}, [4, 2], metrics, 4))
    for name in ("accuracy", "token"):
        np.testing.assert_allclose(found[0][name], 3 / 6)
        for each in found[1:]:
            np.testing.assert_allclose(each[name], [2 / 4, 1 / 2])
    np.testing.assert_allclose(found[0]["top2"], 4 / 6)
    np.testing.assert_array_equal(found[0]["confusion"], [[1, 0, 1], [0, 2, 0], [0, 0, 0]])
    np.testing.assert_array_equal(found[0]["non_finite"], 3)
    for each in found[1:]:
        np.testing.assert_array_equal(each["non_finite"], [1, 2])


def test_the_name_of_the_count_is_taken():
    data = fax.data.InMemory({"a": {"x": np.ones((3, 2)), "y": np.ones(3, int)}})
    with pytest.raises(ValueError, match=r"metrics has the name 'non_finite', which is used for"):
        fm.evaluate(lambda p, b: b["x"], None, data, {"non_finite": fm.Accuracy()})


def test_examples_are_read_once_with_the_settings_of_the_caller():
    """A thread reads them, in which a `with` of the caller's thread has no effect by itself."""
    reads = []

    def read(client_id, examples):
        reads.append(client_id)
        return examples

    clients = {i: {"x": np.array([0, 2**40 if i == 3 else 1])} for i in range(4)}
    data = fax.data.map(fax.data.InMemory(clients), read)
    fm.prepare(data, batch_size=4)
    assert reads == [0, 0, 1, 2, 3]  # the first one also for its dtypes
    with (
        jax.enable_x64(False),
        pytest.raises(fax.data.DataError, match=r"client 3, feature 'x' .* do not fit int32"),
    ):
        fm.prepare(data)
