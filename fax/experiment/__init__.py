"""Experiments."""

from fax.experiment._callbacks import EMA as EMA
from fax.experiment._callbacks import Callback as Callback
from fax.experiment._callbacks import EarlyStopping as EarlyStopping
from fax.experiment._callbacks import Profile as Profile
from fax.experiment._callbacks import StopAfter as StopAfter
from fax.experiment._callbacks import StopAt as StopAt
from fax.experiment._callbacks import StopAtBudget as StopAtBudget
from fax.experiment._compare import Comparison as Comparison
from fax.experiment._compare import compare as compare
from fax.experiment._figures import draw as draw
from fax.experiment._writers import TensorBoard as TensorBoard
from fax.experiment._writers import Writer as Writer
