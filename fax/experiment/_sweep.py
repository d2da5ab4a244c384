"""A sweep: one experiment that trains with several values of some numbers at once.

Numbers that may be traced, such as learning rates, become a leading axis of the algorithm's state,
by `jax.vmap`. All settings train in one program, on the same cohorts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fax.algorithms import Algorithm
from fax.experiment import _catalog
from fax.experiment._build import Experiment, build, evaluation, load, make_algorithm
from fax.experiment._config import Config
from fax.experiment._tables import merged

PyTree = Any
Setting = dict[str, Any]  # by key, as in {"client.rate": 0.1}


def traceable(config: Config, key: str, values: Sequence[Any]) -> bool:
    """Whether the values of a key can be traced, so that one program trains with all of them."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return False
    # A private aggregator draws a secret key for each training run.
    names = [part["name"] for part in config.aggregator]
    if any("key" in _catalog.parameters("aggregators", name) for name in names):
        return False
    table, _, option = key.partition(".")
    if table == "algorithm":
        own = _catalog.parameters("algorithms", config.algorithm["name"])
        return option in own and own[option].annotation == "Any"
    return key == "client.rate" or (key == "server.rate" and config.server is not None)


def label(setting: Setting) -> str:
    """A short name of a setting, such as ``client.rate=0.1,server.rate=1``."""
    return ",".join(f"{key}={value}" for key, value in setting.items())


def sweep(config: Config, settings: Sequence[Setting]) -> Experiment:
    """The experiment that trains with all of these settings at once.

    Args:
      config: all other settings.
      settings: with the same keys, each `traceable`.

    Returns:
      The experiment. Its metrics have the `label` of a setting in their names, as in
      ``client.rate=0.1/loss`` and ``test/client.rate=0.1/loss``.
    """
    if not settings[0]:
        one = build(config)
        return dataclasses.replace(one, options={**one.options, "on_nan": "ignore"})
    task = load(config)
    names = [label(setting) for setting in settings]
    rows = {key: jnp.array([s[key] for s in settings], jnp.float32) for key in settings[0]}

    def algorithm_of(row: Mapping[str, Any]) -> Algorithm:
        tables: dict[str, Any] = {
            name: getattr(config, name) for name in ("algorithm", "client", "server")
        }
        for key, value in row.items():
            table, _, option = key.partition(".")
            tables = merged(tables, {table: {option: value}})
        return make_algorithm(dataclasses.replace(config, **tables), task)

    for setting in settings:
        algorithm_of(setting)  # checks the values, which cannot be done once they are traced

    def init(*start: PyTree) -> PyTree:
        return jax.vmap(lambda row: algorithm_of(row).init(*start))(rows)

    def round(state: PyTree, cohort: Any) -> tuple[PyTree, dict[str, jax.Array]]:
        state, metrics = jax.vmap(lambda row, own: algorithm_of(row).round(own, cohort))(
            rows, state
        )
        numbers = {name: value for name, value in metrics.items() if value.ndim == 1}
        return state, {
            f"{each}/{name}": value[i]
            for i, each in enumerate(names)
            for name, value in numbers.items()
        }

    def params(state: PyTree) -> PyTree:
        return jax.vmap(lambda row, own: algorithm_of(row).params(own))(rows, state)

    on_test = evaluation(config, task, "test")

    def evaluate(params: PyTree) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i, each in enumerate(names):
            results = on_test(jax.tree.map(lambda x, i=i: x[i], params))
            found |= {f"{each}/{name}": value for name, value in results.items()}
        return found

    one = build(config)
    return dataclasses.replace(
        one,
        algorithm=Algorithm(init, round, params),
        evaluate={"test": evaluate},
        options={**one.options, "on_nan": "ignore", "keep": 2},
        config={**config.to_dict(), "grid": {key: [s[key] for s in settings] for key in rows}},
    )
