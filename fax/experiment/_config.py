"""Configurations: all settings of an experiment, as a TOML file holds them.

A configuration is a dict of tables. `configure` checks the names and types in it, and fills in what
is left out: from the task's tuned settings, or else from the defaults here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Annotated, Any

from fax import _arguments
from fax.experiment import _catalog
from fax.experiment._tables import (
    NAMED,
    NONE,
    Table,
    check_keys,
    fields_of,
    merged,
    optimizer_of,
    read,
    table_of,
    typed,
)
from fax.tasks._settings import tuned


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
    check_keys(where, "", tables, known)

    task = table_of(where, "task", tables.get("task"), "tasks")
    model = tables.get("model", NONE)
    model = None if model == NONE else table_of(where, "model", model, "models")
    algorithm = table_of(where, "algorithm", tables.get("algorithm", "fedavg"), "algorithms")
    settings = tuned(task["name"], task.get("model", _first_model(task["name"])))
    own = _catalog.parameters("algorithms", algorithm["name"])

    client = optimizer_of(where, "client", tables.get("client", {}), settings.client)
    tuned_server = _takes_tuned_server(algorithm["name"])
    server = tables.get("server", {} if tuned_server else NONE)
    if server == NONE:
        server = _PLAIN if tuned_server else None
    else:
        default = settings.server if tuned_server else _PLAIN
        server = optimizer_of(where, "server", server, default)
    _check_rates(where, algorithm["name"], own, client, server)

    given = tables.get("aggregator", [])
    given = given if isinstance(given, list) else [given]
    aggregator = [table_of(where, "aggregator", part, "aggregators") for part in given]
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
        budget = dict(budget)
    mesh = tables.get("mesh", {})
    if not isinstance(mesh, Mapping):
        raise ValueError(f"{where}: mesh is {_arguments.shown(mesh)}, expected a table.")
    if "on_nan" in rest:
        _arguments.choice(where, "on_nan", rest["on_nan"], ("stop", "restore", "ignore"))
    for axis, size in mesh.items():
        typed(where, f"mesh.{axis}", size, int)
    return Config(
        task=task,
        model=model,
        algorithm=algorithm,
        client=client,
        server=server,
        aggregator=aggregator,
        cohorts=Batches(**fields_of(where, "cohorts", {**defaults, **batches}, Batches)),
        budget=budget,
        mesh=dict(mesh),
        **fields_of(where, "", rest, Config),
    )


_TABLES = (*NAMED, "cohorts", "budget", "mesh")
_TUNED = ("clients", "batch_size", "epochs", "max_steps")
_PRIVATE = ("gaussian", "laplace")
_PLAIN = {"optimizer": "sgd", "rate": 1.0}
# Their corrections are for the server's step of their papers, not for a step tuned for FedAvg.
_OWN_SERVER = ("feddyn", "qfedavg")


def _check_budget(where: str, budget: Any, aggregator: list[Table]) -> None:
    """A budget needs one private mean whose noise is independent in each round."""
    keys = ("epsilon", "delta")
    if not isinstance(budget, Mapping):
        raise ValueError(
            f"{where}: budget is {_arguments.shown(budget)}, expected a table, such as "
            "{epsilon = 8.0, delta = 1e-5}."
        )
    check_keys(where, "budget.", budget, keys)
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
