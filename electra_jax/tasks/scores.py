"""Scores of classes and of numbers as GLUE computes them, in percent; 0 where one is not defined, without a warning.

Every function takes the true and the predicted values [N]: class numbers, or real numbers for the correlations.
scikit-learn and SciPy are imported where they are used: the import takes a second or two.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np


def accuracy(true: Sequence[int], predicted: Sequence[int]) -> float:
    """Returns the share of equal class numbers."""
    return 100.0 * float(np.mean(np.asarray(true) == np.asarray(predicted)))


def matthews(true: Sequence[int], predicted: Sequence[int]) -> float:
    """Returns Matthews' correlation (for more than two classes Gorodkin's R_K); 0 when either side has one class."""
    from sklearn.metrics import matthews_corrcoef
    return _percent(matthews_corrcoef, true, predicted)


def f1(true: Sequence[int], predicted: Sequence[int]) -> float:
    """Returns F1 of class 1 against class 0; 0 when class 1 is never predicted or never true."""
    from sklearn.metrics import f1_score
    return _percent(f1_score, true, predicted, pos_label=1, zero_division=0)


def macro_f1(true: Sequence[int], predicted: Sequence[int]) -> float:
    """Returns the mean of the F1 of every class that is true or predicted anywhere."""
    from sklearn.metrics import f1_score
    return _percent(f1_score, true, predicted, average="macro", zero_division=0)


def pearson(true: Sequence[float], predicted: Sequence[float]) -> float:
    """Returns Pearson's correlation; 0 when either side is constant, or a prediction is not finite."""
    from scipy.stats import pearsonr
    return _correlation(pearsonr, true, predicted)


def spearman(true: Sequence[float], predicted: Sequence[float]) -> float:
    """Returns Spearman's rank correlation, ties by mean rank; 0 when either side is constant or not finite."""
    from scipy.stats import spearmanr
    return _correlation(spearmanr, true, predicted)


METRICS: dict[str, Callable] = {f.__name__: f for f in (accuracy, matthews, f1, macro_f1, pearson, spearman)}


def _correlation(function, true, predicted) -> float:
    true, predicted = np.asarray(true, np.float64), np.asarray(predicted, np.float64)
    if not np.isfinite(predicted).all() or not np.ptp(true) or not np.ptp(predicted):
        return 0.0    # a network that diverged, or answers the same to everything, has learned nothing
    return _percent(lambda a, b: function(a, b)[0], true, predicted)


def _percent(function, true, predicted, **options) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # both libraries warn of one class, or of nearly constant numbers
        value = float(function(true, predicted, **options))
    return 100.0 * value if np.isfinite(value) else 0.0
