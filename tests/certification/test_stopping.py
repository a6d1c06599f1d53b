"""The stopping rule of `src.certification.stopping`: exact error rates, power and cost."""

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from src.certification import lower_confidence_bound, required_probability
from src.certification.stopping import (
    CERTIFY,
    CONCENTRATION,
    CONTINUE,
    REJECT,
    look_schedule,
    mixture_decision,
    mixture_log_e_value,
)
from tests.certification.test_bounds import fraction


def operating_characteristics(p, p0, alpha, max_n):
    """Exact (chance to certify, mean draws) at success probability `p`, over every outcome."""
    looks = look_schedule(max_n, p0, alpha)
    going_on, drawn, certified, mean = np.ones(1), 0, 0.0, 0.0
    for look in looks:
        new = np.arange(look - drawn + 1)
        going_on = np.convolve(going_on, stats.binom.pmf(new, look - drawn, p))
        decision = mixture_decision(np.arange(look + 1), look, p0, alpha, looks)
        mean += going_on[decision != CONTINUE].sum() * look
        certified += going_on[decision == CERTIFY].sum()
        going_on, drawn = np.where(decision == CONTINUE, going_on, 0), look
    assert going_on.sum() == 0
    return certified, mean


@pytest.mark.parametrize("p0", [0.5, 0.6, 0.8413, 0.97725])
@pytest.mark.parametrize("alpha", [0.001, 0.2])
def test_exact_error_rate_is_within_alpha(p0, alpha):
    # Convolved over every outcome, so there is nothing random about it. Below p0 it is smaller.
    at_p0, _ = operating_characteristics(p0, p0, alpha, max_n=2000)
    below, _ = operating_characteristics(p0 - 0.02, p0, alpha, max_n=2000)
    assert below < at_p0 <= alpha


def test_simulated_error_rate_is_within_alpha():
    # Up to 20 % may be certified; 22 % of 20,000 are 7 standard deviations away: a false alarm
    # in 1e11.
    p0, alpha = required_probability(0.5, 0.5), 0.2
    looks = look_schedule(3000, p0, alpha)
    rng, successes = np.random.default_rng(4), np.zeros(20_000, int)
    decision, drawn = np.zeros(20_000, int), 0
    for look in looks:
        successes += rng.binomial(look - drawn, p0, size=20_000)
        drawn = look
        answers = mixture_decision(np.arange(look + 1), look, p0, alpha, looks)
        decision = np.where(decision, decision, answers[successes])
    assert set(np.unique(decision)) == {CERTIFY, REJECT}
    assert 0.02 < np.mean(decision == CERTIFY) <= 0.22


def test_e_value_rarely_gets_large_at_any_time_at_all():
    # Ville: at most a fifth of the paths ever reach 5, looking after every draw, with no giving
    # up. 2,000 paths: 24 % are 4.5 standard deviations away, a false alarm in 3e5.
    p0 = 0.8
    votes = np.random.default_rng(5).random((2000, 500)) < p0
    log_e = mixture_log_e_value(votes.cumsum(axis=1), np.arange(1, 501), p0)
    assert 0.05 < np.mean(log_e.max(axis=1) >= np.log(5)) <= 0.24


@pytest.mark.parametrize("p0", [0.5, 0.9, 0.99865])
def test_e_value_is_a_martingale_at_p0_and_shrinks_below(p0):
    k = np.arange(301)
    e = np.exp(mixture_log_e_value(k, 300, p0))
    assert np.sum(stats.binom.pmf(k, 300, p0) * e) == pytest.approx(1, rel=1e-7)
    assert np.sum(stats.binom.pmf(k, 300, p0 - 0.01) * e) < 1


@pytest.mark.parametrize("p0", [0.5, 0.8413, 0.97725, 0.99997])
@pytest.mark.parametrize(("k", "n"), [(0, 0), (0, 3), (5, 5), (480, 500), (9990, 10_000)])
def test_e_value_is_just_below_the_integral(p0, k, n):
    with mpmath.workdps(60):
        a, b, start = mpmath.mpf(k + 1), mpmath.mpf(n - k) + CONCENTRATION, mpmath.mpf(p0)
        tail = mpmath.betainc(b, a, 0, 1 - start)
        prior = (1 - start) ** CONCENTRATION / CONCENTRATION
        exact = mpmath.log(tail / prior) - k * mpmath.log(start) - (n - k) * mpmath.log1p(-start)
    log_e = mixture_log_e_value(k, n, p0)
    if np.isfinite(log_e):
        assert exact - 1e-5 < log_e < exact
    else:
        assert exact < -600


@pytest.mark.parametrize("deviations", [0, 1, 6])
@pytest.mark.parametrize(
    ("p0", "size"), [(0.5, 20), (0.8413, 20), (1 - 1e-6, 30), (1 - 1e-6, 37), (1 - 2.0**-40, 37)]
)
def test_e_value_is_never_above_the_true_one_in_the_corners(p0, size, deviations):
    n = 2**size
    k = min(int(n * p0 + deviations * np.sqrt(n * p0 * (1 - p0))) + 1, n)
    with mpmath.workdps(50):
        a, b, start = mpmath.mpf(k + 1), mpmath.mpf(n - k) + CONCENTRATION, mpmath.mpf(p0)
        # The tail above p0 is all but the part below, by a continued fraction (DLMF 8.17.22).
        whole = mpmath.loggamma(a) + mpmath.loggamma(b) - mpmath.loggamma(a + b)
        log_below = a * mpmath.log(start) + b * mpmath.log1p(-start) - mpmath.log(a)
        below = mpmath.exp(log_below - whole) * fraction(a, b, start)
        log_prior = CONCENTRATION * mpmath.log1p(-start) - mpmath.log(CONCENTRATION)
        log_votes = k * mpmath.log(start) + (n - k) * mpmath.log1p(-start)
        exact = whole + mpmath.log1p(-below) - log_prior - log_votes
    allowed = 1e-12 * (n + 100)
    assert exact - 2 * allowed < mixture_log_e_value(k, n, p0) < exact


@given(st.integers(0, 10**6), st.integers(0, 2000), st.floats(0.5, 0.999999))
def test_e_value_grows_with_success_and_never_is_nan(successes, failures, p0):
    n = successes + failures
    log_e = mixture_log_e_value(successes, n, p0)
    assert not np.isnan(log_e)
    assert mixture_log_e_value(successes + 1, n + 1, p0) >= log_e - 1e-5
    assert log_e <= -successes * np.log(p0) + 1e-5


def test_clear_images_are_settled_soon():
    # Radius 2 sigma at alpha = 0.001: 301 draws are the least there can be, 100,000 the most.
    p0 = required_probability(0.5, 0.25)
    certified, mean = operating_characteristics(0.99993, p0, 0.001, max_n=5000)
    assert certified > 0.9999
    assert 301 < mean < 400
    certified, mean = operating_characteristics(0.5, p0, 0.001, max_n=5000)
    assert certified < 1e-6
    assert mean < 33


@pytest.mark.parametrize("p", [0.988, 0.99])
def test_little_power_is_lost_against_a_fixed_number_of_draws(p):
    p0, max_n = required_probability(0.5, 0.25), 5000
    certified, mean = operating_characteristics(p, p0, 0.001, max_n)
    k = np.arange(max_n + 1)
    fixed = stats.binom.pmf(k, max_n, p)[lower_confidence_bound(k, max_n, 0.001) > p0].sum()
    assert fixed - 0.05 < certified
    assert mean < 0.65 * max_n


def test_schedule_ascends_to_the_last_draw():
    p0 = required_probability(0.5, 0.25)
    looks = look_schedule(100_000, p0, 0.001)
    assert looks[0] == 32
    assert looks[-1] == 100_000
    assert np.all(np.diff(looks) > 0)


def test_smallest_budget_is_enough_and_one_less_is_refused():
    p0 = required_probability(0.5, 0.25)
    with pytest.raises(ValueError, match="'max_n' = 300 can never certify") as error:
        look_schedule(300, p0, 0.001)
    needed = int(str(error.value).rstrip(".").split(">= ")[-1])
    looks = look_schedule(needed, p0, 0.001)
    assert mixture_decision(needed, needed, p0, 0.001, looks) == CERTIFY
    with pytest.raises(ValueError, match="'max_n'"):
        look_schedule(needed - 1, p0, 0.001)


def test_the_rule_gives_up_once_the_end_is_out_of_reach():
    p0 = required_probability(0.5, 0.25)
    looks = look_schedule(400, p0, 0.001)
    first = mixture_decision([looks[0], 0], looks[0], p0, 0.001, looks)
    assert first.tolist() == [CONTINUE, REJECT]
    assert first.dtype == np.int8
    assert mixture_decision(0, looks[0], p0, 0.001, looks).dtype == np.int8
    assert mixture_decision(390, 400, p0, 0.001, looks) == REJECT


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: look_schedule(1000, 0.4, 0.001), "p0"),
        (lambda: look_schedule(1000, 1.0, 0.001), "p0"),
        (lambda: look_schedule(1000, 0.9, 0.0), "alpha"),
        (lambda: look_schedule(1000.5, 0.9, 0.01), "max_n"),
        (lambda: mixture_log_e_value(5, 4, 0.9), "successes"),
        (lambda: mixture_decision(5, 9, 0.9, 0.1, (3, 8)), "trials"),
        (lambda: mixture_decision(5, 8, 0.9, 0.1, (9, 8)), "looks"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        call()
