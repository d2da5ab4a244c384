"""`run`: trains for a number of rounds, with a folder from which it can be resumed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from fax import _arguments, _functions
from fax.aggregators._noise import noise_states
from fax.algorithms import Algorithm, ClientStore
from fax.algorithms._algorithm import check_algorithm
from fax.data import Cohorts
from fax.experiment._checkpoints import Keep, check_keep
from fax.experiment._history import numeric, plain
from fax.experiment._outputs import Outputs
from fax.experiment._rounds import NotFiniteError, Run
from fax.experiment._schedule import schedule
from fax.experiment._signals import Interruption

PyTree = Any
_WHERE = "fax.experiment.run"


class Result(NamedTuple):
    """What `run` returns.

    Attributes:
      state: the algorithm's state after the last round.
      history: the metrics of each round, a list of dicts of numbers. ``"round"`` counts from 1; the
        algorithm's metrics have their own names, and those of an evaluation the name of the
        evaluation before them, as in ``"test/accuracy"``. ``"bits"`` is what has been sent in all
        rounds so far, if the algorithm counts it.
      reason: why the run stopped before its last round, or "".
    """

    state: PyTree
    history: list[dict[str, Any]]
    reason: str = ""


def run(
    algorithm: Algorithm | ClientStore,
    state: PyTree,
    cohorts: Cohorts,
    *,
    rounds: int,
    folder: str | os.PathLike[str] | None = None,
    evaluate: Callable[[PyTree], Any] | Mapping[str, Callable[[PyTree], Any]] | None = None,
    every: int | Mapping[str, int] | None = None,
    callbacks: Sequence[Any] = (),
    writers: Sequence[Any] = (),
    rounds_per_call: int = 1,
    keep: int | Keep = 2,
    on_nan: str = "stop",
    config: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: bool = True,
) -> Result:
    """Trains for a number of rounds. With a folder, the run can be interrupted and resumed.

    It is this loop, with evaluation, checkpoints and logs:

        for cohort in cohorts: state, metrics = algorithm.round(state, cohort)

    The folder has ``metrics.csv``, with a line for each round; ``clients.csv``, with the metrics of
    clients, as last measured; ``config.toml``, with the settings, versions, devices and commit;
    ``log.txt``, ``tensorboard/``, ``figures/`` and ``checkpoints/``. A checkpoint is written while
    training goes on, and has everything: the state, the next cohort's number, the rows of a
    `fax.algorithms.ClientStore`, callbacks' states, such as a privacy budget, and the history.

    If the folder has a run, the same call continues it after its newest checkpoint. On the same
    devices and versions, the result is that of a run without interruption, to the bit. On others it
    is only close, since sums are rounded differently; see `restore` for how arrays are spread then.
    If a process is killed, at most the rounds since the last checkpoint are run again. After
    SIGTERM or Ctrl-C, a run finishes its block of rounds, saves a checkpoint, and ends: with exit
    status 143 after SIGTERM, and with a KeyboardInterrupt, whose exit status is 130, after Ctrl-C.
    A second signal ends it at once.

    In several processes, each calls this with the same arguments. Process 0 writes the files, and
    all of them their part of a checkpoint, so the folder must be one that all of them see.

    Args:
      algorithm: of `fax.algorithms`, your own, or a `fax.algorithms.ClientStore`.
      state: to start from, as ``algorithm.init`` returns it. It is also needed to resume.
      cohorts: from `fax.data.cohorts`. It is set to the round of a checkpoint, and advanced.
      rounds: how many rounds in all, also counting those before a resume.
      folder: for the outputs. Without one, nothing is written. If the first round of a run raises
        an error, a folder that was made for it is removed again. Its path may have no brackets,
        which orbax takes for a pattern.
      evaluate: a function of ``algorithm.params(state)`` that returns a number, or a dict of
        numbers and of arrays with a number for each client; or a dict of such functions by name. A
        single one has the name ``"test"``.
      every: after how many rounds to evaluate and save, or a dict of this for ``"evaluate"``,
        ``"checkpoint"`` and ``"log"``. Everything also happens after the last round. Default: 20
        times in a run. Metrics are fetched and logged after each block of rounds by default; less
        often, the devices do not have to wait for the host.
      callbacks: see `Callback`; ``run`` is a `Run`.
      writers: see `Writer`. The folder's `TensorBoard` need not be among them.
      rounds_per_call: how many rounds are in one program, see `fax.algorithms.many_rounds`.
        Evaluation and checkpoints end such a block.
      keep: how many of the newest checkpoints are kept, or a `Keep`, which can also keep the best.
      on_nan: what happens if a loss is NaN or infinite, or if the parameters are when a checkpoint
        is due. ``"stop"``: an error names the round and the clients. ``"restore"``: training
        continues with the state of the last checkpoint and the next cohort, and a warning says so.
        ``"ignore"``: nothing.
      config: settings for ``config.toml``, a dict of strings, numbers, bools, lists and dicts.
      force: whether to continue a run with other settings than it was started with.
      progress: whether to show a progress bar, if the standard error is a terminal.

    Returns:
      The state and the history.

    Raises:
      ValueError: if an argument is invalid; or if the folder has a run of another algorithm, model
        or data, or with other settings, which the message lists.
      FolderInUseError: if another run is using the folder.
      NotFiniteError: if a loss is not finite, see ``on_nan``. The checkpoints remain.
      OSError: if something cannot be written. The older checkpoints remain.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1))
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(2)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=2)
      >>> result = fax.experiment.run(
      ...     algorithm,
      ...     algorithm.init(jnp.zeros(())),
      ...     rounds,
      ...     rounds=30,
      ...     evaluate=lambda params: {"params": params},
      ...     every=10,
      ... )
      >>> [round(row["test/params"], 2) for row in result.history if "test/params" in row]
      [0.71, 0.73, 0.73]
    """
    check_algorithm(_WHERE, getattr(algorithm, "algorithm", algorithm))
    if not isinstance(cohorts, Cohorts):
        raise ValueError(
            f"{_WHERE}: cohorts is {_arguments.shown(cohorts)}, expected the iterator that "
            "fax.data.cohorts returns."
        )
    rounds = _arguments.count(_WHERE, "rounds", rounds)
    rounds_per_call = _arguments.count(_WHERE, "rounds_per_call", rounds_per_call)
    if rounds_per_call > 1 and isinstance(algorithm, ClientStore):
        raise ValueError(
            f"{_WHERE}: rounds_per_call is {rounds_per_call}, but a ClientStore needs the host "
            "after each round. Leave it out, or keep clients' state on the devices."
        )
    if folder is not None:
        folder = Path(_arguments.path(_WHERE, "folder", folder))
    evaluations = _evaluations(evaluate)
    times = schedule(_WHERE, rounds, rounds_per_call, every)
    _check_objects("callbacks", callbacks, ("start", "after_round"))
    _check_objects("writers", writers, ("write",))
    _check_on_nan(on_nan, folder, state)
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(f"{_WHERE}: config is {_arguments.shown(config)}, expected a dict.")
    _arguments.flag(_WHERE, "force", force)
    _arguments.flag(_WHERE, "progress", progress)

    current = Run(
        algorithm,
        state,
        cohorts,
        rounds=rounds,
        rounds_per_call=rounds_per_call,
        folder=folder,
        callbacks=callbacks,
        evaluations=tuple(evaluations),
        keep=check_keep(_WHERE, keep),
        check=on_nan != "ignore",
    )
    outputs = Outputs(current, times, writers, config or {}, force)
    with Interruption() as interruption, outputs:
        current.reason = _reason(current, callbacks, "start")
        outputs.save(wait=True)  # of a new run, with the callbacks as they have started
        bar = outputs.progress() if progress else []
        while current.round < rounds and not current.reason:
            before = current.round
            current.advance(times.block(before))
            due = functools.partial(times.due, before, current.round)
            leaves, ends = 0, current.round == rounds
            try:
                if due("log"):
                    current.fetch()
                if due("evaluate"):
                    current.fetch()
                    current.results, current.measured = _evaluate(evaluations, current.params)
                current.reason = _reason(current, [*callbacks, *bar], "after_round")
                leaves = _in_any_process(interruption.caught)
                ends = bool(ends or leaves or current.reason)
                if ends or due("checkpoint"):
                    current.check()
            except NotFiniteError as error:
                if on_nan != "restore":
                    raise
                outputs.go_back(error)
                if due("evaluate"):
                    current.results, current.measured = _evaluate(evaluations, current.params)
            if ends or due("checkpoint"):
                outputs.log()
                outputs.save(wait=ends)
            elif due("log"):
                outputs.log()
            if leaves:
                interruption.leave(leaves)
        outputs.finish()
        if leaves := _in_any_process(interruption.caught):
            interruption.leave(leaves)
    return Result(current.state, current.history, current.reason)


def _evaluations(evaluate: Any) -> dict[str, Callable[[PyTree], Any]]:
    """The evaluations by name."""
    named = evaluate if isinstance(evaluate, Mapping) else {"test": evaluate}
    found = {} if evaluate is None else dict(named)
    for name, function in found.items():
        _arguments.text(_WHERE, "a key of evaluate", name, "the name of an evaluation")
        own = f"evaluate[{name!r}]" if isinstance(evaluate, Mapping) else "evaluate"
        _functions.function(_WHERE, own, function, {1: "evaluate(params)"})
    return found


def _evaluate(
    evaluations: Mapping[str, Callable[[PyTree], Any]], params: PyTree
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The numbers that evaluations return, and the arrays, by name."""
    results: dict[str, Any] = {}
    for name, function in evaluations.items():
        found = function(params)
        if isinstance(found, Mapping):
            results |= {f"{name}/{key}": value for key, value in found.items()}
        else:
            results[name] = found
    numbers = {name: plain(x, name) for name, x in results.items() if np.ndim(x) == 0}
    arrays = {name: numeric(x, name) for name, x in results.items() if name not in numbers}
    return numbers, arrays


def _check_objects(argument: str, objects: Any, methods: Sequence[str]) -> None:
    """Checks that each of these objects has one of the methods."""
    if not isinstance(objects, Sequence):
        raise ValueError(
            f"{_WHERE}: {argument} is {_arguments.shown(objects)}, expected a list of objects with "
            f"a method {' or '.join(methods)}."
        )
    for number, own in enumerate(objects):
        if isinstance(own, type) or not any(callable(getattr(own, m, None)) for m in methods):
            raise ValueError(
                f"{_WHERE}: {argument}[{number}] is {_arguments.shown(own)}, expected an object "
                f"with a method {' or '.join(methods)}."
            )


def _check_on_nan(on_nan: str, folder: Any, state: PyTree) -> None:
    """Checks that a run can go back to a checkpoint, if it has to."""
    _arguments.choice(_WHERE, "on_nan", on_nan, ("stop", "restore", "ignore"))
    if on_nan != "restore":
        return
    if folder is None:
        raise ValueError(
            f"{_WHERE}: on_nan='restore' needs folder=, for checkpoints to go back to."
        )
    if noise_states(_WHERE, state):
        raise ValueError(
            f"{_WHERE}: on_nan='restore' would use the noise of this private algorithm twice, in "
            "the rounds after a checkpoint and in those that replace them. Pass on_nan='stop'."
        )


def _reason(run: Run, callbacks: Sequence[Any], method: str) -> str:
    """Calls the callbacks. Returns why one of them stops the run, in any process, or ""."""
    reasons = []
    for own in callbacks:
        if hasattr(own, method) and (reason := getattr(own, method)(run)):
            name = type(own).__name__
            reasons.append(reason if isinstance(reason, str) else f"{name} has stopped it")
    # Clocks, for example, are not the same in all processes.
    stops = _in_any_process(len(reasons))
    return reasons[0] if reasons else "another process has stopped it" if stops else ""


def _in_any_process(number: int) -> int:
    """The largest of the numbers that the processes have here."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))
