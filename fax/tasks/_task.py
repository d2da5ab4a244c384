"""Tasks: data, a model, metrics, and settings that are known to work."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import fax.metrics
import fax.models
from fax import _arguments
from fax.data import FederatedData
from fax.tasks import _local_datasets, _packaged_datasets, _photographs, _tff_datasets
from fax.tasks._settings import Settings, tuned
from fax.tasks._tokens import BOS, EOS, PAD, Characters


@dataclass(frozen=True)
class Task:
    """A benchmark of federated learning.

    Attributes:
      name: of the task.
      train: the clients to train with.
      test: the clients to evaluate on.
      model: the model.
      metrics: metrics for `fax.metrics.evaluate`, by name.
      settings: settings with which the model learns well.

    Example:

      >>> task = fax.tasks.load("digits", clients=20)
      >>> task
      Task('digits', train=20 clients, test=1 clients, metrics=loss, accuracy)
    """

    name: str
    train: FederatedData
    test: FederatedData
    model: fax.models.Model
    metrics: Mapping[str, Any]
    settings: Settings

    def __repr__(self) -> str:
        sizes = f"train={len(self.train)} clients, test={len(self.test)} clients"
        return f"Task({self.name!r}, {sizes}, metrics={', '.join(self.metrics)})"


def load(name: str, cache: str | os.PathLike[str] | None = None, **options: Any) -> Task:
    """Loads a task, and downloads its files if they are not there yet.

    ===================  ========================================  ================================
    task                 clients                                   options
    ===================  ========================================  ================================
    ``"digits"``         scikit-learn's digits, by Dirichlet       ``clients=100``, ``alpha=0.5``,
                         proportions                               ``seed=0``
    ``"pystdlib"``       modules of Python's standard library,     ``length=80``
                         the next character
    ``"flights"``        3,146 aircraft that left New York, is a
                         flight late
    ``"bible"``          66 books of the Bible, the next           ``length=80``
                         character
    ``"photographs"``    10 photographs in color, squares of       ``noise=25.0``, ``seed=0``
                         16 x 16 pixels without noise
    ``"emnist"``         3,400 writers of 62 characters            ``model="conv"``, ``"dense"`` or
                                                                   ``"logistic"``;
                                                                   ``digits_only=False``
    ``"cifar100"``       500, with images of 100 classes           ``model="logistic"`` or
                                                                   ``"resnet18"``
    ``"shakespeare"``    715 characters of plays, the next letter  ``length=80``
    ``"stackoverflow"``  342,477 people who ask and answer,        ``length=20``,
                         the next word                             ``vocabulary_size=10_000``
    ===================  ========================================  ================================

    The first five need no network: scikit-learn, Python and the packages of the extra ``datasets``
    have their data. The others use files of TensorFlow Federated, which are kept in
    a folder: ``cache``, or else the environment variable ``FAX_CACHE``, or else the user's folder
    for caches.

    Args:
      name: of the task.
      cache: the folder for downloaded files.
      **options: the options of the task.

    Returns:
      The task. Clients of files are read when they are needed.

    Raises:
      ValueError: if there is no such task, or an option is out of range.
      TypeError: if the task has no such option.
      DownloadError: if a file cannot be downloaded, or is not the published one. The message says
        which files to download by hand, and where to put them.

    Example:

      >>> task = fax.tasks.load("digits", clients=20)
      >>> len(task.train), task.train.client("00")["x"].shape[1:], task.settings.rounds
      (20, (64,), 300)
    """
    if cache is not None:
        _arguments.path("fax.tasks.load", "cache", cache)
    build = TASKS[_arguments.choice("fax.tasks.load", "name", name, sorted(TASKS))]
    _arguments.options(f"fax.tasks.load({name!r})", options, options_of(name))
    return build(cache, **options)


def options_of(name: str) -> list[str]:
    """The options of a task."""
    return [p for p in inspect.signature(TASKS[name]).parameters if p != "cache"]


def _classifier_metrics() -> dict[str, Any]:
    """The metrics of a classifier."""
    return {"loss": fax.metrics.CrossEntropy(), "accuracy": fax.metrics.Accuracy()}


def _language_metrics(oov: int) -> dict[str, Any]:
    """The metrics of a language model. As in FedJAX, the ends of texts need not be predicted."""
    ignore = (PAD, EOS)
    return {
        "loss": fax.metrics.TokenLoss(),
        "accuracy": fax.metrics.TokenAccuracy(ignore=ignore),
        "accuracy_in_vocabulary": fax.metrics.TokenAccuracy(
            ignore=ignore, exclude=(PAD, BOS, EOS, oov)
        ),
        "sequence_loss": fax.metrics.SequenceLoss(),
        "sequence_length": fax.metrics.SequenceLength(),
        "tokens": fax.metrics.TokenCount(),
        "oov_rate": fax.metrics.OOVRate((oov,)),
    }


def _digits(cache: Any, *, clients: int = 100, alpha: float = 0.5, seed: int = 0) -> Task:
    """Handwritten digits of scikit-learn, divided over clients in Dirichlet proportions."""
    seed = _arguments.seed("fax.tasks.load('digits')", seed)
    return Task(
        "digits",
        *_local_datasets.digits(clients, alpha, seed),
        fax.models.create("dense", sizes=(64, 512, 10)),
        _classifier_metrics(),
        tuned("digits"),
    )


def _next_character(name: str, characters: Characters, data: _local_datasets.Split) -> Task:
    """A task of text on which the LSTM of characters is trained."""
    return Task(
        name,
        *data,
        fax.models.create("char_lstm", num_tokens=characters.size),
        _language_metrics(characters.size - 1),
        tuned(name),
    )


def _pystdlib(cache: Any, *, length: int = 80) -> Task:
    """The next character of the modules of Python's standard library."""
    data = _local_datasets.pystdlib(length)
    return _next_character("pystdlib", _local_datasets.PYTHON_CHARACTERS, data)


def _flights(cache: Any) -> Task:
    """Whether a flight arrives late, of 3,146 aircraft."""
    metrics = {"auc": fax.metrics.AUC(), "average_precision": fax.metrics.AveragePrecision()}
    return Task(
        "flights",
        *_packaged_datasets.flights(),
        fax.models.create("dense", sizes=(63, 128, 2)),
        _classifier_metrics() | metrics,
        tuned("flights"),
    )


def _bible(cache: Any, *, length: int = 80) -> Task:
    """The next character of 66 books of the Bible."""
    data = _packaged_datasets.bible(length)
    return _next_character("bible", _packaged_datasets.BIBLE_CHARACTERS, data)


def _photographs_in_color(cache: Any, *, noise: float = 25.0, seed: int = 0) -> Task:
    """Squares of 10 photographs in color, to be restored from noise."""
    where = "fax.tasks.load('photographs')"
    _arguments.number(where, "noise", noise, least=0)
    return Task(
        "photographs",
        *_photographs.photographs(noise, _arguments.seed(where, seed)),
        fax.models.create("denoiser"),
        {"loss": fax.metrics.MSE(), "psnr": fax.metrics.PSNR()},
        tuned("photographs"),
    )


def _emnist(cache: Any, *, model: str = "conv", digits_only: bool = False) -> Task:
    """Handwritten characters of 3,400 writers, or digits."""
    chosen = tuned("emnist", model)
    _arguments.flag("fax.tasks.load('emnist')", "digits_only", digits_only)
    return Task(
        "emnist",
        *_tff_datasets.emnist(cache, digits_only),
        fax.models.create(f"emnist_{model}", num_classes=10 if digits_only else 62),
        _classifier_metrics(),
        chosen,
    )


def _cifar100(cache: Any, *, model: str = "logistic") -> Task:
    """Images of 100 classes on 500 clients."""
    chosen = tuned("cifar100", model)
    names = {"logistic": "cifar100_logistic", "resnet18": "resnet18"}
    return Task(
        "cifar100",
        *_tff_datasets.cifar100(cache),
        fax.models.create(names[model]),
        _classifier_metrics(),
        chosen,
    )


def _shakespeare(cache: Any, *, length: int = 80) -> Task:
    """The next letter of 715 characters of plays."""
    _arguments.count("fax.tasks.load('shakespeare')", "length", length)
    tokens = _tff_datasets.SHAKESPEARE_CHARACTERS.size
    return Task(
        "shakespeare",
        *_tff_datasets.shakespeare(cache, length),
        # FedJAX divides by the length of a sequence with its padding.
        fax.models.create("shakespeare_lstm", num_tokens=tokens, loss_length=length),
        _language_metrics(tokens - 1),
        tuned("shakespeare"),
    )


def _stackoverflow(cache: Any, *, length: int = 20, vocabulary_size: int = 10_000) -> Task:
    """The next word of 342,477 people who ask and answer."""
    where = "fax.tasks.load('stackoverflow')"
    _arguments.count(where, "length", length)
    tokens = 4 + _arguments.count(where, "vocabulary_size", vocabulary_size)
    return Task(
        "stackoverflow",
        *_tff_datasets.stackoverflow(cache, length, vocabulary_size),
        # FedJAX divides by the average number of words of a sentence.
        fax.models.create("stackoverflow_lstm", num_tokens=tokens, loss_length=13.3),
        {**_language_metrics(tokens - 1), "truncation_rate": fax.metrics.TruncationRate(EOS)},
        tuned("stackoverflow"),
    )


TASKS: dict[str, Callable[..., Task]] = {
    "digits": _digits,
    "pystdlib": _pystdlib,
    "flights": _flights,
    "bible": _bible,
    "photographs": _photographs_in_color,
    "emnist": _emnist,
    "cifar100": _cifar100,
    "shakespeare": _shakespeare,
    "stackoverflow": _stackoverflow,
}
