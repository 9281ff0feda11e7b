"""Intervals and tests, against published worked examples, scipy, and the coverage they promise."""

import math

import pytest
import scipy.stats

from pi0.base.stats import PairedDifference, format_rate, mcnemar_exact, paired_difference, wilson_interval


def paired_table(both: int, gained: int, lost: int, neither: int) -> PairedDifference:
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    after = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return paired_difference(before, after)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_gives_the_published_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_wilson_interval_agrees_with_scipy(confidence):
    for n in (1, 7, 100):
        for successes in range(n + 1):
            theirs = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
            assert wilson_interval(successes, n, confidence) == pytest.approx(theirs, abs=1e-12)


def test_wilson_interval_of_nothing_and_of_everything_ends_exactly_at_the_bound():
    assert all(wilson_interval(0, n)[0] == 0.0 and wilson_interval(n, n)[1] == 1.0 for n in range(1, 500))


def test_no_episodes_leave_everything_possible():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (1, 0)])
def test_an_impossible_count_is_an_error(successes, n):
    with pytest.raises(ValueError, match=f"{successes} successes in {n} episodes"):
        wilson_interval(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_a_confidence_that_is_no_fraction_is_an_error(confidence):
    with pytest.raises(ValueError, match="not between 0 and 1"):
        wilson_interval(1, 2, confidence)


def test_a_rate_is_shown_with_its_count_and_interval():
    assert format_rate(55, 100) == "55/100 (55.0%, 95% interval 45.2 to 64.4)"
    assert format_rate(0, 0) == "0/0 (no episodes)"


@pytest.mark.parametrize(
    ("table", "difference", "low", "high"),
    [
        # Altman and others (2000), Statistics with Confidence, table 6.2.
        ((14, 5, 0, 22), 0.122, 0.011, 0.226),
        # Fagerland, Lydersen and Laake (2014), Statistics in Medicine 33:2850: airway hyper-responsiveness.
        ((1, 1, 7, 12), -0.286, -0.507, -0.026),
    ],
)
def test_paired_difference_gives_the_published_intervals(table, difference, low, high):
    result = paired_table(*table)
    assert (result.difference, result.low, result.high) == pytest.approx((difference, low, high), abs=5e-4)


def test_paired_difference_counts_the_pairs_and_not_the_totals():
    result = paired_difference([True, True, False, False, False], [True, False, True, True, False])
    assert (result.n, result.before, result.after, result.gained, result.lost) == (5, 2, 3, 2, 1)
    assert result.difference == pytest.approx(0.2)


def test_swapping_before_and_after_mirrors_the_interval():
    there, back = paired_table(20, 9, 3, 8), paired_table(20, 3, 9, 8)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.p_value == back.p_value


@pytest.mark.parametrize("table", [(10, 0, 0, 0), (0, 10, 0, 0), (0, 0, 10, 0), (5, 0, 0, 5), (1, 0, 0, 0)])
def test_the_extreme_tables_stay_inside_the_possible(table):
    result = paired_table(*table)
    assert -1 <= result.low <= result.difference <= result.high <= 1
    assert result.low < result.high


@pytest.mark.parametrize(
    ("both", "gained", "lost"), [(0.4, 0.3, 0.05), (0.5, 0.4, 0.0), (0.1, 0.1, 0.1), (0.85, 0.1, 0.02)]
)
def test_the_interval_covers_the_true_difference_as_often_as_it_says(both, gained, lost):
    n = 24
    covered = 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            for c in range(n + 1 - a - b):
                d = n - a - b - c
                ways = math.factorial(n) / math.prod(map(math.factorial, (a, b, c, d)))
                chance = ways * both**a * gained**b * lost**c * (1 - both - gained - lost) ** d
                if chance > 1e-9:
                    result = paired_table(a, b, c, d)
                    covered += chance * (result.low <= gained - lost <= result.high)
    assert 0.92 < covered < 0.995


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    # Armitage and Berry (1994), p. 127: two culture media; then the airway example above; then no change.
    [(12, 2, 0.0129), (1, 7, 0.0703), (0, 0, 1.0), (4, 4, 1.0)],
)
def test_mcnemar_gives_the_published_values(gained, lost, p_value):
    assert mcnemar_exact(gained, lost) == pytest.approx(p_value, abs=5e-5)


def test_mcnemar_agrees_with_scipys_binomial_test():
    for gained in range(30):
        for lost in range(30):
            if gained + lost:
                theirs = scipy.stats.binomtest(gained, gained + lost).pvalue
                assert mcnemar_exact(gained, lost) == pytest.approx(theirs, rel=1e-9)


def test_mcnemar_of_thousands_of_episodes_is_still_a_number():
    assert 0 < mcnemar_exact(3000, 2000) < 1e-40


def test_a_paired_difference_is_shown_in_points():
    text = str(paired_table(14, 5, 0, 22))
    assert text == "+12.2 points, 95% interval +1.1 to +22.6, p = 0.062 (5 gained, 0 lost of 41)"


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_lists_that_do_not_pair_up_are_an_error(before, after):
    with pytest.raises(ValueError, match="are not paired"):
        paired_difference(before, after)
