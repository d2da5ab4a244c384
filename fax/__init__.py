"""fax: federated computation as JAX primitives.

A federated algorithm is a JAX function over placements, named groups of participants::

    @fax.program(clients=64)
    def round(params, batches, num_examples):
        updates = fax.map(local_update, fax.broadcast(params), batches)
        return fax.mean(updates, weights=num_examples)

All movement between the server and the participants goes through a few operators. Each is a
JAX primitive, so the program can be jitted, differentiated, vectorized and inspected.
"""

import typing as _typing

from fax import data as data
from fax import drjax as drjax
from fax import inspect as inspect
from fax import lowering as _lowering  # noqa: F401  (says how maps are compiled)
from fax import metrics as metrics
from fax import sharding as sharding
from fax._operators import broadcast as broadcast
from fax._operators import collect as collect
from fax._operators import distribute as distribute
from fax._operators import index as index
from fax._operators import keys as keys
from fax._operators import map as map
from fax._placement import PlacementError as PlacementError
from fax._placement import placements as placements
from fax._program import program as program
from fax._reductions import max as max
from fax._reductions import mean as mean
from fax._reductions import min as min
from fax._reductions import sum as sum

__version__ = "0.1.0"

if _typing.TYPE_CHECKING:
    from fax import aggregators as aggregators
    from fax import algorithms as algorithms
    from fax import deploy as deploy
    from fax import models as models
    from fax import tasks as tasks


def __getattr__(name: str) -> object:
    """Imports the subpackages that need more than JAX on first use."""
    if name in ("aggregators", "algorithms", "deploy", "models", "tasks"):
        import importlib

        return importlib.import_module(f"fax.{name}")
    raise AttributeError(f"module 'fax' has no attribute {name!r}")
