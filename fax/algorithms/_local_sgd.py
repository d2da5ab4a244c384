"""Local SGD: replicas take several steps on their own, then they are averaged."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from fax import _arguments
from fax.aggregators import Aggregator
from fax.algorithms._algorithm import Algorithm
from fax.algorithms._diloco import outer_steps


def local_sgd(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    replicas: int,
    steps: int | Callable[[jax.Array], jax.Array] | None = None,
    weighted: bool = False,
    aggregator: Aggregator | None = None,
    vectorize: int | None = None,
) -> Algorithm:
    """Local SGD: after H steps of their own, replicas go on from the mean of their parameters.

        θ_i takes H steps of the optimizer on shard i;        θ_i' = mean_j θ_j

    The replicas' optimizers keep their states. This is `diloco` with SGD of rate 1 for outer
    optimizer, and has its arguments, metrics and state. A schedule for ``steps`` makes it
    post-local SGD: ``lambda averages: jnp.where(averages < 1000, 1, 16)`` averages after every
    step at first.

    Args:
      loss: see `fax.algorithms.fedavg`.
      optimizer: the replicas', from optax.
      replicas: how many there are. All start from the same parameters.
      steps: H, or a schedule; see `diloco`. Default: all batches of the round.
      weighted: whether the mean is weighted by ``num_examples``, the sizes of the shards.
      aggregator: from `fax.aggregators`, what makes the mean way of the replicas' ways since the
        last mean. Default: the mean.
      vectorize: how many replicas one device works on at once; see `diloco`.

    Returns:
      The algorithm. ``init(params, model_state=None)`` makes its `DiLoCoState`.

    Raises:
      ValueError: as `diloco`.

    References:
      Stich, Local SGD converges fast and communicates little, arXiv:1805.09767. Lin et al., Don't
      use large mini-batches, use local SGD, arXiv:1808.07217.

    Example:

      >>> import optax
      >>> loss = lambda params, batch, key: (batch["x"] - params) ** 2 / 2
      >>> algorithm = fax.algorithms.local_sgd(loss, optax.sgd(0.5), replicas=2, steps=2)
      >>> data = fax.data.InMemory({"shard 0": {"x": jnp.ones(9)}, "shard 1": {"x": jnp.zeros(9)}})
      >>> rounds = fax.data.cohorts(
      ...     data, 2, batch_size=3, sampler="stream", max_steps=2, placement="replicas"
      ... )
      >>> state, metrics = algorithm.round(algorithm.init(jnp.zeros(())), next(rounds))
      >>> algorithm.params(state)  # the mean of 0.75 and 0
      Array(0.375, dtype=float32)
    """
    caller = "fax.algorithms.local_sgd"
    _arguments.optimizer(caller, "optimizer", optimizer)
    return outer_steps(
        caller,
        loss,
        optimizer,
        optax.sgd(1.0),
        replicas,
        steps,
        weighted,
        aggregator,
        vectorize,
    )
