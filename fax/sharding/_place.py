"""Data on meshes: host arrays become placed arrays, and each process loads its own rows."""

from __future__ import annotations

import operator
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from fax._placement import Placement, PlacementError
from fax.sharding._mesh import layouts, split_axes, ways

PyTree = Any


def place(
    tree: PyTree,
    placement: str | None = None,
    *,
    n: int | None = None,
    rows: np.ndarray | None = None,
) -> PyTree:
    """Puts host arrays with a row for each participant onto the devices of the mesh in scope.

    The rows are spread over the mesh axes of the placement, in order: over ``w`` devices,
    participant ``i`` of ``n`` is on device ``i // (n / w)`` along these axes, and the same on all
    devices along the others. A program then finds every row where it is worked on. If ``n`` is no
    multiple of ``w``, all rows are on every device, and a program divides them. Without a mesh
    they are on the default device.

    In a run of several processes each process passes the rows of the participants `local_rows`
    lists and no others; no rows are sent between processes. ``n`` is inferred from their number
    unless it is passed. It then has to be a multiple of ``w``.

    Args:
      tree: a pytree of arrays with a common leading axis, random keys among them.
      placement: the name of the placement. It can be left out if the layout in scope has one
        placement only or, without a layout, the mesh one axis only.
      n: the number of participants, to be checked. In several processes that do not pass it, all
        processes have to call this together, and compare by a small collective what they infer,
        the shapes and the dtypes. With it nothing is communicated.
      rows: which participants' rows they are, as `local_rows` gave them, to be checked.

    Returns:
      The placed pytree: global arrays of shape [n, ...].

    Raises:
      PlacementError: if a leaf has no leading axis or one of another size, the rows are not those
        of this process, the placement cannot be told, or the mesh does not fit the processes.

    Example:

      >>> mesh = fax.sharding.make_mesh(clients=-1)
      >>> with jax.set_mesh(mesh):
      ...     temperatures = fax.sharding.place(np.ones((16, 3)))
      >>> temperatures.sharding.spec
      PartitionSpec('clients',)
    """
    where = "fax.sharding.place"
    flat, treedef = tree_flatten_with_path(tree)
    several = jax.process_count() > 1
    spread: _Spread | None = None
    try:
        spread = _Spread.of(placement, where)
        count = _rows_of(flat, where)
        if n is not None:
            n = _positive(where, n)
        elif several and count is not None:
            n = _infer(count, spread)
        else:
            n = count
        own = None if n is None else spread.local_rows(n, where)
        if own is not None and count is not None:
            _check_rows(count, rows, own, n, where)
    except PlacementError as error:
        if several and n is None and spread is not None:
            _agree(str(error), -1, "", where)  # the others are waiting
        raise
    return treedef
