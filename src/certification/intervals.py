"""Accuracies and radii over a test set, and intervals for what they estimate (no torch).

The images are taken for independent draws from a population; that is what the intervals are about.
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

    An abstention is not `correct`, whatever its radius.

    Args:
        radius: (N,) certified radii of at least 0; correct: (N,) bool; at: radii, any shape.
    Returns:
        float64 in [0, 1], of the shape of `at`.
    """
    radius, correct = _check_rows(radius, correct)
    at = np.asarray(at, dtype=np.float64)
    return np.mean(correct & (radius >= at[..., None]), axis=-1)[()]


def average_certified_radius(radius, correct):
    """Mean over images of the radius where correct, else 0 (ACR; Zhai et al., ICLR 2020)."""
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

    Covers test sampling alone: with probability at least `confidence` over the images drawn, it
    holds the population's accuracy.

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

    Between the k-th smallest and the k-th largest value, for the largest k at which fewer than k
    of N fair coins fall on heads with probability at most (1 - confidence) / 2. Exact order
    statistics (David & Nagaraja, Order Statistics, 2003, section 7.1): the median is covered with
    probability at least `confidence`, whatever the distribution.

    Args:
        values: (N,) numbers, infinite ones allowed, N >= 1.
        confidence: in (0, 1).
    Returns:
        (low, high), float64; (-inf, inf) if there are too few values, at 0.95 fewer than six.
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


def paired_difference_interval(first, second, confidence=0.95, *, resamples=10_000, seed=0):
    """Interval for the mean difference of two figures taken on the same images.

    The percentile bootstrap over images (Efron & Tibshirani, 1993): what the images
    have in common cancels, so it tells apart two models whose own intervals overlap widely.

    Args:
        first, second: (N,) figures of the same images in the same order, N >= 2.
        confidence: in (0, 1), reached approximately.
        resamples, seed: of the bootstrap.
    Returns:
        (mean, low, high) of first - second.
    Raises:
        ValueError: naming the argument that is out of its range.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if first.ndim != 1 or first.shape != second.shape or first.size < 2:
        raise ValueError("'first' and 'second' must be one-dimensional, alike and of two or more.")
    difference = first - second
    if not np.all(np.isfinite(difference)):
        raise ValueError("'first' and 'second' must hold finite numbers.")
    confidence = float(check_open_unit("confidence", confidence))
    rng = np.random.default_rng(seed)
    # One resample at a time: all of them would take a gigabyte for 10,000 images.
    means = [rng.choice(difference, difference.size).mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(difference.mean()), float(low), float(high)


def possibly_certified(top_count, trials, prediction, label, at, sigma, alpha):
    """Whether the votes leave it open that perfect knowledge would certify an image at `at`.

    Perfect knowledge certifies if the label's probability under noise is at least
    Phi(at / sigma). For an image of which that is true, the chance of answering False is at most
    `alpha`, over its draws.

    Args:
        top_count, trials: votes of the selected class among the draws that bound it.
        prediction, label: classes; a negative prediction (abstention) says that the selected
            class is not known.
        at, sigma: radius and standard deviation of the noise, pixel units.
        alpha: in (0, 1).
    Returns:
        bool, of the broadcast shape.
    Raises:
        ValueError: naming the argument that is out of its range.
    """
    p0 = required_probability(at, sigma)
    prediction, label = np.asarray(prediction), np.asarray(label)
    # Either the selected class is the label, and has this probability at most, or it takes its
    # own from what is left for the label.
    if_label = upper_confidence_bound(top_count, trials, alpha)
    if_other = np.nextafter(1.0 - lower_confidence_bound(top_count, trials, alpha), 2.0)
    most = np.where(prediction == label, if_label, if_other)
    most = np.where(prediction < 0, np.maximum(if_label, if_other), most)
    # required_probability rounds up, which here would be the unsafe side.
    return (most >= p0 - 1e-14)[()]


def population_certified_accuracy_interval(
    certified, images, alpha, confidence=0.95, *, possible=None
):
    """Interval for the population's certified accuracy under perfect knowledge of the votes.

    Guarantee, in words: draw `images` images independently from a population and certify each
    with its own noise. With probability at least `confidence` over both draws, the share of the
    population whose label has probability Phi(r / sigma) or more under noise lies in the
    interval. On that share the smoothed classifier is right and constant within r; so `low` also
    bounds from below the share on which it is right and constant within r, whatever the reason.
    No certificate bounds that larger share from above: only `high` for the smaller one exists.

    Why: let T be that share, and q the chance that an image drawn from the population is counted
    in `certified`. Outside T that takes a false certificate, so q <= T + (1 - T) alpha, hence
    T >= (q - alpha) / (1 - alpha). Inside T an image fails to be `possible` with chance alpha at
    most, so its share is at least (1 - alpha) T. Clopper-Pearson bounds both shares from their
    counts, at (1 - confidence) / 2 each. The images' alphas are averaged, not added up.

    Args:
        certified: images right and certified at r, each at `alpha`.
        images: images in all, at least 1.
        alpha: in (0, 1), the failure probability of one certificate.
        confidence: in (0, 1).
        possible: images for which `possibly_certified` holds at r; None for all of them.
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
