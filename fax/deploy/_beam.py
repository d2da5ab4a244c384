"""Clients as the elements of a pipeline of Apache Beam, on any number of machines."""

from __future__ import annotations

import itertools
import os
import tempfile
import uuid
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fax import _arguments, _extras, _functions
from fax._arithmetic import total_dtype
from fax.deploy._backend import ClientError
from fax.deploy._columns import Call, Column, Loaded, Made, Programs, Sent, Shared
from fax.deploy._stages import Stage
from fax.deploy._values import CutError, Held, Row

_CALLER = "fax.deploy.Beam"
# Names differ between backends, whose steps may be in one pipeline.
_NUMBERS = itertools.count()


class Beam:
    """Clients as the elements of a pipeline of Apache Beam, on any of its runners.

    Each stage that sends something is a pipeline. Workers run the stage for each client, and Beam
    adds up in float64 what clients send. Sums of integers wrap, as in the program, and are exact.
    What the server computes runs in this process.

    Workers need Beam, JAX and flatbuffers, and not fax. They keep nothing: what a plan leaves with
    clients between two stages is computed again. So the plans that can run are those without state
    of clients, such as queries, gradients, and rounds of `fax.algorithms.fedavg`. Rows are never
    brought to the server; see `rows`.

    Args:
      source: a function of a pipeline that returns a ``PCollection`` of the clients. Each pipeline
        of a plan calls it. A client is a pair ``(client, {name: array})``, of any name for messages
        and its arrays. If the server has a value for each client, such as a random key, the names
        have to be the ints from 0, which number these values.
      clients: how many there are. A pipeline that finds another number of clients fails.
      like: the arrays of one client by name, or their types as `jax.ShapeDtypeStruct`.
      options: ``PipelineOptions`` of Beam. Default: the ``FnApiRunner``, in this process.
      folder: where pipelines write what they have added up, on any file system that Beam knows, and
        this process reads it. Set it if workers are on other machines. Default: a temporary folder.
      plan: a folder that `Plan.save` wrote. Workers then run only its stages. Default: all stages
        that this process sends, compiled for CPUs.

    Raises:
      ValueError: if an argument is not as described.
      ClientError: when a plan runs, if a pipeline fails or has other clients.
      CutError: when a plan runs, if it fetches rows, or takes or replaces the state of clients.

    Example::

      def source(pipeline):
          return pipeline | beam.io.ReadFromText("words.txt") | beam.Map(parse)

      backend = fax.deploy.Beam(source, 100_000, {"words": np.zeros(8, np.int32)})
      plan = fax.deploy.cut(histogram, backend.held(), held=["words"])
      counts = plan.run(backend, backend.held())
    """

    def __init__(
        self,
        source: Callable[[Any], Any],
        clients: int,
        like: Mapping[str, Any],
        *,
        options: Any = None,
        folder: str | None = None,
        plan: str | os.PathLike[str] | None = None,
    ):
        _extras.require(_CALLER, "apache_beam", "beam")
        from apache_beam.internal.cloudpickle import cloudpickle

        from fax.deploy import _beam_client as worker

        cloudpickle.register_pickle_by_value(worker)  # workers do not have fax
        _functions.function(_CALLER, "source", source, {1: "source(pipeline)"})
        if not isinstance(like, Mapping) or not all(hasattr(x, "dtype") for x in like.values()):
            raise ValueError(
                f"{_CALLER}: like is {_arguments.shown(like)}, expected a dict of the arrays of "
                "one client."
            )
        self._source, self._options, self._folder = source, options, folder
        self._clients = _arguments.count(_CALLER, "clients", clients)
        self._types = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in like.items()}
        self._programs = Programs(self._types, self._clients, plan)
        self._columns: dict[str, Column] = {}
        self._loaded = {name: self._row(Loaded(name)) for name in like}

    def held(self) -> dict[str, Held]:
        """What clients bring, by name, as arguments of `cut` and of `Plan.run`."""
        clients = tuple(range(self._clients))
        found = {}
        for name, of in self._types.items():
            rows = (self._loaded[name],) * self._clients
            found[name] = Held(rows, clients, (self._clients, *of.shape), of.dtype)
        return found

    def rows(self, pipeline: Any, **values: Held) -> Any:
        """What clients hold as elements of a pipeline, ``(client, {name: array})``.

        Use it to write the results of each client to files. A later source can read them again.

        Args:
          pipeline: a pipeline of yours.
          **values: results of `Plan.run` with a row for each client.

        Returns:
          A ``PCollection``.

        Example::

          losses = plan.run(backend, params, backend.held())
          with beam.Pipeline() as pipeline:
              own = backend.rows(pipeline, loss=losses)
              own | beam.Map(as_line) | beam.io.WriteToText("losses.txt")
        """
        import apache_beam as beam

        from fax.deploy import _beam_client as worker

        program = self._programs.making([self._column(x.rows) for x in values.values()])
        label = f"rows {next(_NUMBERS)}"
        return self._read(pipeline) | label >> beam.ParDo(worker.Rows(program, [*values]))

    def put(self, clients: Sequence[Hashable], rows: Sequence[Any]) -> list[Row]:
        self._check(clients)
        return [self._row(Sent(_stacked(rows)))] * self._clients

    def run(self, stage: Stage, clients: Sequence[Hashable], operands: Sequence[Any]) -> list[Any]:
        self._check(clients)
        given = [
            self._column(x) if mode == "placed" else Shared(x)
            for x, mode in zip(operands, stage.inputs, strict=True)
        ]
        call = Call(stage, tuple(given))
        made = [Made(call, number) for number in range(len(stage.outputs))]
        totals = iter(self._totals([x for x in made if x.mode != "placed"]))
        return [
            [self._row(x)] * self._clients if x.mode == "placed" else next(totals) for x in made
        ]

    def fetch(self, rows: Sequence[Row]) -> list[np.ndarray]:
        raise CutError(
            f"{_CALLER} does not bring the rows of clients to the server. Reduce them in the "
            "program, or write them to files with Beam.rows."
        )

    def free(self, rows: Iterable[tuple[Hashable, str]]) -> None:
        for _, slot in rows:
            self._columns.pop(slot, None)

    def _row(self, column: Column) -> Row:
        """A reference to a column, which stands for the rows of all clients."""
        slot = f"column {next(_NUMBERS)}"
        self._columns[slot] = column
        return Row(None, slot)

    def _check(self, clients: Sequence[Hashable]) -> None:
        if list(clients) != list(range(self._clients)):
            raise CutError(
                f"{_CALLER}: a stage runs for {len(clients)} clients, not for the "
                f"{self._clients} of the source in their order. So the plan takes or replaces rows "
                "of some clients, such as their state, which pipelines do not keep. Let the source "
                "bring the state, and write the new one with Beam.rows."
            )

    def _column(self, rows: Sequence[Any]) -> Column:
        """What rows, or values for them, are."""
        references = dict.fromkeys(x for x in rows if isinstance(x, Row))
        if not references:
            return Sent(_stacked(rows))
        slots = {x.slot for x in references}
        if not self._columns.keys() >= slots:
            raise ValueError(f"{_CALLER}: a value that clients hold is of another backend.")
        if len(slots) > 1 or not all(isinstance(x, Row) for x in rows):
            raise CutError(
                f"{_CALLER}: a stage uses rows of which some have been replaced, such as the state "
                "of some clients, which pipelines do not keep. Let the source bring the state, and "
                "write the new one with Beam.rows."
            )
        return self._columns[slots.pop()]

    def _totals(self, columns: Sequence[Made]) -> list[np.ndarray]:
        """What clients send, combined by a pipeline."""
        if not columns:
            return []
        import apache_beam as beam
        from apache_beam.io.filesystems import FileSystems
        from apache_beam.options.pipeline_options import PipelineOptions

        from fax.deploy import _beam_client as worker

        modes = [column.mode for column in columns]
        program = self._programs.making(columns)
        options = self._options
        if options is None:  # without the arguments of this process, which are not Beam's
            options = PipelineOptions(["--runner=FnApiRunner"])
        with tempfile.TemporaryDirectory() as temporary:
            path = FileSystems.join(self._folder or temporary, f"{uuid.uuid4().hex}.npz")
            try:
                with beam.Pipeline(options=options) as pipeline:
                    _ = (
                        self._read(pipeline)
                        | "stage" >> beam.ParDo(worker.Sums(program, modes))
                        | "sums" >> beam.CombineGlobally(worker.Combine(modes))
                        | "result" >> beam.Map(worker.write, path)
                    )
                found, different, totals = worker.read(path)
            except Exception as error:  # a runner may raise any
                text = str(error).strip().splitlines() or [type(error).__name__]
                raise ClientError(f"{_CALLER}: a pipeline failed: {text[-1]}") from error
        if found != self._clients:
            raise ClientError(
                f"{_CALLER}: the source has {found} clients, expected clients={self._clients}."
            )
        if different != found:
            raise ClientError(
                f"{_CALLER}: the source has only {different} numbers for {found} clients, expected "
                f"each int below {found} once."
            )
        # Integers wrap where the program's do.
        return [
            x
            if jnp.issubdtype(x.dtype, jnp.inexact)
            else x.astype(total_dtype(of.mode, of.aval.dtype))
            for x, of in zip(totals, columns, strict=True)
        ]

    def _read(self, pipeline: Any) -> Any:
        """The clients, whatever windows the source puts them in."""
        import apache_beam as beam
        from apache_beam.transforms.window import GlobalWindows

        label = f"all clients {next(_NUMBERS)}"
        return self._source(pipeline) | label >> beam.WindowInto(GlobalWindows())


def _stacked(rows: Sequence[Any]) -> Any:
    if jnp.issubdtype(rows[0].dtype, jax.dtypes.prng_key):
        data = np.stack([np.asarray(jax.random.key_data(row)) for row in rows])
        return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(rows[0]))
    return np.stack([np.asarray(row) for row in rows])
