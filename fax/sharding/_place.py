"""Data on meshes: puts host arrays on devices, and says which rows each process loads."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from fax._placement import PlacementError
from fax.sharding._row_sharding import RowSharding, listed, positive, row_sharding_in_scope

PyTree = Any


def place(
    tree: PyTree,
    placement: str | None = None,
    *,
    n: int | None = None,
    rows: np.ndarray | None = None,
) -> PyTree:
    """Puts host arrays with one row per participant onto the devices of the mesh in scope.

    The rows are spread over the mesh axes of the placement, in order. With ``w`` devices along
    these axes, participant ``i`` of ``n`` is on device ``i // (n / w)``, with a copy on each device
    along the other axes. A program then finds each row on the device that needs it. If ``n`` is not
    a multiple of ``w``, every device holds all rows, and the program divides the work. Without a
    mesh, the rows are on the default device.

    In a run of several processes, each process passes exactly the rows of the participants that
    `local_rows` lists; no rows are sent between processes. ``n`` is inferred from their number
    unless it is passed, and has to be a multiple of ``w``.

    A `jax.ShapeDtypeStruct` gets the sharding that an array would have. So do arrays if the mesh
    has the devices of a `topology`, which cannot hold any: then this returns their types.

    Args:
      tree: a pytree of arrays, or types of arrays, with a common leading axis. They may be random
        keys.
      placement: the name of the placement. Optional if the layout in scope has only one placement
        or, without a layout, if the mesh has only one axis.
      n: the number of participants, to be checked. In a run of several processes that do not pass
        it, all processes have to call this together: they compare the inferred ``n``, the shapes
        and the dtypes in a small collective. If it is passed, nothing is communicated.
      rows: the participants whose rows these are, as returned by `local_rows`, to be checked.

    Returns:
      The placed pytree: global arrays of shape [n, ...], or their types.

    Raises:
      PlacementError: if a leaf has no leading axis or one of another size, the rows are not those
        of this process, the placement is ambiguous, or the mesh does not fit the processes.

    Example:

      >>> mesh = fax.sharding.make_mesh(clients=-1)
      >>> with jax.set_mesh(mesh):
      ...     temperatures = fax.sharding.place(jnp.ones((16, 3)))
      >>> temperatures.shape, len(temperatures.addressable_shards) == jax.device_count()
      ((16, 3), True)
    """
    where = "fax.sharding.place"
    spread = row_sharding_in_scope(where, placement)
    flat, treedef = tree_flatten_with_path(tree)
    if not flat:
        return tree
    compare = n is None and jax.process_count() > 1
    error: PlacementError | None = None
    try:
        count = _leading_axis(where, flat)
        n = _inferred(where, count, spread) if n is None else positive(where, n)
        own = spread.own_rows(where, n)
        _check_rows(where, count, rows, own, n, spread)
    except PlacementError as refused:
        error = refused
    if compare:  # also after an error, because the others wait
        _check_that_processes_agree(where, flat, n if error is None else None)
    if error is not None:
        raise error
    assert n is not None
    return tree_unflatten(treedef, [spread.put(leaf, n, own) for _, leaf in flat])


def local_rows(n: int, placement: str | None = None) -> np.ndarray:
    """Returns the participants whose data this process must load, on the mesh in scope.

    These are the participants whose rows are on one of its devices. Two processes share rows if
    another axis of the mesh extends across them, because then both work on these participants. A
    single process loads all rows.

    Args:
      n: the number of participants.
      placement: the name of the placement, as in `place`.

    Returns:
      The participants' numbers in ascending order, as an int array for `place`.

    Raises:
      PlacementError: if ``n`` is not a positive int or, in several processes, not a multiple of
        the number of devices along the placement's axes; if the placement is ambiguous, or the mesh
        does not fit the processes.

    Example:

      >>> mesh = fax.sharding.make_mesh(clients=-1)
      >>> with jax.set_mesh(mesh):
      ...     rows = fax.sharding.local_rows(16)
      ...     data = fax.sharding.place({"squares": rows**2}, rows=rows)
      >>> rows
      array([ 0,  1,  2, ..., 13, 14, 15])
      >>> data["squares"].shape
      (16,)
    """
    where = "fax.sharding.local_rows"
    return row_sharding_in_scope(where, placement).own_rows(where, positive(where, n))


def _leading_axis(where: str, flat: list[tuple[Any, Any]]) -> int:
    """Checks that all leaves have the same number of rows, and returns it."""
    first: tuple[str, int] | None = None
    for path, leaf in flat:
        name = f"tree{keystr(path)}"
        shape = _shape(leaf)
        if not shape:
            found = f"{type(leaf).__name__} {leaf!r:.60}" if shape is None else "a scalar"
            raise PlacementError(
                f"{where}: {name} is {found}, expected an array with a row for each participant. "
                "Server values do not need to be placed."
            )
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            raise PlacementError(
                f"{where}: {name} is already spread over several processes. Pass arrays that "
                "this process has loaded."
            )
        if first is None:
            first = name, shape[0]
        elif shape[0] != first[1]:
            raise PlacementError(
                f"{where}: {first[0]} has {first[1]} rows, but {name}, of shape {shape}, has "
                f"{shape[0]}. All leaves need one row for each participant."
            )
    assert first is not None
    return first[1]


def _shape(leaf: Any) -> tuple[int, ...] | None:
    """The shape of an array or a number, or None for anything else."""
    try:
        return getattr(jax.typeof(leaf), "shape", None)
    except (TypeError, OverflowError):  # a Python int may be too large for any array
        return None


def _inferred(where: str, count: int, spread: RowSharding) -> int:
    """Infers the number of participants from the ``count`` rows of one process."""
    if jax.process_count() == 1:
        return positive(where, count)
    parts = len(spread.own_rows(where, spread.num_shards))
    if count == 0 or count % parts:
        raise PlacementError(
            f"{where}: tree has {count} rows, expected a multiple of {parts}, because process "
            f"{jax.process_index()} has {parts} of the {spread.num_shards} devices over which the "
            "rows are spread. Pass the rows of fax.sharding.local_rows(n)."
        )
    return count // parts * spread.num_shards


def _check_rows(
    where: str, count: int, rows: Any, own: np.ndarray, n: int, spread: RowSharding
) -> None:
    """Checks that the rows are those of this process."""
    me = jax.process_index()
    wanted = f"process {me} must pass those of participants {_ranges(own)}"
    if count != len(own):
        expected = f"{len(own)}" if len(own) == n else f"{len(own)}: {wanted}"
        raise PlacementError(
            f"{where}: tree has {count} rows for n={n}, expected {expected}. See "
            "fax.sharding.local_rows."
        )
    if rows is None:
        return
    given = np.asarray(rows)
    if given.shape == own.shape and (given == own).all():
        return
    message = f"{where}: rows are {_ranges(given)}, but for n={n} {wanted}, in this order."
    foreign = sorted(set(given.ravel().tolist()) - set(own.tolist()))
    if foreign and foreign[0] in (owners := spread.owners(n) if spread.mesh else {}):
        message += f" Participant {foreign[0]} belongs to process {listed(owners[foreign[0]])}."
    raise PlacementError(f"{message} See fax.sharding.local_rows.")


def _ranges(rows: np.ndarray) -> str:
    """Formats numbers in a message: 0-3, 8-11."""
    rows = np.asarray(rows).reshape(-1)
    if not np.issubdtype(rows.dtype, np.integer):
        return repr(rows)
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:6] if len(run)]
    return listed(shown + ["..."] * (len(runs) > 6)) or "none"


def _check_that_processes_agree(where: str, flat: list[tuple[Any, Any]], n: int | None) -> None:
    """Compares what all processes are about to place. After an error, ``n`` is None."""
    avals = [(keystr(path), getattr(leaf, "dtype", None), _shape(leaf)) for path, leaf in flat]
    kinds = ", ".join(f"tree{path}: rows of {dtype}{[*(s or ())][1:]}" for path, dtype, s in avals)
    mine = np.array([0 if n is None else n, zlib.crc32(kinds.encode()) >> 1], np.int32)
    theirs = multihost_utils.process_allgather(mine)
    invalid = np.flatnonzero(theirs[:, 0] == 0)
    if n is None:
        return
    me = jax.process_index()
    if len(invalid):
        raise PlacementError(
            f"{where}: process {listed(invalid)} passed invalid rows. See its error message."
        )
    differ = np.flatnonzero(theirs[:, 0] != n)
    if len(differ):
        raise PlacementError(
            f"{where}: process {me} has rows for n={n} participants, but process {differ[0]} for "
            f"n={theirs[differ[0], 0]}. See fax.sharding.local_rows."
        )
    differ = np.flatnonzero(theirs[:, 1] != mine[1])
    if len(differ):
        raise PlacementError(
            f"{where}: process {differ[0]} has different leaves, dtypes or shapes from process "
            f"{me}, which has {kinds}. Rows need the same shape in all processes: pad to a size "
            "that all of them know."
        )
