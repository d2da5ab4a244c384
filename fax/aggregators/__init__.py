"""Aggregators: what happens to clients' updates on their way to the server."""

from fax.aggregators._accounting import Budget as Budget
from fax.aggregators._accounting import PrivacyBudgetError as PrivacyBudgetError
from fax.aggregators._accounting import calibrate as calibrate
from fax.aggregators._accounting import epsilon as epsilon
from fax.aggregators._aggregator import Aggregator as Aggregator
from fax.aggregators._aggregator import PerClient as PerClient
from fax.aggregators._aggregator import Transformation as Transformation
from fax.aggregators._aggregator import chain as chain
from fax.aggregators._aggregator import mean as mean
from fax.aggregators._clipping import adaptive_clip as adaptive_clip
from fax.aggregators._clipping import clip_by_norm as clip_by_norm
from fax.aggregators._dp_ftrl import DPFTRLState as DPFTRLState
from fax.aggregators._dp_ftrl import dp_ftrl as dp_ftrl
from fax.aggregators._finite import non_finite as non_finite
from fax.aggregators._krum import krum as krum
from fax.aggregators._krum import multi_krum as multi_krum
from fax.aggregators._privacy import gaussian as gaussian
from fax.aggregators._privacy import laplace as laplace
from fax.aggregators._robust import geometric_median as geometric_median
from fax.aggregators._robust import median as median
from fax.aggregators._robust import trimmed_mean as trimmed_mean
