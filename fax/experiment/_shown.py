"""Which metrics of a run figures, tables, the progress bar and the shell show."""

from __future__ import annotations

from collections.abc import Callable, Iterable

# These are shown wherever they were measured. Of evaluations, other metrics are shown, too.
FIRST = ("loss", "accuracy", "psnr")
_NOT_EVALUATIONS = ("clients", "clusters", "domains", "personal", "replicas")
# These do not say how good a model is. The last three describe the data.
_HIDDEN = ("id", "non_finite", "oov_rate", "sequence_length", "tokens")
_SMALLER = ("cross_entropy", "mae", "mse", "perplexity")
_LARGER = ("auc", "average_precision", "f1", "precision", "psnr", "r2", "recall")


def kind_of(name: str) -> str:
    """What was measured: the last part of a metric's name."""
    return name.rpartition("/")[2]


def kinds(names: Iterable[str]) -> list[str]:
    """The kinds that are shown: losses, accuracies and PSNR, and then those of evaluations."""
    names = list(names)
    found = {kind_of(name) for name in names}
    evaluated = [
        kind_of(name)
        for name in names
        if _is_of_evaluation(name.split("/")) and kind_of(name) not in _HIDDEN
    ]
    return list(dict.fromkeys([*(kind for kind in FIRST if kind in found), *evaluated]))


def _is_of_evaluation(parts: list[str]) -> bool:
    """Whether a name begins with that of an evaluation, and not with a setting of a sweep."""
    return len(parts) > 1 and parts[0] not in _NOT_EVALUATIONS and "=" not in parts[0]


def main(kinds: Iterable[str]) -> str:
    """The kind that is shown where there is room for one."""
    kinds = list(kinds)
    others = [kind for kind in kinds if kind not in FIRST]
    return next(kind for kind in ("psnr", "accuracy", *others, "loss") if kind in kinds)


def best(kind: str) -> Callable | None:
    """`min` or `max`, whichever chooses the best value, or None if that is not known."""
    if kind.endswith(("loss", "error")) or kind in _SMALLER:
        return min
    return max if "accuracy" in kind or kind in _LARGER else None
