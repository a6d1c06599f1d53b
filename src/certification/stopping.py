"""When to stop drawing: is the selected class's probability p above p0? (numpy and scipy only)

The caller draws up to each count of `look_schedule` and asks a rule, which answers CERTIFY,
REJECT or CONTINUE. Both rules keep the same promise at whatever look they stop: if p <= p0, the
chance of ever answering CERTIFY is at most `alpha`. REJECT means "not certified", which is always
a safe answer, so it needs no guarantee; it costs a little power and saves many draws.
"""

import functools
import math

import numpy as np
from scipy import special

from src.certification.bounds import minimum_successes, minimum_trials, upper_confidence_bound
from src.ranges import check_counts, check_open_unit, check_whole

CERTIFY, CONTINUE, REJECT = 1, 0, -1

# Shares of alpha. The last look has its own, so that an image that needs every draw has nearly
# the power of a test with a fixed n; the first look that can certify settles the easy images.
FIRST_SHARE = 0.4
LAST_SHARE = 0.2
# The mixture's prior is Beta(1, CONCENTRATION) cut to (p0, 1]: in u = (1 - p) / (1 - p0) its
# density is proportional to u ** (CONCENTRATION - 1), whatever p0. Small values favour p near 1.
CONCENTRATION = 0.25
# Level of the upper bound that gives up; see `_is_futile`.
FUTILITY = 0.01


def look_schedule(max_n, p0, alpha, *, step=32, growth=1.05):
    """Counts of draws at which to look, ascending, from `step` or fewer to `max_n`.

    They grow by `step` or by the factor `growth`, whichever is more, with one look at the first
    count at which all successes certify. Looks before it can only reject.

    Args:
        max_n: most draws to spend, whole number.
        p0: probability in [0.5, 1) to be exceeded, from `required_probability`.
        alpha: in (0, 1).
    Returns:
        tuple of ints, the last of them `max_n`.
    Raises:
        ValueError: if `max_n` draws can never certify `p0`; the message says how many would do.
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
    """Counts from `count` on, below `stop`."""
    counts = []
    while count < stop:
        counts.append(count)
        count = max(count + step, math.ceil(count * growth))
    return counts


def _check_p0(p0):
    if not 0.5 <= p0 < 1:
        raise ValueError("'p0' must lie in [0.5, 1); no radius beyond 8 sigma can be certified.")


def mixture_log_e_value(successes, trials, p0):
    """Log e-value against p <= p0, never above the true one (rounding errors are taken off).

    The likelihood of the votes, averaged over a Beta(1, CONCENTRATION) prior cut to (p0, 1], over
    their likelihood at p0. (Mixtures: Robbins, Ann. Math. Stat. 1970; Howard, Ramdas, McAuliffe &
    Sekhon, Ann. Stat. 2021.)

    Args:
        successes, trials: whole numbers, 0 <= successes <= trials.
        p0: in [0.5, 1).
    Returns:
        float64 of the broadcast shape, minus infinity where the e-value underflows.
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
    # A tail that nearly underflows has lost its digits; the votes are then far below p0.
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.where(tail < 1e-290, 0.0, tail))
    log_average = special.betaln(a, b) + log_tail - log_prior
    log_e = log_average - successes * np.log(p0) - failures * np.log1p(-p0)
    return (log_e - 1e-12 * (trials + 100.0))[()]


def mixture_decision(successes, trials, p0, alpha, looks):
    """The mixture rule: certify once its e-value reaches 1 / ((1 - LAST_SHARE) alpha).

    At `looks[-1]` a Clopper-Pearson bound at LAST_SHARE * alpha may certify as well. The rule may
    be asked at any counts, as often as one likes, not at those of `looks` alone.

    Args:
        successes: (...) votes for the selected class, none of them among those that selected it.
        trials: (...) draws so far, at most `looks[-1]`.
        p0: scalar in [0.5, 1), from `required_probability`.
        alpha: scalar in (0, 1).
        looks: ascending counts, from `look_schedule`.
    Returns:
        int8 of the broadcast shape: CERTIFY, REJECT or CONTINUE; never CONTINUE at `looks[-1]`.
    Raises:
        ValueError: naming the argument that is out of its range.
    """
    successes, trials = _check_progress(successes, trials, looks)
    level = (1 - LAST_SHARE) * float(check_open_unit("alpha", alpha))
    certified = mixture_log_e_value(successes, trials, p0) >= -np.log(level)
    return _with_the_end(certified, successes, trials, p0, alpha, looks)


def _check_progress(successes, trials, looks):
    successes, trials = check_counts(successes, trials)
    if np.any(np.diff(looks) <= 0) or np.any(trials > looks[-1]):
        raise ValueError("'looks' must ascend, and 'trials' must not exceed the last of them.")
    return successes, trials


def _with_the_end(certified, successes, trials, p0, alpha, looks):
    """Add to `certified` what the last look certifies, and the giving up."""
    final = _final_count(looks[-1], alpha * LAST_SHARE, p0)
    certified = certified | ((trials == looks[-1]) & (successes >= final))
    futile = _is_futile(successes, trials, final, looks[-1])
    # CERTIFY first: a rule may certify before `final` successes are in reach.
    return np.where(certified, CERTIFY, np.where(futile, REJECT, CONTINUE)).astype(np.int8)[()]


@functools.lru_cache(maxsize=256)
def _final_count(max_n, level, p0):
    """Fewest successes out of `max_n` that certify at the last look."""
    return int(minimum_successes(max_n, level, p0))


def _is_futile(successes, trials, final, max_n):
    """Whether the last look is out of reach, or p is clearly below the share that it asks for.

    That share, final / max_n, lies above p0: an image with p in between would most likely spend
    all its draws in vain.
    """
    unreachable = successes + (max_n - trials) < final
    return unreachable | (upper_confidence_bound(successes, trials, FUTILITY) < final / max_n)
