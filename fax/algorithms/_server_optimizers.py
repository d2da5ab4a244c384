"""The server optimizers of the papers as optax transformations.

Optax has all of them, but with differences: a bias correction, epsilon in another place, another
initial second moment. Any optax optimizer can be the server's, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fax import _arguments, _functions

PyTree = Any
Rate = Any  # a number, an array, a tracer, or an optax schedule over rounds


def server_momentum(
    learning_rate: Rate = 1.0, *, momentum: Any = 0.9
) -> optax.GradientTransformation:
    """Server momentum (FedAvgM), for `fedopt`.

    D is the mean update:

        v' = momentum v + D        x' = x + learning_rate v'

    Args:
      learning_rate: a number, or an optax schedule over rounds.
      momentum: 0.9 in Reddi et al.; Hsu et al. try 0 to 0.997.

    Returns:
      The server's optimizer, which gets the gradient -D. It is ``optax.sgd``.

    Raises:
      ValueError: if an argument is negative.

    References:
      Hsu et al., Measuring the effects of non-identical data distribution for federated visual
      classification, arXiv:1909.06335.

    Example:

      >>> optimizer = fax.algorithms.server_momentum(momentum=0.5)
      >>> state = optimizer.init(jnp.zeros(()))
      >>> for _ in range(3):
      ...     update, state = optimizer.update(jnp.array(-1.0), state)
      ...     print(update)
      1.0
      1.5
      1.75
    """
    _check("server_momentum", learning_rate, momentum=momentum)
    return optax.sgd(learning_rate, momentum=momentum)


def server_adagrad(learning_rate: Rate, *, tau: Any = 1e-3) -> optax.GradientTransformation:
    """Server Adagrad (FedAdagrad), for `fedopt`.

    D is the mean update:

        v' = v + D^2        x' = x + learning_rate D / (sqrt(v') + tau)

    v starts at tau^2. There is no momentum, as in the paper's experiments.

    Args:
      learning_rate: a number, or an optax schedule over rounds.
      tau: the degree of adaptivity; smaller values are more adaptive.

    Returns:
      The server's optimizer, which gets the gradient -D.

    Raises:
      ValueError: if the learning rate is negative or ``tau`` is not positive.

    References:
      Reddi et al., Adaptive federated optimization, arXiv:2003.00295, Algorithm 2.

    Example:

      >>> optimizer = fax.algorithms.server_adagrad(0.1)
      >>> update, _ = optimizer.update(jnp.array(-2.0), optimizer.init(jnp.zeros(())))
      >>> print(f"{update:.3f}")
      0.100
    """
    _check("server_adagrad", learning_rate, tau=tau)
    return _adaptive(lambda v, square: v + square, learning_rate, None, tau)


def server_adam(
    learning_rate: Rate,
    *,
    b1: Any = 0.9,
    b2: Any = 0.99,
    tau: Any = 1e-3,
    bias_correction: bool = False,
) -> optax.GradientTransformation:
    """Server Adam (FedAdam), for `fedopt`.

    D is the mean update:

        m' = b1 m + (1 - b1) D
        v' = b2 v + (1 - b2) D^2
        x' = x + learning_rate m' / (sqrt(v') + tau)

    m starts at 0, and v at tau^2. As in the paper, there is no bias correction.

    Args:
      learning_rate: a number, or an optax schedule over rounds.
      b1: the decay of the mean of updates.
      b2: the decay of the mean of their squares.
      tau: the degree of adaptivity; smaller values are more adaptive.
      bias_correction: if True, v starts at 0, and m' and v' are divided by 1 - b1^t and 1 - b2^t in
        round t: ``optax.adam(learning_rate, b1, b2, eps=tau)``.

    Returns:
      The server's optimizer, which gets the gradient -D.

    Raises:
      ValueError: if an argument is negative or ``tau`` is not positive.

    References:
      Reddi et al., Adaptive federated optimization, arXiv:2003.00295, Algorithm 2. Kingma and Ba,
      Adam, arXiv:1412.6980.

    Example:

      >>> for corrected in (False, True):
      ...     optimizer = fax.algorithms.server_adam(0.1, bias_correction=corrected)
      ...     update, _ = optimizer.update(jnp.array(-2.0), optimizer.init(jnp.zeros(())))
      ...     print(f"{update:.4f}")
      0.0995
      0.0999
    """
    _check("server_adam", learning_rate, b1=b1, b2=b2, tau=tau)
    _arguments.flag("fax.algorithms.server_adam", "bias_correction", bias_correction)
    if bias_correction:
        return optax.adam(learning_rate, b1, b2, eps=tau)
    return _adaptive(lambda v, square: b2 * v + (1 - b2) * square, learning_rate, b1, tau)


def server_yogi(
    learning_rate: Rate, *, b1: Any = 0.9, b2: Any = 0.99, tau: Any = 1e-3
) -> optax.GradientTransformation:
    """Server Yogi (FedYogi), for `fedopt`.

    D is the mean update:

        m' = b1 m + (1 - b1) D
        v' = v - (1 - b2) D^2 sign(v - D^2)
        x' = x + learning_rate m' / (sqrt(v') + tau)

    m starts at 0, and v at tau^2.

    Args:
      learning_rate: a number, or an optax schedule over rounds.
      b1: the decay of the mean of updates.
      b2: how fast v moves.
      tau: the degree of adaptivity; smaller values are more adaptive.

    Returns:
      The server's optimizer, which gets the gradient -D.

    Raises:
      ValueError: if an argument is negative or ``tau`` is not positive.

    References:
      Reddi et al., Adaptive federated optimization, arXiv:2003.00295, Algorithm 2.

    Example:

      >>> optimizer = fax.algorithms.server_yogi(0.1)
      >>> update, _ = optimizer.update(jnp.array(-2.0), optimizer.init(jnp.zeros(())))
      >>> print(f"{update:.4f}")
      0.0995
    """
    _check("server_yogi", learning_rate, b1=b1, b2=b2, tau=tau)
    return _adaptive(
        lambda v, square: v - (1 - b2) * square * jnp.sign(v - square), learning_rate, b1, tau
    )


def _check(name: str, learning_rate: Rate, **others: Any) -> None:
    caller = f"fax.algorithms.{name}"
    if callable(learning_rate):
        form = {1: "learning_rate(round)"}
        _functions.function(caller, "learning_rate", learning_rate, form)
    else:
        _arguments.number(caller, "learning_rate", learning_rate, least=0)
    for argument, value in others.items():
        if argument == "tau":
            _arguments.number(caller, argument, value, above=0)
        else:
            _arguments.number(caller, argument, value, least=0)


class _Moments(NamedTuple):
    m: PyTree  # None without momentum
    v: PyTree


def _adaptive(
    next_v: Callable, learning_rate: Rate, b1: Any, tau: Any
) -> optax.GradientTransformation:
    """Algorithm 2 of arXiv:2003.00295, on gradients -D, with ``next_v(v, D^2)``.

    The paper requires that v starts at tau^2 or more. Early versions of its text square m' instead
    of D; the authors' code and Yogi's paper square D, as here.
    """

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return new.astype(old.dtype)  # hyperparameters that are arrays must not widen the state

    def init(params: PyTree) -> _Moments:
        m = None if b1 is None else optax.tree.zeros_like(params)
        return _Moments(m, jax.tree.map(lambda x: keep(jnp.full_like(x, 1) * tau**2, x), params))

    def update(gradient: PyTree, state: _Moments, params: PyTree = None) -> tuple:
        m, v = gradient, jax.tree.map(lambda v, g: keep(next_v(v, g**2), v), state.v, gradient)
        if b1 is not None:
            m = jax.tree.map(lambda m, g: keep(b1 * m + (1 - b1) * g, m), state.m, gradient)
        direction = jax.tree.map(lambda m, v: keep(m / (jnp.sqrt(v) + tau), m), m, v)
        return direction, _Moments(state.m if b1 is None else m, v)

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )
