"""Scores are those of the published definitions, and of cases worked out by hand; undefined ones are 0, silently."""

import math
import warnings

import numpy as np
import pytest

from electra_jax.tasks import scores

TRUE = [1, 1, 1, 0, 0, 0, 0, 1]
SAID = [1, 0, 1, 0, 1, 0, 0, 0]    # 2 hits, 1 false alarm, 2 misses, 3 correct rejections


@pytest.mark.parametrize(("name", "expected"), [
    ("accuracy", 62.5),                                          # 5 of 8
    ("f1", 100 * 4 / 7),                                         # 2 * 2 / (2 * 2 + 1 + 2)
    ("matthews", 100 * (2 * 3 - 1 * 2) / math.sqrt(3 * 4 * 4 * 5)),
    ("macro_f1", 100 * (4 / 7 + 6 / 9) / 2),                     # class 0: 2 * 3 / (2 * 3 + 2 + 1)
])
def test_class_scores_of_a_case_worked_out_by_hand(name, expected):
    assert scores.METRICS[name](TRUE, SAID) == pytest.approx(expected, abs=1e-9)


def test_correlations_of_cases_worked_out_by_hand():
    assert scores.pearson([1, 2, 3], [1, 2, 4]) == pytest.approx(100 * 3 / math.sqrt(2 * 14 / 3))
    assert scores.spearman([1, 2, 3, 4], [1, 10, 100, 50]) == pytest.approx(80)    # 1 - 6 * 2 / (4 * 15)
    assert scores.spearman([1, 2, 3], [-1, -2, -9]) == pytest.approx(-100)
    assert scores.spearman([1, 2, 2], [1, 2, 3]) == pytest.approx(100 * math.sqrt(3) / 2)    # ties share a rank


def mean_ranks(values):
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


def covariance_ratio(x, y):
    x, y = np.array(x) - np.mean(x), np.array(y) - np.mean(y)
    return 100 * (x @ y) / math.sqrt((x @ x) * (y @ y))


def test_scores_agree_with_the_published_definitions_on_random_answers():
    rng = np.random.default_rng(0)
    for _ in range(20):
        true, said = rng.integers(0, 2, 30), rng.integers(0, 2, 30)
        hits, alarms = np.sum(true & said), np.sum(said) - np.sum(true & said)
        misses, rest = np.sum(true) - hits, np.sum((1 - true) * (1 - said))
        root = math.sqrt((hits + alarms) * (hits + misses) * (rest + alarms) * (rest + misses))
        assert scores.matthews(true, said) == pytest.approx(100 * (hits * rest - alarms * misses) / root)
        assert scores.f1(true, said) == pytest.approx(100 * 2 * hits / (2 * hits + alarms + misses))
        assert scores.accuracy(true, said) == pytest.approx(100 * (hits + rest) / 30)
        x, y = rng.integers(0, 6, 30).astype(float), rng.normal(size=30).round(1)
        assert scores.pearson(x, y) == pytest.approx(covariance_ratio(x, y))
        assert scores.spearman(x, y) == pytest.approx(covariance_ratio(mean_ranks(x), mean_ranks(y)))


@pytest.mark.parametrize(("name", "true", "said"), [
    ("matthews", [0, 1, 1], [1, 1, 1]), ("matthews", [1, 1], [1, 1]), ("matthews", [0, 0], [0, 1]),
    ("f1", [0, 1, 1], [0, 0, 0]), ("f1", [0, 0], [0, 0]), ("f1", [0, 0], [1, 1]),
    ("pearson", [1, 2, 3], [2, 2, 2]), ("pearson", [2, 2], [1, 3]), ("pearson", [3], [1]),
    ("spearman", [1, 2, 3], [2, 2, 2]), ("spearman", [1, 2], [math.nan, 1]), ("pearson", [1, 2, 3], [1, math.inf, 2]),
    ("spearman", [3], [1]), ("spearman", [1, 2, 3], [1, math.inf, 2]),
])
def test_an_undefined_score_is_0_without_a_warning(name, true, said):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores.METRICS[name](true, np.array(said)) == 0.0


def test_nearly_constant_answers_are_scored_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abs(scores.pearson([1, 2, 3], np.array([1, 1 + 1e-15, 1 - 1e-15]))) <= 100
