"""Aggregators: what happens to clients' updates on their way to the server."""

from fax import _extras

_extras.require("fax.aggregators", "optax", "algorithms")

from fax.aggregators._accounting import calibrate as calibrate
from fax.aggregators._accounting import epsilon as epsilon
from fax.aggregators._aggregator import Aggregator as Aggregator
from fax.aggregators._aggregator import Format as Format
from fax.aggregators._aggregator import PerClient as PerClient
from fax.aggregators._aggregator import Transformation as Transformation
from fax.aggregators._budget import Budget as Budget
from fax.aggregators._budget import PrivacyBudgetError as PrivacyBudgetError
from fax.aggregators._budget import renewed as renewed
from fax.aggregators._chain import chain as chain
from fax.aggregators._chain import mean as mean
from fax.aggregators._clipping import adaptive_clip as adaptive_clip
from fax.aggregators._clipping import clip_by_norm as clip_by_norm
from fax.aggregators._dp_ftrl import DPFTRLState as DPFTRLState
from fax.aggregators._dp_ftrl import dp_ftrl as dp_ftrl
from fax.aggregators._drive import drive as drive
from fax.aggregators._e3m0 import e3m0 as e3m0
from fax.aggregators._eight_bits import e4m3 as e4m3
from fax.aggregators._eight_bits import int8 as int8
from fax.aggregators._error_feedback import ErrorFeedbackState as ErrorFeedbackState
from fax.aggregators._error_feedback import error_feedback as error_feedback
from fax.aggregators._krum import krum as krum
from fax.aggregators._krum import multi_krum as multi_krum
from fax.aggregators._noise import NoiseState as NoiseState
from fax.aggregators._noise import releases as releases
from fax.aggregators._non_finite import non_finite as non_finite
from fax.aggregators._power_sgd import PowerSGDState as PowerSGDState
from fax.aggregators._power_sgd import power_sgd as power_sgd
from fax.aggregators._private_means import GaussianState as GaussianState
from fax.aggregators._private_means import gaussian as gaussian
from fax.aggregators._private_means import laplace as laplace
from fax.aggregators._quantization import uniform_quantization as uniform_quantization
from fax.aggregators._robust import geometric_median as geometric_median
from fax.aggregators._robust import median as median
from fax.aggregators._robust import trimmed_mean as trimmed_mean
from fax.aggregators._rotation import hadamard as hadamard
from fax.aggregators._secure_sum import secure_sum as secure_sum
from fax.aggregators._terngrad import terngrad as terngrad
from fax.aggregators._top_k import top_k as top_k
