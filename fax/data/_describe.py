"""What federated data hold: a table, and a figure of which client has what."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from fax import _arguments
from fax._extras import require
from fax.data._check_examples import Schema, check_federated, num_rows, read_client
from fax.data._protocol import ClientId, DataError, FederatedData

_MOST_LABELS = 100  # of more values, no client has a histogram


@dataclasses.dataclass(frozen=True)
class Description:
    """What `describe` returns. ``print`` shows it as a table.

    Attributes:
      clients: the ids of the clients, in order.
      num_examples: the number of examples of each client, ``[clients]``.
      features: for each feature its dtype and the shape of one example.
      bytes: of all examples in memory.
      labels: the values of the label, sorted, or None if there is no label with at most 100 values.
      label_counts: how many examples of each label a client has, ``[clients, labels]``, or None.

    Example:

      >>> data = fax.data.InMemory({"ada": {"y": [0, 1, 1]}, "bob": {"y": [1]}})
      >>> fax.data.describe(data).label_counts
      array([[1, 2],
             [0, 1]])
    """

    clients: tuple[ClientId, ...]
    num_examples: np.ndarray
    features: dict[str, tuple[np.dtype, tuple[int, ...]]]
    bytes: int
    labels: np.ndarray | None
    label_counts: np.ndarray | None

    def __str__(self) -> str:
        sizes, total = self.num_examples, int(self.num_examples.sum())
        quantiles = np.percentile(sizes, [0, 50, 100])
        lines = [
            ("clients", f"{len(self.clients):,}"),
            ("examples", f"{total:,}, {self.bytes / 2**20:,.1f} MiB"),
            (
                "examples per client",
                "from {:,.0f} to {:,.0f}, median {:,.0f}".format(*quantiles[[0, 2, 1]]),
            ),
        ]
        for name, (dtype, shape) in self.features.items():
            dtype_name = "strings" if dtype.kind in "OSU" else dtype.name
            lines.append((f"feature {name}", f"{dtype_name}[{','.join(map(str, shape))}]"))
        if self.labels is not None and self.label_counts is not None:
            shares = self.label_counts.sum(0) / total
            rarest, commonest = np.argmin(shares), np.argmax(shares)
            each = np.median((self.label_counts > 0).sum(1))
            lines += [
                ("labels", f"{len(self.labels)}, {each:g} per client (median)"),
                ("most frequent label", f"{self.labels[commonest]}, {shares[commonest]:.1%}"),
                ("least frequent label", f"{self.labels[rarest]}, {shares[rarest]:.1%}"),
            ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:{width}}  {value}" for name, value in lines)

    def figure(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws how many examples clients have, and the shares of labels at each client.

        Args:
          path: the file to save the figure to, by its suffix as PNG, SVG or PDF. Default: none.

        Returns:
          A ``matplotlib.figure.Figure``.

        Raises:
          ModuleNotFoundError: if matplotlib is not installed.
          ValueError: if ``path`` is not a path, or has a suffix that matplotlib does not know.
        """
        if path is not None:
            _arguments.path("fax.data.Description.figure", "path", path)
        require("fax.data.Description.figure", "matplotlib", "experiment")
        from matplotlib.figure import Figure

        panels = 1 if self.label_counts is None else 2
        drawing = Figure(figsize=(5 * panels, 3.6), layout="constrained")
        axes = drawing.subplots(1, panels, squeeze=False)[0]
        axes[0].hist(self.num_examples, bins=min(30, len(np.unique(self.num_examples)) + 1))
        axes[0].set(xlabel="examples of a client", ylabel="clients")
        axes[0].yaxis.get_major_locator().set_params(integer=True)
        if self.labels is not None and self.label_counts is not None:
            # Clients whose most frequent label is the same are next to each other.
            shares = self.label_counts / self.label_counts.sum(1, keepdims=True)
            order = np.lexsort((-shares.max(1), shares.argmax(1)))
            image = axes[1].imshow(
                shares[order], aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
            )
            axes[1].set(xlabel="label", ylabel="clients, by their most frequent label")
            axes[1].set_yticks([])
            every = -(-len(self.labels) // 15)
            positions = range(0, len(self.labels), every)
            axes[1].set_xticks(positions, [str(self.labels[i]) for i in positions])
            drawing.colorbar(image, ax=axes[1], label="share of the client's examples")
        if path is not None:
            drawing.savefig(path, dpi=150)
        return drawing


def describe(data: FederatedData, *, label: str | None = "y") -> Description:
    """Describes federated data: clients, examples, features, and which client has which labels.

    All clients are read, one after another, and checked as when they are read for training.

    Args:
      data: federated data.
      label: the name of the feature to count values of: ints, bools or strings, one for each
        example. Data without it, or with more than 100 values of it, are described without labels.
        None counts nothing.

    Returns:
      A `Description`, which prints as a table and draws a figure.

    Raises:
      DataError: if a client cannot be used.

    Example:

      >>> arrays = {"x": jnp.zeros((60, 4)), "y": jnp.arange(60) % 3}
      >>> data = fax.data.partition.iid(arrays, 6)
      >>> print(fax.data.describe(data))
      clients               6
      examples              60, 0.0 MiB
      examples per client   from 10 to 10, median 10
      feature x             float32[4]
      feature y             int32[]
      labels                3, 3 per client (median)
      most frequent label   0, 33.3%
      least frequent label  0, 33.3%
    """
    where = "fax.data.describe"
    check_federated(where, "data", data)
    if label is not None:
        _arguments.text(where, "label", label, "the name of a feature", error=DataError)
    ids, schema = tuple(data.client_ids()), Schema()
    if not ids:
        raise DataError(f"{where}: data has no clients.")
    features: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    sizes, histograms, size_in_bytes = [], [], 0
    known: set[Any] = set()
    for client_id in ids:
        examples = read_client(data, client_id)
        schema.check(client_id, examples)
        features = features or {name: (x.dtype, x.shape[1:]) for name, x in examples.items()}
        sizes.append(num_rows(examples))
        size_in_bytes += sum(_size(x) for x in examples.values())
        values = examples.get(label) if label is not None and len(known) <= _MOST_LABELS else None
        if values is not None and values.ndim == 1 and values.dtype.kind in "biuOSU":
            histogram = dict(zip(*(x.tolist() for x in np.unique(values, return_counts=True))))
            histograms.append(histogram)
            known |= histogram.keys()
    labels = counts = None
    if known and len(known) <= _MOST_LABELS:
        if len({isinstance(value, bytes) for value in known}) > 1:
            raise DataError(
                f"{where}: feature {label!r} has bytes at some clients and strings or numbers at "
                "others. Decode the bytes with fax.data.map."
            )
        ordered = sorted(known)
        # As an array of bytes, they would lose zeros at their end.
        labels = np.array(ordered, object if isinstance(ordered[0], str | bytes) else None)
        counts = np.array([[own.get(value, 0) for value in ordered] for own in histograms])
    return Description(ids, np.array(sizes), features, size_in_bytes, labels, counts)


def _size(array: np.ndarray) -> int:
    """The bytes of an array, and of its strings if it refers to them."""
    return sum(map(len, array.flat)) if array.dtype.hasobject else array.nbytes
