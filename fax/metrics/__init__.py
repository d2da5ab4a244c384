"""Metrics: statistics that can be merged, and evaluation as a federated program.

A metric is a function ``metric(batch, scores)`` that returns a statistic of each example, a
`Mean` or a `Sum`. Statistics are added up in any order: over a batch, a client, a domain or all
data. `evaluate` adds up those of all clients, `evaluate_clients` those of each client.
"""

from fax.metrics._binary import BinaryAccuracy as BinaryAccuracy
from fax.metrics._calibration import CalibrationError as CalibrationError
from fax.metrics._calibration import Reliability as Reliability
from fax.metrics._classification import Accuracy as Accuracy
from fax.metrics._classification import ConfusionMatrix as ConfusionMatrix
from fax.metrics._classification import CrossEntropy as CrossEntropy
from fax.metrics._classification import PerDomain as PerDomain
from fax.metrics._classification import TopK as TopK
from fax.metrics._evaluate import evaluate as evaluate
from fax.metrics._evaluate import evaluate_clients as evaluate_clients
from fax.metrics._fairness import Fairness as Fairness
from fax.metrics._fairness import fairness as fairness
from fax.metrics._packing import Prepared as Prepared
from fax.metrics._packing import prepare as prepare
from fax.metrics._precision_recall import F1 as F1
from fax.metrics._precision_recall import Detections as Detections
from fax.metrics._precision_recall import Precision as Precision
from fax.metrics._precision_recall import Recall as Recall
from fax.metrics._ranking import AUC as AUC
from fax.metrics._ranking import AveragePrecision as AveragePrecision
from fax.metrics._ranking import LogitHistogram as LogitHistogram
from fax.metrics._ranking import average_precision as average_precision
from fax.metrics._ranking import roc_auc as roc_auc
from fax.metrics._regression import MAE as MAE
from fax.metrics._regression import MSE as MSE
from fax.metrics._regression import PSNR as PSNR
from fax.metrics._regression import R2 as R2
from fax.metrics._regression import Decibels as Decibels
from fax.metrics._regression import ExplainedVariance as ExplainedVariance
from fax.metrics._sequences import ExpMean as ExpMean
from fax.metrics._sequences import OOVRate as OOVRate
from fax.metrics._sequences import Perplexity as Perplexity
from fax.metrics._sequences import SequenceCount as SequenceCount
from fax.metrics._sequences import SequenceLength as SequenceLength
from fax.metrics._sequences import SequenceLoss as SequenceLoss
from fax.metrics._sequences import TokenAccuracy as TokenAccuracy
from fax.metrics._sequences import TokenCount as TokenCount
from fax.metrics._sequences import TokenLoss as TokenLoss
from fax.metrics._sequences import TokenTopK as TokenTopK
from fax.metrics._sequences import TruncationRate as TruncationRate
from fax.metrics._statistics import Mean as Mean
from fax.metrics._statistics import Statistic as Statistic
from fax.metrics._statistics import Sum as Sum
