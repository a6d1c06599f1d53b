"""Confidence bounds, radii and tests behind every certificate (numpy and scipy only).

Results are rounded to the safe side: a lower bound or a radius is never above its exact value.
Arguments broadcast. Scalars give a float64 scalar.
"""

import bisect

import numpy as np
from scipy import special

from src.ranges import check_counts, check_open_unit, check_positive, check_unit, check_whole

# Units in the last place by which results are rounded to the safe side. `_rounding_error` says
# how this was tested for bounds. Against 50 digits, ndtri and ndtr were off by at most 4.
BOUND_GUARD = 64
NORMAL_GUARD = 16
# Beyond these limits scipy returns 1e161 or NaN for many counts.
MIN_ALPHA, MAX_TRIALS = 1e-50, 2**37


def lower_confidence_bound(successes, trials, alpha):
    """One-sided lower confidence bound of a probability (Clopper & Pearson, Biometrika 1934).

    The p at which `successes` or more out of `trials` have probability `alpha`, but at most
    successes / trials. Over the draws, the chance that the bound lies above the true probability
    is at most `alpha`. Rounded down.

    Args:
        successes, trials: whole numbers, 0 <= successes <= trials. Without trials the bound is 0.
            More than 2**37 trials are accepted only if all of them are successes.
        alpha: in [1e-50, 1).
    Returns:
        float64 in [0, successes / trials], of the broadcast shape.
    Raises:
        ValueError: naming the argument that is out of its range.
    """
    successes, trials = check_counts(successes, trials)
    alpha = check_open_unit("alpha", alpha)
    if np.any(alpha < MIN_ALPHA):
        raise ValueError(f"'alpha' must be at least {MIN_ALPHA:g} for bounds in float64.")
    _check_trials("trials", np.where(successes < trials, trials, 0))
    k, n = np.maximum(successes, 1.0), np.maximum(trials, 1.0)
    with np.errstate(all="ignore"):
        p = np.minimum(_newton(k, n, alpha, np.minimum(_quantile(k, n, alpha), k / n)), k / n)
        p = np.where(k == n, alpha ** (1 / n), p)
        p = p - _rounding_error(k, n, alpha, p)
        # Where scipy's quantile is wrong the bound is 0. A NaN fails the comparisons too.
        sound = (p > 0) & ((k == n) | (_excess(k, n, alpha, p) <= 0))
    return np.where((successes > 0) & sound, p, 0.0)[()]


def _quantile(k, n, alpha):
    """scipy's root of `_excess`, which is off by up to 3,500 units in the last place."""
    low, rest = alpha <= 0.5, n - k + 1
    small = special.betaincinv(k, rest, alpha, out=None, where=low)
    return np.where(low, small, special.betainccinv(k, rest, 1 - alpha, out=None, where=~low))


def _excess(k, n, alpha, p):
    """P(Binomial(n, p) >= k) - alpha, from the smaller tail, which has the more exact digits."""
    low = alpha <= 0.5
    upper = special.betainc(k, n - k + 1, p, out=None, where=low) - alpha
    # For alpha >= 1/2, 1 - alpha is exact in float64.
    return np.where(low, upper, 1 - alpha - special.betaincc(k, n - k + 1, p, out=None, where=~low))


def _newton(k, n, alpha, p):
    """One step of Newton's method from `p` towards the root of `_excess`."""
    log_slope = np.log(k) + special.xlogy(k - 1, p) + special.xlog1py(n - k, -p)
    log_slope += special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return p - _excess(k, n, alpha, p) / np.exp(log_slope)


def _rounding_error(k, n, alpha, p):
    """More than the root `p` was ever off by in a test with 34 digits (checked with mpmath).

    301,500 random counts had up to MAX_TRIALS trials, few or many successes or failures, and alpha
    from MIN_ALPHA to 1 - 2**-53. No bound was above the exact one. The largest errors of `p`, in
    units in the last place, were 15 for alpha from 1e-12 to 1/2 and 57 for smaller alpha, both up
    to 2**27 trials; beyond, 2,010 for alpha up to 1/2 (1/90 of what is subtracted); and 1.1 for
    alpha above 1/2.
    """
    rough = (k < n) & ((alpha > 0.5) | (n > 2**27))
    units = np.where(alpha < 1e-12, 2 * BOUND_GUARD, BOUND_GUARD)
    return units * np.spacing(p) + np.where(rough, n * 2.0**-61 * p, 0.0)


def _check_trials(name, trials):
    if np.any(trials > MAX_TRIALS):
        raise ValueError(f"'{name}' must be at most 2**37 for bounds in float64.")


def upper_confidence_bound(successes, trials, alpha):
    """One-sided upper confidence bound of a probability; see `lower_confidence_bound`.

    Over the draws, the chance that the bound lies below the true probability is at most `alpha`.
    Rounded up; float64 in (0, 1]. Without trials the bound is 1.
    """
    successes, trials = check_counts(successes, trials)
    failures = lower_confidence_bound(trials - successes, trials, alpha)
    return np.minimum(np.nextafter(1.0 - failures, 2.0), 1.0)[()]


def certified_radius(p_lower, sigma):
    """`sigma * Phi^-1(p_lower)`, the certified l2 radius (Cohen et al., ICML 2019, Theorem 1).

    Args:
        p_lower: in [0, 1], a lower bound of the top class's probability, or NaN.
        sigma: positive, standard deviation of the noise in pixel units.
    Returns:
        float64 radius in pixel units, rounded down; 0 for NaN and for `p_lower` <= 1/2.
    Raises:
        ValueError: if `p_lower` lies outside [0, 1] or `sigma` is not positive and finite.
    """
    p_lower, sigma = check_unit("p_lower", p_lower), check_positive("sigma", sigma)
    # NaN compares false, so it becomes 1/2 too: it must never certify.
    p_lower = np.where(p_lower > 0.5, p_lower, 0.5)
    with np.errstate(over="ignore"):
        radius = sigma * special.ndtri(p_lower)
    # Infinite only for p_lower = 1; a product that overflows stays finite.
    radius = np.where(p_lower < 1, np.minimum(radius, 1e308), radius)
    return _rounded_down(radius, 0.0)


def two_sided_radius(p_lower, p_upper_rival, sigma):
    """`(sigma / 2) * (Phi^-1(p_lower) - Phi^-1(p_upper_rival))` (Cohen et al., equation 3).

    Arguments, result and errors as for `certified_radius`. `p_upper_rival`, in [0, 1] or NaN, is an
    upper bound of every other class's probability. The radius is 0 where the bounds overlap.
    """
    p_lower = check_unit("p_lower", p_lower)
    p_upper_rival = check_unit("p_upper_rival", p_upper_rival)
    sigma = check_positive("sigma", sigma)
    apart = p_lower > p_upper_rival
    top = special.ndtri(np.where(apart, p_lower, 0.5))
    rival = special.ndtri(np.where(apart, p_upper_rival, 0.5))
    # Each quantile has its own rounding error, which does not shrink with their difference.
    with np.errstate(over="ignore"):
        radius, scale = sigma / 2 * (top - rival), sigma / 2 * (np.abs(top) + np.abs(rival))
    # After an overflow the error is unknown, so the radius is 0. It is infinite only for
    # p_lower = 1 or p_upper_rival = 0.
    known = np.isfinite(scale) | (p_lower == 1) | (p_upper_rival == 0)
    return _rounded_down(np.where(known, radius, 0.0), scale)


def _rounded_down(radius, scale):
    """`radius` less its possible rounding error, at least 0.

    `scale` is the size of the numbers whose difference `radius` is.
    """
    finite = np.isfinite(radius) & np.isfinite(scale)
    error = NORMAL_GUARD * np.spacing(np.where(finite, np.maximum(radius, scale), 1.0))
    return np.maximum(np.where(finite, radius - error, radius), 0.0)[()]


def required_probability(radius, sigma):
    """`Phi(radius / sigma)`: the `p_lower` that certifies `radius`. Rounded up, in [0.5, 1].

    `radius` is at least 0 and `sigma` is positive, both in pixel units.
    """
    radius = np.asarray(radius, dtype=np.float64)
    if not np.all(radius >= 0):
        raise ValueError("'radius' must be at least 0.")
    with np.errstate(over="ignore"):
        p = special.ndtr(radius / check_positive("sigma", sigma))
    return np.where(radius > 0, np.minimum(p + NORMAL_GUARD * np.spacing(p), 1.0), 0.5)[()]


def minimum_successes(trials, alpha, p0=0.5):
    """Fewest successes whose lower bound exceeds `p0`; int64 of the broadcast shape.

    Raises:
        ValueError: if even `trials` successes are too few; the message says how many would do.
    """
    trials = check_whole("trials", trials)
    alpha, p0 = check_open_unit("alpha", alpha), check_open_unit("p0", p0)
    trials, alpha, p0 = np.broadcast_arrays(trials, alpha, p0)
    short = lower_confidence_bound(trials, trials, alpha) <= p0
    if np.any(short):
        n, level, bound = (float(x[short].flat[0]) for x in (trials, alpha, p0))
        raise ValueError(
            f"'n' = {n:.0f} can never certify at alpha = {level:g}; "
            f"use n >= {minimum_trials(level, bound)}."
        )
    # Bisection: the bound of `low` does not exceed p0, that of `high` does.
    low, high = np.zeros_like(trials), trials.copy()
    while np.any(high - low > 1):
        middle = (low + high) // 2
        enough = lower_confidence_bound(middle, trials, alpha) > p0
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high[()]


def minimum_trials(alpha, p0=0.5):
    """Fewest trials, all of them successes, whose lower bound exceeds `p0`; scalars in, int out.

    Raises:
        ValueError: if `p0` is so close to 1 that no number of trials shows it in float64.
    """
    alpha, p0 = check_open_unit("alpha", alpha), check_open_unit("p0", p0)
    # The bound is alpha ** (1 / trials) less a rounding error, which counts for `p0` near 1.
    most = min(64 * int(1 + np.log(alpha) / np.log(p0)), 2**50)
    trials = range(1, most + 1)
    found = bisect.bisect_left(trials, True, key=lambda n: lower_confidence_bound(n, n, alpha) > p0)
    if found == most:
        raise ValueError(f"'p0' = {p0:.17g} is too close to 1 to be certified.")
    return trials[found]


def maximum_radius(sigma, trials, alpha):
    """Radius that `trials` draws certify at `alpha` if all vote for one class: the largest."""
    return certified_radius(lower_confidence_bound(trials, trials, alpha), sigma)


def abstain_p_value(top, second):
    """Two-sided binomial test that two classes are equally likely (PREDICT, Cohen et al.).

    PREDICT abstains if the p-value exceeds alpha. `top` and `second`, whole numbers of at least 0,
    are the votes for the two leading classes, in any order. Returns float64 in [0, 1], of the
    broadcast shape; 1 if neither class has a vote. Rounded up: rounding never decides for a class.
    """
    top, second = check_whole("top", top), check_whole("second", second)
    _check_trials("top", top + second)
    more, less = np.maximum(top, second), np.minimum(top, second)
    tail = special.betainc(np.maximum(more, 1), less + 1, 0.5)
    # Rounded up by at least ten times its largest error against 34 digits.
    tail = tail * (1 + (more + less + 1000) * 2.0**-50)
    return np.where(more > less, np.minimum(2 * tail, 1.0), 1.0)[()]
