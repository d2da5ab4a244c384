"""Federated data: where clients' examples come from, and how they become the batches of a round.

Everything takes and gives `FederatedData`, a read-only collection of clients with four methods.
`InMemory`, `SQLite` and `Files` are sources, `fax.data.partition` makes clients of central arrays,
and `subset`, `slice`, `split`, `map` and `concatenate` are views. `cohorts` samples clients for
round after round, and makes a `Cohort` of their batches.
"""

from fax.data import partition as partition
from fax.data._cohort import Client as Client
from fax.data._cohort import Cohort as Cohort
from fax.data._cohort import Gathered as Gathered
from fax.data._cohorts import Cohorts as Cohorts
from fax.data._cohorts import cohorts as cohorts
from fax.data._files import Files as Files
from fax.data._mapped import map as map
from fax.data._memory import InMemory as InMemory
from fax.data._protocol import DataError as DataError
from fax.data._protocol import FederatedData as FederatedData
from fax.data._sqlite import SQLite as SQLite
from fax.data._validate import validate as validate
from fax.data._views import concatenate as concatenate
from fax.data._views import slice as slice
from fax.data._views import split as split
from fax.data._views import subset as subset
