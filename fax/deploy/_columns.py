"""What the clients of a Beam pipeline hold: columns, which say how each client's row is made.

A pipeline keeps nothing when it ends. So a value that stays with clients is computed again where it
is needed, from their data and from what the server sent. A program has all that this takes.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from fax.deploy import _client as runtime
from fax.deploy._backend import ClientError
from fax.deploy._stages import Stage

if TYPE_CHECKING:
    from fax.deploy import _beam_client as worker

# So many clients run in one call, or fewer if their arrays have more bytes than this.
_TOGETHER, _BYTES = 256, 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """What clients bring from the source, by its name."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Sent:
    """An array of the server with a row for each client."""

    value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """A value of the server, the same for all clients."""

    value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A stage that each client runs."""

    stage: Stage
    operands: tuple[Column, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """A result of a stage."""

    call: Call
    number: int

    @property
    def aval(self) -> Any:
        return self.call.stage.jaxpr.out_avals[self.number]

    @property
    def mode(self) -> str:
        return self.call.stage.outputs[self.number]


Column = Loaded | Sent | Shared | Made


class Programs:
    """Makes programs for workers.

    Args:
      types: what each client brings, by name.
      clients: how many there are.
      plan: a folder with the only stages that workers may run, None for all.
    """

    def __init__(
        self,
        types: Mapping[str, jax.ShapeDtypeStruct],
        clients: int,
        plan: str | os.PathLike[str] | None,
    ):
        self._types = types
        self._clients = clients
        self._saved = None if plan is None else _saved(pathlib.Path(plan))
        self._handles: dict[str, Any] = {}

    def making(self, columns: Sequence[Column]) -> worker.Program:
        """The program that makes columns."""
        from fax.deploy import _beam_client as worker

        writer = _Writer(self._blob)
        outputs = [writer.reference(column) for column in columns]
        rows = [*self._types.values(), *(x.aval for x in columns if isinstance(x, Made))]
        each = sum(math.prod(x.shape) * x.dtype.itemsize for x in rows)
        each += sum(x.data.nbytes // self._clients for x in writer.sent)
        together = max(1, min(_TOGETHER, self._clients, _BYTES // max(1, each)))
        x64 = bool(jax.config.jax_enable_x64)
        # A process that has loaded a program need not load one that only has other values.
        kinds = [x.key for x in (*writer.shared, *writer.sent)]
        what = str((writer.calls, outputs, kinds, together, x64))
        return worker.Program(
            blobs=writer.blobs,
            calls=writer.calls,
            outputs=outputs,
            loaded={name: (of.dtype.name, of.shape) for name, of in self._types.items()},
            shared=writer.shared,
            sent=writer.sent,
            clients=self._clients,
            together=together,
            x64=x64,
            handle=self._handles.setdefault(what, worker.Shared()),
        )

    def _blob(self, stage: Stage) -> tuple[str, bytes]:
        """The hash of a stage, and the stage as workers load it."""
        if self._saved is not None:
            if stage.digest not in self._saved:
                raise ClientError(
                    f"The stage {stage.name!r} is not in the plan of fax.deploy.Beam. Save the "
                    "plan that runs there, with the same version of JAX."
                )
            return self._saved[stage.digest]
        return stage.artifact(["cpu"])


class _Writer:
    """Collects what a program needs."""

    def __init__(self, blob_of: Any):
        self._blob_of = blob_of
        self._known: dict[Any, Any] = {}
        self.blobs: dict[str, bytes] = {}
        self.calls: list[tuple[str, list[Any]]] = []
        self.shared: list[worker.Value] = []
        self.sent: list[worker.Value] = []

    def reference(self, column: Column) -> Any:
        """Where a program finds the value of a column."""
        if isinstance(column, Loaded):
            return "loaded", column.name
        if isinstance(column, Made):
            return "made", self._call(column.call), column.number
        if column not in self._known:
            kind, values = (
                ("sent", self.sent) if isinstance(column, Sent) else ("shared", self.shared)
            )
            values.append(_value(column.value))
            self._known[column] = kind, len(values) - 1
        return self._known[column]

    def _call(self, call: Call) -> int:
        if call not in self._known:
            operands = [self.reference(x) for x in call.operands]
            name, self.blobs[name] = self._blob_of(call.stage)
            self.calls.append((name, operands))
            self._known[call] = len(self.calls) - 1
        return self._known[call]


def _value(x: Any) -> worker.Value:
    """An array for workers, or random keys, which are sent as their data."""
    from fax.deploy import _beam_client as worker

    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return worker.Value(np.asarray(jax.random.key_data(x)), str(jax.random.key_impl(x)))
    return worker.Value(np.asarray(x), None)


def _saved(folder: pathlib.Path) -> dict[str, tuple[str, bytes]]:
    """The hashes and files of a saved plan's stages, by what they compute."""
    stages = runtime.read_plan(folder)["stages"]
    return {
        stage["program"]: (name, (folder / stage["file"]).read_bytes())
        for name, stage in stages.items()
    }
