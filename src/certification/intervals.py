"""Accuracies and radii over a test set, with confidence intervals (no torch).

The intervals are about the population of images from which the test set is an independent sample.
"""

import numpy as np
from scipy.stats import binom
from statsmodels.stats.proportion import proportion_confint

from src.certification.bounds import (
    lower_confidence_bound,
    required_probability,
    upper_confidence_bound,
)
from src.ranges import check_counts, check_open_unit, check_whole


def certified_accuracy(radius, correct, at):
    """Share of images that are correct and certified at `at` or more (Cohen et al., section 4).

    Args:
        radius: (N,) certified radii of at least 0.
        correct: (N,) bool, False where the classifier abstains.
        at: radii, any shape.
    Returns:
        float64 in [0, 1], of the shape of `at`.
    """
    radius, correct = _check_rows(radius, correct)
    at = np.asarray(at, dtype=np.float64)
    return np.mean(correct & (radius >= at[..., None]), axis=-1)[()]


def average_certified_radius(radius, correct):
    """Mean over the images of the radius, 0 if not correct (ACR; Zhai et al., ICLR 2020)."""
    radius, correct = _check_rows(radius, correct)
    return np.mean(np.where(correct, radius, 0.0))


def _check_rows(radius, correct):
    """`radius` as float64 and `correct` as bool, both (N,) with N >= 1."""
    radius, correct = np.asarray(radius, dtype=np.float64), np.asarray(correct)
    if radius.ndim != 1 or radius.shape != correct.shape or radius.size == 0:
        raise ValueError("'radius' and 'correct' must be one-dimensional, alike and not empty.")
    if not np.all(radius >= 0):
        raise ValueError("'radius' must hold numbers of at least 0.")
    if not np.all((correct == 0) | (correct == 1)):
        raise ValueError("'correct' must hold true or false.")
    return radius, correct.astype(bool)


def accuracy_interval(successes, trials, confidence=0.95):
    """Two-sided interval for an accuracy (Clopper & Pearson, Biometrika 1934, by statsmodels).

    Over the sample of images, it contains the population's accuracy with probability at least
    `confidence`. It covers no other error, such as that of a certificate.

    Args:
        successes, trials: whole numbers, 0 <= successes <= trials, trials >= 1; may be arrays.
        confidence: in (0, 1).
    Returns:
        (low, high), float64 in [0, 1], of the broadcast shape.
    Raises:
        ValueError: naming the argument that is out of its range.
    """
    successes, trials = check_counts(successes, trials)
    confidence = float(check_open_unit("confidence", confidence))
    if np.any(trials == 0):
        raise ValueError("'trials' must be at least 1.")
    low, high = proportion_confint(successes, trials, alpha=1 - confidence, method="beta")
    # statsmodels leaves NaN where an end of the interval is exact.
    low, high = np.where(successes == 0, 0.0, low), np.where(successes == trials, 1.0, high)
    return low[()], high[()]


def median_interval(values, confidence=0.95):
    """Two-sided interval for the median of the population that `values` were drawn from.

    From the k-th smallest to the k-th largest value (David & Nagaraja, Order Statistics, 2003,
    section 7.1). k is the largest number for which fewer than k of N fair coins show heads with
    probability at most (1 - confidence) / 2. The interval contains the median with probability
    at least `confidence`, whatever the distribution.

    Args:
        values: (N,) numbers, infinite ones allowed, N >= 1.
        confidence: in (0, 1).
    Returns:
        (low, high), float64. Too few values (at 0.95, fewer than six) give (-inf, inf).
    Raises:
        ValueError: naming the argument that is out of its range.
    """
    values = np.sort(np.asarray(values, dtype=np.float64))
    if values.ndim != 1 or values.size == 0 or np.any(np.isnan(values)):
        raise ValueError("'values' must be one-dimensional, not empty and free of NaN.")
    tail = (1 - float(check_open_unit("confidence", confidence))) / 2
    # The smallest count whose cumulative probability reaches `tail`: no smaller one does.
    rank = int(binom.ppf(tail, values.size, 0.5))
    if rank == 0:
        return -np.inf, np.inf
    return float(values[rank - 1]), float(values[-rank])


def possibly_certified(top_count, trials, prediction, label, at, sigma, alpha):
    """False if the votes refute that an image could be certified at the radius `at`.

    With unlimited draws it would be, if the label's probability under noise is Phi(at / sigma) or
    more. If it is, the chance of answering False is at most `alpha`, over the draws.

    Args:
        top_count, trials: votes for the selected class, and draws in all.
        prediction, label: classes. A negative prediction (abstention) means that the selected
            class is unknown.
        at, sigma: radius and standard deviation of the noise in pixel units.
        alpha: in (0, 1).
    Returns:
        bool, of the broadcast shape.
    Raises:
        ValueError: naming the argument that is out of its range.
    """
    p0 = required_probability(at, sigma)
    prediction, label = np.asarray(prediction), np.asarray(label)
    # An upper bound of the label's probability: if the label is the selected class, then that
    # class's upper bound; else 1 minus that class's lower bound.
    if_label = upper_confidence_bound(top_count, trials, alpha)
    if_other = np.nextafter(1.0 - lower_confidence_bound(top_count, trials, alpha), 2.0)
    most = np.where(prediction == label, if_label, if_other)
    most = np.where(prediction < 0, np.maximum(if_label, if_other), most)
    # required_probability rounds up, which here would be the unsafe side.
    return (most >= p0 - 1e-14)[()]


def population_certified_accuracy_interval(
    certified, images, alpha, confidence=0.95, *, possible=None
):
    """Interval for the share of a population that unlimited draws would certify at a radius r.

    That share, T, are the images whose label has probability Phi(r / sigma) or more under noise.
    If `images` images are an independent sample of the population, each certified with noise of
    its own, the interval contains T with probability at least `confidence`.

    On the images in T the smoothed classifier is correct and constant within r. So `low` is also
    a lower bound of the share on which that holds for any reason; `high` bounds only T.

    Why: let q be the chance that an image drawn from the population is counted in `certified`.
    Outside T that needs a false certificate, so q <= T + (1 - T) alpha, hence
    T >= (q - alpha) / (1 - alpha). Inside T an image is not `possible` with chance at most alpha,
    so the share of `possible` images is at least (1 - alpha) T. Clopper-Pearson bounds both shares
    from their counts, at (1 - confidence) / 2 each. The alphas are averaged, not added up.

    Args:
        certified: number of images that are correct and certified at r, each at `alpha`.
        images: number of all images, at least 1.
        alpha: in (0, 1), the failure probability of one certificate.
        confidence: in (0, 1).
        possible: number of images for which `possibly_certified` holds at r; default: all.
    Returns:
        (low, high), float64 in [0, 1]; high is 1 without `possible`.
    Raises:
        ValueError: naming the argument that is out of its range.
    """
    certified = check_whole("certified", certified)
    possible = check_whole("possible", images if possible is None else possible)
    if np.any(possible < certified) or np.any(possible > images):
        raise ValueError("'possible' must lie between 'certified' and 'images'.")
    half = (1 - check_open_unit("confidence", confidence)) / 2
    alpha = check_open_unit("alpha", alpha)
    low = (lower_confidence_bound(certified, images, half) - alpha) / (1 - alpha)
    high = upper_confidence_bound(possible, images, half) / (1 - alpha)
    return np.maximum(low, 0.0)[()], np.minimum(high, 1.0)[()]
