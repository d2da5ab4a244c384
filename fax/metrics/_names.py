"""Metrics by name, where their default settings are enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fax import _arguments
from fax._nearest import did_you_mean
from fax.metrics._binary import BinaryAccuracy
from fax.metrics._calibration import CalibrationError
from fax.metrics._classification import Accuracy, CrossEntropy, Metric
from fax.metrics._precision_recall import F1, Precision, Recall
from fax.metrics._ranking import AUC, AveragePrecision
from fax.metrics._regression import MAE, MSE, PSNR, R2
from fax.metrics._sequences import Perplexity, TokenAccuracy, TokenLoss

# The metrics that work without arguments, by the names that can stand for them.
NAMED: dict[str, Metric] = {
    "accuracy": Accuracy(),
    "auc": AUC(),
    "average_precision": AveragePrecision(),
    "binary_accuracy": BinaryAccuracy(),
    "calibration_error": CalibrationError(),
    "cross_entropy": CrossEntropy(),
    "f1": F1(),
    "mae": MAE(),
    "mse": MSE(),
    "perplexity": Perplexity(),
    "precision": Precision(),
    "psnr": PSNR(),
    "r2": R2(),
    "recall": Recall(),
    "token_accuracy": TokenAccuracy(),
    "token_loss": TokenLoss(),
}

Metrics = Mapping[str, Metric | str] | Sequence[str] | str


def named_metrics(where: str, metrics: Any) -> Mapping[str, Metric]:
    """Metrics by name. Names of metrics, alone or in a mapping, become the metrics themselves."""
    if isinstance(metrics, str):
        metrics = [metrics]
    if isinstance(metrics, list | tuple | set | frozenset) and all(
        isinstance(name, str) for name in metrics
    ):
        metrics = {name: name for name in metrics}
    if not isinstance(metrics, Mapping) or not metrics:
        raise ValueError(
            f"{where}: metrics is {metrics!r:.80}, expected a mapping from names to metrics, such "
            "as {'accuracy': fax.metrics.Accuracy()}, or names of metrics, such as ['accuracy']."
        )
    for name, metric in metrics.items():
        _arguments.text(where, "a key of metrics", name, "the name of a metric")
        if isinstance(metric, str) and metric not in NAMED:
            raise ValueError(
                f"{where}: there is no metric {metric!r}. {did_you_mean(metric, NAMED)}"
            )
    return {name: NAMED[m] if isinstance(m, str) else m for name, m in metrics.items()}
