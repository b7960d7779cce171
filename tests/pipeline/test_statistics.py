"""Intervals against scipy's own and against figures worked out by hand."""

import math

import pytest
from scipy import stats

from rlhf_pipeline.statistics import distinct_n, mean_of, paired_rise, win_rate

BEFORE = [0.1, -0.4, 0.8, 0.3, 0.0, 1.2, -0.9]
AFTER = [0.4, 0.1, 0.7, 1.3, 0.0, 1.9, -0.2]


def test_mean_has_students_interval() -> None:
    low, high = stats.t.interval(0.95, 6, loc=stats.tmean(BEFORE), scale=stats.sem(BEFORE))
    found = mean_of(BEFORE)
    assert (found.mean, found.low, found.high) == pytest.approx((stats.tmean(BEFORE), low, high))
    assert found.deviation == pytest.approx(stats.tstd(BEFORE))
    assert found.count == 7


def test_two_values_by_hand() -> None:
    found = mean_of([1.0, 3.0])  # mean 2, standard error 1, t with one degree of freedom 12.706
    assert (found.low, found.high) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)


def test_rise_is_the_paired_t_interval() -> None:
    expected = stats.ttest_rel(AFTER, BEFORE).confidence_interval(0.95)
    found = paired_rise(BEFORE, AFTER)
    assert found.mean == pytest.approx(stats.tmean(AFTER) - stats.tmean(BEFORE))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_pairing_removes_what_prompts_share() -> None:
    prompts = [float(10 * index) for index in range(20)]
    after = [value + 1 + 0.01 * (index % 3) for index, value in enumerate(prompts)]
    assert paired_rise(prompts, after).low > 0.9
    assert mean_of(after).low < mean_of(prompts).high


def test_one_value_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 2 values, not 1"):
        mean_of([1.0])


def test_equal_values_have_an_interval_of_no_width() -> None:
    found = mean_of([2.0] * 5)
    assert (found.low, found.high) == (2.0, 2.0)


def test_win_rate_is_wilsons() -> None:
    before, after = [0.0] * 20, [1.0] * 14 + [-1.0] * 6
    expected = stats.binomtest(14, 20).proportion_ci(0.95, method="wilson")
    found = win_rate(before, after)
    assert (found.wins, found.ties, found.losses, found.share) == (14, 0, 6, 0.7)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_ties_count_half() -> None:
    found = win_rate([0, 0, 0, 0], [1, 0, 0, -1])
    assert (found.wins, found.ties, found.losses, found.share) == (1, 2, 1, 0.5)
    assert found.low + found.high == pytest.approx(1)


def test_win_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 pair"):
        win_rate([], [])


def test_distinct_n_by_hand() -> None:
    texts = ["The cat saw the dog", "the cat!"]  # words: the×3 cat×2 saw dog; pairs: 5, "the cat" twice
    assert distinct_n(texts, 1) == pytest.approx(4 / 7)
    assert distinct_n(texts, 2) == pytest.approx(4 / 5)


def test_no_pair_spans_two_texts() -> None:
    assert distinct_n(["a", "b"], 2) == 0.0


def test_a_repeated_phrase_scores_low() -> None:
    assert distinct_n(["so good so good so good"] * 10, 2) < 0.05
    assert not math.isnan(distinct_n([], 1))
