"""Confidence bounds, radii and tests behind every certificate (numpy and scipy only).

Bounds and radii are rounded so that they are never better than the real numbers they stand for.
Arguments broadcast; scalars in give a float64 scalar out.
"""

import numpy as np
from scipy import special

from src.ranges import (
    check_counts,
    check_open_unit,
    check_positive,
    check_probability,
    check_whole,
)

# Units in the last place by which results are rounded to the safe side. `_rounding_error` says
# what was tried for bounds; against 50 digits, ndtri and ndtr were off by at most 4.
BOUND_GUARD = 64
NORMAL_GUARD = 16
# Where scipy still finds its way. Beyond, it answers 1e161, NaN or nothing to many counts.
MIN_ALPHA, MAX_TRIALS = 1e-50, 2**37


def lower_confidence_bound(successes, trials, alpha):
    """One-sided lower confidence bound of a probability (Clopper & Pearson, Biometrika 1934).

    The p at which `successes` or more out of `trials` has probability `alpha`, at most their
    share. Over the draws, the chance that it lies above the true probability is at most `alpha`.
    Rounded down.

    Args:
        successes, trials: whole numbers, 0 <= successes <= trials. Nothing drawn bounds nothing: 0.
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
        # Where scipy's quantile went astray, nothing is bounded; a NaN does not pass either.
        sound = (p > 0) & ((k == n) | (_excess(k, n, alpha, p) <= 0))
    return np.where((successes > 0) & sound, p, 0.0)[()]


def _quantile(k, n, alpha):
    """scipy's root, up to 3,500 units in the last place away from that of its own betainc."""
    low = alpha <= 0.5
    small = special.betaincinv(k, n - k + 1, alpha, out=None, where=low)
    return np.where(low, small, special.betainccinv(k, n - k + 1, 1 - alpha, out=None, where=~low))


def _excess(k, n, alpha, p):
    """P(Binomial(n, p) >= k) - alpha from the smaller tail, whose digits are all there."""
    low = alpha <= 0.5
    upper = special.betainc(k, n - k + 1, p, out=None, where=low) - alpha
    # 1 - alpha is exact from one half on.
    return np.where(low, upper, 1 - alpha - special.betaincc(k, n - k + 1, p, out=None, where=~low))


def _newton(k, n, alpha, p):
    """One step from `p` towards the root of `_excess`, which it all but reaches."""
    log_slope = np.log(k) + special.xlogy(k - 1, p) + special.xlog1py(n - k, -p)
    log_slope += special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return p - _excess(k, n, alpha, p) / np.exp(log_slope)


def _rounding_error(k, n, alpha, p):
    """What the root `p` may be off by, and more.

    Against 34 digits, on 250,000 counts up to MAX_TRIALS (few and many successes and failures,
    and in between) and alpha from MIN_ALPHA to 1 - 2**-53: at most 31 units in the last place
    for alpha from 1e-12 to 1/2 and n up to 2**27, 62 for smaller alpha; n * 2**-64 of the root
    for alpha above 1/2 (few successes), and less than that for alpha up to 1/2 beyond 2**27.
    """
    rough = (k < n) & ((alpha > 0.5) | (n > 2**27))
    units = np.where(alpha < 1e-12, 2 * BOUND_GUARD, BOUND_GUARD)
    return units * np.spacing(p) + np.where(rough, n * 2.0**-61 * p, 0.0)


def _check_trials(name, trials):
    if np.any(trials > MAX_TRIALS):
        raise ValueError(f"'{name}' must be at most 2**37 for bounds in float64.")


def upper_confidence_bound(successes, trials, alpha):
    """One-sided upper confidence bound of a probability; see `lower_confidence_bound`.

    Over the draws, the chance that it lies below the true probability is at most `alpha`.
    Rounded up; float64 in (0, 1]. Nothing drawn bounds nothing: 1.
    """
    successes, trials = check_counts(successes, trials)
    failures = lower_confidence_bound(trials - successes, trials, alpha)
    return np.minimum(np.nextafter(1.0 - failures, 2.0), 1.0)[()]


def certified_radius(p_lower, sigma):
    """`sigma * Phi^-1(p_lower)`, the certified l2 radius (Cohen et al., ICML 2019, Theorem 1).

    Args:
        p_lower: in [0, 1], a lower bound of the top class's probability, or NaN.
        sigma: positive, standard deviation of the noise, pixel units.
    Returns:
        float64 radius in pixel units, rounded down; 0 for NaN and at or below one half.
    Raises:
        ValueError: if `p_lower` lies outside [0, 1] or `sigma` is not positive and finite.
    """
    p_lower = check_probability("p_lower", p_lower)
    sigma = check_positive("sigma", sigma)
    # NaN compares false, so it is replaced too: it must never certify.
    p_lower = np.where(p_lower > 0.5, p_lower, 0.5)
    with np.errstate(over="ignore"):
        radius = sigma * special.ndtri(p_lower)
    # Only certainty has no end: a product that overflows has one.
    radius = np.where(p_lower < 1, np.minimum(radius, 1e308), radius)
    return _rounded_down(radius, 0.0)


def two_sided_radius(p_lower, p_upper_rival, sigma):
    """`(sigma / 2) * (Phi^-1(p_lower) - Phi^-1(p_upper_rival))` (Cohen et al., equation 3).

    Args:
        p_lower: in [0, 1], a lower bound of the top class's probability, or NaN.
        p_upper_rival: in [0, 1], an upper bound of every other class's probability, or NaN.
        sigma: positive, standard deviation of the noise, pixel units.
    Returns:
        float64 radius in pixel units, rounded down; 0 for NaN and where the bounds overlap.
    Raises:
        ValueError: if a probability lies outside [0, 1] or `sigma` is not positive and finite.
    """
    p_lower = check_probability("p_lower", p_lower)
    p_upper_rival = check_probability("p_upper_rival", p_upper_rival)
    sigma = check_positive("sigma", sigma)
    apart = p_lower > p_upper_rival
    top = special.ndtri(np.where(apart, p_lower, 0.5))
    rival = special.ndtri(np.where(apart, p_upper_rival, 0.5))
    # Each quantile brings its own error, which a small difference does not shrink.
    return _rounded_down(sigma / 2 * (top - rival), sigma / 2 * (np.abs(top) + np.abs(rival)))


def _rounded_down(radius, scale):
    """`radius` less the rounding error it may carry, at least 0; `scale` is what it came from."""
    finite = np.isfinite(radius)
    error = NORMAL_GUARD * np.spacing(np.where(finite, np.maximum(radius, scale), 1.0))
    return np.maximum(np.where(finite, radius - error, radius), 0.0)[()]


def required_probability(radius, sigma):
    """`Phi(radius / sigma)`: what `p_lower` must reach to certify `radius`. Rounded up.

    `radius` is at least 0, `sigma` positive, both in pixel units; float64 in [0.5, 1].
    """
    radius = np.asarray(radius, dtype=np.float64)
    if not np.all(radius >= 0):
        raise ValueError("'radius' must be at least 0.")
    p = special.ndtr(radius / check_positive("sigma", sigma))
    return np.where(radius > 0, np.minimum(p + NORMAL_GUARD * np.spacing(p), 1.0), 0.5)[()]


def two_sided_bounds(top_count, rival_count, trials, alpha, num_classes):
    """Bounds for `two_sided_radius` out of the votes, jointly valid at `alpha`.

    The selected class is bounded from below at alpha / 2, each of its K - 1 rivals from above at
    (alpha / 2) / (K - 1) (Bonferroni); no rival can have more than the selected class leaves.
    The bound grows with the count, so the rival with most votes has the largest.

    Args:
        top_count: votes of the class that other draws selected; it need not have the most here.
        rival_count: most votes of any other class; the two are at most `trials` together.
        trials: draws in all; more than the votes if some were void.
        alpha: in (0, 1).
        num_classes: K, of which K - 1 are rivals.
    Returns:
        (p_lower, p_upper_rival), float64 of the broadcast shape.
    Raises:
        ValueError: naming the argument that is out of its range.
    """
    alpha = check_open_unit("alpha", alpha)
    p_lower = lower_confidence_bound(top_count, trials, alpha / 2)
    p_upper = upper_confidence_bound(rival_count, trials, alpha / 2 / (num_classes - 1))
    return p_lower, np.minimum(p_upper, np.nextafter(1.0 - p_lower, 2.0))[()]


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
    low, high = 0, 1
    while lower_confidence_bound(high, high, alpha) <= p0:
        low, high = high, 2 * high
        if high > 2**50:
            raise ValueError(f"'p0' = {p0:.17g} is too close to 1 to be certified.")
    while high - low > 1:
        middle = (low + high) // 2
        enough = lower_confidence_bound(middle, middle, alpha) > p0
        low, high = (low, middle) if enough else (middle, high)
    return high


def maximum_radius(sigma, trials, alpha):
    """Largest radius that `trials` draws can certify at `alpha`: all of them for one class."""
    return certified_radius(lower_confidence_bound(trials, trials, alpha), sigma)


def abstain_p_value(top, second):
    """Two-sided binomial test that two classes are equally likely (PREDICT, Cohen et al.).

    PREDICT abstains if it exceeds alpha. Symmetric in the two counts; 1 if neither has a vote.

    Args:
        top, second: whole numbers of at least 0, votes of the two leading classes.
    Returns:
        float64 in [0, 1], of the broadcast shape, rounded up.
    """
    top, second = check_whole("top", top), check_whole("second", second)
    _check_trials("top", top + second)
    more, less = np.maximum(top, second), np.minimum(top, second)
    tail = special.betainc(np.maximum(more, 1), less + 1, 0.5)
    # Rounded up by ten times of what it was off by, against 34 digits, or more.
    tail = tail * (1 + (more + less + 1000) * 2.0**-50)
    return np.where(more > less, np.minimum(2 * tail, 1.0), 1.0)[()]
