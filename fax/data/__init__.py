"""Federated data: where clients' examples come from, and how they become the batches of a round.

Everything takes and gives `FederatedData`, a read-only collection of clients with four methods.
`InMemory`, `SQLite` and `Files` are sources, and the functions `from_...` make sources of other
libraries' data. `fax.data.partition` makes clients of central arrays, and `subset`, `slice`,
`split`, `map` and `concatenate` are views. `describe` says what is there. `cohorts` samples clients
for round after round, and makes a `Cohort` of their batches.
"""

from fax.data import partition as partition
from fax.data._cohort import Client as Client
from fax.data._cohort import Cohort as Cohort
from fax.data._cohort import Gathered as Gathered
from fax.data._cohorts import Cohorts as Cohorts
from fax.data._cohorts import cohorts as cohorts
from fax.data._describe import Description as Description
from fax.data._describe import describe as describe
from fax.data._fedscale import from_fedscale as from_fedscale
from fax.data._files import Files as Files
from fax.data._hdf5 import from_hdf5 as from_hdf5
from fax.data._hugging_face import from_huggingface as from_huggingface
from fax.data._items import from_grain as from_grain
from fax.data._items import from_torch as from_torch
from fax.data._leaf import from_leaf as from_leaf
from fax.data._mapped import map as map
from fax.data._memory import InMemory as InMemory
from fax.data._protocol import DataError as DataError
from fax.data._protocol import FederatedData as FederatedData
from fax.data._ragged import crop as crop
from fax.data._ragged import pad as pad
from fax.data._sqlite import SQLite as SQLite
from fax.data._tables import from_pandas as from_pandas
from fax.data._tables import from_records as from_records
from fax.data._validate import validate as validate
from fax.data._views import concatenate as concatenate
from fax.data._views import slice as slice
from fax.data._views import split as split
from fax.data._views import subset as subset
