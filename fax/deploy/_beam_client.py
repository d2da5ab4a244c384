"""What the workers of a Beam pipeline run. They need Beam and JAX, and not fax.

A program says which stages run for each client, one after another, and on what. A worker loads it
once, and runs it for several clients at a time in a loop that XLA compiles. What clients send is
added up in float64 and in integers of 64 bits, so that the order of clients hardly matters.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import jax
import jax.numpy as jnp
import numpy as np
from apache_beam.io.filesystems import FileSystems
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.shared import Shared
from apache_beam.utils.timestamp import MIN_TIMESTAMP
from apache_beam.utils.windowed_value import WindowedValue
from jax import export, lax

# What a stage reads: ("loaded", name) what the client brings, ("shared", number) the same for all,
# ("sent", number) a row for this client, or ("made", call, result) of an earlier stage.
Reference = tuple[Any, ...]


class Value(NamedTuple):
    """An array of the server. Of random keys it is the data, and ``key`` their implementation."""

    data: np.ndarray
    key: str | None


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs for each client.

    Attributes:
      blobs: the stages, as `jax.export` serializes them, by their hash.
      calls: which of them run, and what they read.
      outputs: which values are the results.
      loaded: the dtype and shape of what each client brings, by name.
      shared: values that are the same for all clients.
      sent: values with a row for each client.
      clients: how many there are.
      together: how many run in one call.
      x64: whether JAX uses 64 bits.
      handle: finds what a process has loaded.
    """

    blobs: Mapping[str, bytes]
    calls: Sequence[tuple[str, Sequence[Reference]]]
    outputs: Sequence[Reference]
    loaded: Mapping[str, tuple[str, tuple[int, ...]]]
    shared: Sequence[Value]
    sent: Sequence[Value]
    clients: int
    together: int
    x64: bool
    handle: Shared

    def check(self, element: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """A client and its arrays, from an element of the source."""
        is_pair = isinstance(element, tuple | list) and len(element) == 2
        if not (is_pair and isinstance(element[1], Mapping)):
            raise ValueError(
                f"the source has {element!r:.200}, expected a pair of a client and a dict of its "
                "arrays"
            )
        client, given = element
        if self.sent and not (_is_int(client) and 0 <= client < self.clients):
            raise ValueError(
                f"the source has a client {client!r:.80}, expected an int below {self.clients}, "
                "because the server has a value for each client, by number"
            )
        own = {}
        for name, (dtype, shape) in self.loaded.items():
            if name not in given:
                raise ValueError(
                    f"client {client!r:.80} has no {name!r}, only {sorted(given)}, expected "
                    f"{dtype}{list(shape)}"
                )
            x = own[name] = np.asarray(given[name])
            if (x.dtype.name, x.shape) != (dtype, shape):
                raise ValueError(
                    f"{name!r} of client {client!r:.80} is {x.dtype}{list(x.shape)}, expected "
                    f"{dtype}{list(shape)}"
                )
        return client, own

    def rows(self, clients: Sequence[tuple[Any, dict[str, np.ndarray]]]) -> dict[Any, np.ndarray]:
        """What these clients read, each value with ``together`` rows, of which the last repeat."""
        padded = [*clients, *[clients[0]] * (self.together - len(clients))]
        used = {ref for _, operands in self.calls for ref in operands} | set(self.outputs)
        found = {}
        for ref in used:
            if ref[0] == "loaded":
                found[ref] = np.stack([own[ref[1]] for _, own in padded])
            elif ref[0] == "sent":
                found[ref] = self.sent[ref[1]].data[[client for client, _ in padded]]
        return found


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


class Loaded:
    """A program as a process has loaded and compiled it."""

    def __init__(self, program: Program):
        stages = {}
        for name, blob in program.blobs.items():
            if hashlib.sha256(blob).hexdigest() != name:
                raise ValueError("a stage is not what its hash says")
            stages[name] = export.deserialize(bytearray(blob)).call
        # What depends on values of the server must not be kept.
        calls, outputs, together = program.calls, program.outputs, program.together
        keys = {("shared", number): x.key for number, x in enumerate(program.shared)}
        keys |= {("sent", number): x.key for number, x in enumerate(program.sent)}

        def client(shared: Sequence[Any], own: dict[Any, Any]) -> list[Any]:
            made: list[Sequence[Any]] = []

            def value(ref: Reference) -> Any:
                if ref[0] == "made":
                    return made[ref[1]][ref[2]]
                x = shared[ref[1]] if ref[0] == "shared" else own[ref]
                key = keys.get(ref)
                return x if key is None else jax.random.wrap_key_data(x, impl=key)

            for stage, operands in calls:
                made.append(stages[stage](*map(value, operands)))
            return [_data(value(ref)) for ref in outputs]

        def run(shared: Sequence[Any], own: dict[Any, Any]) -> list[Any]:
            # The numbers are there because clients may read nothing of their own.
            return lax.map(lambda x: client(shared, x[0]), (own, jnp.arange(together)))

        self.run = jax.jit(run)


def _data(x: Any) -> Any:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


class RunStages(beam.DoFn):
    """Runs a program for clients, several at a time. Elements are pairs of a client and a dict."""

    def __init__(self, program: Program):
        self.program = program

    def setup(self) -> None:
        self._loaded = self.program.handle.acquire(lambda: Loaded(self.program))
        self._shared = [x.data for x in self.program.shared]

    def start_bundle(self) -> None:
        self._waiting: list[tuple[Any, dict[str, np.ndarray]]] = []

    def process(self, element: Any) -> Iterator[Any]:
        self._waiting.append(self.program.check(element))
        if len(self._waiting) == self.program.together:
            yield from self._results()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._waiting:
            for result in self._results():
                yield WindowedValue(result, MIN_TIMESTAMP, [GlobalWindow()])

    def _results(self) -> Iterable[Any]:
        clients, self._waiting = self._waiting, []
        with jax.enable_x64(self.program.x64):  # this thread or process has settings of its own
            found = self._loaded.run(self._shared, self.program.rows(clients))
        return self.results([client for client, _ in clients], list(map(np.asarray, found)))

    def results(self, clients: list[Any], found: list[np.ndarray]) -> Iterable[Any]:
        raise NotImplementedError


class Rows(RunStages):
    """Yields each client with a dict of its results."""

    def __init__(self, program: Program, names: Sequence[str]):
        super().__init__(program)
        self.names = names

    def results(self, clients: list[Any], found: list[np.ndarray]) -> Iterable[Any]:
        for number, client in enumerate(clients):
            yield client, {name: x[number] for name, x in zip(self.names, found, strict=True)}


# What some clients sent, combined: how many they are, an array for each result, None without
# clients, and a bit for each client there is, set for these, None if clients have no numbers. Beam
# sends totals between workers, which know tuples, but not the classes of this file.
Total = tuple[int, list[np.ndarray] | None, np.ndarray | None]
_NOTHING: Total = (0, None, None)


class Sums(RunStages):
    """Yields totals of the clients that ran together.

    Args:
      modes: for each result ``sum``, ``max`` or ``min``.
    """

    def __init__(self, program: Program, modes: Sequence[str]):
        super().__init__(program)
        self.modes = modes

    def results(self, clients: list[Any], found: list[np.ndarray]) -> Iterable[Any]:
        values = [
            _REDUCE[mode].reduce(_wide(x[: len(clients)]), axis=0)
            for mode, x in zip(self.modes, found, strict=True)
        ]
        seen = None
        if self.program.sent:
            bits = np.zeros(self.program.clients, bool)
            bits[clients] = True
            seen = np.packbits(bits)
        yield len(clients), list(map(np.asarray, values)), seen


_REDUCE: dict[str, Any] = {"sum": np.add, "max": np.maximum, "min": np.minimum}


def _wide(x: np.ndarray) -> np.ndarray:
    """Floats and integers of 64 bits. Sums of integers wrap, and wrap again in shorter ones."""
    for kind, dtype in _WIDE:
        if jnp.issubdtype(x.dtype, kind):
            return x.astype(dtype)
    return x


_WIDE = (
    *((jnp.floating, np.float64), (jnp.complexfloating, np.complex128)),
    *((jnp.signedinteger, np.int64), (jnp.unsignedinteger, np.uint64)),
)


class Combine(beam.CombineFn):
    """Combines totals."""

    def __init__(self, modes: Sequence[str]):
        self.modes = modes

    def create_accumulator(self) -> Total:
        return _NOTHING

    def add_input(self, one: Total, other: Total) -> Total:
        (number, values, seen), (more, others, also_seen) = one, other
        if values is None or others is None:
            return other if values is None else one
        pairs = zip(self.modes, values, others, strict=True)
        combined = [np.asarray(_REDUCE[mode](x, y)) for mode, x, y in pairs]
        both = None if seen is None or also_seen is None else seen | also_seen
        return number + more, combined, both

    def merge_accumulators(self, totals: Iterable[Total]) -> Total:
        return functools.reduce(self.add_input, totals, _NOTHING)

    def extract_output(self, total: Total) -> Total:
        return total


def write(total: Total, path: str) -> None:
    """Writes a total to a file of any file system that Beam knows. Nothing is pickled."""
    number, values, seen = total
    different = number if seen is None else int(np.unpackbits(seen).sum())
    buffer = io.BytesIO()
    np.savez(buffer, np.array([number, different]), *(values or ()), allow_pickle=False)
    with FileSystems.create(path) as file:
        file.write(buffer.getvalue())


def read(path: str) -> tuple[int, int, list[np.ndarray]]:
    """How many clients a total has, how many different ones, and its values. Removes the file."""
    with FileSystems.open(path) as file:
        buffer = io.BytesIO(file.read())
    with np.load(buffer, allow_pickle=False) as found:
        counts, *values = (found[name] for name in found.files)
    FileSystems.delete([path])
    return int(counts[0]), int(counts[1]), values
