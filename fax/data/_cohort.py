"""The clients of one round and their batches, as a pytree that is passed to a jitted round.

The batches are either arrays, or the numbers of rows of examples that are on the devices. In the
second case a batch is gathered when its step runs, so that the batches of a cohort never take up
memory all at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

import fax._operators as operators
from fax.data._batches import Batches, register
from fax.primitives._any_active import any_active
from fax.primitives._round import AtMost

PyTree = Any
Carry = TypeVar("Carry")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Gathered(Mapping[str, jax.Array]):
    """Batches that are gathered from examples on the devices when a feature is accessed.

    A mapping from features to arrays: ``batches["x"]`` is ``examples["x"][rows]``.

    Attributes:
      examples: feature -> array [examples, ...], of all clients. If the examples are split over
        devices, [shards * examples, ...], and rows are counted from the start of the client's
        shard.
      rows: int32 [clients, steps, batch], or the part of it for one client or one step. Padding
        repeats a row of the same client.
      axes: the mesh axes that the examples are split over, or None if they are on all devices.

    Example:

      >>> examples = {"x": jnp.array([0.0, 10.0, 20.0, 30.0])}
      >>> batches = fax.data.Gathered(examples, rows=jnp.array([[3, 1], [2, 2]]))
      >>> list(batches), batches["x"].tolist()
      (['x'], [[30.0, 10.0], [20.0, 20.0]])
    """

    examples: Mapping[str, jax.Array]
    rows: jax.Array
    axes: tuple[str, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def __getitem__(self, feature: str) -> jax.Array:
        if self.axes is None:
            return _take(self.examples[feature], self.rows)
        spread = PartitionSpec(self.axes)
        return jax.shard_map(
            lambda examples, rows: jnp.take(examples, rows, axis=0, mode="clip"),
            in_specs=(spread, spread),
            out_specs=spread,
            axis_names=set(self.axes),
        )(self.examples[feature], self.rows)

    def __repr__(self) -> str:  # that of Mapping would gather all features
        return f"Gathered({_features(self.examples, 1)})"

    def __contains__(self, feature: object) -> bool:  # that of Mapping would gather the feature
        return feature in self.examples

    def __iter__(self) -> Iterator[str]:
        return iter(self.examples)

    def __len__(self) -> int:
        return len(self.examples)


def _take(examples: jax.Array, rows: jax.Array) -> jax.Array:
    """The rows of the examples, spread over Explicit mesh axes as their numbers are."""
    sharding = jax.typeof(rows).sharding
    if not any(sharding.spec):
        return jnp.take(examples, rows, axis=0, mode="clip")
    return jnp.asarray(examples).at[rows].get(mode="clip", out_sharding=sharding)


def _summary(x: Client | Cohort, *sizes: str) -> str:
    """Sizes and features on one line. While JAX handles the pytree, fields can be anything."""
    shape = getattr(x.mask, "shape", ())
    if len(shape) < len(sizes):
        return f"{type(x).__name__}(...)"
    names = ["rounds", *sizes][-len(shape) :]  # several rounds have one more axis
    known = [f"{name}={size}" for name, size in zip(names, shape)]
    batches = x.batches
    gathered = isinstance(batches, Gathered)
    found = _features(batches.examples, 1) if gathered else _features(batches, len(shape))
    return f"{type(x).__name__}({', '.join([*known, found])})"


def _features(batches: PyTree, leading: int) -> str:
    """Features without their leading axes: ``features=x float32[28,28], y int32[]``."""
    shown = []
    for path, x in jax.tree_util.tree_leaves_with_path(batches):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        own = ",".join(map(str, getattr(x, "shape", ())[leading:]))
        shown.append(f"{name} {getattr(x, 'dtype', type(x).__name__)}[{own}]".lstrip())
    return f"features={', '.join(shown)}"


@register
@dataclasses.dataclass(frozen=True, eq=False)
class Client(Batches):
    """One client of a cohort, as a client function sees it. See `Cohort.clients`.

    Attributes:
      batches: leaves [steps, batch, ...].
      mask: bool [steps, batch], False for padding.
      num_examples: int32 scalar, how many distinct examples the client has.
      position: int32 scalar, the client's position in the data's ``client_ids()``.
      key: a random key, different for each client and round.

    Example:

      >>> data = fax.data.InMemory({"ann": {"x": jnp.arange(3.0)}, "bob": {"x": jnp.ones(1)}})
      >>> cohort = next(fax.data.cohorts(data, clients=2, batch_size=2))
      >>> @fax.program(clients=2)
      ... def means(cohort):
      ...     def client(own):
      ...         first = own.batch(0)["x"]
      ...         return own.position, jnp.mean(first, where=own.mask[0])
      ...     return fax.map(client, cohort.clients())
      >>> positions, values = means(cohort)
      >>> positions.shape, values.shape
      ((2,), (2,))
    """

    batches: PyTree
    mask: jax.Array
    num_examples: jax.Array
    position: jax.Array
    key: jax.Array
    _full: tuple[Any] | None = None

    def __repr__(self) -> str:
        return _summary(self, "steps", "batch_size")

    def batch(self, number: Any) -> PyTree:
        """The batch of a step, leaves [batch, ...]."""
        return self._fetch(jax.tree.map(lambda x: x[number], self._of_steps))

    @property
    def _of_steps(self) -> PyTree:
        """The arrays with a leading axis of steps: rows, or the batches themselves."""
        return self.batches.rows if isinstance(self.batches, Gathered) else self.batches

    def _fetch(self, x: PyTree) -> PyTree:
        """The batch of a step, from its part of `_of_steps`."""
        if isinstance(self.batches, Gathered):
            return dict(dataclasses.replace(self.batches, rows=x))
        return x

    def scan(
        self,
        step: Callable[[Carry, PyTree, jax.Array, jax.Array], Carry],
        carry: Carry,
        *,
        first: Any = 0,
        branch: bool = True,
    ) -> Carry:
        """Loops over the client's batches in order, like `jax.lax.scan`.

        Steps without any example are not run. Where several clients are vectorized, a step runs
        if any of them has examples left, and leaves the carries of the others unchanged. None of
        this costs anything if the cohort is not `padded`.

        Args:
          step: ``step(carry, batch, mask, key) -> carry``. The batch has leaves [batch, ...], the
            mask is [batch], and the key is different in each step.
          carry: the initial carry, a pytree of arrays.
          first: the number of the first step, from which the keys of steps are derived.
          branch: whether to skip steps without any example by a branch. If False, they run, and
            their result is dropped: where a client is sharded, its devices have to take the same
            branch.

        Returns:
          The carry after the last step.

        Raises:
          TypeError: if ``step`` returns a carry of another structure, shape or dtype.

        Example:

          >>> data = fax.data.InMemory({"ann": {"x": jnp.arange(4.0)}, "bob": {"x": jnp.ones(3)}})
          >>> cohort = next(fax.data.cohorts(data, clients=2, batch_size=2))
          >>> @fax.program(clients=2)
          ... def totals(cohort):
          ...     def client(own):
          ...         def step(total, batch, mask, key):
          ...             return total + jnp.sum(jnp.where(mask, batch["x"], 0))
          ...         return own.scan(step, jnp.zeros(()))
          ...     return fax.sum(fax.map(client, cohort.clients()))
          >>> totals(cohort)
          Array(9., dtype=float32)
        """

        def at(carry: Carry, numbered: tuple[jax.Array, PyTree, jax.Array]) -> tuple[Carry, None]:
            number, x, mask = numbered
            if not self.padded:
                key = jax.random.fold_in(self.key, number)
                new = step(carry, self._fetch(x), jnp.ones_like(mask), key)
                _check_carry(new, carry)
                return new, None
            active = jnp.any(mask)
            someone, mine = any_active(active) if branch else (None, active)

            def run(carry: Carry) -> Carry:
                # A client without examples in this step repeats its first step and drops the
                # result, so that padding never reaches a function that is singular there.
                own, own_mask = _select(mine, (x, mask), (real, self.mask[0]))
                own_key = jax.random.fold_in(self.key, number)
                new = step(carry, self._fetch(own), own_mask, own_key)
                _check_carry(new, carry)
                return _select(mine, new, carry)

            if not branch:
                return run(carry), None
            return lax.cond(someone, run, lambda carry: carry, carry), None

        real = jax.tree.map(lambda x: x[0], self._of_steps)
        carry = jax.tree.map(jnp.asarray, carry)
        if any(jax.typeof(x).weak_type for x in jax.tree.leaves(carry)):
            # Weak types, such as those of Python scalars, take the dtype that a step returns.
            sample = jax.eval_shape(lambda: (self.batch(0), self.mask[0], self.key))
            new = jax.eval_shape(step, carry, *sample)
            if _same_structure(new, carry):
                carry = jax.tree.map(_strong, carry, new)
        steps = first + jnp.arange(self.mask.shape[0], dtype=jnp.int32)
        return lax.scan(at, carry, (steps, self._of_steps, self.mask))[0]


def _same_structure(one: PyTree, other: PyTree) -> bool:
    structures: Any = [jax.tree.structure(x) for x in (one, other)]
    return bool(structures[0] == structures[1])


def _strong(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    return lax.convert_element_type(x, like.dtype) if jax.typeof(x).weak_type else x


def _check_carry(new: PyTree, old: PyTree) -> None:
    if not _same_structure(new, old):
        raise TypeError(
            "Client.scan: step returned a carry of another structure, "
            f"{jax.tree.structure(new)}, expected {jax.tree.structure(old)}."
        )
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True
    ):
        one, other = jax.typeof(before), jax.typeof(jnp.asarray(after))
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            raise TypeError(
                f"Client.scan: carry{jax.tree_util.keystr(path)} is {one.str_short()}, but "
                f"{other.str_short()} after a step. A step must not change shapes and dtypes."
            )


def _select(mine: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: lax.select(mine, n, o), new, old)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class Cohort(Batches):
    """The clients of one round and their batches. `cohorts` makes them.

    Attributes:
      batches: leaves [clients, steps, batch, ...]: arrays, or `Gathered`, whose arrays are gathered
        from examples on the devices when they are accessed.
      mask: bool [clients, steps, batch], False for padding. A client's real steps come first.
      num_examples: int32 [clients], how many distinct examples each client has, no matter how many
        of them are in the batches, or how often.
      positions: int32 [clients], positions in the data's ``client_ids()``.
      keys: random keys [clients], which depend on the seed, the round and the client.
      vectorize: for `fax.map`, if the algorithm does not say how many clients a device vectorizes:
        a bound on its default, such that little of the work is padding, or None. Neighbors have
        about the same length.
      padded: whether there may be padding. False only if it is known that there is none, as with
        ``sampler="stream"``; programs are then compiled without what padding needs. With another
        mask, as in ``dataclasses.replace(cohort, mask=mask)``, this is no longer known.

    Example:

      >>> data = fax.data.InMemory({"ann": {"x": jnp.arange(3.0)}, "bob": {"x": jnp.ones(1)}})
      >>> cohort = next(fax.data.cohorts(data, clients=2, batch_size=2))
      >>> cohort.size, cohort.batches["x"].shape, cohort.mask.shape
      (2, (2, 2, 2), (2, 2, 2))
      >>> [data.client_ids()[p] for p in cohort.positions], cohort.num_examples.tolist()
      (['ann', 'bob'], [3, 1])
    """

    batches: PyTree
    mask: jax.Array
    num_examples: jax.Array
    positions: jax.Array
    keys: jax.Array
    vectorize: AtMost | None = dataclasses.field(default=None, metadata={"static": True})
    _full: tuple[Any] | None = None

    def __repr__(self) -> str:
        return _summary(self, "clients", "steps", "batch_size")

    @property
    def size(self) -> int:
        """The number of clients."""
        return self.mask.shape[0]

    def clients(self, *, placement: str | None = None) -> Client:
        """The clients as a placed value, for `fax.map` in a program with ``size`` clients.

        A client function is called with a `Client`. Examples on the devices are broadcast, and each
        step gathers its own rows of them.

        Args:
          placement: which placement, if several are in scope.

        Raises:
          PlacementError: outside a program.
        """
        batches = self.batches
        if isinstance(batches, Gathered):
            # Examples that are split over devices cannot be broadcast, so gather before the map.
            batches = (
                dict(batches)
                if batches.axes
                else dataclasses.replace(
                    batches, examples=operators.broadcast(batches.examples, placement=placement)
                )
            )
        client = Client(batches, self.mask, self.num_examples, self.positions, self.keys)
        return client if self.padded else dataclasses.replace(client, _full=(self.mask,))
