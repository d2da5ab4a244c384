"""Experiments: from a configuration to a finished, resumable, plotted run."""

from fax import _extras

_extras.require("fax.experiment", "optax", "experiment")
_extras.require("fax.experiment", "flax", "experiment")

from fax.experiment._build import Experiment as Experiment
from fax.experiment._build import build as build
from fax.experiment._config import Cohorts as Cohorts
from fax.experiment._config import Config as Config
from fax.experiment._config import configure as configure
