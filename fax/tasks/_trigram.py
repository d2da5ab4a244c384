"""A trigram model with back-off, the baseline for models of the next token.

With the counts n of the training data and the absolute discount d (Ney et al., 1994; Katz, 1987),

    p(c | a b) = (n(a b c) - d) / n(a b)    if a b c was seen
                 alpha(a b) p(c | b)        otherwise

where alpha(a b) distributes the discounted probability over the tokens that were not seen after
a b. In the same way, p(c | b) backs off to p(c). The first token of a sequence has no a.
"""

from __future__ import annotations

import jax
import numpy as np

from fax import _arguments
from fax.data import FederatedData
from fax.tasks._task import Task
from fax.tasks._tokens import PAD

_MOST_TOKENS = 512  # whose counts take a gigabyte


def trigram_loss(task: Task) -> float:
    """The loss on the test data of a trigram model with back-off, a baseline for language models.

    It is fitted to the training data of all clients together, by Katz's back-off with absolute
    discounting (Ney, Essen & Kneser, 1994). A model that learns more than the frequencies of three
    tokens in a row has a smaller loss.

    Args:
      task: a task that predicts the next token, such as ``fax.tasks.load("pystdlib")``.

    Returns:
      The mean negative log-likelihood of a token, in nats.

    Raises:
      ValueError: if it is no task, its features are not sequences of tokens, or there are more than
        512 different tokens.

    Example:

      >>> task = fax.tasks.load("pystdlib")
      >>> 1.5 < fax.tasks.trigram_loss(task) < 2.2
      True
    """
    if not isinstance(task, Task):
        raise ValueError(
            f"fax.tasks.trigram_loss: task is {_arguments.shown(task)}, expected a task, such as "
            "fax.tasks.load('pystdlib')."
        )
    first = task.train.client(task.train.client_ids()[0])
    if np.ndim(first["x"]) != 2 or not np.issubdtype(first["x"].dtype, np.integer):
        raise ValueError(
            f"fax.tasks.trigram_loss: task is {task.name!r}, expected one that predicts the next "
            "token, such as fax.tasks.load('pystdlib')."
        )
    params = jax.eval_shape(task.model.init, jax.random.key(0))
    scores = jax.eval_shape(task.model.apply, params, {"x": np.zeros((1, 1), np.int32)})
    tokens = scores.shape[-1]
    if tokens > _MOST_TOKENS:
        raise ValueError(
            f"fax.tasks.trigram_loss: task is {task.name!r} with {tokens} tokens, expected at most "
            f"{_MOST_TOKENS}, since there is a number in memory for every three tokens. Choose a "
            "task of characters, or of a smaller vocabulary."
        )
    return float(Trigram(task.train, tokens).loss(task.test))


class Trigram:
    """A model fitted to the sequences ``x`` and the next tokens ``y`` of all clients together."""

    def __init__(self, data: FederatedData, tokens: int) -> None:
        a, b, c = _contexts(data)
        single = _counts(tokens, c) + 1
        self.single = single / single.sum()
        self.double = _back_off(_counts(tokens, b, c), self.single)
        self.triple = _back_off(_counts(tokens, a, b, c), self.double)

    def loss(self, data: FederatedData) -> np.floating:
        """The mean negative log-likelihood of a token, in nats."""
        return -np.log(self.triple[_contexts(data)]).mean()


def _contexts(data: FederatedData) -> tuple[np.ndarray, ...]:
    """The two tokens before each token, with 0 before the start of a sequence, and the token."""
    every = [data.client(client_id) for client_id in data.client_ids()]
    x, y = (np.concatenate([client[name] for client in every]) for name in "xy")
    before = np.pad(x[:, :-1], [(0, 0), (1, 0)])
    real = y != PAD
    return before[real], x[real], y[real]


def _counts(tokens: int, *columns: np.ndarray) -> np.ndarray:
    shape = (tokens,) * len(columns)
    numbers = np.ravel_multi_index(columns, shape)
    return np.bincount(numbers, minlength=np.prod(shape)).reshape(shape).astype(float)


def _back_off(counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Probabilities from counts; from those of a shorter context for tokens that were not seen."""
    once, twice = np.sum(counts == 1), np.sum(counts == 2)
    # Among few tokens, all may be frequent; the estimate is then 0 / 0, and no probability is left.
    discount = once / (once + 2 * twice) if once and twice else 0.5
    seen = counts > 0
    total = np.maximum(counts.sum(-1, keepdims=True), 1)
    kept = np.where(seen, counts - discount, 0) / total
    rest = np.where(seen, 0, lower)
    rest /= np.maximum(rest.sum(-1, keepdims=True), np.finfo(float).tiny)
    return kept + (1 - kept.sum(-1, keepdims=True)) * rest
