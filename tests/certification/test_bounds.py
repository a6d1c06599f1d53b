"""Bounds, radii and tests of `src.certification` against exact and high-precision answers."""

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from src.certification import bounds as certification
from src.certification.bounds import (
    abstain_p_value,
    certified_radius,
    lower_confidence_bound,
    maximum_radius,
    minimum_successes,
    minimum_trials,
    required_probability,
    two_sided_radius,
    upper_confidence_bound,
)

mpmath.mp.dps = 50
levels = st.floats(1e-12, 0.5)
probabilities = st.floats(0, 1)
sigmas = st.floats(0.01, 10)


@st.composite
def counts(draw, most=10**6):
    trials = draw(st.integers(1, most))
    return draw(st.integers(0, trials)), trials


def upper_tail(k, n, p):
    """P(Binomial(n, p) >= k) to 40 digits or more, for p below k / n."""
    p = mpmath.mpf(float(p))
    log_term = mpmath.log(mpmath.binomial(n, k)) + k * mpmath.log(p) + (n - k) * mpmath.log1p(-p)
    total = term = mpmath.exp(log_term)
    for i in range(k, n):
        term *= mpmath.mpf(n - i) / (i + 1) * p / (1 - p)
        total += term
        if term < total * mpmath.mpf(10) ** -45:
            break
    return total


def exact_quantile(p):
    """Phi^-1(p) to 40 digits or more."""
    p = mpmath.mpf(float(p))
    return -mpmath.sqrt(2) * mpmath.erfinv(1 - 2 * p)


KNOWN = [
    # k, n, p_lower, Phi^-1(p_lower) at alpha = 0.001
    (100, 100, 0.933254300797, 1.500475024),
    (1000, 1000, 0.993116048421, 2.463262615),
    (10**4, 10**4, 0.999309463003, 3.198577515),
    (10**5, 10**5, 0.999930924833, 3.811456563),
    (99, 100, 0.911373111296, 1.349259039),
    (99000, 10**5, 0.988989340377, 2.289999955),
    (80000, 10**5, 0.796066071193, 0.827651563),
]


@pytest.mark.parametrize(("k", "n", "p_lower", "quantile"), KNOWN)
def test_known_bounds_and_radii(k, n, p_lower, quantile):
    assert lower_confidence_bound(k, n, 0.001) == pytest.approx(p_lower, abs=1e-12)
    assert certified_radius(lower_confidence_bound(k, n, 0.001), 0.25) == pytest.approx(
        0.25 * quantile, abs=1e-9
    )


# scipy's quantile alone is 13 ulp above the true bound at (10, 11) for small alpha.
@pytest.mark.parametrize("alpha", [1e-12, 1e-6, 0.001, 0.05, 0.5])
@pytest.mark.parametrize(
    ("k", "n"),
    [
        *((1, 1), (1, 10), (9, 10), (10, 10), (3, 83), (66, 100), (550, 1000), (999, 1000)),
        *((50490, 10**5), (99000, 10**5), (10**5, 10**5), (1, 10**6), (999990, 10**6)),
        *((10**6, 10**6), (2999000, 3 * 10**6), (10, 11), (15974, 140712)),
    ],
)
def test_bound_is_just_below_the_true_one(k, n, alpha):
    bound = lower_confidence_bound(k, n, alpha)
    assert upper_tail(k, n, bound) < alpha
    above = min(bound * (1 + 1e-13), (bound + k / n) / 2)
    assert upper_tail(k, n, above) > alpha


def test_bound_is_below_the_true_one_where_scipy_is_above():
    # scipy's quantile alone is 2,584 ulp too high here.
    bound = lower_confidence_bound(15974, 140712, 3.231458031040363e-11)
    assert upper_tail(15974, 140712, bound) < mpmath.mpf(3.231458031040363e-11)


@given(n=st.integers(1, 10**7), alpha=levels)
def test_all_successes_have_a_closed_form(n, alpha):
    exact = mpmath.mpf(alpha) ** (mpmath.mpf(1) / n)
    bound = lower_confidence_bound(n, n, alpha)
    assert bound < exact
    assert exact - mpmath.mpf(bound) < 1e-13 * exact


@given(counts(), levels)
def test_bounds_enclose_the_share_and_mirror_each_other(count, alpha):
    k, n = count
    lower, upper = lower_confidence_bound(k, n, alpha), upper_confidence_bound(k, n, alpha)
    assert 0 <= lower <= k / n <= upper <= 1
    assert (lower == 0) == (k == 0)
    assert upper >= 1 - lower_confidence_bound(n - k, n, alpha)
    if k == n:
        assert upper == 1


@given(counts(most=10**5), levels)
def test_bound_agrees_with_statsmodels(count, alpha):
    k, n = count
    low, _ = proportion_confint(k, n, alpha=2 * alpha, method="beta")
    assert lower_confidence_bound(k, n, alpha) == pytest.approx(low, rel=1e-11, abs=1e-300)


@given(counts(), levels)
def test_bound_grows_with_successes_and_alpha_and_falls_with_trials(count, alpha):
    k, n = count
    bound = lower_confidence_bound(k, n, alpha)
    assert lower_confidence_bound(k + 1, n + 1, alpha) >= bound
    assert lower_confidence_bound(k, n + 1, alpha) <= bound
    assert lower_confidence_bound(k, n, min(1.5 * alpha, 0.75)) >= bound


def fraction(a, b, x):
    """Continued fraction of the incomplete beta function (DLMF 8.17.22), by Lentz's method."""
    c, d = mpmath.mpf(1), 1 / (1 - (a + b) * x / (a + 1))
    total, m, factor = d, 0, mpmath.mpf(0)
    while abs(factor - 1) > mpmath.mpf(10) ** -40:
        m += 1
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + even * d)
        c = 1 + even / c
        total *= d * c
        d = 1 / (1 + odd * d)
        c = 1 + odd / c
        factor = d * c
        total *= factor
    return total


def excess(k, n, p, alpha):
    """P(Binomial(n, p) >= k) - alpha to 25 digits or more, k < n, from the smaller tail."""
    p, alpha = mpmath.mpf(float(p)), mpmath.mpf(float(alpha))
    log_term = mpmath.loggamma(n + 1) - mpmath.loggamma(k + 1) - mpmath.loggamma(n - k + 1)
    term = mpmath.exp(log_term + k * mpmath.log(p) + (n - k + 1) * mpmath.log1p(-p))
    if k > n * p:
        return term * fraction(k, n - k + 1, p) - alpha
    return 1 - term * k / (n - k + 1) * fraction(n - k + 1, k, 1 - p) - alpha


CORNERS = [
    *((1, 1), (1, 2), (2, 3), (5, 6), (2, 380), (12, 13), (17, 18108), (2, 1000), (990, 1000)),
    *((1328, 10**4), (9990, 10**4), (1425, 10**5), (3, 10**6), (500_000, 10**6), (5, 2**27)),
    *((12, 1113023264), (2**30 - 7, 2**30), (2**29, 2**30), (3, 10**11)),
    *((10**11 - 4, 10**11), (2**37 - 30, 2**37), (2**50, 2**50)),
]
# The corners of alpha, those above one half and the least that is accepted among them.
ALPHAS = (1e-50, 1e-30, 1e-20, 1e-12, 1e-6, 1e-3, 0.025, 0.3, 0.5, np.nextafter(0.5, 1))
ALPHAS += (0.6, 0.62436, 0.9, 0.95, 0.99, 0.999, 1 - 1e-9, 1 - 1e-15, 1 - 2**-53)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_bound_is_never_above_the_true_one_in_the_corners(alpha):
    for k, n in CORNERS:
        bound = lower_confidence_bound(k, n, alpha)
        assert 0 < bound <= k / n
        if k == n:
            assert mpmath.mpf(float(bound)) < mpmath.mpf(float(alpha)) ** (mpmath.mpf(1) / n)
        else:
            assert excess(k, n, bound, alpha) < 0
            # Not far below either, where it is not the share that bounds it.
            above = bound * (1 + (1e-13 if n <= 2**27 and alpha <= 0.5 else 1e-6))
            assert above >= k / n * (1 - 1e-6) or excess(k, n, above, alpha) > 0


@pytest.mark.parametrize("k", [1, 2, 3, 5, 12, 17, 40])
@pytest.mark.parametrize("size", [6, 10, 14, 20, 27, 28, 33, 37])
@pytest.mark.parametrize("alpha", [0.51, 0.68, 0.84, 0.97, 1 - 1e-7])
def test_few_successes_are_bounded_soundly_above_one_half(k, size, alpha):
    assert excess(k, 2**size, lower_confidence_bound(k, 2**size, alpha), alpha) < 0


@pytest.mark.parametrize(
    ("k", "n", "alpha"),
    [(5, 6, 6.3e-98), (1328, 10**4, 1e-150), (2, 1000, 1e-200), (1425, 10**5, 5e-324)],
)
def test_a_hopeless_alpha_is_refused(k, n, alpha):
    with pytest.raises(ValueError, match="'alpha' must be at least 1e-50"):
        lower_confidence_bound(k, n, alpha)


@pytest.mark.parametrize("astray", [1e161, np.nan, -1.0, 0.9, np.inf])
def test_a_quantile_that_went_astray_bounds_nothing(astray, monkeypatch):
    monkeypatch.setattr(
        certification.special, "betaincinv", lambda k, *_, **__: np.full(np.shape(k), astray)
    )
    bound = lower_confidence_bound(30, 100, 0.001)
    assert 0 <= bound <= 0.3
    assert excess(30, 100, max(bound, 1e-300), 0.001) < 0


@pytest.mark.parametrize("alpha", [1e-50, 1e-12, 0.001, 0.5, 0.6, 0.999, 1 - 2**-53])
@pytest.mark.parametrize("n", [1, 7, 1000, 2**17, 2**30, 2**37])
def test_bound_grows_with_successes_in_the_corners(n, alpha):
    k = np.unique(np.clip([*range(60), *(n // 2 + i for i in range(60)), *range(n - 60, n)], 0, n))
    bounds = lower_confidence_bound(k, n, alpha)
    assert np.all(np.diff(bounds) >= 0)
    assert np.all((bounds >= 0) & (bounds <= k / n))


def test_more_trials_than_scipy_can_tell_apart_are_refused():
    with pytest.raises(ValueError, match="'trials' must be at most"):
        lower_confidence_bound(5, 2**37 + 1, 0.001)
    # All of them successes have a closed form.
    assert minimum_trials(0.001, 1 - 1e-13) == pytest.approx(np.log(1000) * 1e13, rel=0.1)


@pytest.mark.parametrize("size", [1, 4, 10, 17, 24, 30, 37])
@pytest.mark.parametrize("deviations", [0, 1.1, 3.2, 7, 25])
def test_abstention_p_value_is_rounded_up(size, deviations):
    more = min(2 ** (size - 1) + 1 + int(deviations * 2 ** (size / 2 - 1)), 2**size)
    exact = 2 * excess(more, 2**size, 0.5, 0.0)
    p_value = abstain_p_value(more, 2**size - more)
    assert min(exact, 1) <= p_value <= exact * (1 + 1e-3) + 1e-300


def test_a_radius_that_overflows_is_finite():
    assert certified_radius(1 - 1e-9, 1e308) == pytest.approx(1e308)
    assert certified_radius(1.0, 0.5) == np.inf


@pytest.mark.parametrize("n", [1, 7, 50, 400])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_exact_coverage(n, alpha):
    # Summed over every outcome, so there is nothing random about it.
    bounds = lower_confidence_bound(np.arange(n + 1), n, alpha)
    p = np.linspace(0.001, 0.999, 500)[:, None]
    wrong = (stats.binom.pmf(np.arange(n + 1), n, p) * (bounds > p)).sum(axis=1)
    assert wrong.max() <= alpha * (1 + 1e-9)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.999])
def test_simulated_coverage(p):
    # At most 5 % wrong are promised; more than 6 % of 20,000 are 6.5 standard deviations away:
    # a false alarm in 1e10.
    k = np.random.default_rng(0).binomial(1000, p, size=20_000)
    assert np.mean(lower_confidence_bound(k, 1000, 0.05) > p) <= 0.06
    assert np.mean(upper_confidence_bound(k, 1000, 0.05) < p) <= 0.06


@given(st.floats(0.5, 1, exclude_max=True), sigmas)
def test_radius_is_just_below_the_exact_one(p, sigma):
    exact = mpmath.mpf(sigma) * exact_quantile(p)
    radius = certified_radius(p, sigma)
    assert 0 <= radius <= exact
    assert exact - mpmath.mpf(radius) <= 1e-14 * exact


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, np.nan])
def test_nothing_is_certified_without_a_majority(p):
    assert certified_radius(p, 0.5) == 0


@given(probabilities, probabilities, sigmas)
def test_two_sided_radius_is_just_below_the_exact_one(p, q, sigma):
    radius = two_sided_radius(p, q, sigma)
    if p <= q:
        assert radius == 0
    elif q > 1e-30 and p < 1:
        exact = mpmath.mpf(sigma) / 2 * (exact_quantile(p) - exact_quantile(q))
        assert 0 <= radius <= exact
        # Both quantiles, at most 12, may be much larger than their difference.
        assert exact - mpmath.mpf(radius) <= 1e-13 * sigma


def test_two_sided_known_answer():
    assert two_sided_radius(0.8, 0.1, 1.0) == pytest.approx(1.0615863996, abs=1e-10)


@pytest.mark.parametrize(("p", "q"), [(np.nan, 0.1), (0.9, np.nan), (np.nan, np.nan), (1, 1)])
def test_two_sided_radius_of_nothing_known_is_zero(p, q):
    assert two_sided_radius(p, q, 1.0) == 0


def test_a_two_sided_radius_that_overflows_is_zero():
    # Infinite or NaN would be above the exact radius, which is finite.
    assert two_sided_radius([1 - 1e-9, 1e-9], [1e-9, 1e-10], 1e308).tolist() == [0, 0]
    assert two_sided_radius([1.0, 0.7], [0.3, 0.0], 1e308).tolist() == [np.inf, np.inf]
    assert required_probability(1e308, 1e-300) == 1


@pytest.mark.parametrize(
    ("n", "k"), [(10, 10), (100, 66), (1000, 550), (10**4, 5156), (10**5, 50490)]
)
def test_known_minimum_of_successes(n, k):
    assert minimum_successes(n, 0.001) == k


@given(st.integers(50, 10**5), st.floats(1e-9, 0.4), st.floats(0.5, 0.6))
def test_minimum_of_successes_is_the_first_to_exceed(n, alpha, p0):
    k = minimum_successes(n, alpha, p0)
    assert lower_confidence_bound(k, n, alpha) > p0
    assert lower_confidence_bound(k - 1, n, alpha) <= p0


def test_too_few_draws_say_how_many_would_do():
    with pytest.raises(
        ValueError, match=r"'n' = 9 can never certify at alpha = 0.001; use n >= 10\."
    ):
        minimum_successes(9, 0.001)
    assert minimum_trials(0.001) == 10
    with pytest.raises(ValueError, match="too close to 1"):
        minimum_trials(0.001, 1 - 1e-16)


@pytest.mark.parametrize(("multiple", "n"), [(1, 40), (2, 301), (3, 5114), (4, 218_105)])
def test_a_perfect_classifier_needs_this_many_draws(multiple, n):
    assert minimum_trials(0.001, required_probability(0.5 * multiple, 0.5)) == n
    assert maximum_radius(0.5, n, 0.001) > 0.5 * multiple > maximum_radius(0.5, n - 1, 0.001)


@given(st.floats(0, 8), sigmas)
def test_required_probability_is_just_above_the_exact_one(multiple, sigma):
    radius = multiple * sigma
    exact = mpmath.ncdf(mpmath.mpf(radius) / mpmath.mpf(sigma))
    assert exact <= required_probability(radius, sigma) <= min(exact * (1 + 1e-14), 1)


@pytest.mark.parametrize(
    ("top", "second", "p_value"),
    [
        (10, 0, 0.001953125),
        (11, 0, 0.0009765625),
        (66, 34, 0.001789930391),
        (67, 33, 0.000873719837),
        (0, 0, 1),
        (7, 7, 1),
    ],
)
def test_known_abstention_p_values(top, second, p_value):
    assert abstain_p_value(top, second) == pytest.approx(p_value, rel=1e-9)
    assert abstain_p_value(second, top) == abstain_p_value(top, second)


@given(counts(most=2000))
def test_abstention_p_value_agrees_with_scipy(count):
    k, n = count
    expected = stats.binomtest(k, n, 0.5).pvalue
    assert abstain_p_value(k, n - k) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("p", [(0.5, 0.5, 0.0), (0.34, 0.33, 0.33), (0.48, 0.42, 0.1)])
def test_predict_rarely_names_another_class_than_the_top_one(p):
    # At most alpha = 10 % may be named wrongly; 12 % of 20,000 are 9 standard deviations away,
    # so a false alarm has odds below 1e-18. (A tie counts class 0 as the top one.)
    votes = np.random.default_rng(2).multinomial(100, p, size=20_000)
    first, second = np.sort(votes, axis=1)[:, :-3:-1].T
    named = abstain_p_value(first, second) <= 0.1
    assert np.mean(named & (votes.argmax(axis=1) != 0)) <= 0.12


def test_arrays_broadcast_and_scalars_stay_scalars():
    bounds = lower_confidence_bound([[5], [9]], 10, [0.1, 0.01, 0.001])
    assert bounds.shape == (2, 3)
    assert bounds[1, 2] == lower_confidence_bound(9, 10, 0.001)
    for scalar in (lower_confidence_bound(9, 10, 0.1), certified_radius(0.9, 1)):
        assert type(scalar) is np.float64


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: lower_confidence_bound(-1, 10, 0.1), "successes"),
        (lambda: lower_confidence_bound(11, 10, 0.1), "successes"),
        (lambda: lower_confidence_bound(1.5, 10, 0.1), "successes"),
        (lambda: lower_confidence_bound(np.nan, 10, 0.1), "successes"),
        (lambda: lower_confidence_bound("9", 10, 0.1), "successes"),
        (lambda: lower_confidence_bound(1, -10, 0.1), "trials"),
        (lambda: lower_confidence_bound(1, 10, 0.0), "alpha"),
        (lambda: lower_confidence_bound(1, 10, [0.1, 1.0]), "alpha"),
        (lambda: lower_confidence_bound(1, 10, np.nan), "alpha"),
        (lambda: certified_radius(1.1, 0.5), "p_lower"),
        (lambda: certified_radius(0.9, 0.0), "sigma"),
        (lambda: certified_radius(0.9, np.inf), "sigma"),
        (lambda: two_sided_radius(0.9, -0.1, 0.5), "p_upper_rival"),
        (lambda: required_probability(-1, 0.5), "radius"),
        (lambda: required_probability(np.nan, 0.5), "radius"),
        (lambda: minimum_successes(100, 2.0), "alpha"),
        (lambda: abstain_p_value(-1, 3), "top"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        call()
