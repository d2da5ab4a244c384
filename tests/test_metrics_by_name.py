"""Metrics of classes, yes-or-no labels and regression, and fairness, against scikit-learn."""

import dataclasses
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as reference

import fax
from fax.metrics import AUC, F1, PSNR, R2, AveragePrecision, Precision, Recall
from fax.metrics._exact_sums import Parts
from fax.metrics._names import NAMED

CLASSES, LABELS, EXAMPLES = 4, 3, 211
RNG = np.random.default_rng(3)
Y = RNG.choice(CLASSES - 1, EXAMPLES)  # class 3 is never there, but is predicted
SCORES = RNG.normal(size=(EXAMPLES, CLASSES)).astype(np.float32)
SCORES[:, 3] -= 2  # seldom
TAGS = RNG.random((EXAMPLES, LABELS)) < (0.5, 0.1, 0.9)
LOGITS = (2 * RNG.normal(size=(EXAMPLES, LABELS)) + TAGS).astype(np.float32)
TARGETS = (RNG.normal(size=(EXAMPLES, 2)) * (1, 5)).astype(np.float32)
TARGETS[60] = 0.1  # all that client c2 has
GUESSES = (TARGETS + RNG.normal(size=TARGETS.shape)).astype(np.float32)
PREDICTED = SCORES.argmax(1)


def clients(**features):
    """Clients of different sizes, and the rows of each."""
    ends = [0, 3, 60, 61, 140, EXAMPLES]
    rows = [slice(a, b) for a, b in itertools.pairwise(ends)]
    own = {f"c{i}": {k: x[part] for k, x in features.items()} for i, part in enumerate(rows)}
    return fax.data.InMemory(own), rows


def scores(params, batch):
    return batch["x"]


def sharpness(scores):
    return np.exp(scores) / np.exp(scores).sum(1, keepdims=True)


def calibration(scores, labels, bins):
    """The expected calibration error, as its paper writes it."""
    confidence, hit = sharpness(scores).max(1), scores.argmax(1) == labels
    error = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return error


def per_class(measure, **options):
    return measure(Y, PREDICTED, zero_division=0, **options)


CASES = {
    "precision": (SCORES, Y, Precision(), per_class(reference.precision_score, average="macro")),
    "recall": (SCORES, Y, Recall(), per_class(reference.recall_score, average="macro")),
    "f1": (SCORES, Y, F1(), per_class(reference.f1_score, average="macro")),
    "micro f1": (SCORES, Y, F1("micro"), per_class(reference.f1_score, average="micro")),
    "f1 of classes": (SCORES, Y, F1("none"), per_class(reference.f1_score, average=None)),
    "tags": (
        LOGITS,
        TAGS,
        F1("micro", binary=True),
        reference.f1_score(TAGS, LOGITS > 0, average="micro"),
    ),
    "a tag": (
        LOGITS[:, 1],
        TAGS[:, 1].astype(np.int32),
        Precision(binary=True),
        reference.precision_score(TAGS[:, 1], LOGITS[:, 1] > 0),
    ),
    "binary accuracy": (LOGITS, TAGS, "binary_accuracy", ((LOGITS > 0) == TAGS).mean()),
    "accuracy": (SCORES, Y, "accuracy", reference.accuracy_score(Y, PREDICTED)),
    "calibration": (SCORES, Y, "calibration_error", calibration(SCORES, Y, 15)),
    "mse": (GUESSES, TARGETS, "mse", reference.mean_squared_error(TARGETS, GUESSES)),
    "psnr": (
        *(GUESSES, TARGETS, "psnr"),
        -10 * np.log10(reference.mean_squared_error(TARGETS, GUESSES)),
    ),
    "psnr of bytes": (
        *(GUESSES, TARGETS, PSNR(peak=255)),
        10 * np.log10(255**2 / reference.mean_squared_error(TARGETS, GUESSES)),
    ),
    "mae": (GUESSES, TARGETS, "mae", reference.mean_absolute_error(TARGETS, GUESSES)),
    "r2": (GUESSES, TARGETS, "r2", reference.r2_score(TARGETS, GUESSES)),
    "r2, far from 0": (GUESSES + 1e4, TARGETS + 1e4, R2(center=1e4), None),
}


@pytest.mark.parametrize("name", CASES)
def test_against_scikit_learn(name):
    x, y, metric, expected = CASES[name]
    if expected is None:
        expected = reference.r2_score(y.astype(np.float64), x.astype(np.float64))
    data, _ = clients(x=x, y=y)
    found = fax.metrics.evaluate(scores, jnp.zeros(1), data, {"it": metric})["it"]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_each_client_has_its_own():
    data, rows = clients(x=SCORES, y=Y)
    metrics = {"f1": F1(), "classes": Recall("none"), "error": fax.metrics.CalibrationError(5)}
    found = fax.metrics.evaluate_clients(scores, jnp.zeros(1), data, metrics)
    own = jnp.zeros((len(rows), 1))
    personal = fax.metrics.evaluate_clients(scores, own, data, metrics, personal=True)
    options = dict(labels=range(CLASSES), average=None, zero_division=0)
    for i, part in enumerate(rows):
        f1 = reference.f1_score(Y[part], PREDICTED[part], average="macro", zero_division=0)
        recall = reference.recall_score(Y[part], PREDICTED[part], **options)
        for results in (found, personal):
            np.testing.assert_allclose(results["f1"][i], f1, rtol=1e-6)
            np.testing.assert_allclose(results["classes"][i], recall, rtol=1e-6)
            expected = calibration(SCORES[part], Y[part], 5)
            np.testing.assert_allclose(results["error"][i], expected, rtol=1e-5)
    r2 = fax.metrics.evaluate_clients(
        scores, jnp.zeros(1), clients(x=GUESSES, y=TARGETS)[0], {"r2": "r2"}
    )["r2"]
    assert np.isnan(r2[2])  # one example has no spread, but 0.1² is rounded
    np.testing.assert_allclose(
        r2[[0, 1, 3, 4]],
        [reference.r2_score(TARGETS[rows[i]], GUESSES[rows[i]]) for i in (0, 1, 3, 4)],
        rtol=1e-5,
    )


def total(metric, y, logits):
    """The sum of what a metric finds, in one program."""
    return jax.jit(lambda y, logits: metric(dict(y=y), logits).sum())(y, logits)


@pytest.mark.parametrize(
    ("exact", "theirs", "metric"),
    [
        (fax.metrics.roc_auc, reference.roc_auc_score, AUC),
        (fax.metrics.average_precision, reference.average_precision_score, AveragePrecision),
    ],
)
def test_rankings(exact, theirs, metric):
    for logits in (LOGITS, np.round(LOGITS), LOGITS.astype(np.float16)):  # also with ties
        for i in range(LABELS):
            found = exact(logits[:, i], TAGS[:, i])
            np.testing.assert_allclose(found, theirs(TAGS[:, i], logits[:, i]), rtol=1e-12)
    data, _ = clients(x=LOGITS, y=TAGS)
    expected = theirs(TAGS, LOGITS, average="macro")
    largest = {2: 1, 8: 0.8, 64: 0.2, 4096: 4e-3}  # bounds, by the number of bins
    metrics = {str(bins): metric(bins=bins) for bins in largest}
    together = jax.jit(
        lambda y, logits: {name: own({"y": y}, logits).sum() for name, own in metrics.items()}
    )(TAGS, LOGITS)
    found = fax.metrics.evaluate(scores, jnp.zeros(1), data, metrics)
    for bins, too_much in largest.items():
        merged = together[str(bins)]
        bound = merged.bound()
        assert abs(merged.result() - expected) <= bound + 1e-12
        assert 0 <= bound < too_much
        np.testing.assert_allclose(found[str(bins)], merged.result(), rtol=1e-12)
    # A histogram whose bins are the values themselves is exact.
    rounded = np.clip(np.round(LOGITS), -8, 7)
    merged = total(metric(bins=16, limit=8.0), TAGS, rounded + 0.5)
    np.testing.assert_allclose(merged.result(), theirs(TAGS, rounded), rtol=1e-12)
    # Worst cases of the bound: all of a bin in the best, or in the worst order.
    one_bin = total(metric(bins=2), np.array([1, 1, 0, 0]), np.array([1.0, 2.0, 3.0, 4.0]))
    for order in ([4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]):
        assert abs(one_bin.result() - theirs([1, 1, 0, 0], order)) <= one_bin.bound() + 1e-12
    rng = np.random.default_rng(0)
    for _ in range(30):  # few scores, in bins of some labels 1 alone, some 0 alone, and both
        few, tags = rng.permutation(6) / 2, np.array([1, 1, 1, 0, 0, rng.integers(2)])
        counts = (np.bincount(few.astype(int), tags == label, 3)[None, ::-1] for label in (1, 0))
        binned = dataclasses.replace(one_bin, **dict(zip(("positive", "negative"), counts)))
        assert abs(binned.result() - theirs(tags, few)) <= binned.bound() + 1e-12
    signed = np.clip(np.round(20 * LOGITS[:, 0]), -128, 127).astype(np.int8)
    for few in (signed, signed.view(np.uint8), signed > 0):  # -few would wrap around, or fail
        few_exact = theirs(TAGS[:, 0], few.astype(float))
        np.testing.assert_allclose(exact(few, TAGS[:, 0]), few_exact, rtol=1e-12)
    by_two = total(metric(limit=300.0), TAGS[:, 0], np.stack([-1 - signed, signed], -1))
    same = total(metric(limit=300.0), TAGS[:, 0], 1 + 2 * signed.astype(np.float32))
    assert by_two.result() == same.result()
    assert np.isnan(exact([0.5, 0.2], [0, 0]))
    assert np.isnan(total(metric(), np.array([0, 0]), np.array([0.5, 0.2])).result())
    nothing = total(metric(), np.array([0, 1, 1]), np.array([0.5, 1.0, np.nan]))
    assert nothing.result() == 1


def test_perplexity():
    tokens = RNG.integers(0, 5, (30, 6))
    tokens[:, 0] = 1  # every sequence has a token
    parts = [slice(10 * i, 10 * i + 10) for i in range(3)]
    own = {f"c{p.start}": {"x": RNG.normal(size=(10, 6, 5)), "y": tokens[p]} for p in parts}
    log_probs = np.log(np.concatenate([np.exp(e["x"]) for e in own.values()]))
    log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, tokens[..., None], -1)[..., 0]
    found = fax.metrics.evaluate(scores, jnp.zeros(1), fax.data.InMemory(own), "perplexity")
    np.testing.assert_allclose(found["perplexity"], np.exp(-chosen[tokens != 0].mean()), rtol=1e-5)


def test_the_documentation_lists_all_names():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "metrics.md").read_text("utf-8")
    listed = page[page.index("The names are") :].partition(".")[0]
    assert re.findall(r"`(\w+)`", listed) == list(NAMED)


def test_names():
    data, _ = clients(x=SCORES, y=Y)
    expected = fax.metrics.evaluate(
        scores, jnp.zeros(1), data, {"accuracy": fax.metrics.Accuracy(), "f1": F1()}
    )
    for metrics in (["accuracy", "f1"], ("accuracy", "f1"), {"accuracy": "accuracy", "f1": F1()}):
        assert fax.metrics.evaluate(scores, jnp.zeros(1), data, metrics) == expected
    with pytest.raises(ValueError, match=r"no metric 'acuracy'. Did you mean 'accuracy'"):
        fax.metrics.evaluate(scores, jnp.zeros(1), data, ["acuracy"])
    with pytest.raises(ValueError, match=r"metrics is \[3\], expected a mapping .* or names"):
        fax.metrics.evaluate_clients(scores, jnp.zeros(1), data, [3])


def test_labels_that_are_neither_0_nor_1():
    data, _ = clients(x=LOGITS[:, 0], y=np.where(np.arange(EXAMPLES) == 100, 2, TAGS[:, 0]))
    for metric in ("auc", "binary_accuracy", F1(binary=True)):
        with pytest.raises(fax.data.DataError, match=r"'c3', feature 'y' has 2, .* 0 to 1"):
            fax.metrics.evaluate(scores, jnp.zeros(1), data, {"it": metric})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fax.metrics.roc_auc([1.0], [0, 1]), r"shape \(1,\) and labels \(2,\)"),
        (lambda: fax.metrics.roc_auc([1.0, np.nan], [0, 1]), r"scores\[1\] is NaN"),
        (lambda: fax.metrics.average_precision([1.0, 2.0], [0, 3]), r"labels\[1\] is .*3"),
        (lambda: fax.metrics.roc_auc(["a", "b"], [0, 1]), "scores are <U1, expected real numbers"),
        (
            lambda: fax.metrics.roc_auc(np.ma.array([1.0, 2.0, 3.0], mask=[0, 0, 1]), [0, 1, 0]),
            "roc_auc: scores has masked values",
        ),
        (
            lambda: fax.metrics.average_precision([1, 2], np.ma.array([0, 1], mask=[1, 0])),
            "average_precision: labels has masked values",
        ),
        (
            lambda: fax.metrics.fairness(np.ma.array([1.0, 2.0], mask=[0, 1])),
            "fairness: values has masked values. Pass only those that count",
        ),
        (lambda: F1("weighted"), "F1: average is 'weighted', expected"),
        (lambda: F1(binary=1), "F1: binary is 1"),
        (lambda: AUC(bins=1), "AUC: bins is 1"),
        (lambda: AUC(limit=0), "AUC: limit is 0"),
        (lambda: fax.metrics.MSE(label=3), "MSE: label is 3"),
        (lambda: fax.metrics.MSE()(dict(y=jnp.zeros(3)), jnp.zeros((3, 2))), r"shape \(3, 2\) and"),
        (lambda: AUC()(dict(y=jnp.zeros(3, int)), jnp.zeros((3, 4))), r"shape \(3, 4\) and labels"),
        (lambda: AUC()(dict(y=jnp.zeros(3)), jnp.zeros(3)), "labels are float.* Convert them"),
        (lambda: F1()(dict(y=jnp.zeros(3, int)), jnp.zeros(3)), "one for each label and class"),
        (lambda: fax.metrics.fairness([1.0, np.nan]), r"is nan.*: values\[np.isfinite\(values\)\]"),
        (lambda: fax.metrics.fairness([]), "expected a number for each client"),
        (lambda: fax.metrics.fairness([1.0], percentiles=[101]), "percentiles is 101"),
        (lambda: fax.metrics.fairness([1.0], percentiles=50), "percentiles is 50, expected a list"),
        (lambda: PSNR(peak=0), "PSNR: peak is 0, expected a number above 0"),
        (lambda: evaluated({3: "mse"}), "a key of metrics is 3, expected a string, the name of a"),
        (
            lambda: evaluated({"m": PSNR(peak=np.array(2.0))}),
            "evaluate: metric 'm' cannot be hashed, .* Pass numbers of Python for its attributes",
        ),
        (lambda: evaluated({"m": PSNR("z")}), "metric 'm' needs the feature 'z', but clients have"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def evaluated(metrics):
    return fax.metrics.evaluate(scores, jnp.zeros(1), clients(x=GUESSES, y=TARGETS)[0], metrics)


def test_a_single_number_is_a_scalar():
    counts = np.array([1, 2]), np.array([2, 2]), np.array([4, 2])
    assert isinstance(F1("micro").statistic(*counts).result(), np.float64)
    assert isinstance(Parts((jnp.ones(()),), None).value(), np.float64)


def test_fairness():
    values = RNG.permutation(np.arange(40.0)) / 40
    found = fax.metrics.fairness(values)
    assert found.worst_tenth == pytest.approx(np.arange(4).mean() / 40)
    assert found.best_tenth == pytest.approx(np.arange(36, 40).mean() / 40)
    assert found.variance == pytest.approx(values.var())
    assert found.gap == pytest.approx(values.mean() - np.arange(4).mean() / 40)
    assert found.percentiles == {p: np.percentile(values, p) for p in (5, 25, 50, 75, 95)}
    losses = fax.metrics.fairness(values, higher_is_better=False, percentiles=iter([90]))
    assert list(losses.percentiles) == [90]
    assert losses.worst_tenth == pytest.approx(found.best_tenth)
    assert losses.best_tenth == pytest.approx(found.worst_tenth)
    assert losses.gap == pytest.approx(np.arange(36, 40).mean() / 40 - values.mean())
    assert fax.metrics.fairness([0.5, 0.7]).worst_tenth == 0.5
    assert fax.metrics.fairness(jnp.array([0.5, 0.75], jnp.bfloat16)).mean == 0.625


def test_statistics_merge_in_any_order():
    halves = slice(0, 100), slice(100, None)
    for metric, x, y in [(F1(), SCORES, Y), (AUC(), LOGITS, TAGS), (R2(), GUESSES, TARGETS)]:
        whole = total(metric, y, x)
        one, other = (total(metric, y[h], x[h]) for h in halves)
        for merged in (one.merge(other), other.merge(one.merge(one.zero()))):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), merged, whole)
