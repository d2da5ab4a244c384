"""Benchmark tasks of federated learning: data, a model, metrics and settings."""

from fax import _extras

_extras.require("fax.tasks", "optax", "tasks")
_extras.require("fax.tasks", "flax", "tasks")

from fax.tasks._download import DownloadError as DownloadError
from fax.tasks._settings import Settings as Settings
from fax.tasks._task import Task as Task
from fax.tasks._task import load as load
from fax.tasks._tokens import Characters as Characters
from fax.tasks._tokens import Words as Words
from fax.tasks._trigram import trigram_loss as trigram_loss
