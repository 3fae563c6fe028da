"""Scores of classes and of numbers as GLUE computes them, and of answers as SQuAD does.

Those of GLUE are in percent, and 0 where one is not defined, without a warning. They take the true and the predicted
values [N]: class numbers, or real numbers for the correlations.
scikit-learn and SciPy are imported where they are used: the import takes a second or two.
"""

import collections
import re
import string
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


# --- Answers in words: strings, 0..1 ------------------------------------------------------------

def normalise_answer(text: str) -> str:
    """Returns `text` as the official scripts compare it: lower case, no punctuation, no articles, single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_f1(prediction: str, gold: str) -> float:
    """Returns the F1 of the bags of words, 0..1, as evaluate-v2.0.py: two empty ones agree."""
    ours, theirs = normalise_answer(prediction).split(), normalise_answer(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def against_gold(text: str, gold: Sequence[str], v2: bool) -> tuple[float, float]:
    """Returns exact match and F1 against the gold answer that suits best, as SQuAD's script of that version."""
    if v2:    # evaluate-v2.0.py: answers of nothing but articles and punctuation do not count
        gold = [answer for answer in gold if normalise_answer(answer)] or [""]
    answer = normalise_answer(text)
    f1 = max(answer_f1(text, each) for each in gold)
    # evaluate-v1.1.py gives an empty prediction no F1, whatever the answer.
    return float(any(answer == normalise_answer(each) for each in gold)), f1 if v2 or answer else 0.0


def best_threshold(answered: np.ndarray, empty: np.ndarray, odds: np.ndarray) -> tuple[float, float]:
    """Returns the best mean over all thresholds, and the lowest threshold that gives it.

    A question with null odds above the threshold scores `empty`, the others `answered`; all [questions]. Exact also
    where odds are equal: the official search then counts questions on both sides of the same threshold.
    """
    values, group = np.unique(odds, return_inverse=True)
    gain = np.bincount(group, weights=answered - empty)
    totals = empty.sum() + np.concatenate([[0.0], np.cumsum(gain)])
    best = int(np.argmax(totals))
    return float(totals[best] / len(odds)), float(values[best - 1] if best else values[0] - 1)
