"""Experiments: from a task's name to a finished, resumable, plotted run."""

from fax import _extras

for _module in ("optax", "flax", "orbax.checkpoint", "tensorboardX", "matplotlib", "tqdm"):
    _extras.require("fax.experiment", _module, "experiment")

from fax.experiment._build import Experiment as Experiment
from fax.experiment._build import build as build
from fax.experiment._callbacks import EMA as EMA
from fax.experiment._callbacks import Callback as Callback
from fax.experiment._callbacks import Profile as Profile
from fax.experiment._callbacks import StopAtBudget as StopAtBudget
from fax.experiment._checkpoints import Keep as Keep
from fax.experiment._compare import Comparison as Comparison
from fax.experiment._compare import compare as compare
from fax.experiment._config import Batches as Batches
from fax.experiment._config import Config as Config
from fax.experiment._config import configure as configure
from fax.experiment._figures import draw as draw
from fax.experiment._folder import FolderInUseError as FolderInUseError
from fax.experiment._resume import Checkpoint as Checkpoint
from fax.experiment._resume import restore as restore
from fax.experiment._rounds import NotFiniteError as NotFiniteError
from fax.experiment._rounds import Run as Run
from fax.experiment._run import Result as Result
from fax.experiment._run import run as run
from fax.experiment._stopping import EarlyStopping as EarlyStopping
from fax.experiment._stopping import StopAfter as StopAfter
from fax.experiment._stopping import StopAt as StopAt
from fax.experiment._writers import TensorBoard as TensorBoard
from fax.experiment._writers import Writer as Writer
