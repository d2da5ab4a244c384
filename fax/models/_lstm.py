"""An LSTM layer whose gradient takes two matrix products a step instead of four.

The product of the inputs with their weights does not depend on earlier steps, so it is one product
for all steps, before the loop. The gradient with respect to the recurrent weights is a sum over
steps of outer products, which JAX would add up step by step. The derivative rule in this module
moves products with the tangent of the weights out of the loop, so that its transpose, too, is one
product for all steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from jax import lax


class LSTM(nnx.Module):
    """An LSTM layer with a single bias, and 1 added at the forget gate.

    With the initial state zero, and ``z_t = x_t W + h_(t-1) U + b`` in four parts i, g, f, o:

        c_t = sigmoid(f + 1) c_(t-1) + sigmoid(i) tanh(g)        h_t = sigmoid(o) tanh(c_t)

    This is the layer of Haiku that FedJAX uses, with 4 hidden (inputs + hidden + 1) parameters. It
    maps [batch, length, inputs] to h, [batch, length, hidden].

    Example:

      >>> from flax import nnx
      >>> fax.models.LSTM(3, 5, rngs=nnx.Rngs(0))(jnp.ones((2, 7, 3))).shape
      (2, 7, 5)
    """

    kernel: nnx.Param[jax.Array]
    recurrent: nnx.Param[jax.Array]
    bias: nnx.Param[jax.Array]

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        # Haiku has one matrix for inputs and state, and so one fan-in for both.
        init = initializers.truncated_normal((inputs + hidden) ** -0.5)
        self.kernel = nnx.Param(init(rngs.params(), (inputs, 4 * hidden), jnp.float32))
        self.recurrent = nnx.Param(init(rngs.params(), (hidden, 4 * hidden), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(4 * hidden, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The states h of all steps, [batch, length, hidden]."""
        z = jnp.swapaxes(x, 0, 1) @ self.kernel[...] + self.bias[...]
        return jnp.swapaxes(recur(z, self.recurrent[...].astype(z.dtype)), 0, 1)


@jax.custom_jvp
def recur(z: jax.Array, recurrent: jax.Array) -> jax.Array:
    """The states h of all steps.

    Args:
      z: [length, batch, 4 hidden], the part of z that comes from the inputs.
      recurrent: [hidden, 4 hidden].

    Returns:
      [length, batch, hidden].
    """

    def step(state, z):
        (h, c), _ = _step(state, z, recurrent)
        return (h, c), h

    return lax.scan(step, _zeros(z), z)[1]


@recur.defjvp
def _recur_jvp(primals, tangents):
    z, recurrent = primals
    dz, drecurrent = tangents

    def step(state, z):
        (h, c), slopes = _step(state, z, recurrent)
        return (h, c), (state[0], h, slopes)

    _, (before, states, slopes) = lax.scan(step, _zeros(z), z)
    dz = dz + before @ drecurrent

    def linear_step(tangents, at):
        dh, dc = tangents
        dz, (by_gates, forget, by_cell) = at
        di, dg, df, do = jnp.split((dz + dh @ recurrent) * by_gates, 4, -1)
        dc = forget * dc + di + dg + df
        dh = by_cell * dc + do
        return (dh, dc), dh

    return states, lax.scan(linear_step, _zeros(z), (dz, slopes))[1]


def _step(state, z, recurrent):
    """The next state, and the derivatives of c (for o, of h) by z, of c by c, and of h by c."""
    h, before = state
    i, g, f, o = jnp.split(z + h @ recurrent, 4, -1)
    i, f, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f + 1), jax.nn.sigmoid(o)
    g = jnp.tanh(g)
    c = f * before + i * g
    t = jnp.tanh(c)
    by_gates = [g * i * (1 - i), i * (1 - g * g), before * f * (1 - f), t * o * (1 - o)]
    return (o * t, c), (jnp.concatenate(by_gates, -1), f, o * (1 - t * t))


def _zeros(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    zeros = jnp.zeros_like(z[0, :, : z.shape[-1] // 4])
    return zeros, zeros
