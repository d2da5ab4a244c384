"""A trigram model with back-off, the baseline for models of the next token.

With the counts n of the training data and the absolute discount d (Ney et al., 1994; Katz, 1987),

    p(c | a b) = (n(a b c) - d) / n(a b)    if a b c was seen
                 alpha(a b) p(c | b)        otherwise

where alpha(a b) distributes the discounted probability over the tokens that were not seen after
a b. In the same way, p(c | b) backs off to p(c). The first token of a sequence has no a.
"""

import numpy as np

PADDING = 0


class Trigram:
    """A model fitted to the sequences ``x`` and the next tokens ``y`` of all clients together."""

    def __init__(self, data, tokens):
        a, b, c = _contexts(data)
        single = _counts(tokens, c) + 1
        self.single = single / single.sum()
        self.double = _back_off(_counts(tokens, b, c), self.single)
        self.triple = _back_off(_counts(tokens, a, b, c), self.double)

    def loss(self, data):
        """The mean negative log-likelihood of a token, in nats."""
        return -np.log(self.triple[_contexts(data)]).mean()


def _contexts(data):
    """The two tokens before each token, with 0 before the start of a sequence, and the token."""
    every = [data.client(client_id) for client_id in data.client_ids()]
    x, y = (np.concatenate([client[name] for client in every]) for name in "xy")
    before = np.pad(x[:, :-1], [(0, 0), (1, 0)])
    real = y != PADDING
    return before[real], x[real], y[real]


def _counts(tokens, *columns):
    shape = (tokens,) * len(columns)
    numbers = np.ravel_multi_index(columns, shape)
    return np.bincount(numbers, minlength=np.prod(shape)).reshape(shape).astype(float)


def _back_off(counts, lower):
    """Probabilities from counts; from those of a shorter context for tokens that were not seen."""
    once, twice = np.sum(counts == 1), np.sum(counts == 2)
    discount = once / (once + 2 * twice)
    seen = counts > 0
    total = np.maximum(counts.sum(-1, keepdims=True), 1)
    kept = np.where(seen, counts - discount, 0) / total
    rest = np.where(seen, 0, lower)
    rest /= np.maximum(rest.sum(-1, keepdims=True), np.finfo(float).tiny)
    return kept + (1 - kept.sum(-1, keepdims=True)) * rest
