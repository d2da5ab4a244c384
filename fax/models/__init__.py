"""Benchmark models of federated learning, in flax.nnx, as pure functions of their parameters.

The modules have the architectures and initializers of FedJAX's models. `create` makes a `Model` of
one of them by its name, and `functional` makes one of any module.
"""

from fax import _extras

_extras.require("fax.models", "flax", "models")

from fax.models._images import Cifar100Logistic as Cifar100Logistic
from fax.models._images import Denoiser as Denoiser
from fax.models._images import Dense as Dense
from fax.models._images import EmnistConv as EmnistConv
from fax.models._images import EmnistDense as EmnistDense
from fax.models._images import EmnistLogistic as EmnistLogistic
from fax.models._losses import cross_entropy as cross_entropy
from fax.models._losses import sequence_cross_entropy as sequence_cross_entropy
from fax.models._losses import squared_error as squared_error
from fax.models._lstm import LSTM as LSTM
from fax.models._model import Model as Model
from fax.models._model import functional as functional
from fax.models._registry import create as create
from fax.models._resnet import ResNet18 as ResNet18
from fax.models._text import CharLSTM as CharLSTM
from fax.models._text import ShakespeareLSTM as ShakespeareLSTM
from fax.models._text import StackOverflowLSTM as StackOverflowLSTM
