"""From a configuration to what runs: a task's data and model, an algorithm, and evaluation."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

import fax.aggregators
import fax.algorithms
import fax.metrics
import fax.models
import fax.tasks
from fax import _arguments
from fax.algorithms import Algorithm
from fax.data import Cohorts, FederatedData, cohorts, split
from fax.experiment import _catalog
from fax.experiment._callbacks import StopAtBudget
from fax.experiment._checkpoints import Keep
from fax.experiment._config import Config
from fax.experiment._run import Result, run
from fax.experiment._tables import Table
from fax.tasks._optimizers import optimizer

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `fax.experiment.run` needs. `build` makes it from a configuration.

    The command ``fax run my_module:name`` takes one from a module, or from a function without
    arguments that returns one.

    Attributes:
      algorithm: from `fax.algorithms`.
      start: the arguments of ``algorithm.init``: the parameters, or those of several models.
      cohorts: from `fax.data.cohorts`.
      rounds: how many rounds to train.
      evaluate: functions of the parameters that return a dict of numbers, by name.
      options: the other arguments of `run`, such as ``{"every": 10}``.
      config: the settings, as `run` writes them to the folder.

    Example:

      >>> config = fax.experiment.configure("digits", {"rounds": 2, "task": {"clients": 20}})
      >>> experiment = fax.experiment.build(config)
      >>> experiment.algorithm, experiment.rounds, list(experiment.evaluate)
      (Algorithm(fedavg), 2, ['test'])
    """

    algorithm: Algorithm
    start: tuple[PyTree, ...]
    cohorts: Cohorts
    rounds: int
    evaluate: Mapping[str, Callable[[PyTree], Mapping[str, Any]]] = dataclasses.field(
        default_factory=dict
    )
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.start, tuple):
            raise ValueError(
                f"fax.experiment.Experiment: start is {_arguments.shown(self.start)}, expected a "
                "tuple of the arguments of algorithm.init. Write start=(params,)."
            )

    def run(self, folder: str | os.PathLike[str] | None = None, **options: Any) -> Result:
        """Calls `fax.experiment.run`.

        Args:
          folder: where to write the results.
          **options: other arguments of `run`.
        """
        return run(
            self.algorithm,
            self.algorithm.init(*self.start),
            self.cohorts,
            rounds=self.rounds,
            folder=folder,
            evaluate=self.evaluate,
            config=self.config,
            **{**self.options, **options},
        )


def build(config: Config) -> Experiment:
    """Makes an experiment from a configuration. On a mesh, call it under `jax.set_mesh`.

    Args:
      config: from `configure`.

    Returns:
      The experiment, with evaluation on the task's test data.

    Raises:
      ValueError: if a value is out of range, as the function that takes it says.
      DownloadError: if the task's files cannot be downloaded.

    Example:

      >>> config = fax.experiment.configure("digits", {"task": {"clients": 20}})
      >>> fax.experiment.build(config).cohorts.round
      0
    """
    task = load(config)
    params = task.model.init(jax.random.key(config.seed))
    algorithm = make_algorithm(config, task)
    rounds = make_cohorts(config, task)
    start: tuple[PyTree, ...] = (params,)
    if config.algorithm["name"] == "hyp_cluster":
        with make_cohorts(config, task) as others:
            start = fax.algorithms.hyp_cluster_start(
                task.model.loss,
                optimizer("client", config.client),
                params,
                next(others),
                jax.random.key(config.seed),
                num_clusters=config.algorithm["num_clusters"],
            )
    return Experiment(
        algorithm=algorithm,
        start=start,
        cohorts=rounds,
        rounds=config.rounds,
        evaluate={"test": evaluation(config, task, "test")},
        options={
            "every": config.every,
            "rounds_per_call": config.rounds_per_call,
            "on_nan": config.on_nan,
            "keep": Keep(best="test/loss", mode="min"),
            "callbacks": [] if config.budget is None else [_budget(config, len(task.train))],
        },
        config=config.to_dict(),
    )


def load(config: Config) -> fax.tasks.Task:
    """The task, with the model of the configuration if it names one."""
    options = {key: value for key, value in config.task.items() if key != "name"}
    task = fax.tasks.load(config.task["name"], options.pop("cache", None), **options)
    if config.model is None:
        return task
    own = {key: value for key, value in config.model.items() if key != "name"}
    return dataclasses.replace(task, model=fax.models.create(config.model["name"], **own))


def make_cohorts(config: Config, task: fax.tasks.Task) -> Cohorts:
    """The iterator over the rounds' cohorts."""
    options = dataclasses.asdict(config.cohorts)
    return cohorts(task.train, seed=config.seed, placement=placement(config), **options)


def placement(config: Config) -> str:
    """The placement of the algorithm's participants, which is also the default mesh axis."""
    replicas = "replicas" in _catalog.parameters("algorithms", config.algorithm["name"])
    return "replicas" if replicas else "clients"


def make_algorithm(config: Config, task: fax.tasks.Task) -> Algorithm:
    """The algorithm with its optimizers and its aggregator. Numbers may be traced."""
    name = config.algorithm["name"]
    given: dict[str, Any] = {
        "loss": lambda: task.model.loss,
        "client_learning_rate": lambda: config.client["rate"],
        "num_clients": lambda: len(task.train),
        "replicas": lambda: config.cohorts.clients,
        "aggregator": lambda: _make_aggregator(config.aggregator, len(task.train)),
    }
    for argument in ("client_optimizer", "inner_optimizer", "base_optimizer"):
        given[argument] = lambda: optimizer("client", config.client)
    if server := config.server:
        given["server_learning_rate"] = lambda: server["rate"]
        for argument in ("server_optimizer", "outer_optimizer"):
            given[argument] = lambda: optimizer("server", server)
    own = _catalog.parameters("algorithms", name)
    arguments = {key: make() for key, make in given.items() if key in own}
    options = {key: value for key, value in config.algorithm.items() if key != "name"}
    return _catalog.catalog("algorithms")[name](**arguments, **options)


def _make_aggregator(parts: list[Table], num_clients: int) -> Any:
    made = [_make_part(part, num_clients) for part in parts]
    return fax.aggregators.chain(*made) if len(made) > 1 else made[0] if made else None


def _make_part(part: Mapping[str, Any], num_clients: int) -> Any:
    """An aggregator of a table, which may hold others."""
    options = {
        key: _make_part(value, num_clients) if isinstance(value, Mapping) else value
        for key, value in part.items()
        if key != "name"
    }
    if "num_clients" in _catalog.parameters("aggregators", part["name"]):
        options["num_clients"] = num_clients
    return _catalog.catalog("aggregators")[part["name"]](**options)


def _budget(config: Config, num_clients: int) -> StopAtBudget:
    """Stops a private run when its budget is spent."""
    assert config.budget is not None
    private = config.aggregator[-1]
    uniform = config.cohorts.sampler == "uniform"
    budget = fax.aggregators.Budget(
        config.budget["epsilon"],
        config.budget["delta"],
        private["noise_multiplier"],
        sampling_rate=config.cohorts.clients / num_clients if uniform else None,
        mechanism=private["name"],
    )
    return StopAtBudget(budget)


def evaluation(
    config: Config, task: fax.tasks.Task, on: str, *, each: bool = False
) -> Callable[[PyTree], dict[str, Any]]:
    """A function that evaluates parameters on the task's ``"test"`` or ``"train"`` data.

    With ``each``, its results are arrays with a number for each client, and have the clients' ids.
    """
    data: FederatedData = getattr(task, on)
    if len(data) > config.evaluation_clients:
        _, data = split(data, config.evaluation_clients, seed=config.seed)

    @functools.cache
    def prepared() -> Any:
        try:
            return fax.metrics.prepare(data)
        except fax.data.DataError:  # it does not fit on the devices
            return data

    def evaluate(params: PyTree) -> dict[str, Any]:
        if each:
            found = fax.metrics.evaluate_clients(task.model.apply, params, data, task.metrics)
            return {"id": data.client_ids(), **found}
        return fax.metrics.evaluate(task.model.apply, params, prepared(), task.metrics)

    return evaluate
