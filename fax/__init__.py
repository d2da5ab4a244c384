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

__version__ = "0.1.0"

if _typing.TYPE_CHECKING:
    from fax import aggregators as aggregators
    from fax import algorithms as algorithms
    from fax import data as data
    from fax import deploy as deploy
    from fax import drjax as drjax
    from fax import experiment as experiment
    from fax import inspect as inspect
    from fax import metrics as metrics
    from fax import models as models
    from fax import sharding as sharding
    from fax import tasks as tasks
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

_PACKAGES = (
    *("aggregators", "algorithms", "data", "deploy", "drjax", "experiment", "inspect", "metrics"),
    *("models", "sharding", "tasks"),
)
_NAMES = (
    *("broadcast", "collect", "distribute", "index", "keys", "map", "PlacementError"),
    *("placements", "program", "max", "mean", "min", "sum"),
)


def __getattr__(name: str) -> object:
    """Imports what is used when it is first used, so that ``fax --help`` need not import JAX."""
    if name in _PACKAGES:
        import importlib

        return importlib.import_module(f"fax.{name}")
    if name in _NAMES:
        _load()
        return globals()[name]
    raise AttributeError(f"module 'fax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES, *_NAMES})


def _load() -> None:
    """Imports the core, which needs JAX and NumPy alone."""
    import fax.data
    import fax.drjax
    import fax.inspect
    import fax.metrics
    import fax.sharding  # noqa: F401
    from fax import _operators, _placement, _program, _reductions

    for home in (_operators, _placement, _program, _reductions):
        for name in set(_NAMES) & vars(home).keys():
            globals()[name] = vars(home)[name]
