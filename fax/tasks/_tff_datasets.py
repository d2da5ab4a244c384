"""The data sets that TensorFlow Federated publishes, prepared as FedJAX prepares them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fax.data
from fax.data import DataError, FederatedData
from fax.tasks._download import DownloadError, Source, cache_folder, check, files, record_of
from fax.tasks._tokens import Characters, Words

_FOLDER = "https://storage.googleapis.com/tff-datasets-public/"
# The checksums of CIFAR-100 and Shakespeare are in FedJAX's source, that of the words is in
# TensorFlow Federated's. For the other files none is published.
EMNIST = Source(_FOLDER + "emnist_all.sqlite.lzma")
CIFAR100 = Source(
    _FOLDER + "cifar100.sqlite.lzma",
    "23d3916c9caa33395737ee560cc7cb77bbd05fc7b73647ee7be3a7e764172939",
)
SHAKESPEARE = Source(
    _FOLDER + "shakespeare.sqlite.lzma",
    "d3d11fceb9e105439ac6f4d52af6efafed5a2a1e1eb24c5bd2dd54ced242f5c4",
)
STACKOVERFLOW = Source(_FOLDER + "stackoverflow.sqlite.lzma")
STACKOVERFLOW_WORDS = Source(
    _FOLDER + "stackoverflow.word_count.tar.bz2",
    "1dc00256d6e527c54b9756d968118378ae14e6692c0b3b6cad470cdd3f0c519c",
)

# The 86 characters of Shakespeare, in the order of TensorFlow's tutorial on text generation.
SHAKESPEARE_CHARACTERS = Characters(
    b"dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquyAEIMQUY]!%)-159\r"
)

_LONGEST_LINE = 1000  # bytes of a word and its count

Cache = str | os.PathLike[str] | None
Split = tuple[FederatedData, FederatedData]


def emnist(cache: Cache, digits_only: bool) -> Split:
    """Handwritten characters by writer, with 1 for ink and 0 for paper.

    The feature ``domain`` is 0 for writers at a high school, and 1 for those of the census.
    """
    prefix = "digits_only" if digits_only else "all"
    features = {"pixels": (np.float32, (28, 28)), "label": (np.int32, ())}
    return _splits(
        cache,
        EMNIST,
        [f"{prefix}_train", f"{prefix}_test"],
        features,
        functools.partial(_emnist, classes=10 if digits_only else 62),
    )


def _emnist(client_id: str, examples: Any, classes: int) -> dict[str, np.ndarray]:
    pixels = examples["pixels"]
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise DataError(
            f"client {client_id!r}, feature 'pixels' has values from {pixels.min()} to "
            f"{pixels.max()}, expected 0 to 1."
        )
    # In some versions there is a checksum before the writer's number.
    found = re.fullmatch(r"(?:.{16}:)?f(\d{4})_\d\d", client_id)
    if not found:
        raise DataError(f"client {client_id!r} is not the id of a writer, such as f0123_45.")
    domain = 0 if 2100 <= int(found[1]) <= 2599 else 1
    labels = _labels(client_id, examples["label"], classes)
    return {"x": 1 - pixels[..., None], "y": labels, "domain": np.full_like(labels, domain)}


def cifar100(cache: Cache) -> Split:
    """Images of 100 classes: the central 24 x 24 pixels, with mean 0 and standard deviation 1."""
    features = {"image": (np.uint8, (32, 32, 3)), "label": (np.int32, ())}
    return _splits(cache, CIFAR100, ["train", "test"], features, _cifar100)


def _cifar100(client_id: str, examples: Any) -> dict[str, np.ndarray]:
    images = examples["image"][:, 4:28, 4:28].astype(np.float32)
    mean = images.mean((1, 2, 3), keepdims=True)
    deviation = images.std((1, 2, 3), keepdims=True)
    # The least deviation is that of TensorFlow's per_image_standardization.
    deviation = np.maximum(deviation, 1 / np.sqrt(np.float32(images[0].size)))
    return {"x": (images - mean) / deviation, "y": _labels(client_id, examples["label"], 100)}


def shakespeare(cache: Cache, length: int) -> Split:
    """The lines of Shakespeare's characters, to predict the next letter."""
    prepare = functools.partial(_characters, length=length)
    features = {"snippets": (bytes, ())}
    return _splits(cache, SHAKESPEARE, ["train", "test"], features, prepare, keeps_length=False)


def _characters(client_id: str, examples: Any, length: int) -> dict[str, np.ndarray]:
    return SHAKESPEARE_CHARACTERS.sequences(examples["snippets"], length)


def stackoverflow(cache: Cache, length: int, vocabulary_size: int) -> Split:
    """Sentences of questions and answers, to predict the next word.

    The feature ``domain`` is 0 for questions, and 1 for answers.
    """
    database, archive = files(cache_folder(cache), STACKOVERFLOW, STACKOVERFLOW_WORDS)
    words = Words(_most_frequent(archive, vocabulary_size))
    features = {"tokens": (bytes, ()), "type": (bytes, ())}
    prepare = functools.partial(_sentences, words=words, length=length)
    return _opened(database, STACKOVERFLOW, ["train", "test"], features, prepare)


def _sentences(client_id: str, examples: Any, words: Words, length: int) -> dict[str, np.ndarray]:
    domain = np.array([kind == b"answer" for kind in examples["type"]], np.int32)
    return {**words.sequences(examples["tokens"], length), "domain": domain}


def _most_frequent(archive: Path, size: int) -> list[str]:
    """The words that most people use: the first words of a list of words and counts."""
    try:
        with tarfile.open(archive, "r:bz2") as tar:
            file = tar.extractfile("stackoverflow.word_count")
            assert file is not None
            parts = iter(lambda: file.readline(_LONGEST_LINE), b"")
            lines = [line.decode().split() for line in itertools.islice(parts, size)]
    except (tarfile.TarError, KeyError, OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(
            f"{archive} is not Stack Overflow's list of words, stackoverflow.word_count in a "
            f".tar.bz2: {error}. Remove it, and load the task again."
        ) from error
    for number, line in enumerate(lines, 1):
        if len(line) != 2 or not line[1].isdigit():
            raise DataError(
                f"{archive}: line {number} is {' '.join(line)!r:.80}, expected a word and its "
                "count. It is another vocabulary. Remove it, and load the task again."
            )
    counts = [int(count) for _, count in lines]
    if len(lines) < size or counts != sorted(counts, reverse=True):
        raise DataError(
            f"{archive} has {len(lines)} words, expected at least vocabulary_size={size}, the most "
            "frequent first. It is another vocabulary. Remove it, and load the task again."
        )
    words = [word for word, _ in lines]
    if len(set(words)) < len(words):
        twice = next(word for word in words if words.count(word) > 1)
        raise DataError(
            f"{archive} has {twice!r} more than once. It is another vocabulary. Remove it, and "
            "load the task again."
        )
    return words


def _splits(cache: Cache, source: Source, *arguments: Any, **keywords: Any) -> Split:
    (path,) = files(cache_folder(cache), source)
    return _opened(path, source, *arguments, **keywords)


def _opened(
    path: Path,
    source: Source,
    splits: list[str],
    features: dict[str, Any],
    prepare: Callable,
    keeps_length: bool = True,
) -> Split:
    """The splits of a file, whose clients are prepared when they are read."""
    plain = path.with_suffix("")
    if not plain.exists():
        record_of(plain).unlink(missing_ok=True)
    with _published(path, source):
        sources = [fax.data.SQLite(path, split, features) for split in splits]
    check(plain, None, "Remove it, and load the task again, so that it is decompressed again.")
    train, test = (fax.data.map(d, prepare, keeps_length=keeps_length) for d in sources)
    with _published(path, source):
        first = train.client_ids()[0]
        train.client(first)  # to find out now if the file is of another version
    return train, test


@contextlib.contextmanager
def _published(path: Path, source: Source) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DownloadError(
            f"{path} is damaged, or not the version that fax.tasks knows: {error} Remove it and "
            f"the decompressed file, and load the task again. {source.url} has the right version."
        ) from error


def _labels(client_id: str, labels: np.ndarray, classes: int) -> np.ndarray:
    if labels.min() < 0 or labels.max() >= classes:
        bad = labels[(labels < 0) | (labels >= classes)][0]
        raise DataError(
            f"client {client_id!r}, feature 'label' has the label {bad}, expected 0 to "
            f"{classes - 1}. The file is another version."
        )
    return labels
