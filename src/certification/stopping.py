"""When to stop drawing: is the selected class's probability p above p0? (numpy and scipy only)

The caller draws up to each count of `look_schedule` and then asks `mixture_decision`, which answers
CERTIFY, REJECT or CONTINUE. If p <= p0, the chance that it ever answers CERTIFY is at most `alpha`.
REJECT means "not certified". That is always a safe answer, so it needs no guarantee; it certifies
slightly fewer images and saves many draws.
"""

import functools
import math

import numpy as np
from scipy import special

from src.certification.bounds import minimum_successes, minimum_trials, upper_confidence_bound
from src.ranges import check_counts, check_open_unit, check_whole

CERTIFY, CONTINUE, REJECT = 1, 0, -1

# The share of alpha for the last look. With it an image that needs all draws is certified nearly as
# often as by a test with a fixed n.
LAST_SHARE = 0.2
# One look is the first count at which a bound at this share of alpha certifies a perfect vote.
FIRST_SHARE = 0.4
# The mixture's prior is Beta(1, CONCENTRATION) cut to (p0, 1]: in u = (1 - p) / (1 - p0) its
# density is proportional to u ** (CONCENTRATION - 1), whatever p0. Small values favour p near 1.
CONCENTRATION = 0.25
# Level of the upper bound by which `_is_futile` rejects.
FUTILITY = 0.01


def look_schedule(max_n, p0, alpha, *, step=32, growth=1.05):
    """Counts of draws after which to decide, ascending, from at most `step` to `max_n`.

    They grow by `step` or by the factor `growth`, whichever is more. One of them is the first count
    at which successes alone certify; at smaller counts the decision can only be to reject.

    Args:
        max_n: most draws to spend, whole number.
        p0: probability to be exceeded, in [0.5, 1), from `required_probability`.
        alpha: in (0, 1).
    Returns:
        tuple of ints, the last of them `max_n`.
    Raises:
        ValueError: if `max_n` draws can never certify `p0`; the message says how many would.
    """
    max_n = int(check_whole("max_n", max_n))
    _check_p0(p0)
    needed = minimum_trials(check_open_unit("alpha", alpha) * LAST_SHARE, p0)
    if max_n < needed:
        raise ValueError(
            f"'max_n' = {max_n} can never certify p > {p0:.6g} at alpha = {alpha:g}; "
            f"use max_n >= {needed}."
        )
    start = minimum_trials(alpha * FIRST_SHARE, p0)
    early = _growing(step, start, step, growth)
    return (*early, *_growing(start, max_n, step, growth), max_n)


def _growing(count, stop, step, growth):
    """Counts from `count` on that are below `stop`."""
    counts = []
    while count < stop:
        counts.append(count)
        count = max(count + step, math.ceil(count * growth))
    return counts


def _check_p0(p0):
    if not 0.5 <= p0 < 1:
        raise ValueError("'p0' must lie in [0.5, 1); no radius beyond 8 sigma can be certified.")


def mixture_log_e_value(successes, trials, p0):
    """Log of the evidence (e-value) against p <= p0. Rounded down.

    The e-value is a ratio: the likelihood of the votes averaged over a Beta(1, CONCENTRATION) prior
    cut to (p0, 1], divided by their likelihood at p0. (Mixtures: Robbins, Ann. Math. Stat. 1970;
    Howard, Ramdas, McAuliffe & Sekhon, Ann. Stat. 2021.)

    Args:
        successes, trials: whole numbers, 0 <= successes <= trials.
        p0: in [0.5, 1).
    Returns:
        float64 of the broadcast shape, -inf where the e-value underflows.
    """
    # Why it is valid: for each q > p0, one vote multiplies the ratio by q / p0 (success) or
    # (1 - q) / (1 - p0) (failure). The expectation of that factor, p q / p0 + (1 - p) (1 - q) /
    # (1 - p0), grows with p because q > p0, and is 1 at p = p0. So for every p <= p0 the ratio,
    # and its average over q, is a non-negative supermartingale that starts at 1, and by Ville's
    # inequality it ever reaches 1 / alpha with probability at most alpha.
    successes, trials = check_counts(successes, trials)
    _check_p0(p0)
    failures = trials - successes
    a, b = successes + 1.0, failures + CONCENTRATION
    # The prior's mass above p0 is (1 - p0) ** CONCENTRATION, and Beta(1, b) has density
    # b (1 - p) ** (b - 1).
    log_prior = CONCENTRATION * np.log1p(-p0) - np.log(CONCENTRATION)
    tail = special.betaincc(a, b, p0)
    # A tail that nearly underflows has too few digits. The votes are then far below p0.
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.where(tail < 1e-290, 0.0, tail))
    log_average = special.betaln(a, b) + log_tail - log_prior
    log_e = log_average - successes * np.log(p0) - failures * np.log1p(-p0)
    return (log_e - 1e-12 * (trials + 100.0))[()]


def mixture_decision(successes, trials, p0, alpha, looks):
    """Certify once the mixture's e-value reaches 1 / ((1 - LAST_SHARE) alpha).

    At `looks[-1]` a Clopper-Pearson bound at LAST_SHARE * alpha may certify as well. The guarantee
    holds however often and at whatever counts the function is called.

    Args:
        successes: (...) votes for the selected class. The draws that selected it do not count.
        trials: (...) draws so far, at most `looks[-1]`.
        p0: scalar in [0.5, 1), from `required_probability`.
        alpha: scalar in (0, 1).
        looks: ascending counts, from `look_schedule`.
    Returns:
        int8 of the broadcast shape: CERTIFY, REJECT or CONTINUE; never CONTINUE at `looks[-1]`.
    Raises:
        ValueError: naming the argument that is out of its range.
    """
    successes, trials = check_counts(successes, trials)
    if np.any(np.diff(looks) <= 0) or np.any(trials > looks[-1]):
        raise ValueError("'looks' must ascend, and 'trials' must not exceed the last of them.")
    level = (1 - LAST_SHARE) * float(check_open_unit("alpha", alpha))
    certified = mixture_log_e_value(successes, trials, p0) >= -np.log(level)
    final = _final_count(looks[-1], alpha * LAST_SHARE, p0)
    certified |= (trials == looks[-1]) & (successes >= final)
    futile = _is_futile(successes, trials, final, looks[-1])
    # CERTIFY first: the e-value may certify before `final` successes can be reached.
    return np.where(certified, CERTIFY, np.where(futile, REJECT, CONTINUE)).astype(np.int8)[()]


@functools.lru_cache(maxsize=256)
def _final_count(max_n, level, p0):
    """Fewest successes out of `max_n` that certify at the last look."""
    return int(minimum_successes(max_n, level, p0))


def _is_futile(successes, trials, final, max_n):
    """Whether `final` of `max_n` successes are impossible or, by the votes so far, improbable.

    final / max_n lies above p0. An image with p between the two would most likely spend all its
    draws and not be certified.
    """
    unreachable = successes + (max_n - trials) < final
    return unreachable | (upper_confidence_bound(successes, trials, FUTILITY) < final / max_n)
