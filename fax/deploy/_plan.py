"""Plans: a program divided into stages of the server and of the clients, and how it runs."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.errors import InconclusiveDimensionOperation

from fax import _arguments
from fax.deploy._absence import check_absence
from fax.deploy._artifacts import save
from fax.deploy._audit import Audit, audit
from fax.deploy._backend import Backend, ClientError
from fax.deploy._cut import Cutter
from fax.deploy._plan_arguments import (
    DATA,
    check_names,
    check_type,
    is_named,
    names_of,
    ragged_type,
    refuse_resident,
    type_of,
)
from fax.deploy._runner import Runner, fetch, is_secure
from fax.deploy._secure_sums import check_plan
from fax.deploy._stages import PLATFORMS, Stage
from fax.deploy._steps import Block, rows_of
from fax.deploy._values import CutError, Held, OfThisProcess, named

PyTree = Any


def cut(
    fn: Callable,
    *args: PyTree,
    held: Collection[str] = DATA,
    pull: bool = False,
    ragged: Collection[str] = (),
) -> Plan:
    """Divides a program into what the server does and what each client does.

    Clients run the function of every `fax.map`, each on its own rows, and send only what is
    reduced. The server computes everything else. Gradients, loops and branches work as in the
    program. The program is only traced: values of ``args`` are not looked at.

    Args:
      fn: a function that calls programs, such as an algorithm's ``round``.
      *args: its arguments, or their shapes and dtypes as `jax.ShapeDtypeStruct`.
      held: which leaves of the arguments the clients hold: those whose path has one of these names,
        as a field or as a key of a dict. The leading axis of each has a row for each client.
        Default: the batches, the mask and the number of examples of a `fax.data.Cohort`. Add
        the names of state that clients keep, such as ``clients`` for `fax.algorithms.scaffold`.
      pull: whether the server may fetch rows where it needs them. The audit lists where it does.
      ragged: the names of those ``held`` leaves of which clients have different numbers of steps,
        such as ``["batches", "mask"]``. The steps are axis 1 of the leaf, so the leading axis of a
        client's row. The plan then does for any number of them, without padding. The clients'
        functions must not let the results depend on padding, which holds for fax's algorithms.

    Returns:
      The plan.

    Raises:
      CutError: if the server needs the rows of clients and ``pull`` is False, if no leaf has one of
        the names, if a client function has effects, if the cohort's examples are on the server, or
        if the program needs to know how many ``ragged`` steps there are.
      ValueError: if ``held`` or ``ragged`` is no collection of names.

    Example:

      >>> @fax.program(clients=3)
      ... def mean_length(words):
      ...     return fax.mean(fax.map(lambda w: jnp.sum(w != 0), words["words"]))
      >>> words = {"words": jnp.array([[7, 0, 0], [7, 7, 0], [7, 7, 7]])}
      >>> plan = fax.deploy.cut(mean_length, words, held=["words"])
      >>> float(plan.run(fax.deploy.InProcess(), words))
      2.0
    """
    held, ragged = names_of("held", held), names_of("ragged", ragged)
    paths, tree = jax.tree_util.tree_flatten_with_path(args)
    refuse_resident(args)
    where = [is_named(path, held) for path, _ in paths]
    check_names("held", held, paths)
    check_names("ragged", ragged, paths)
    steps = export.symbolic_shape("steps", constraints=["steps >= 1"])
    types = [
        ragged_type(path, x, held, steps) if is_named(path, ragged) else type_of(x)
        for path, x in paths
    ]
    cutter = Cutter(pull)
    try:
        jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(*jax.tree.unflatten(tree, types))
        block = cutter.block(jaxpr, [0 if own else None for own in where])
    except (TypeError, ValueError, NotImplementedError, InconclusiveDimensionOperation) as error:
        if isinstance(error, CutError) or not ragged:
            raise
        raise CutError(
            "fax.deploy.cut: with ragged=, the program cannot be traced, perhaps because it needs "
            f"to know how many steps clients have: {error}"
        ) from error
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    stages = tuple(dict.fromkeys(block.stages()))
    return Plan(block, stages, tree, jax.tree.structure(out), tuple(names))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan(OfThisProcess):
    """A program as steps of the server and stages of the clients. See `cut`.

    Attributes:
      stages: what clients compute, each function once.
    """

    _block: Block
    stages: tuple[Stage, ...]
    _arguments: Any
    _results: Any
    _names: tuple[str, ...]

    _instead = "In another process, cut the program again. Clients need what save() writes."

    def __repr__(self) -> str:
        return f"Plan(stages={[own.name for own in self.stages]})"

    def run(
        self,
        backend: Backend,
        *args: PyTree,
        clients: Sequence[Hashable] | None = None,
        quorum: int | None = None,
        take: int | None = None,
    ) -> PyTree:
        """Runs the plan. The values are those of the program up to rounding.

        Args:
          backend: where clients run.
          *args: the arguments of the program. What clients hold is a `Held`; if it is an array, its
            rows are sent to the clients first.
          clients: the names of the clients, in the order of the rows. Default: those that hold the
            arguments, or the numbers from 0.
          quorum: how many clients of each stage must be left if others fail. The run then starts
            again without those that failed, so its results are those of a program in which they are
            left out, for example by ``where=``. Default: ``take``, or if that is not given either,
            the run ends if any client fails.
          take: how many clients to go on with: those that answer first when the first stage runs.
            The others are left out like clients that fail. If one of those taken fails later, all
            others are asked again. If fewer can answer, the run goes on with them, if they are at
            least ``quorum``. Default: all clients.

        Returns:
          The program's results. Those with a row for each client are `Held`: the rows stay with the
          clients, and ``fetch`` brings them to the server. ``Held.present`` says who took part.

        Raises:
          ValueError: if arguments differ from those that the plan was made for, if ``clients`` are
            not as many as take part, if rows of one participant are with different clients, or if
            ``take`` is less than ``quorum`` or more than the number of clients.
          CutError: if there is a ``quorum`` or ``take``, and results would be wrong without some
            clients, for example because `fax.mean` without weights divides by the number of all of
            them. Also if the backend has `SecureSums`, and clients send anything else.
          ClientError: if a client fails, or with ``quorum`` or ``take``, if too few are left.
        """
        quorum = self._least(quorum, take)
        leaves, tree = jax.tree.flatten(args, is_leaf=lambda x: isinstance(x, Held))
        if tree != self._arguments:
            raise ValueError(
                f"Plan.run: the arguments have the structure {tree}, expected that of the "
                f"arguments of fax.deploy.cut: {self._arguments}."
            )
        clients = None if clients is None else named(clients)
        if clients is not None and len(clients) not in self._sizes:
            raise ValueError(
                f"Plan.run: clients names {len(clients)} clients, expected as many as take "
                f"part: {' or '.join(map(str, sorted(self._sizes)))}."
            )
        if is_secure(backend):
            check_plan(self.audit())
        runner = Runner(backend, clients, leaves, quorum, take)
        for x, value, name in zip(leaves, self._block.inputs, self._names, strict=True):
            check_type(name, x, value)
        given: list[Any] = []
        while True:
            try:
                given = given or list(self._placed(runner, leaves))
                found = self._block.run(runner, given)
                return jax.tree.unflatten(self._results, found)
            except ClientError as error:
                if quorum is None or runner.opened or runner.failed.issuperset(error.clients):
                    raise
                # From the start, because all sums must be over the same clients. A stage only adds
                # to what clients hold, so nothing has changed.
                runner.fail(error)

    def _least(self, quorum: int | None, take: int | None) -> int | None:
        """How many clients must be left, None if none may fail."""
        if take is not None:
            _arguments.count("Plan.run", "take", take)
            quorum = take if quorum is None else quorum
            if take > max(self._sizes):
                raise ValueError(
                    f"Plan.run: take is {take}, expected at most the number of clients, "
                    f"{max(self._sizes)}."
                )
        if quorum is not None:
            _arguments.count("Plan.run", "quorum", quorum)
            check_absence(self._block)
        if take is not None and quorum is not None and quorum > take:
            raise ValueError(
                f"Plan.run: quorum is {quorum}, expected at most take, which is {take}."
            )
        return quorum

    @functools.cached_property
    def _sizes(self) -> set[int]:
        """How many clients take part."""
        inputs = {x.aval.shape[x.axis] for x in self._block.inputs if x.axis is not None}
        return inputs | {exchange.clients for exchange in self.audit().exchanges}

    def _placed(self, runner: Runner, leaves: Sequence[Any]) -> Iterator[Any]:
        """The arguments, those that clients hold with them."""
        for x, value in zip(leaves, self._block.inputs, strict=True):
            if value.held and not isinstance(x, Held):
                names, rows = runner.send(rows_of(jnp.asarray(x), 0), None)
                x = Held(tuple(rows), names, value.aval.shape, value.aval.dtype)
            # Without x64, JAX has half of the bits of NumPy's numbers, and so has what is sent.
            is_narrow = hasattr(x, "dtype") and x.dtype == value.aval.dtype
            yield x if is_narrow or value.held else np.asarray(x, value.aval.dtype)

    def audit(self) -> Audit:
        """What clients receive and send, and how their data can reach the server.

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

    def save(self, folder: str | os.PathLike[str], platforms: Sequence[str] = PLATFORMS) -> None:
        """Writes the stages and the audit to a new folder, for clients that have JAX alone.

        The file ``fax/deploy/_client.py`` runs them on a machine without fax; see `Processes`.

        Args:
          folder: where to. It may exist if it is empty.
          platforms: which platforms the stages can run on.

        Raises:
          FileExistsError: if the folder is not empty.
          ValueError: if ``platforms`` names none, or one that JAX does not have.
        """
        save(folder, self.stages, self.audit(), platforms)

    def fetch(self, backend: Backend, tree: PyTree) -> PyTree:
        """The values with every `Held` replaced by an array of its rows."""
        leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Held))
        held = [x for x in leaves if isinstance(x, Held)]
        found = dict(zip(held, fetch(backend, held), strict=True)) if held else {}

        def fetched(x: Any) -> Any:
            if not isinstance(x, Held):
                return x
            if None in x.shape:
                raise ValueError(f"Plan.fetch: {x} has rows of different shapes; fetch each alone.")
            return jnp.stack([jnp.asarray(row) for row in found[x]], x.axis)

        return jax.tree.unflatten(structure, map(fetched, leaves))
