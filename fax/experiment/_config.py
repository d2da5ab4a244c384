"""Configurations: all settings of an experiment, as a TOML file holds them.

A configuration is a dict of tables. `configure` checks the names and types in it, and fills in what
is left out: from the task's tuned settings, or else from the defaults here.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from fax import _arguments
from fax._nearest import did_you_mean
from fax.experiment import _catalog
from fax.tasks._settings import tuned

Table = dict[str, Any]

NONE = "none"  # TOML has no null


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """The table ``[cohorts]``: see `fax.data.cohorts`. The defaults of some are the task's."""

    clients: Annotated[int, "how many clients take part in a round"]
    batch_size: Annotated[int, "examples in a batch"]
    epochs: Annotated[int, "how often a client goes through its examples in a round"]
    max_steps: Annotated[int | None, 'the most batches that a client has in a round, or `"none"`']
    sampler: Annotated[str, "how clients are chosen"] = "uniform"
    drop_remainder: Annotated[bool, "whether to drop the last batch of an epoch if it is short"] = (
        False
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of an experiment. `configure` makes it.

    Attributes:
      task: its ``name`` and the options of `fax.tasks.load`.
      model: the ``name`` and the options of `fax.models.create`, or None for the task's model.
      algorithm: the ``name`` of one of `fax.algorithms`, and its options.
      client: the ``optimizer`` of the clients, its ``rate`` and its options.
      server: the same at the server, or None for that of the algorithm.
      aggregator: the aggregators of a chain, in order: each a ``name`` and options.
      cohorts: who takes part in a round, and with which batches.
      budget: the ``epsilon`` and ``delta`` of a private aggregator, or None.
      mesh: the size of each mesh axis.
      rounds, seed, every, rounds_per_call, evaluation_clients, on_nan: see ``docs/command.md``.

    Example:

      >>> config = fax.experiment.configure("digits", {"client": {"rate": 0.03}})
      >>> config.algorithm["name"], config.client, config.rounds
      ('fedavg', {'optimizer': 'sgd', 'rate': 0.03}, 300)
    """

    task: Annotated[Table, "the task, and options of `fax.tasks.load`"]
    model: Annotated[Table | None, "the model, instead of the task's, and options of its module"]
    algorithm: Annotated[Table, "the algorithm, and its options"]
    client: Annotated[Table, "the clients' optimizer, its learning rate, and its other options"]
    server: Annotated[Table | None, "the server's optimizer, in the same form"]
    aggregator: Annotated[list[Table], "the aggregator and its options, or a list of them: a chain"]
    cohorts: Annotated[Batches, "who takes part in a round, and with which batches"]
    budget: Annotated[
        Table | None, "a private run stops when this `epsilon` is spent, for this `delta`"
    ]
    mesh: Annotated[Table, "the size of each mesh axis; -1 for the remaining devices"]
    rounds: Annotated[int, "how many rounds to train"]
    seed: Annotated[int, "from which everything random is derived"] = 0
    every: Annotated[
        int | None, 'evaluate and save after so many rounds; `"none"`: 20 times in a run'
    ] = None
    rounds_per_call: Annotated[int, "how many rounds run in one compiled loop"] = 1
    evaluation_clients: Annotated[int, "evaluate on at most so many clients"] = 3400
    on_nan: Annotated[str, 'if a loss is NaN or infinite: `"stop"`, `"restore"` or `"ignore"`'] = (
        "stop"
    )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written to a TOML file."""
        found = dataclasses.asdict(self)
        for table in (found, found["cohorts"]):
            table.update({name: NONE for name, value in table.items() if value is None})
        return found


def read(source: str | os.PathLike[str]) -> Table:
    """The tables of a TOML file, or of the task with this name."""
    if str(source) in _catalog.catalog("tasks"):
        return {"task": {"name": str(source)}}
    path = Path(source)
    if path.suffix != ".toml":
        raise ValueError(
            f"{source!s} is neither a task nor a TOML file, nor module:name. "
            f"{did_you_mean(source, _catalog.catalog('tasks'))}"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: this is not TOML: {error}") from error


def merged(tables: Mapping[str, Any], *changes: Mapping[str, Any]) -> Table:
    """Tables with changes, which are nested in the same way. A name counts as a table with it."""
    found = dict(tables)
    for change in changes:
        for key, value in change.items():
            old = found.get(key)
            old = _named(old) if key in _NAMED and isinstance(old, str) else old
            if isinstance(value, Mapping) and isinstance(old, Mapping):
                first = _NAMED.get(key)
                # Options belong to what was named before.
                keep = first is None or value.get(first, old.get(first)) == old.get(first)
                found[key] = merged(old, value) if keep else dict(value)
            else:
                found[key] = value
    return found


def configure(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *changes: Mapping[str, Any],
    where: str = "fax.experiment.configure",
) -> Config:
    """Makes a configuration: checks what is given, and fills in what is not.

    Args:
      source: the name of a task, the path of a TOML file, or its tables as a dict.
      *changes: tables to change, such as ``{"client": {"rate": 0.03}}``.
      where: what messages call a dict, such as the name of the file that it was read from.

    Returns:
      The configuration, with the task's tuned settings where nothing else is given.

    Raises:
      ValueError: if a key is unknown, with the nearest known one, or a value has the wrong type.
      FileNotFoundError: if there is no such file.

    Example:

      >>> config = fax.experiment.configure("digits", {"algorithm": "scaffold", "rounds": 10})
      >>> config.algorithm, config.client, config.server
      ({'name': 'scaffold'}, {'optimizer': 'sgd', 'rate': 0.1}, None)
    """
    if not isinstance(source, Mapping):
        where, source = str(source), read(source)
    tables = merged(source, *changes)
    known = [field.name for field in dataclasses.fields(Config)]
    _check_keys(where, "", tables, known)

    task = _table(where, "task", tables.get("task"), "tasks")
    model = None if tables.get("model", NONE) == NONE else tables["model"]
    model = model and _table(where, "model", model, "models")
    algorithm = _table(where, "algorithm", tables.get("algorithm", "fedavg"), "algorithms")
    settings = tuned(task["name"], task.get("model", _first_model(task["name"])))
    own = _catalog.parameters("algorithms", algorithm["name"])

    client = _optimizer(where, "client", tables.get("client", {}), settings.client)
    tuned_server = _takes_tuned_server(algorithm["name"])
    server = tables.get("server", {} if tuned_server else NONE)
    if server == NONE:
        server = _PLAIN if tuned_server else None
    else:
        default = settings.server if tuned_server else _PLAIN
        server = _optimizer(where, "server", server, default)
    _check_rates(where, algorithm["name"], own, client, server)

    given = tables.get("aggregator", [])
    given = given if isinstance(given, list) else [given]
    aggregator = [_table(where, "aggregator", part, "aggregators") for part in given]
    if aggregator and "aggregator" not in own:
        raise ValueError(f"{where}: {algorithm['name']} takes no aggregator.")

    rest = {key: tables[key] for key in known if key in tables and key not in _TABLES}
    rest.setdefault("rounds", settings.rounds)
    defaults = {name: getattr(settings, name) for name in _TUNED}
    if "replicas" in own:  # replicas keep their shards, and have a number of steps in a round
        defaults |= {"epochs": 1}
    batches = tables.get("cohorts", {})
    if not isinstance(batches, Mapping):
        raise ValueError(f"{where}: cohorts is {_arguments.shown(batches)}, expected a table.")
    budget = None if tables.get("budget", NONE) == NONE else tables["budget"]
    if budget is not None:
        _check_budget(where, budget, aggregator)
    mesh = tables.get("mesh", {})
    if not isinstance(mesh, Mapping):
        raise ValueError(f"{where}: mesh is {_arguments.shown(mesh)}, expected a table.")
    if "on_nan" in rest:
        _arguments.choice(where, "on_nan", rest["on_nan"], ("stop", "restore", "ignore"))
    for axis, size in mesh.items():
        _typed(where, f"mesh.{axis}", size, int)
    return Config(
        task=task,
        model=model,
        algorithm=algorithm,
        client=client,
        server=server,
        aggregator=aggregator,
        cohorts=Batches(**_fields(where, "cohorts", {**defaults, **batches}, Batches)),
        budget=budget,
        mesh=dict(mesh),
        **_fields(where, "", rest, Config),
    )


_NAMED = {**dict.fromkeys(("task", "model", "algorithm", "aggregator"), "name")}
_NAMED |= dict.fromkeys(("client", "server"), "optimizer")
_TABLES = (*_NAMED, "cohorts", "budget", "mesh")
_TUNED = ("clients", "batch_size", "epochs", "max_steps")
_PRIVATE = ("gaussian", "laplace")
_PLAIN = {"optimizer": "sgd", "rate": 1.0}
# Their corrections are for the server's step of their papers, not for a step tuned for FedAvg.
_OWN_SERVER = ("feddyn", "qfedavg")


def _named(value: Any) -> Any:
    """A table that is given by its name alone."""
    return {"name": value} if isinstance(value, str) else value


def _table(where: str, key: str, value: Any, kind: str) -> Table:
    """Checks a table with the name of one of the catalog, and its options."""
    value = _named(value)
    known = _catalog.catalog(kind)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        found = dict(value) if isinstance(value, Mapping) else _arguments.shown(value)
        raise ValueError(
            f"{where}: {key} is {found}, expected a name, or a table with a name and options. "
            f"{did_you_mean('', known)}"
        )
    name = value["name"]
    if name not in known:
        raise ValueError(f"{where}: {key} {name!r} does not exist. {did_you_mean(name, known)}")
    _check_keys(where, f"{key}.", value, ["name", *_catalog.options(kind, name)], f" for {name}")
    missing = [option for option in _catalog.required(kind, name) if option not in value]
    if missing:
        raise ValueError(
            f"{where}: {key}.{missing[0]} is missing. {name} needs it, and has no default for it."
        )
    nested = {k: v for k, v in value.items() if k in ("transformation", "values")}
    parts = {k: _table(where, f"{key}.{k}", v, "aggregators") for k, v in nested.items()}
    return {**value, **parts}


def _optimizer(where: str, key: str, value: Any, default: Mapping[str, Any]) -> Table:
    """Checks the table of an optimizer. Without a name, it changes the default."""
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{where}: {key} is {_arguments.shown(value)}, expected a table, such as "
            f"{{optimizer = 'sgd', rate = 0.1}}."
        )
    if "optimizer" not in value:
        value = {**default, **value}
    name, known = value["optimizer"], _catalog.catalog("optimizers")
    if name not in known:
        raise ValueError(
            f"{where}: {key}.optimizer {name!r} does not exist. {did_you_mean(name, known)}"
        )
    options = ["optimizer", *_catalog.options("optimizers", name)]
    _check_keys(where, f"{key}.", value, options, f" for {name}")
    if "rate" not in value:
        raise ValueError(f"{where}: {key}.rate is missing, the learning rate of {name}.")
    _arguments.number(where, f"{key}.rate", value["rate"], above=0)
    return dict(value)


def _check_budget(where: str, budget: Any, aggregator: list[Table]) -> None:
    """A budget needs one private mean whose noise is independent in each round."""
    keys = ("epsilon", "delta")
    if not isinstance(budget, Mapping):
        raise ValueError(
            f"{where}: budget is {_arguments.shown(budget)}, expected a table, such as "
            "{epsilon = 8.0, delta = 1e-5}."
        )
    _check_keys(where, "budget.", budget, keys)
    for key in keys:
        _arguments.number(where, f"budget.{key}", budget.get(key), above=0)
    if not aggregator or aggregator[-1]["name"] not in _PRIVATE:
        raise ValueError(
            f"{where}: budget needs an aggregator that ends with {' or '.join(_PRIVATE)}, whose "
            "noise it can account for."
        )


def _takes_tuned_server(algorithm: str) -> bool:
    own = _catalog.parameters("algorithms", algorithm)
    return "server_optimizer" in own and algorithm not in _OWN_SERVER


def _check_rates(
    where: str, algorithm: str, own: Mapping[str, Any], client: Table, server: Table | None
) -> None:
    """Some algorithms take learning rates only, and no server optimizer, or none at all."""
    for key, table, argument in (
        ("client", client, "client_learning_rate"),
        ("server", server, "server_learning_rate"),
    ):
        if table and argument in own and (table["optimizer"] != "sgd" or len(table) > 2):
            raise ValueError(
                f"{where}: {key} is {table}, but {algorithm} takes a learning rate there, as in "
                f"{key} = {{optimizer = 'sgd', rate = {table['rate']}}}."
            )
    takes = {"server_optimizer", "outer_optimizer", "server_learning_rate"}
    if server and not takes & own.keys():
        raise ValueError(f"{where}: {algorithm} has no optimizer at the server. Leave out server.")


def _first_model(task: str) -> Any:
    """The model of a task that has several, by default."""
    return next(
        (p.default for k, p in _catalog.parameters("tasks", task).items() if k == "model"), None
    )


def _check_keys(
    where: str, prefix: str, table: Mapping[str, Any], known: Iterable[str], what: str = ""
) -> None:
    known = list(known)
    for key in table:
        if key not in known:
            near = did_you_mean(f"{prefix}{key}", [f"{prefix}{each}" for each in known])
            raise ValueError(f"{where}: there is no key {prefix}{key}{what}. {near}")


def _fields(where: str, prefix: str, table: Mapping[str, Any], schema: type) -> Table:
    """Checks a table's values by the fields of a dataclass. Its ints are numbers of something."""
    types = typing.get_type_hints(schema)
    dots = f"{prefix}." if prefix else ""
    _check_keys(where, dots, table, types)
    found = {key: _typed(where, f"{dots}{key}", value, types[key]) for key, value in table.items()}
    for key, value in found.items():
        least = 0 if key == "seed" else 1
        if type(value) is int and value < least:
            raise ValueError(
                f"{where}: {dots}{key} is {value}, expected an int of at least {least}."
            )
    return found


def _typed(where: str, key: str, value: Any, expected: Any) -> Any:
    """Checks the type of a value: an int, a string, True or False, or an int or none."""
    optional = type(None) in typing.get_args(expected)
    if optional and value in (NONE, None):
        return None
    kind = typing.get_args(expected)[0] if optional else expected
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        words = {int: "an int", str: "a string", bool: "true or false"}[kind]
        or_none = f', or "{NONE}"' if optional else ""
        raise ValueError(f"{where}: {key} is {_arguments.shown(value)}, expected {words}{or_none}.")
    return value
