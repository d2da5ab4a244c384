"""Experiments: from a task's name to a finished, resumable, plotted run."""

from fax import _extras

for _package in ("optax", "flax", "orbax.checkpoint", "matplotlib", "tensorboardX", "tqdm"):
    _extras.require("fax.experiment", _package, "experiment")

from fax.experiment._build import Experiment as Experiment
from fax.experiment._build import build as build
from fax.experiment._checkpoints import Keep as Keep
from fax.experiment._config import Batches as Batches
from fax.experiment._config import Config as Config
from fax.experiment._config import configure as configure
from fax.experiment._folder import FolderInUseError as FolderInUseError
from fax.experiment._resume import Checkpoint as Checkpoint
from fax.experiment._resume import restore as restore
from fax.experiment._rounds import NotFiniteError as NotFiniteError
from fax.experiment._run import Result as Result
from fax.experiment._run import Run as Run
from fax.experiment._run import run as run
