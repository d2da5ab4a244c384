"""When a run evaluates, saves and logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fax import _arguments

_TIMES = 20  # how often a run evaluates and saves, if nothing is said


class Schedule(NamedTuple):
    """After how many rounds something happens. Evaluation and checkpoints end a block of rounds.

    Attributes:
      rounds: how many there are in all. After the last one, everything happens.
      rounds_per_call: the rounds of a block.
      evaluate: after how many rounds the evaluations run.
      checkpoint: after how many rounds a checkpoint is saved.
      log: after how many rounds the metrics are fetched and written.
    """

    rounds: int
    rounds_per_call: int
    evaluate: int
    checkpoint: int
    log: int

    def block(self, done: int) -> int:
        """How many rounds to run next. It depends on nothing else, for a run that is resumed."""
        ends = (self.rounds_per_call, self.evaluate, self.checkpoint)
        return min(self.rounds, *(done - done % n + n for n in ends)) - done

    def due(self, before: int, done: int, what: str) -> bool:
        """Whether it is time for something after the block between two numbers of rounds."""
        every = getattr(self, what)
        return done >= self.rounds or done // every > before // every


def schedule(where: str, rounds: int, rounds_per_call: int, every: Any) -> Schedule:
    """The schedule for the arguments of `run`."""
    parts = ("evaluate", "checkpoint", "log")
    usual = -(-rounds // _TIMES) or 1
    known = {"evaluate": usual, "checkpoint": usual, "log": 1}
    if isinstance(every, Mapping):
        unknown = [name for name in every if name not in parts]
        if unknown:
            raise ValueError(
                f"{where}: every has the key {unknown[0]!r}, expected {_arguments.either(parts)}."
            )
        known |= {n: _arguments.count(where, f"every[{n!r}]", own) for n, own in every.items()}
    elif every is not None:
        expected = "an int of at least 1, or a dict of them by 'evaluate', 'checkpoint' and 'log'"
        number = _arguments.count(where, "every", every, expected=expected)
        known |= {"evaluate": number, "checkpoint": number}
    return Schedule(rounds, rounds_per_call, **known)
