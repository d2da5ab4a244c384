"""Aggregators: what happens to clients' updates on their way to the server."""

from fax.aggregators._aggregator import Aggregator as Aggregator
from fax.aggregators._aggregator import PerClient as PerClient
from fax.aggregators._aggregator import Transformation as Transformation
from fax.aggregators._aggregator import chain as chain
from fax.aggregators._aggregator import mean as mean
from fax.aggregators._e3m0 import e3m0 as e3m0
