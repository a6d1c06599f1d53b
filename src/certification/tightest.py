"""The tightest sound radius: a one-sided or a two-sided test, as earlier votes chose (no torch)."""

import numpy as np

from src.certification.bounds import (
    certified_radius,
    lower_confidence_bound,
    two_sided_radius,
    upper_confidence_bound,
)
from src.ranges import check_open_unit, check_whole

ONE_SIDED, TWO_SIDED = "one-sided", "two-sided"


def choose_test(top_count, rival_count, n0, n, alpha, num_classes=10):
    """The test that promises the larger radius, from the votes that choose the class.

    Why it is sound: the choice is made before the `n` votes are seen, and they are independent of
    the `n0` votes. So given the n0 votes, class and test are fixed, and `tight_radius` is too large
    with probability at most `alpha`. To compare the radii of the n votes themselves would not be
    sound: their larger one fails in up to 1.5 `alpha` of the cases.

    The rule: the radii that the tests would give if the n votes had the shares of the n0 votes.
    Of the votes against the class, the rival gets (its own + 1) in (all of them + 2), since so few
    votes say little of how the rest is split (of two classes: + 1, as there is one rival only).
    If all n0 votes agree, the test is one-sided.

    Args:
        top_count: votes for the class, out of `n0`.
        rival_count: the most votes for any other class, out of `n0`.
        n0: number of the votes that choose class and test, at least 1.
        n: number of the votes that will be tested, at least 1.
        alpha: in (0, 1), the chance of a false certificate.
        num_classes: K, at least 2.
    Returns:
        "one-sided" or "two-sided"; an array of them if an argument is one.
    Raises:
        ValueError: naming the argument that is out of its range.
    """
    top_count, rival_count, n0 = _checked_votes(top_count, rival_count, "n0", n0)
    n, num_classes = check_whole("n", n), check_whole("num_classes", num_classes)
    if np.any(n0 < 1) or np.any(n < 1) or np.any(num_classes < 2):
        raise ValueError("'n0' and 'n' must be at least 1, and 'num_classes' at least 2.")
    rest = n0 - top_count
    top = top_count * n // n0
    share = np.minimum((rival_count + 1) / (rest + np.minimum(num_classes - 1, 2)), 1.0)
    rival = np.ceil((n - top) * share)
    one, two = (tight_radius(test, top, rival, n, alpha, 1) for test in (ONE_SIDED, TWO_SIDED))
    return np.where(two > one, TWO_SIDED, ONE_SIDED)[()]


def tight_radius(test, top_count, rival_count, trials, alpha, sigma):
    """The certified l2 radius by the test that `choose_test` gave.

    One-sided: `certified_radius` at `alpha`, the radius of CERTIFY. Two-sided: `two_sided_radius`
    with the class bounded from below and its strongest rival from above, at `alpha` / 2 each; the
    rival also has at most what the class leaves. Rounded down.

    There is nothing to pay for the choice of the rival among K - 1 classes. The one that is truly
    strongest is one fixed class. Its bound holds with probability 1 - `alpha` / 2, and the bound
    of the largest count is at least the bound of its count.

    Args:
        test: "one-sided" or "two-sided", chosen without these votes.
        top_count: votes for the class, which other votes chose too, so that here another class may
            have more.
        rival_count: the most votes for any other class.
        trials: number of votes.
        alpha: in (0, 1), the chance that the radius is too large.
        sigma: standard deviation of the noise, in pixel units.
    Returns:
        float64 of the broadcast shape.
    Raises:
        ValueError: naming the argument that is out of its range.
    """
    top_count, rival_count, trials = _checked_votes(top_count, rival_count, "trials", trials)
    test, alpha = np.asarray(test), check_open_unit("alpha", alpha)
    if not np.all((test == ONE_SIDED) | (test == TWO_SIDED)):
        raise ValueError(f"'test' must be '{ONE_SIDED}' or '{TWO_SIDED}'.")
    two_sided = test == TWO_SIDED
    p_lower = lower_confidence_bound(top_count, trials, np.where(two_sided, alpha / 2, alpha))
    p_rival = upper_confidence_bound(rival_count, trials, alpha / 2)
    p_rival = np.minimum(p_rival, np.nextafter(1.0 - p_lower, 2.0))
    one, two = certified_radius(p_lower, sigma), two_sided_radius(p_lower, p_rival, sigma)
    return np.where(two_sided, two, one)[()]


def _checked_votes(top_count, rival_count, name, votes):
    """All as int64; ValueError unless the two counts are at most the votes together."""
    top_count, rival_count, votes = (
        check_whole(key, value)
        for key, value in (("top_count", top_count), ("rival_count", rival_count), (name, votes))
    )
    if np.any(top_count + rival_count > votes):
        raise ValueError(f"'top_count' and 'rival_count' must not exceed '{name}' together.")
    return top_count, rival_count, votes
