"""Language models, which predict the next token. Token 0 is padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers

from fax.models._images import Linear
from fax.models._lstm import LSTM


class _Embedding(nnx.Module):
    """A vector for each token. Numbers that are not tokens get NaN."""

    embedding: nnx.Param[jax.Array]

    def __init__(self, tokens: int, size: int, *, rngs: nnx.Rngs):
        init = initializers.truncated_normal(1.0)  # as in Haiku
        self.embedding = nnx.Param(init(rngs.params(), (tokens, size), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"fax.models: feature 'x' is {x.dtype} of shape {x.shape}, expected integers of "
                "shape ('batch', 'length'), the numbers of tokens."
            )
        table = self.embedding[...]
        return jnp.take(table, jnp.where(x < 0, len(table), x), axis=0, mode="fill")


class ShakespeareLSTM(nnx.Module):
    """Two LSTM layers of 256 units on characters, as in FedJAX and arXiv:1602.05629.

    820,522 parameters for 90 tokens: 86 characters, padding, begin, end, and out of vocabulary.
    It maps ``"x"``, int [batch, length], to scores, [batch, length, tokens].

    Example:

      >>> model = fax.models.create("shakespeare_lstm")
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> sum(x.size for x in jax.tree.leaves(params))
      820522
    """

    embed: _Embedding
    lstm1: LSTM
    lstm2: LSTM
    out: nnx.Linear

    def __init__(self, num_tokens: int = 90, *, rngs: nnx.Rngs):
        self.embed = _Embedding(num_tokens, 8, rngs=rngs)
        self.lstm1 = LSTM(8, 256, rngs=rngs)
        self.lstm2 = LSTM(256, 256, rngs=rngs)
        self.out = Linear(256, num_tokens, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The scores, [batch, length, tokens]."""
        x = jnp.tanh(self.lstm1(self.embed(x)))
        return self.out(jnp.tanh(self.lstm2(x)))


class StackOverflowLSTM(nnx.Module):
    """An LSTM layer of 670 units, projected to 96, on words, as in FedJAX and arXiv:2003.00295.

    4,050,748 parameters for 10,004 tokens: 10,000 words, padding, begin, end, and out of
    vocabulary. It maps ``"x"``, int [batch, length], to scores, [batch, length, tokens]. If it is
    ``tied``, words are scored by their embeddings, and there are 3,090,364 parameters.

    Example:

      >>> model = fax.models.create("stackoverflow_lstm", tied=True)
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> sum(x.size for x in jax.tree.leaves(params))
      3090364
    """

    tied: bool
    embed: _Embedding
    lstm: LSTM
    project: nnx.Linear
    bias: nnx.Param[jax.Array]
    out: nnx.Linear

    def __init__(self, num_tokens: int = 10_004, *, tied: bool = False, rngs: nnx.Rngs):
        self.tied = tied
        self.embed = _Embedding(num_tokens, 96, rngs=rngs)
        self.lstm = LSTM(96, 670, rngs=rngs)
        self.project = Linear(670, 96, rngs=rngs)
        if tied:
            self.bias = nnx.Param(jnp.zeros(num_tokens, jnp.float32))
        else:
            self.out = Linear(96, num_tokens, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The scores, [batch, length, tokens]."""
        x = self.project(jnp.tanh(self.lstm(self.embed(x))))
        return x @ self.embed.embedding[...].T + self.bias[...] if self.tied else self.out(x)


class CharLSTM(nnx.Module):
    """An LSTM layer on characters, small enough to be trained on a CPU.

    It maps ``"x"``, int [batch, length], to scores, [batch, length, tokens].

    Example:

      >>> from flax import nnx
      >>> model = fax.models.CharLSTM(num_tokens=20, hidden=8, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 5), int)).shape
      (2, 5, 20)
    """

    embed: _Embedding
    lstm: LSTM
    out: nnx.Linear

    def __init__(self, num_tokens: int = 100, hidden: int = 192, *, rngs: nnx.Rngs):
        self.embed = _Embedding(num_tokens, 32, rngs=rngs)
        self.lstm = LSTM(32, hidden, rngs=rngs)
        self.out = Linear(hidden, num_tokens, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The scores, [batch, length, tokens]."""
        return self.out(self.lstm(self.embed(x)))
