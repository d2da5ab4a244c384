"""Plans: a program divided into stages of the server and of the clients, and how it runs."""

from __future__ import annotations

import dataclasses
import functools
import os
import weakref
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fax.data import Gathered
from fax.deploy._artifacts import save
from fax.deploy._audit import Audit, audit
from fax.deploy._backend import Backend
from fax.deploy._cut import Cutter
from fax.deploy._stages import PLATFORMS, Stage
from fax.deploy._steps import Block, rows_of
from fax.deploy._values import CutError, Held, Row

PyTree = Any
# The fields of a `fax.data.Cohort` that are clients' data.
DATA = ("batches", "mask", "num_examples")


def cut(fn: Callable, *args: PyTree, held: Collection[str] = DATA, pull: bool = False) -> Plan:
    """Divides a program into what the server does and what each client does.

    Clients run the function of every `fax.map`, each on its own rows, and send only what is
    reduced. Everything else is the server's. Gradients, loops and branches work as in the program.
    The program is only traced: values of ``args`` are not looked at.

    Args:
      fn: a function that calls programs, such as an algorithm's ``round``.
      *args: its arguments, or their shapes and dtypes as `jax.ShapeDtypeStruct`.
      held: which leaves of the arguments the clients hold: those with one of these names in their
        path, of a field, or a key of a dict. The leading axis of each has a row for each client.
        Default: the batches, the mask and the number of examples of a `fax.data.Cohort`. Add
        the names of state that clients keep, such as ``clients`` for `fax.algorithms.scaffold`.
      pull: whether the server may fetch rows where it needs them. The audit lists where it does.

    Returns:
      The plan.

    Raises:
      CutError: if the server needs the rows of clients and ``pull`` is False, if no leaf has one of
        the names, if a client function has effects, or if the cohort's examples are on the server.

    Example:

      >>> @fax.program(clients=3)
      ... def mean_length(words):
      ...     return fax.mean(fax.map(lambda w: jnp.sum(w != 0), words["words"]))
      >>> words = {"words": jnp.array([[7, 0, 0], [7, 7, 0], [7, 7, 7]])}
      >>> plan = fax.deploy.cut(mean_length, words, held=["words"])
      >>> float(plan.run(fax.deploy.InProcess(), words))
      2.0
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(args)
    _refuse_resident(args)
    where = [bool({_name(key) for key in path} & set(held)) for path, _ in paths]
    _check_names(held, paths)
    types = [_type(x) for _, x in paths]
    jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(*jax.tree.unflatten(tree, types))
    cutter = Cutter(pull)
    block = cutter.block(jaxpr, [0 if own else None for own in where])
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    return Plan(
        block, tuple(dict.fromkeys(block.stages())), tree, jax.tree.structure(out), tuple(names)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A program as steps of the server and stages of the clients. See `cut`.

    Attributes:
      stages: what clients compute, each function once.
    """

    _block: Block
    stages: tuple[Stage, ...]
    _arguments: Any
    _results: Any
    _names: tuple[str, ...]

    def run(
        self, backend: Backend, *args: PyTree, clients: Sequence[Hashable] | None = None
    ) -> PyTree:
        """Runs the plan. The values are those of the program up to rounding.

        Args:
          backend: where clients run.
          *args: the arguments of the program. What clients hold is a `Held`; if it is an array, its
            rows are sent to the clients first.
          clients: the names of the clients, in the order of the rows. Default: those that hold the
            arguments, or the numbers from 0.

        Returns:
          The program's results. Those with a row for each client are `Held`: they stay there, and
          ``fetch`` brings them.

        Raises:
          ValueError: if arguments differ from those that the plan was made for, or rows of one
            participant are with different clients.
        """
        leaves, tree = jax.tree.flatten(args, is_leaf=lambda x: isinstance(x, Held))
        if tree != self._arguments:
            raise ValueError(
                f"Plan.run: the arguments have the structure {tree}, expected that of the "
                f"arguments of fax.deploy.cut: {self._arguments}."
            )
        runner = _Runner(backend, clients, leaves)
        given = []
        for x, value, name in zip(leaves, self._block.inputs, self._names, strict=True):
            _check_type(name, x, value)
            if value.held and not isinstance(x, Held):
                rows = runner.send(rows_of(jnp.asarray(x), 0), None)
                x = Held(rows, value.aval.shape, value.aval.dtype)
            given.append(x if hasattr(x, "dtype") else np.asarray(x, value.aval.dtype))
        return jax.tree.unflatten(self._results, self._block.run(runner, given))

    def audit(self) -> Audit:
        """What the plan moves, and how each input of the clients can reach the server.

        Example:

          >>> @fax.program(clients=3)
          ... def mean_length(words):
          ...     return fax.mean(fax.map(lambda w: jnp.sum(w != 0), words["words"]))
          >>> words = {"words": jax.ShapeDtypeStruct((3, 8), jnp.int32)}
          >>> plan = fax.deploy.cut(mean_length, words, held=["words"])
          >>> plan.audit().statements
          {"[0]['words']": 'only through sums over 3'}
        """
        return audit(self._block, self._names)

    def save(self, folder: str | os.PathLike, platforms: Sequence[str] = PLATFORMS) -> None:
        """Writes the stages and the audit to a new folder, for clients that have JAX alone.

        The file ``fax/deploy/_client.py`` runs them on a machine without fax; see `Processes`.

        Args:
          folder: where to. It may exist if it is empty.
          platforms: what the stages are compiled for.

        Raises:
          FileExistsError: if the folder is not empty.
        """
        save(folder, self.stages, self.audit(), platforms)

    def fetch(self, backend: Backend, tree: PyTree) -> PyTree:
        """The values with every `Held` replaced by an array of its rows."""

        def fetched(x: Any) -> Any:
            if not isinstance(x, Held):
                return x
            return jnp.stack([jnp.asarray(row) for row in backend.fetch(x.rows)], x.axis)

        return jax.tree.map(fetched, tree, is_leaf=lambda x: isinstance(x, Held))


class _Runner:
    """Runs steps on a backend, and knows which client is which participant."""

    def __init__(self, backend: Backend, clients: Any, leaves: Sequence[Any]):
        self._backend = backend
        self._clients = clients
        self._holders: dict[int, set[tuple[Hashable, ...]]] = {}
        for x in leaves:
            if isinstance(x, Held):
                self._holders.setdefault(len(x.rows), set()).add(x.clients)

    def _names(self, size: int) -> tuple[Hashable, ...]:
        """The clients of participants of whom no operand says who they are."""
        if self._clients is not None and len(self._clients) == size:
            return tuple(self._clients)
        known = self._holders.get(size, {tuple(range(size))})
        if len(known) > 1:
            raise ValueError(
                f"Plan.run: arguments with {size} rows are held by different clients, so it is not "
                "known which clients are meant elsewhere; name them by clients=."
            )
        return next(iter(known))

    def on_clients(
        self, stage: Stage, size: int, operands: Sequence[Any], axes: Sequence[int | None]
    ) -> list[Any]:
        holders = {x.clients for x in operands if isinstance(x, Held)}
        if len(holders) > 1:
            raise ValueError(
                f"Stage {stage.name!r} uses rows that are with different clients: "
                f"{' and '.join(map(str, holders))}. Rows of the same participant have to be with "
                "the same client."
            )
        clients = next(iter(holders)) if holders else self._names(size)
        given = [
            x if axis is None else x.rows if isinstance(x, Held) else rows_of(jnp.asarray(x), axis)
            for x, axis in zip(operands, axes, strict=True)
        ]
        found = self._backend.run(stage, clients, given)
        for mode, rows in zip(stage.outputs, found, strict=True):
            if mode == "placed":
                self._free_later(rows)
        return found

    def send(self, rows: Sequence[Any], like: Held | None) -> tuple[Row, ...]:
        clients = self._names(len(rows)) if like is None else like.clients
        found = self._backend.put(clients, rows)
        self._free_later(found)
        return tuple(found)

    def fetch(self, held: Held) -> list[np.ndarray]:
        return self._backend.fetch(held.rows)

    def _free_later(self, rows: Sequence[Row]) -> None:
        for row in rows:
            weakref.finalize(row, self._backend.free, [(row.client, row.slot)]).atexit = False


def _refuse_resident(args: PyTree) -> None:
    def is_gathered(x: Any) -> bool:
        return isinstance(x, Gathered)

    if any(map(is_gathered, jax.tree.leaves(args, is_leaf=is_gathered))):
        raise CutError(
            "fax.deploy.cut: the cohort's batches are rows of examples that are all on the server. "
            "Make cohorts that clients can hold by fax.data.cohorts(..., resident=False)."
        )


def _check_names(held: Collection[str], paths: Sequence[Any]) -> None:
    known = {_name(key) for path, _ in paths for key in path}
    missing = [name for name in held if name not in known]
    if missing and set(held) != set(DATA):
        raise CutError(
            f"fax.deploy.cut: held names {missing[0]!r}, which is in no path of the arguments. "
            f"Their names are {sorted(name for name in known if isinstance(name, str))}."
        )


def _name(key: Any) -> Any:
    """The name of a field or the key of a dict in a path."""
    return getattr(key, "name", getattr(key, "key", None))


@functools.singledispatch
def _type(x: Any) -> Any:
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


@_type.register
def _(x: Held) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@_type.register
def _(x: jax.ShapeDtypeStruct) -> Any:
    return x


def _check_type(name: str, x: Any, value: Any) -> None:
    own = _type(x)
    if (own.shape, own.dtype) != (value.aval.shape, value.aval.dtype):
        raise ValueError(
            f"Plan.run: {name} is {own.dtype}{list(own.shape)}, expected "
            f"{value.aval.dtype}{list(value.aval.shape)}, as when the plan was made."
        )
    if isinstance(x, Held) and not value.held:
        raise ValueError(
            f"Plan.run: {name} is held by clients, but the plan was made for a value of the "
            "server; add its name to held= of fax.deploy.cut."
        )
