"""Partitions of central arrays into clients.

Each function takes a mapping from the names of features to arrays with a common leading axis, and
gives every example to exactly one client. It returns a `fax.data.InMemory`, whose clients are
slices of one copy of the arrays, or of the arrays themselves if the order of examples stays as it
is. So do not write to the arrays afterwards. Clients are named ``"00"``, ``"01"``, ... in order,
with as many digits as are needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fax import _arguments
from fax.data._assignment import (
    examples_by_client,
    group_by_owner,
    owners_by_proportions,
    positions_in_runs,
)
from fax.data._check_examples import checked_examples
from fax.data._memory import InMemory
from fax.data._protocol import DataError


def iid(arrays: Mapping[str, Any], clients: int, *, seed: int = 0) -> InMemory:
    """Deals out shuffled examples. All clients get the same number of examples, or one more.

    Args:
      arrays: the features, with a common leading axis of ``n`` examples.
      clients: the number of clients, at most ``n``.
      seed: of the random numbers, an int.

    Returns:
      The clients.

    Raises:
      DataError: if the arrays cannot be used, or ``n < clients``.

    Example:

      >>> data = fax.data.partition.iid({"x": jnp.arange(10)}, 4)
      >>> [data.num_examples(i) for i in data.client_ids()]
      [3, 3, 2, 2]
    """
    where = "iid"
    arrays, n, clients = _checked(where, arrays, clients)
    order = _generator(where, seed).permutation(n)
    return _dealt(arrays, np.array_split(order, clients))


def dirichlet(
    arrays: Mapping[str, Any],
    clients: int,
    *,
    alpha: float,
    label: str = "y",
    balanced: bool = False,
    min_examples: int = 1,
    seed: int = 0,
) -> InMemory:
    """Gives each client its own mix of labels: the smaller ``alpha``, the fewer labels dominate it.

    By default the examples of each label are divided among the clients in proportions from a
    symmetric Dirichlet distribution, Dir(alpha), as in Yurochkin et al., arXiv:1905.12022. Clients
    then differ in their numbers of examples, and for a small alpha many would have none. A client
    with fewer than ``min_examples`` is given random examples of the largest clients.

    With ``balanced=True``, as in Hsu et al., arXiv:1909.06335, all clients have the same number of
    examples, or one more. Each client draws its proportions of labels from Dir(alpha p), where p
    are the proportions of all examples, so that the concentration is alpha / K for K equally
    frequent labels. It then draws its examples in these proportions, which are renormalized when
    a label runs out.

    For a large alpha both tend to `iid`. For a small alpha each label tends to belong to a single
    client, or with ``balanced=True`` each client tends to have a single label.

    Args:
      arrays: the features, with a common leading axis of ``n`` examples.
      clients: the number of clients.
      alpha: the concentration, a positive number.
      label: the name of the feature that has the labels, of shape ``[n]``.
      balanced: whether all clients get the same number of examples.
      min_examples: the fewest examples that a client may have, an int of at least 1.
      seed: of the random numbers, an int.

    Returns:
      The clients.

    Raises:
      DataError: if the arrays cannot be used, or ``n < clients * min_examples``.

    Example:

      >>> import numpy as np
      >>> labels = np.repeat(np.arange(3), 100)
      >>> data = fax.data.partition.dirichlet({"y": labels}, 3, alpha=1e-3, balanced=True)
      >>> [np.bincount(data.client(i)["y"], minlength=3).tolist() for i in data.client_ids()]
      [[100, 0, 0], [0, 100, 0], [0, 0, 100]]
    """
    where = "dirichlet"
    arrays, n, clients = _checked(where, arrays, clients, min_examples)
    alpha = _concentration(where, alpha)
    _arguments.flag(f"fax.data.partition.{where}", "balanced", balanced, error=DataError)
    rng = _generator(where, seed)
    labels, inverse = np.unique(_column(where, arrays, label), return_inverse=True)
    pools = [rng.permutation(pool) for pool in group_by_owner(inverse, len(labels))]
    if balanced:
        return _dealt(arrays, _balanced(pools, clients, alpha, rng))
    owner = np.empty(n, int)
    for pool in pools:
        owner[pool] = owners_by_proportions(len(pool), rng.dirichlet(np.full(clients, alpha)))
    return _dealt(arrays, examples_by_client(owner, clients, min_examples, rng))


def _balanced(
    pools: list[np.ndarray], clients: int, alpha: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Lets one client after another draw from the pools of the labels, without replacement."""
    left = np.array([len(pool) for pool in pools])
    examples, ends = np.concatenate(pools), np.cumsum(left)
    sizes = [len(part) for part in np.array_split(np.arange(left.sum()), clients)]
    concentration = alpha * left / left.sum()
    parts = []
    for size in sizes:
        proportions = rng.dirichlet(concentration)
        taken = np.zeros(len(pools), int)
        while (lacking := size - taken.sum()) > 0:
            rest = left > taken
            if proportions[rest].sum() < 1e-9:
                # The labels of this client have run out. The proportions among the other labels
                # are independent of theirs, and again have a Dirichlet distribution.
                proportions = np.zeros(len(pools))
                proportions[rest] = rng.dirichlet(concentration[rest])
            wanted = np.where(rest, proportions, 0)
            draw = rng.multinomial(int(lacking), wanted / wanted.sum())
            taken += np.minimum(draw, left - taken)
        ends -= taken
        left -= taken
        parts.append(examples[np.repeat(ends, taken) + positions_in_runs(taken)])
    return parts


def shards(
    arrays: Mapping[str, Any],
    clients: int,
    *,
    label: str = "y",
    shards_per_client: int = 2,
    seed: int = 0,
) -> InMemory:
    """Cuts the examples, sorted by label, into shards, and deals out the shards.

    With two shards for each client, as in McMahan et al., arXiv:1602.05629, most clients have
    examples of two labels.

    Args:
      arrays: the features, with a common leading axis of ``n`` examples.
      clients: the number of clients.
      label: the name of the feature to sort by, of shape ``[n]``.
      shards_per_client: how many shards each client gets.
      seed: of the random numbers, an int.

    Returns:
      The clients.

    Raises:
      DataError: if the arrays cannot be used, or there are more shards than examples.

    Example:

      >>> data = fax.data.partition.shards({"y": jnp.arange(12) // 3}, 2)
      >>> [data.client(i)["y"].tolist() for i in data.client_ids()]
      [[2, 2, 2, 0, 0, 0], [1, 1, 1, 3, 3, 3]]
    """
    where = "shards"
    each = _count(where, "shards_per_client", shards_per_client)
    arrays, _, clients = _checked(where, arrays, clients, each)
    order = np.argsort(_column(where, arrays, label), kind="stable")
    pieces = np.array_split(order, clients * each)
    deal = _generator(where, seed).permutation(len(pieces)).reshape(clients, each)
    return _dealt(arrays, [np.concatenate([pieces[i] for i in hand]) for hand in deal])


def by_column(arrays: Mapping[str, Any], column: str, *, keep: bool = False) -> InMemory:
    """Makes a client for each value in a column, such as the author of an example.

    Args:
      arrays: the features, with a common leading axis of ``n`` examples.
      column: the name of a feature of shape ``[n]`` of ints, bools or strings.
      keep: whether the clients' examples keep this feature, which is the same in all of them.

    Returns:
      The clients, in the order of the values. The id of a client is its value as a string.

    Raises:
      DataError: if the arrays cannot be used.

    Example:

      >>> arrays = {"author": ["bob", "ada", "bob"], "x": [1, 2, 3]}
      >>> data = fax.data.partition.by_column(arrays, "author")
      >>> data.client_ids(), data.client("bob")
      (('ada', 'bob'), {'x': array([1, 3])})
    """
    where = "by_column"
    arrays, _, _ = _checked(where, arrays, 1)
    values = _column(where, arrays, column)
    if values.dtype.kind not in "biuOSU":
        raise DataError(
            f"fax.data.partition.{where}: feature {column!r} has dtype {values.dtype}, expected "
            "ints, bools or strings."
        )
    if not _arguments.flag(f"fax.data.partition.{where}", "keep", keep, error=DataError):
        arrays = {name: array for name, array in arrays.items() if name != column}
        if not arrays:
            raise DataError(
                f"fax.data.partition.{where}: {column!r} is the only feature, so clients would "
                "have none. Pass keep=True."
            )
    found, inverse = np.unique(values, return_inverse=True)
    ids = [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else str(v) for v in found]
    return _dealt(arrays, examples_by_client(inverse, len(found)), ids)


def by_quantity(
    arrays: Mapping[str, Any],
    clients: int,
    *,
    alpha: float,
    min_examples: int = 1,
    seed: int = 0,
) -> InMemory:
    """Deals out shuffled examples in different numbers: the smaller ``alpha``, the more different.

    The clients' shares are drawn from a symmetric Dirichlet distribution, Dir(alpha), as in Li et
    al., arXiv:2102.02079. A client with fewer than ``min_examples`` is given random examples of the
    largest clients.

    Args:
      arrays: the features, with a common leading axis of ``n`` examples.
      clients: the number of clients.
      alpha: the concentration, a positive number.
      min_examples: the fewest examples that a client may have, an int of at least 1.
      seed: of the random numbers, an int.

    Returns:
      The clients.

    Raises:
      DataError: if the arrays cannot be used, or ``n < clients * min_examples``.

    Example:

      >>> data = fax.data.partition.by_quantity({"x": jnp.arange(100)}, 4, alpha=0.5)
      >>> [data.num_examples(i) for i in data.client_ids()]
      [24, 1, 54, 21]
    """
    where = "by_quantity"
    arrays, n, clients = _checked(where, arrays, clients, min_examples)
    alpha = _concentration(where, alpha)
    rng = _generator(where, seed)
    owner = np.empty(n, int)
    owner[rng.permutation(n)] = owners_by_proportions(n, rng.dirichlet(np.full(clients, alpha)))
    return _dealt(arrays, examples_by_client(owner, clients, min_examples, rng))


def _dealt(
    arrays: Mapping[str, np.ndarray], parts: Sequence[np.ndarray], ids: Sequence[str] | None = None
) -> InMemory:
    """The clients that have these parts of the examples."""
    order = np.concatenate(parts)
    ends = np.cumsum([len(part) for part in parts])
    if ids is None:
        ids = [str(i).zfill(len(str(len(parts) - 1))) for i in range(len(parts))]
    if (order[1:] > order[:-1]).all():  # the order stays as it is, so nothing has to be copied
        sources = dict(arrays)
    else:
        sources = {name: array[order] for name, array in arrays.items()}
    return InMemory(
        {
            client_id: {name: array[end - len(part) : end] for name, array in sources.items()}
            for client_id, part, end in zip(ids, parts, ends)
        }
    )


def _checked(
    where: str, arrays: Any, clients: Any, each: Any = 1
) -> tuple[dict[str, np.ndarray], int, int]:
    """Checks the arrays, and that there are enough examples for all clients."""
    try:
        checked_arrays = checked_examples("of all examples", arrays)
    except DataError as error:
        message = str(error).replace("client 'of all examples'", "arrays")
        message = re.sub(r" Leave the client out.*", "", message)
        raise DataError(f"fax.data.partition.{where}: {message}") from error
    n = len(next(iter(checked_arrays.values())))
    clients, each = _count(where, "clients", clients), _count(where, "min_examples", each)
    if n < clients * each:
        raise DataError(
            f"fax.data.partition.{where}: {n} examples are too few for {clients} clients with at "
            f"least {each} each."
        )
    return checked_arrays, n, clients


def _column(where: str, arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if not isinstance(name, str) or name not in arrays:
        raise DataError(
            f"fax.data.partition.{where}: there is no feature {name!r:.80}. The arrays are "
            f"{sorted(arrays)}. Pass the name of one of them."
        )
    if arrays[name].ndim != 1:
        raise DataError(
            f"fax.data.partition.{where}: feature {name!r} has shape {arrays[name].shape}, "
            "expected one value for each example."
        )
    return arrays[name]


def _count(where: str, name: str, value: Any) -> int:
    return _arguments.count(f"fax.data.partition.{where}", name, value, error=DataError)


def _concentration(where: str, alpha: Any) -> float:
    # Outside of this range NumPy's Dirichlet distribution is numerically unstable.
    caller = f"fax.data.partition.{where}"
    what = "or fax.data.partition.iid for clients that are alike"
    return float(
        _arguments.number(
            caller, "alpha", alpha, least=1e-100, most=1e100, what=what, error=DataError
        )
    )


def _generator(where: str, seed: int) -> np.random.Generator:
    caller = f"fax.data.partition.{where}"
    return np.random.default_rng(_arguments.seed(caller, seed, error=DataError))
