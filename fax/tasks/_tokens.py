"""Text as sequences of integers, by characters or by words, as FedJAX makes them.

In all of them 0 is padding, 1 the beginning of a text and 2 its end; what is in the vocabulary
comes next, and what is not, the last number of all. A sequence is a pair: in ``x`` what a model
reads, in ``y`` what comes next.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from fax import _arguments
from fax.data import DataError

PAD, BOS, EOS, FIRST = 0, 1, 2, 3


class Characters:
    """Numbers for the bytes of texts.

    Args:
      vocabulary: the bytes that have numbers of their own, 3, 4, ... in this order.

    Raises:
      DataError: if the vocabulary is not bytes, is empty or has a byte twice.

    Example:

      >>> fax.tasks.Characters(b"abc").sequences([b"ab", b"cat"], length=4)["x"]
      array([[1, 3, 4, 2],
             [1, 5, 3, 6]], dtype=int32)
    """

    def __init__(self, vocabulary: bytes) -> None:
        where = "fax.tasks.Characters"
        if not isinstance(vocabulary, bytes) or not vocabulary:
            raise DataError(f"{where}: vocabulary is {vocabulary!r:.80}, expected bytes.")
        if len(set(vocabulary)) < len(vocabulary):
            twice = sorted({bytes([c]) for c in vocabulary if vocabulary.count(c) > 1})
            raise DataError(f"{where}: vocabulary has {twice} more than once.")
        self.vocabulary = vocabulary
        self._numbers = np.full(256, self.size - 1, np.int32)
        self._numbers[list(vocabulary)] = np.arange(FIRST, self.size - 1)

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return FIRST + len(self.vocabulary) + 1

    def sequences(self, texts: Iterable[bytes], length: int) -> dict[str, np.ndarray]:
        """Joins texts, and cuts them into sequences.

        Every text gets its beginning and its end, all follow one another, and the whole is cut
        every ``length`` numbers. The next of each number is in ``y``, across cuts and texts. The
        last sequence is padded. No character is lost.

        Args:
          texts: byte strings, at least one.
          length: of a sequence.

        Returns:
          ``{"x": ..., "y": ...}``, int32 [sequences, length].

        Raises:
          DataError: if there is no text, or ``length`` is not positive.
        """
        _check_length("fax.tasks.Characters", length)
        parts = []
        for text in texts:
            numbers = self._numbers[np.frombuffer(text, np.uint8)]
            parts.append(np.concatenate([[BOS], numbers, [EOS]]).astype(np.int32))
        if not parts:
            raise DataError("fax.tasks.Characters: texts are empty, expected at least one.")
        joined = np.concatenate(parts)
        missing = -(len(joined) - 1) % length
        x, y = (np.pad(part, (0, missing)) for part in (joined[:-1], joined[1:]))
        return {"x": x.reshape(-1, length), "y": y.reshape(-1, length)}


class Words:
    """Numbers for the words of sentences. Words are what stands between single spaces.

    Args:
      vocabulary: the words that have numbers of their own, 3, 4, ... in this order.

    Raises:
      DataError: if the vocabulary is empty or has a word twice.

    Example:

      >>> words = fax.tasks.Words(["to", "be"])
      >>> words.sequences([b"to be or", b"be"], length=3)
      {'x': array([[1, 3, 4],
             [1, 4, 0]], dtype=int32), 'y': array([[3, 4, 5],
             [4, 2, 0]], dtype=int32)}
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        where = "fax.tasks.Words"
        text = isinstance(vocabulary, str | bytes)
        if text or not isinstance(vocabulary, Sequence) or not vocabulary:
            raise DataError(f"{where}: vocabulary is {vocabulary!r:.80}, expected a list of words.")
        self.vocabulary = tuple(vocabulary)
        self._numbers: dict[bytes, int] = {}
        for number, word in enumerate(self.vocabulary, FIRST):
            if not isinstance(word, str) or not word or " " in word:
                raise DataError(f"{where}: vocabulary has {word!r}, expected words without spaces.")
            if self._numbers.setdefault(word.encode(), number) != number:
                raise DataError(f"{where}: vocabulary has {word!r} more than once.")

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return FIRST + len(self.vocabulary) + 1

    def sequences(self, sentences: Iterable[bytes], length: int) -> dict[str, np.ndarray]:
        """Makes one sequence of each sentence: padded, or cut to what fits.

        Args:
          sentences: byte strings.
          length: of a sequence. A sentence of that many words keeps all of them, but not its end.

        Returns:
          ``{"x": ..., "y": ...}``, int32 [sentences, length].

        Raises:
          DataError: if ``length`` is not positive.
        """
        _check_length("fax.tasks.Words", length)
        oov = self.size - 1
        found: dict[str, list[list[int]]] = {"x": [], "y": []}
        for sentence in sentences:
            words = itertools.islice(sentence.split(b" "), length)
            numbers = [self._numbers.get(word, oov) for word in words]
            for name, row in (("x", [BOS, *numbers]), ("y", [*numbers, EOS])):
                found[name].append((row + [PAD] * length)[:length])
        return {name: np.array(rows, np.int32).reshape(-1, length) for name, rows in found.items()}


def _check_length(where: str, length: int) -> None:
    _arguments.count(where, "length", length, expected="a positive int", error=DataError)
