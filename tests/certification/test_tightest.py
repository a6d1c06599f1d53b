"""The tightest radius: closed values, an independent bound, and its exact chance of an error."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from src.certification import (
    ONE_SIDED,
    TWO_SIDED,
    certified_radius,
    choose_test,
    lower_confidence_bound,
    tight_radius,
    upper_confidence_bound,
)

N, ALPHA = 100_000, 0.001


@pytest.mark.parametrize(
    ("top", "rival", "one", "two"),
    [
        (80_000, 15_000, 0.8277, 0.9236),
        (99_900, 60, 3.0002, 3.0581),
        (100_000, 0, 3.8115, 3.7878),
        # Without a majority only the two-sided test finds a radius.
        (45_000, 20_000, 0.0, 0.3440),
    ],
)
def test_known_radii_in_units_of_sigma(top, rival, one, two):
    assert tight_radius(ONE_SIDED, top, rival, N, ALPHA, 1.0) == pytest.approx(one, abs=5e-5)
    assert tight_radius(TWO_SIDED, top, rival, N, ALPHA, 1.0) == pytest.approx(two, abs=5e-5)
    assert tight_radius(TWO_SIDED, top, rival, N, ALPHA, 0.5) == pytest.approx(two / 2, abs=3e-5)


@st.composite
def votes(draw):
    n = draw(st.integers(10, 10**5))
    top = draw(st.integers(1, n))
    return top, draw(st.integers(0, n - top)), n


@given(votes(), st.floats(1e-6, 0.3))
def test_radii_agree_with_the_bounds_of_statsmodels(counts, alpha):
    top, rival, n = counts

    def ends(count, level):
        # Its two-sided interval at 2 level has the one-sided bounds at level as its ends.
        return proportion_confint(count, n, alpha=2 * level, method="beta")

    p_lower, half = ends(top, alpha)[0], ends(top, alpha / 2)[0]
    p_upper = min(ends(rival, alpha / 2)[1], 1 - half)
    one = max(stats.norm.ppf(p_lower), 0)
    two = max((stats.norm.ppf(half) - stats.norm.ppf(p_upper)) / 2, 0)
    for test, expected in ((ONE_SIDED, one), (TWO_SIDED, two)):
        radius = tight_radius(test, *counts, alpha, 1.0)
        assert radius == pytest.approx(expected, rel=1e-8, abs=1e-8)
        assert radius <= expected + 1e-10


@given(votes())
def test_the_rival_has_at_most_what_the_class_leaves(counts):
    plain = certified_radius(lower_confidence_bound(counts[0], counts[2], ALPHA / 2), 1.0)
    assert tight_radius(TWO_SIDED, *counts, ALPHA, 1.0) >= plain * (1 - 1e-12) - 1e-15


def test_a_class_that_lost_gets_no_radius():
    assert tight_radius([ONE_SIDED, TWO_SIDED], 10, 90, 100, 0.01, 1.0).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("top", "rival", "n0", "n", "test"),
    [
        (100, 0, 100, N, ONE_SIDED),
        (99, 1, 100, N, TWO_SIDED),
        (80, 15, 100, N, TWO_SIDED),
        (999, 1, 1000, N, TWO_SIDED),
        # So few votes bound a rival badly.
        (99, 1, 100, 100, ONE_SIDED),
        (100, 0, 100, 10, ONE_SIDED),
        # All votes were void.
        (0, 0, 100, N, ONE_SIDED),
    ],
)
def test_known_choices(top, rival, n0, n, test):
    assert choose_test(top, rival, n0, n, ALPHA) == test


@given(st.integers(0, 100), st.integers(10, 10**5), st.floats(1e-6, 0.3))
def test_of_two_classes_the_one_sided_test_is_always_chosen(top, n, alpha):
    # The rival has all that the class leaves, so that a bound of its own can only cost.
    assert choose_test(top, 100 - top, 100, n, alpha, num_classes=2) == ONE_SIDED


@pytest.mark.parametrize(
    "p", [(0.8, 0.15, 0.05), (0.6, 0.2, 0.2), (0.97, 0.01, 0.01, 0.01), (0.99999, 0.00001)], ids=str
)
def test_the_choice_is_about_as_good_as_the_better_test(p):
    # Mean radii over 500 draws; of what the better test gains on the worse, 1/10 may be lost.
    rng = np.random.default_rng(0)
    first, fresh = (np.sort(rng.multinomial(n, p, 500))[:, :-3:-1].T for n in (100, N))
    test = choose_test(*first, 100, N, ALPHA)
    radii = [tight_radius(t, *fresh, N, ALPHA, 1.0).mean() for t in (test, ONE_SIDED, TWO_SIDED)]
    worse, better = sorted(radii[1:])
    assert radii[0] >= better - 0.1 * (better - worse)


def test_arrays_broadcast_and_scalars_stay_scalars():
    test = choose_test([[100], [80]], 0, 100, [1000, N], ALPHA)
    assert test.shape == (2, 2)
    assert tight_radius(test, [[990], [800]], 5, 1000, ALPHA, 1.0).shape == (2, 2)
    assert isinstance(choose_test(99, 1, 100, N, ALPHA), str)
    assert isinstance(tight_radius(TWO_SIDED, 99, 1, 100, ALPHA, 1.0), np.float64)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: choose_test(60, 41, 100, N, ALPHA), "rival_count"),
        (lambda: choose_test(-1, 0, 100, N, ALPHA), "top_count"),
        (lambda: choose_test(0, 0, 0, N, ALPHA), "n0"),
        (lambda: choose_test(99, 1, 100, 0, ALPHA), "n"),
        (lambda: choose_test(99, 1, 100, N, 1.0), "alpha"),
        (lambda: choose_test(99, 1, 100, N, ALPHA, 1), "num_classes"),
        (lambda: tight_radius("three-sided", 99, 1, 100, ALPHA, 1.0), "test"),
        (lambda: tight_radius(TWO_SIDED, 99, 2, 100, ALPHA, 1.0), "top_count"),
        (lambda: tight_radius(TWO_SIDED, 99, 1, 100, 0.0, 1.0), "alpha"),
        (lambda: tight_radius(TWO_SIDED, 99, 1, 100, ALPHA, 0.0), "sigma"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        call()


# --- The chance of a false certificate ------------------------------------------------------------


def certificates(first, fresh, alpha, test=None):
    """(class, whether CERTIFY answers, tight radius) for votes (..., K) at n0 and at n.

    The `test` is that of `choose_test` if none is given.
    """
    first, fresh = np.broadcast_arrays(first, fresh)
    top = first.argmax(axis=-1)
    is_top = np.arange(first.shape[-1]) == top[..., None]
    (lead, rival), (count, most) = (
        ((votes * is_top).sum(axis=-1), (votes * ~is_top).max(axis=-1)) for votes in (first, fresh)
    )
    n0, n = first[0, 0].sum(), fresh[0, 0].sum()
    test = test or choose_test(lead, rival, n0, n, alpha)
    radius = tight_radius(test, count, most, n, alpha, 1.0)
    return top, lower_confidence_bound(count, n, alpha) > 0.5, radius


def false(p, top, answers, radius):
    """Which certificates give a false answer or radius, if the classes have probabilities `p`.

    For some classifier with these, the radius of equation 3 is all that holds (Cohen et al.,
    Theorem 2): anything above it is false.
    """
    p = np.asarray(p)
    rival = np.array([np.delete(p, c).max() for c in range(len(p))])
    true = (stats.norm.ppf(p) - stats.norm.ppf(rival)) / 2
    return answers & ((top != p.argmax()) | (radius > true[top]))


def outcomes(total, classes=3):
    """All votes of `total` copies on so many classes."""
    counts = np.array(list(itertools.product(range(total + 1), repeat=classes - 1)))
    rest = total - counts.sum(axis=1, keepdims=True)
    return np.hstack([rest, counts])[rest[:, 0] >= 0]


def chances_of_error(cases, n0, n, alpha, test=None):
    """For each p, the exact chance of a false certificate, over all n0 votes and all n votes."""
    first, fresh = outcomes(n0), outcomes(n)
    given = certificates(first[:, None], fresh[None], alpha, test)
    for p in cases:
        chances = (stats.multinomial.pmf(votes, votes[0].sum(), p) for votes in (first, fresh))
        yield np.einsum("i,j,ij", *chances, false(p, *given))


def tight_cases(n, alpha):
    """Probabilities at which some votes give a radius that is just false."""
    down, up = 1 - 1e-9, 1 + 1e-9
    for top, rival, _ in outcomes(n):
        p = lower_confidence_bound(top, n, alpha / 2) * down
        q = upper_confidence_bound(rival, n, alpha / 2) * up
        if q < p and p + q <= 1 and 1 - p - q <= q:
            yield p, q, 1 - p - q
    for top in range(n // 2, n + 1):
        p = lower_confidence_bound(top, n, alpha) * down
        if p > 1 / 3:
            yield from ((p, 1 - p, 0), (p, 0.7 * (1 - p), 0.3 * (1 - p)))


@pytest.mark.parametrize("test", [None, ONE_SIDED, TWO_SIDED])
@pytest.mark.parametrize(("n0", "n", "alpha"), [(5, 12, 0.1), (3, 20, 0.3), (8, 40, 0.2)])
def test_the_exact_chance_of_an_error_is_at_most_alpha(test, n0, n, alpha):
    cases = [(0.5, 0.5, 0), (0.5, 0.25, 0.25), (0.4, 0.4, 0.2), (1 / 3,) * 3, (0.7, 0.2, 0.1)]
    cases += tight_cases(n, alpha)
    chances = list(chances_of_error(cases, n0, n, alpha, test))
    assert len(cases) > 20
    assert all(0 <= chance <= alpha for chance in chances)
    # Not for want of certificates. (Of two bounds at alpha / 2, seldom both are at their worst.)
    assert max(chances) > (0.4 if test == TWO_SIDED else 0.9) * alpha


def test_both_tests_are_chosen_in_what_is_enumerated():
    first = outcomes(8)
    first = first[first[:, 0] == first.max(axis=1)]
    chosen = choose_test(first[:, 0], first[:, 1:].max(axis=1), 8, 40, 0.2)
    assert {ONE_SIDED, TWO_SIDED} == set(chosen)


def test_choosing_the_class_from_the_same_votes_would_break_it():
    # Two classes are tied. Eight of ten votes are more than alpha allows for one of them by less
    # than half (P = 0.055), so that the two of them together have more.
    p, n, alpha = (0.5, 0.5, 0), 10, 0.1
    same = outcomes(n)
    wrong = false(p, *certificates(same[:, None], same[:, None], alpha))[:, 0]
    broken = (stats.multinomial.pmf(same, n, p) * wrong).sum()
    assert broken == pytest.approx(112 / 1024)
    assert broken > alpha >= next(chances_of_error([p], 5, n, alpha))


@pytest.mark.parametrize(
    "p", [(0.45, 0.3, 0.15, 0.1), (0.5, 0.5, 0, 0), (0.6, 0.2, 0.1, 0.1), (0.9, 0.04, 0.03, 0.03)]
)
def test_simulated_certificates_are_false_in_at_most_alpha_of_the_cases(p):
    # 4,000 certificates at alpha = 0.2: the standard deviation of the share is 0.63 %, so a share
    # of false ones beyond 0.24 is a false alarm in 1e9.
    rng = np.random.default_rng(1)
    first, fresh = (rng.multinomial(n, p, (4000, 1)) for n in (20, 500))
    assert false(p, *certificates(first, fresh, 0.2)).mean() <= 0.24
