"""What a checkpoint holds of a run, and how a run continues from it."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from fax import _arguments
from fax.aggregators._noise import noise_states
from fax.algorithms import ClientStore
from fax.experiment._arrays import Leaf, difference, split, whole
from fax.experiment._checkpoints import Checkpoints, Keep, Saved
from fax.experiment._folder import CHECKPOINTS, log

if TYPE_CHECKING:
    from fax.experiment._run import Run

PyTree = Any
_WHERE = "fax.experiment.restore"


class Checkpoint(NamedTuple):
    """What `restore` returns.

    Attributes:
      round: how many rounds were done.
      state: the algorithm's state. If no state was passed, a dict of arrays by the paths of leaves.
      history: the metrics of each round, see `Result`.
      cohort: the number of the next cohort, for ``fax.data.cohorts(..., start=)``.
      callbacks: the states of callbacks that are not arrays, by the names of their classes.
      clients: the file with the rows of a `fax.algorithms.ClientStore`, or None. Its ``load`` reads
        it.
    """

    round: int
    state: PyTree
    history: list[dict[str, Any]]
    cohort: int
    callbacks: dict[str, Any]
    clients: Path | None


def restore(
    folder: str | os.PathLike[str], state: PyTree = None, *, round: int | str | None = None
) -> Checkpoint:
    """Reads a checkpoint of a run.

    Arrays that were on a mesh are spread over the same axes of the mesh in scope, if it has them
    and they divide the arrays. So a run can continue on another mesh, and on more or fewer
    devices. Without a mesh, they are on the default device.

    Args:
      folder: of the run.
      state: a state with the same structure, shapes and dtypes, as ``algorithm.init`` returns it.
        Without it, the result is a dict.
      round: of which round. Default: the newest that can be read; if another one is newer, a
        warning says why it cannot. ``"best"``: that with the best value of the metric that `run`
        was told to keep the best checkpoint of.

    Returns:
      The checkpoint.

    Raises:
      FileNotFoundError: if there is no checkpoint, or none of this round.
      ValueError: if ``state`` has other leaves, shapes or dtypes. The message names the leaf.

    Example:

      >>> import optax, tempfile
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2
      >>> algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.1))
      >>> data = fax.data.InMemory({"ann": {"x": jnp.ones(3)}, "bob": {"x": jnp.zeros(2)}})
      >>> rounds = fax.data.cohorts(data, clients=2, batch_size=2)
      >>> state = algorithm.init(jnp.zeros(()))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     result = fax.experiment.run(algorithm, state, rounds, rounds=5, folder=folder)
      ...     checkpoint = fax.experiment.restore(folder, state)
      >>> checkpoint.round, bool(checkpoint.state.params == result.state.params)
      (5, True)
    """
    path = Path(_arguments.path(_WHERE, "folder", folder)) / CHECKPOINTS
    if round is not None and round != "best":
        _arguments.count(_WHERE, "round", round, least=0, expected="a number of rounds, or 'best'")
    if not path.is_dir():
        raise FileNotFoundError(f"{_WHERE}: folder={os.fspath(folder)!r} has no checkpoints.")
    checkpoints = Checkpoints(path, Keep(), read_only=True)
    try:
        found = checkpoints.rounds()
        if round == "best":
            saved = newest(checkpoints, _WHERE, state)
            checkpoints.close()
            checkpoints = Checkpoints(path, Keep(*saved.facts["keep"]), read_only=True)
            round = checkpoints.best()
            if round is None:
                raise FileNotFoundError(
                    f"{_WHERE}: no checkpoint in {os.fspath(folder)!r} is the best: pass "
                    "keep=fax.experiment.Keep(best=...) to run, and evaluate when it saves."
                )
        if round is None:
            saved = newest(checkpoints, _WHERE, state)
        elif round in found:
            saved = checkpoints.read(int(round), lambda leaves: _like(leaves, state))
        else:
            have = ", ".join(map(str, found)) or "none"
            raise FileNotFoundError(
                f"{_WHERE}: round is {round}, but the checkpoints are of rounds {have}."
            )
    finally:
        checkpoints.close()
    facts = saved.facts
    if state is None:
        leaves = [Leaf(**leaf) for leaf in facts["leaves"]]
        restored = {leaf.name: whole(leaf, x) for leaf, x in zip(leaves, saved.arrays)}
    else:
        restored = state_of(saved, state, _WHERE)
    states = {own["name"]: own["value"] for own in facts["callbacks"] if "value" in own}
    return Checkpoint(
        facts["round"], restored, facts["history"], facts["cohort"], states, saved.clients
    )


def newest(
    checkpoints: Checkpoints, where: str, state: PyTree = None, *, delete: bool = False
) -> Saved:
    """The newest checkpoint that can be read. A warning says why newer ones cannot.

    Args:
      checkpoints: of a run; there is at least one.
      where: for messages.
      state: for the arrays' shardings.
      delete: whether to delete those that cannot be read.

    Raises:
      ValueError: if none can be read.
    """
    failed: list[str] = []
    for number in reversed(checkpoints.rounds()):
        error = None
        try:
            saved = checkpoints.read(number, lambda leaves: _like(leaves, state))
        except Exception as found:  # whatever orbax raises for a damaged file
            error = found
        if _anyone(error is not None):
            why = f"{type(error).__name__}: {error!s:.200}" if error else "in another process"
            failed.append(f"the checkpoint of round {number} cannot be read ({why})")
            continue
        for message in failed:
            say(f"{where}: {message}. That of round {number} is used instead.")
        if delete:
            for other in [n for n in checkpoints.rounds() if n > number]:
                checkpoints.delete(other)
        return saved
    raise ValueError(
        f"{where}: no checkpoint in {os.fspath(checkpoints.folder)!r} can be read: "
        f"{'; '.join(failed)}. Start again in another folder."
    )


def state_of(saved: Saved, state: PyTree, where: str) -> PyTree:
    """The state in a checkpoint, with the structure of another one.

    Raises:
      ValueError: if that has other leaves, shapes or dtypes than the run had at its start.
    """
    given, _ = split(state, "state")
    initial = [Leaf(**leaf) for leaf in saved.facts["initial"]]
    differs = difference(initial, given)
    if differs:
        algorithm = saved.facts["algorithm"]
        raise ValueError(
            f"{where}: the checkpoint is of another algorithm or model (it is of {algorithm}): "
            f"{differs}. Pass what the run was started with, or choose another folder."
        )
    leaves = [Leaf(**leaf) for leaf in saved.facts["leaves"]]
    restored = zip(leaves, saved.arrays, _like(leaves, state))
    own = {leaf.name: whole(leaf, x, like) for leaf, x, like in restored}
    return jax.tree.unflatten(jax.tree.structure(state), [own[leaf.name] for leaf in given])


def contents(run: Run) -> tuple[list[Any], dict[str, Any]]:
    """The arrays and facts of a run's checkpoint.

    Raises:
      ValueError: if the state has other leaves than at the start.
    """
    leaves, arrays = split(run.state, "state")
    names, first = [leaf.name for leaf in leaves], [leaf.name for leaf in run.initial]
    if names != first:
        changed = sorted(set(names) ^ set(first)) or names
        raise ValueError(
            f"fax.experiment.run: a round has changed the structure of the state at {changed[0]}. "
            "A state must keep its structure, or a checkpoint cannot be restored."
        )
    callbacks = []
    for number, callback in enumerate(run.callbacks):
        record: dict[str, Any] = {"name": type(callback).__name__}
        callbacks.append(record)
        if not hasattr(callback, "state"):
            continue
        state = callback.state
        if _is_json(state):
            record["value"] = copy.deepcopy(state)  # it may change while this is written
        else:
            own, more = _arrays_of(callback, state, number)
            record["leaves"] = [len(leaves), len(leaves) + len(own)]
            leaves, arrays = leaves + own, arrays + more
    facts = {
        "round": run.round,
        "cohort": run.cohorts.round,
        "algorithm": run.name,
        "initial": [dataclasses.asdict(leaf) for leaf in run.initial],
        "leaves": [dataclasses.asdict(leaf) for leaf in leaves],
        "history": list(run.history),
        "callbacks": callbacks,
        "keep": list(run.keep),
    }
    return arrays, facts


def put_back(run: Run, saved: Saved) -> None:
    """Makes a run what it was when a checkpoint was saved."""
    where, facts = "fax.experiment.run", saved.facts
    in_store = isinstance(run.algorithm, ClientStore)
    if in_store != (saved.clients is not None):
        had, fix = ("no", "the algorithm itself") if in_store else ("a", "one")
        raise ValueError(f"{where}: the run in this folder had {had} ClientStore. Pass {fix}.")
    run.state = state_of(saved, run.state, where)
    run.round, run.cohorts.round = facts["round"], facts["cohort"]
    run.history[:] = facts["history"]
    if isinstance(run.algorithm, ClientStore) and saved.clients is not None:
        run.algorithm.load(saved.clients)
    left = list(facts["callbacks"])
    for callback in run.callbacks:
        own = next((x for x in left if x["name"] == type(callback).__name__), None)
        if own is None:
            log.info("the callback %s is new, and starts here", type(callback).__name__)
            continue
        left.remove(own)
        if "leaves" in own:
            callback.state = _of_callback(run, callback, saved, *own["leaves"])
        elif "value" in own:
            callback.state = own["value"]
    for record in left:
        log.info("the callback %s is not there any more", record["name"])


def lost_noise(run: Run, last: int, same: bool) -> None:
    """Refuses to repeat private rounds in another way.

    On the same devices, a round that is run again releases the same numbers. On others, sums may
    differ in their last bits; with the same noise, the difference reveals something about clients.

    Args:
      run: after its checkpoint was put back.
      last: the last round that was released.
      same: whether settings, versions and devices are the same.

    Raises:
      ValueError: if some rounds after the checkpoint were released, and they are not.
    """
    if not same and last > run.round and noise_states("fax.experiment.run", run.state):
        raise ValueError(
            f"fax.experiment.run: rounds {run.round + 1} to {last} of this private run were "
            "released after its last checkpoint. They would be run again with other settings, "
            "devices or versions, but with the same noise, and the difference would reveal "
            "something about clients. Continue with those that the run had before."
        )


def say(message: str) -> None:
    """Warns, and writes to the log."""
    log.warning("%s", message)
    warnings.warn(message, stacklevel=2)


def _like(leaves: Sequence[Leaf], state: PyTree) -> list[Any]:
    """For each leaf of a checkpoint, that of a state with this name, or None."""
    flat = jax.tree_util.tree_leaves_with_path(state)
    own = {f"state{jax.tree_util.keystr(path)}": x for path, x in flat}
    return [own.get(leaf.name) for leaf in leaves]


def _of_callback(run: Run, callback: Any, saved: Saved, start: int, stop: int) -> PyTree:
    """A callback's state: with the structure of its present state, or of the parameters."""
    leaves = [Leaf(**leaf) for leaf in saved.facts["leaves"][start:stop]]
    arrays = [whole(leaf, x) for leaf, x in zip(leaves, saved.arrays[start:stop])]
    paths = [leaf.name.partition("]")[2] for leaf in leaves]
    for tree in (getattr(callback, "state", None), run.params):
        flat = jax.tree_util.tree_leaves_with_path(tree)
        if [jax.tree_util.keystr(path) for path, _ in flat] == paths:
            return jax.tree.unflatten(jax.tree.structure(tree), arrays)
    raise ValueError(
        f"fax.experiment.run: the state of the callback {type(callback).__name__} has the leaves "
        f"{', '.join(paths)} in the checkpoint. Give it a state of this structure when it is made."
    )


def _arrays_of(callback: Any, state: PyTree, number: int) -> tuple[list[Leaf], list[Any]]:
    """What `split` returns for the state of a callback, which a user has written."""
    try:
        return split(state, f"callbacks[{number}]", keep_host=True)
    except TypeError as error:
        raise ValueError(
            f"fax.experiment.run: the state of the callback {type(callback).__name__} cannot be "
            f"saved: {error}. Make it a pytree of arrays and numbers, or plain data as in JSON. If "
            "it does not have to be saved, give the attribute another name."
        ) from error


def _is_json(state: Any) -> bool:
    try:
        return repr(json.loads(json.dumps(state))) == repr(state)
    except (TypeError, ValueError):
        return False


def _anyone(failed: bool) -> bool:
    """Whether this is so in any process."""
    if jax.process_count() == 1:
        return failed
    return bool(np.any(multihost_utils.process_allgather(np.int32(failed))))
