"""Experiments: from a task's name to a finished, resumable, plotted run."""

from fax import _extras

_extras.require("fax.experiment", "optax", "experiment")
_extras.require("fax.experiment", "orbax.checkpoint", "experiment")

from fax.experiment._checkpoints import Keep as Keep
from fax.experiment._folder import FolderInUseError as FolderInUseError
from fax.experiment._resume import Checkpoint as Checkpoint
from fax.experiment._resume import restore as restore
from fax.experiment._run import Result as Result
from fax.experiment._run import Run as Run
from fax.experiment._run import run as run
