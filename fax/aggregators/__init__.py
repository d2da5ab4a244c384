"""Aggregators: what happens to clients' updates on their way to the server."""

from fax.aggregators._aggregator import Aggregator as Aggregator
from fax.aggregators._aggregator import PerClient as PerClient
from fax.aggregators._aggregator import Transformation as Transformation
from fax.aggregators._aggregator import chain as chain
from fax.aggregators._aggregator import mean as mean
from fax.aggregators._drive import drive as drive
from fax.aggregators._power_sgd import PowerSGDState as PowerSGDState
from fax.aggregators._power_sgd import power_sgd as power_sgd
from fax.aggregators._quantization import uniform_quantization as uniform_quantization
from fax.aggregators._rotation import hadamard as hadamard
from fax.aggregators._secure_sum import secure_sum as secure_sum
from fax.aggregators._sparsification import top_k as top_k
from fax.aggregators._terngrad import terngrad as terngrad
