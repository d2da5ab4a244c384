"""Text as sequences of ints for characters or words, in the same way as FedJAX.

0 is padding, 1 the beginning of a text, and 2 its end. The vocabulary has the numbers 3, 4, ...,
and everything out of vocabulary has the last number. A sequence is a pair of features: ``x`` is
what a model reads, and ``y`` the next number for each position.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fax import _arguments
from fax.data import DataError

PAD, BOS, EOS, FIRST = 0, 1, 2, 3


class Characters:
    """Numbers for the characters of texts, each of which is a byte.

    Args:
      vocabulary: the bytes with the numbers 3, 4, ..., in this order.

    Raises:
      ValueError: if the vocabulary is not bytes, is empty or has a byte twice.

    Example:

      >>> fax.tasks.Characters(b"abc").sequences([b"ab", b"cat"], length=4)["x"]
      array([[1, 3, 4, 2],
             [1, 5, 3, 6]], dtype=int32)
    """

    vocabulary: bytes

    def __init__(self, vocabulary: bytes) -> None:
        where = "fax.tasks.Characters"
        if not isinstance(vocabulary, bytes) or not vocabulary:
            raise ValueError(f"{where}: vocabulary is {vocabulary!r:.80}, expected bytes.")
        if len(set(vocabulary)) < len(vocabulary):
            twice = sorted({bytes([c]) for c in vocabulary if vocabulary.count(c) > 1})
            raise ValueError(f"{where}: vocabulary has {twice} more than once.")
        self.vocabulary = vocabulary
        self._numbers = np.full(256, self.size - 1, np.int32)
        self._numbers[list(vocabulary)] = np.arange(FIRST, self.size - 1)

    @property
    def size(self) -> int:
        """How many numbers there are, including padding, begin, end and out of vocabulary."""
        return FIRST + len(self.vocabulary) + 1

    def sequences(self, texts: Iterable[bytes], length: int) -> dict[str, np.ndarray]:
        """Joins texts, and cuts the result into sequences.

        The beginning and the end are added to each text, and the joined texts are cut every
        ``length`` numbers. ``y`` is the next number, across cuts and texts. The last sequence is
        padded. No character is lost.

        Args:
          texts: byte strings, at least one.
          length: of a sequence.

        Returns:
          ``{"x": ..., "y": ...}``, int32 [sequences, length].

        Raises:
          DataError: if there is no text.
          ValueError: if a text is not bytes, or ``length`` is not an int of at least 1.
        """
        _check_length("fax.tasks.Characters", length)
        parts = []
        for text in _checked("fax.tasks.Characters", "texts", texts):
            numbers = self._numbers[np.frombuffer(text, np.uint8)]
            parts.append(np.concatenate([[BOS], numbers, [EOS]]).astype(np.int32))
        if not parts:
            raise DataError("fax.tasks.Characters: there are no texts, expected at least one.")
        joined = np.concatenate(parts)
        missing = -(len(joined) - 1) % length
        x, y = (np.pad(part, (0, missing)) for part in (joined[:-1], joined[1:]))
        return {"x": x.reshape(-1, length), "y": y.reshape(-1, length)}


class Words:
    """Numbers for the words of sentences. Words are separated by single spaces.

    Args:
      vocabulary: the words with the numbers 3, 4, ..., in this order.

    Raises:
      ValueError: if the vocabulary is not a list of words, is empty or has a word twice.

    Example:

      >>> words = fax.tasks.Words(["to", "be"])
      >>> words.sequences([b"to be or", b"be"], length=3)
      {'x': array([[1, 3, 4],
             [1, 4, 0]], dtype=int32), 'y': array([[3, 4, 5],
             [4, 2, 0]], dtype=int32)}
    """

    vocabulary: tuple[str, ...]

    def __init__(self, vocabulary: Sequence[str]) -> None:
        where = "fax.tasks.Words"
        text = isinstance(vocabulary, str | bytes)
        if text or not isinstance(vocabulary, Sequence) or not vocabulary:
            raise ValueError(
                f"{where}: vocabulary is {vocabulary!r:.80}, expected a list of words."
            )
        self.vocabulary = tuple(vocabulary)
        self._numbers: dict[bytes, int] = {}
        for number, word in enumerate(self.vocabulary, FIRST):
            if not isinstance(word, str) or not word or " " in word:
                raise ValueError(
                    f"{where}: vocabulary has {word!r}, expected words without spaces."
                )
            if self._numbers.setdefault(word.encode(), number) != number:
                raise ValueError(f"{where}: vocabulary has {word!r} more than once.")

    @property
    def size(self) -> int:
        """How many numbers there are, including padding, begin, end and out of vocabulary."""
        return FIRST + len(self.vocabulary) + 1

    def sequences(self, sentences: Iterable[bytes], length: int) -> dict[str, np.ndarray]:
        """Makes a sequence of each sentence, which is padded or truncated.

        Args:
          sentences: byte strings.
          length: of a sequence. A sentence of that many words keeps all words, but not its end.

        Returns:
          ``{"x": ..., "y": ...}``, int32 [sentences, length].

        Raises:
          ValueError: if a sentence is not bytes, or ``length`` is not an int of at least 1.
        """
        _check_length("fax.tasks.Words", length)
        oov = self.size - 1
        found: dict[str, list[list[int]]] = {"x": [], "y": []}
        for sentence in _checked("fax.tasks.Words", "sentences", sentences):
            words = itertools.islice(sentence.split(b" "), length)
            numbers = [self._numbers.get(word, oov) for word in words]
            for name, row in (("x", [BOS, *numbers]), ("y", [*numbers, EOS])):
                found[name].append((row + [PAD] * length)[:length])
        return {name: np.array(rows, np.int32).reshape(-1, length) for name, rows in found.items()}


def _checked(where: str, name: str, texts: Iterable[bytes]) -> Iterator[bytes]:
    """The texts, if they are byte strings."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ValueError(
            f"{where}: {name} is {texts!r:.80}, expected a list of byte strings, such as [b'abc']."
        )
    for number, text in enumerate(texts):
        if not isinstance(text, bytes):
            raise ValueError(
                f"{where}: {name}[{number}] is {text!r:.80}, expected bytes, such as b'abc' or "
                "'abc'.encode()."
            )
        yield text


def _check_length(where: str, length: int) -> None:
    _arguments.count(where, "length", length)
