"""Accuracies over a test set and the intervals of `src.certification.intervals`."""

import numpy as np
import pytest
from scipy import stats

from src.certification import (
    certified_radius,
    lower_confidence_bound,
    required_probability,
    upper_confidence_bound,
)
from src.certification.intervals import (
    accuracy_interval,
    average_certified_radius,
    certified_accuracy,
    median_interval,
    population_certified_accuracy_interval,
    possibly_certified,
)


def test_accuracy_and_average_radius_by_hand():
    radius = np.array([0.0, 0.5, 1.0, 2.0])
    correct = np.array([False, True, True, False])
    assert certified_accuracy(radius, correct, 0.5) == 0.5
    assert certified_accuracy(radius, correct, [0, 0.5, 0.6, 2]).tolist() == [0.5, 0.5, 0.25, 0]
    assert average_certified_radius(radius, correct) == pytest.approx(1.5 / 4)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (490, 500)])
def test_accuracy_interval_agrees_with_scipy(successes, trials):
    low, high = accuracy_interval(successes, trials)
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_accuracy_interval_takes_arrays():
    low, high = accuracy_interval(np.arange(11), 10)
    assert low[0] == 0
    assert high[-1] == 1
    assert np.all(low <= np.arange(11) / 10)
    assert np.all(high >= np.arange(11) / 10)


def test_interval_widens_with_the_failure_probability_of_certificates():
    # With a negligible alpha it is the interval of test sampling; alpha moves both ends outwards.
    plain = population_certified_accuracy_interval(450, 500, 1e-12, possible=450)
    wide = population_certified_accuracy_interval(450, 500, 0.05, possible=450)
    assert plain == pytest.approx(accuracy_interval(450, 500))
    assert wide[0] < plain[0] < plain[1] < wide[1]
    assert population_certified_accuracy_interval(450, 500, 0.001)[1] == 1
    assert population_certified_accuracy_interval(0, 500, 0.001)[0] == 0


def certify_population(rng, p, images, *, n, at, sigma, alpha):
    """Counts (certified, possible) of a sample of images whose labels have probabilities `p`."""
    votes = rng.binomial(n, p[rng.integers(len(p), size=images)])
    # Two classes; this image's own earlier draws select the one that is usually ahead.
    selects_label = rng.random(images) < 0.9
    top = np.where(selects_label, votes, n - votes)
    radius = certified_radius(lower_confidence_bound(top, n, alpha), sigma)
    possible = possibly_certified(top, n, np.where(selects_label, 0, 1), 0, at, sigma, alpha)
    return (selects_label & (radius >= at)).sum(), possible.sum()


def test_interval_covers_the_population_when_certificates_fail_often():
    # Probabilities just below and just above p0 make certificates fail as often as alpha = 0.2
    # allows. 600 repetitions at 90 %: covering fewer than 85 % is 4 standard deviations off,
    # a false alarm in 3e4 were the coverage as low as promised; the seed is fixed.
    rng, sigma, at = np.random.default_rng(3), 0.5, 0.5
    p0 = required_probability(at, sigma)
    p = np.array([p0 - 1e-9] * 50 + [p0 + 1e-9] * 30 + [0.99] * 20)
    covered = 0
    for _ in range(600):
        certified, possible = certify_population(rng, p, 200, n=100, at=at, sigma=sigma, alpha=0.2)
        low, high = population_certified_accuracy_interval(
            certified, 200, 0.2, 0.9, possible=possible
        )
        covered += low <= np.mean(p >= p0) <= high
    assert covered / 600 >= 0.85


def test_what_the_votes_rule_out():
    # Phi(1) = 0.841: 70 of 100 votes rule it out at 0.001 only if they are the label's own limit.
    arguments = {"at": 0.5, "sigma": 0.5, "alpha": 0.001}
    assert upper_confidence_bound(70, 100, 0.001) < 0.841
    assert not possibly_certified(70, 100, 4, 4, **arguments)
    assert possibly_certified(90, 100, 4, 4, **arguments)
    assert not possibly_certified(70, 100, 4, 7, **arguments)
    assert possibly_certified(10, 100, 4, 7, **arguments)
    # An abstention hides which class was selected: both readings must be ruled out.
    assert not possibly_certified(50, 100, -1, 7, **arguments)
    assert possibly_certified(20, 100, -1, 7, **arguments)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: accuracy_interval(1, 0), "trials"),
        (lambda: accuracy_interval(11, 10), "successes"),
        (lambda: accuracy_interval(1, 10, 1.0), "confidence"),
        (lambda: certified_accuracy([0.1, np.nan], [True, True], 0.1), "radius"),
        (lambda: average_certified_radius([], []), "radius"),
        (lambda: average_certified_radius([1.0], [2]), "correct"),
        (lambda: population_certified_accuracy_interval(5, 10, 0.1, possible=4), "possible"),
        (lambda: population_certified_accuracy_interval(5, 10, 1.5), "alpha"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        call()


def test_median_interval_is_the_textbook_one():
    # Ten values at 95 %: from the second smallest to the second largest, covered at 97.9 %.
    assert median_interval(np.arange(10.0)[::-1]) == (1, 8)
    assert median_interval([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == (0, 5)
    assert median_interval([0.0, 1.0, 2.0, 3.0, 4.0]) == (-np.inf, np.inf)
    assert median_interval([0.0] * 20 + [np.inf] * 20) == (0, np.inf)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("count", [6, 7, 10, 33, 100, 501, 1000])
def test_median_interval_covers_and_is_as_short_as_it_may_be(count, confidence):
    low, high = median_interval(np.arange(1.0, count + 1), confidence)
    if np.isinf(low):
        assert 2 * stats.binom.cdf(0, count, 0.5) > 1 - confidence
        return
    assert low + high == count + 1
    # A continuous population's median lies below the k-th smallest of `count` draws exactly if
    # fewer than k of them fall below the median: a count of fair coins. Likewise above.
    missed = 2 * stats.binom.cdf(low - 1, count, 0.5)
    assert missed <= 1 - confidence < 2 * stats.binom.cdf(low, count, 0.5)


@pytest.mark.parametrize("share", [0.5, 0.6])
def test_median_interval_covers_a_population_with_atoms(share):
    # The median of values that are 0 with probability `share`, else inf, is 0 (at one half,
    # any number). Missed if both ends are inf: exact by the binomial count of zeros.
    missed = sum(
        stats.binom.pmf(zeros, 30, share)
        for zeros in range(31)
        if median_interval([0.0] * zeros + [np.inf] * (30 - zeros))[0] > 0
    )
    assert missed <= 0.025


@pytest.mark.parametrize("values", [[], [[1.0]], [1.0, np.nan]])
def test_median_interval_refuses(values):
    with pytest.raises(ValueError, match="'values'"):
        median_interval(values)
