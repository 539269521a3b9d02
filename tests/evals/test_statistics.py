"""Intervals, paired tests and shifts against scipy and closed forms."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from kajiya.errors import DataError
from kajiya.evals import statistics as s
from kajiya.evals.metrics import Measured
from kajiya.evals.results import figure_of
from kajiya.evals.seeds import compare_seeds, noise_floor
from kajiya.evals.shift import embedding_shift, map_embeddings, measure_shift, population_stability


def test_interval_of_a_mean_matches_scipys_bootstrap() -> None:
    values = np.random.default_rng(1).exponential(size=200)
    low, high = s.interval(s.mean_scores(values))
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert low == pytest.approx(theirs.low, abs=0.02)
    assert high == pytest.approx(theirs.high, abs=0.02)


def test_clusters_widen_the_interval_as_theory_says() -> None:
    # Rows of a source are copies of each other: the effective number of rows is the number of sources.
    sources = np.random.default_rng(2).normal(size=50)
    values, groups = np.repeat(sources, 20), [str(i) for i in range(50) for _ in range(20)]
    low, high = s.interval(s.mean_scores(values), groups)
    alone_low, alone_high = s.interval(s.mean_scores(values))
    expected = 2 * 1.96 * sources.std(ddof=1) / math.sqrt(50)
    assert high - low == pytest.approx(expected, rel=0.1)
    assert (high - low) / (alone_high - alone_low) == pytest.approx(math.sqrt(20), rel=0.15)


def test_exact_permutation_equals_scipys() -> None:
    random = np.random.default_rng(3)
    a, b = random.normal(size=10), random.normal(0.6, size=10)
    found = s.compare(s.mean_scores(a), s.mean_scores(b))
    theirs = stats.permutation_test((b - a,), np.mean, permutation_type="samples", n_resamples=math.inf)
    assert found.test == "exact permutation"
    assert found.p_value == pytest.approx(theirs.pvalue)
    assert found.difference == pytest.approx(np.mean(b - a))
    assert found.effect_size == pytest.approx(np.mean(b - a) / np.std(b - a, ddof=1))


def test_sampled_permutation_is_close_to_the_t_test() -> None:
    random = np.random.default_rng(4)
    a = random.normal(size=300)
    b = a + random.normal(0.05, 0.5, size=300)
    found = s.compare(s.mean_scores(a), s.mean_scores(b))
    assert found.test == "permutation"
    assert found.p_value == pytest.approx(stats.ttest_rel(b, a).pvalue, abs=0.03)


def test_swapping_whole_groups_is_more_cautious() -> None:
    shift = np.repeat(np.random.default_rng(5).normal(0.3, 1.0, size=12), 25)
    a, groups = np.zeros(300), [str(i) for i in range(12) for _ in range(25)]
    together = s.compare(s.mean_scores(a), s.mean_scores(shift), groups)
    alone = s.compare(s.mean_scores(a), s.mean_scores(shift))
    assert alone.p_value < 0.01 < together.p_value
    assert (together.n_groups, together.n_rows) == (12, 300)


def test_mcnemar_equals_the_binomial_test() -> None:
    random = np.random.default_rng(6)
    a, b = random.random(400) < 0.6, random.random(400) < 0.7
    n01, n10 = int((~a & b).sum()), int((a & ~b).sum())
    found = s.compare(s.mean_scores(a.astype(float)), s.mean_scores(b.astype(float)))
    assert found.test == "exact McNemar"
    assert found.p_value == pytest.approx(stats.binomtest(n01, n01 + n10).pvalue)
    assert s.mcnemar(a, a) == 1.0


def test_figures_by_rows_are_resampled_and_swapped() -> None:
    def median(rows: np.ndarray) -> float:
        return float(np.median(rows[:, 0]))

    random = np.random.default_rng(7)
    a = random.normal(size=(80, 1))
    first, second = s.Scores(a, median, by_rows=True), s.Scores(a + 1.5, median, by_rows=True)
    low, high = s.interval(first)
    theirs = stats.bootstrap((a[:, 0],), np.median, n_resamples=2000, method="percentile", rng=0).confidence_interval
    assert (low, high) == (pytest.approx(theirs.low, abs=0.1), pytest.approx(theirs.high, abs=0.1))
    found = s.compare(first, second)
    assert found.difference == pytest.approx(1.5)
    assert found.p_value < 0.01
    assert s.compare(first, first).p_value == 1.0


def test_needed_rows_give_the_promised_power() -> None:
    n = s.rows_needed(0.2, 1.0)
    assert n == 197  # (1.95996 + 0.84162)² / 0.04 = 196.2
    random = np.random.default_rng(8)
    hits = np.mean([stats.ttest_1samp(random.normal(0.2, 1.0, size=n), 0).pvalue < 0.05 for _ in range(600)])
    assert hits == pytest.approx(0.8, abs=0.05)
    assert s.rows_needed(0.0, 1.0) is None


def test_verdicts_are_plain_words() -> None:
    a, random = np.zeros(400), np.random.default_rng(9)
    better = s.compare(s.mean_scores(a), s.mean_scores(a + 0.02 + random.normal(0, 0.05, 400)))
    words = s.comparison_words(better, "A", "B", scale=100, unit="points")
    assert words.startswith("B is better by ")
    assert "points" in words
    lower = s.compare(s.mean_scores(a, True), s.mean_scores(a + 0.5 + random.normal(0, 0.05, 400), True))
    assert s.comparison_words(lower, "A", "B").startswith("A is better by 0.5")
    none = s.compare(s.mean_scores(a), s.mean_scores(random.normal(0.02, 1.0, 400)))
    assert "no difference shown" in s.comparison_words(none, "A", "B")
    assert f"n = {none.n_needed:,} would be needed" in s.comparison_words(none, "A", "B")


def test_rows_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(DataError, match="do not pair up"):
        s.compare(s.mean_scores([1.0]), s.mean_scores([1.0, 2.0]))
    with pytest.raises(DataError, match="no rows"):
        s.interval(s.mean_scores([]))


def test_noise_of_seeds() -> None:
    floor = noise_floor([1.0, 1.2, 0.8])
    assert floor.spread == pytest.approx(0.2)
    assert floor.detectable == pytest.approx(stats.t.ppf(0.975, 4) * 0.2 * math.sqrt(2 / 3))
    a, b = [1.0, 1.1, 0.9, 1.05], [0.7, 0.75, 0.72, 0.69]
    found = compare_seeds(a, b)
    assert found.p_value == pytest.approx(stats.ttest_ind(b, a, equal_var=False).pvalue)
    assert found.is_beyond_noise
    assert not compare_seeds(a, [1.02, 0.95, 1.1, 0.97]).is_beyond_noise
    with pytest.raises(DataError, match="two seeds"):
        noise_floor([1.0])


def test_shift_against_closed_forms() -> None:
    random = np.random.default_rng(10)
    a = random.normal(size=20_000)
    moved = measure_shift(a, a + 0.5)
    assert moved.wasserstein == pytest.approx(0.5)
    assert moved.ks == pytest.approx(2 * stats.norm.cdf(0.25) - 1, abs=0.02)
    # Two equal shares: (q − p) ln(q / p) summed by hand.
    halves = population_stability(np.array([0.0, 1.0] * 50), np.array([0.0] * 75 + [1.0] * 25), bins=2)
    assert halves == pytest.approx(0.25 * math.log(0.75 / 0.5) - 0.25 * math.log(0.25 / 0.5))
    assert population_stability(a, a) == 0
    assert measure_shift(a, random.normal(size=20_000)).words.startswith("no shift")
    with pytest.raises(DataError, match="finite"):
        measure_shift(a, np.array([math.nan]))


def test_maps_of_embeddings() -> None:
    from sklearn.decomposition import PCA

    vectors = np.random.default_rng(11).normal(size=(40, 6)) * np.array([5, 3, 1, 1, 1, 1])
    theirs = PCA(2).fit_transform(vectors)
    assert np.allclose(np.abs(map_embeddings(vectors)), np.abs(theirs))
    shifts = embedding_shift(vectors, vectors + np.array([4, 0, 0, 0, 0, 0]), components=2)
    assert shifts[0].wasserstein > 3 * shifts[1].wasserstein
    with pytest.raises(DataError, match="no kind of map"):
        map_embeddings(vectors, "tsne")


def test_an_interval_of_what_cannot_vary_is_wilsons_or_none() -> None:
    for right, n in ((1.0, 9), (0.0, 9)):
        theirs = stats.binomtest(int(right * n), n).proportion_ci(0.95, method="wilson")
        assert s.interval(s.mean_scores([right] * n, points=100)) == pytest.approx((theirs.low, theirs.high))
    # Of rows that share sources, the sources are what was tried.
    assert s.interval(s.mean_scores([1.0] * 9, points=100), list("aaabbbccc")) == pytest.approx(s.wilson(1.0, 3))
    assert s.interval(s.mean_scores([1.0, 0.0, 1.0]), ["a"] * 3) is None
    assert s.interval(s.mean_scores([0.5])) is None
    assert s.interval(s.mean_scores([0.3] * 50)) is None
    assert s.interval(s.mean_scores([0.0] * 5, is_lower_better=True)) is None
    assert s.wilson(0.3, 40) == pytest.approx(tuple(stats.binomtest(12, 40).proportion_ci(0.95, method="wilson")))


# ---------------------------------------------------------------- many rows


def test_resamples_in_portions_are_those_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(10)
    bits, sizes = random.exponential(size=300), random.integers(1, 9, size=300).astype(float)
    groups = [str(i // 4) for i in range(300)]

    def spread(rows: np.ndarray) -> float:
        return float(rows[:, 0].std())

    def all_figures() -> list[float]:
        first, second = s.ratio_scores(bits, sizes), s.ratio_scores(bits[::-1], sizes)
        whole, other = (s.Scores(each.rows, spread, by_rows=True) for each in (first, second))
        pairs = [s.compare(first, second, groups), s.compare(whole, other)]
        found = [*s.ratio_interval(bits, sizes), *s.interval(first, groups), *s.interval(whole)]
        return found + [each for pair in pairs for each in (*pair.interval, pair.p_value)]

    draws = np.random.default_rng(0).integers(0, 300, size=(2000, 300))
    ratios = bits[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    in_one_piece = all_figures()
    assert in_one_piece[:2] == pytest.approx(np.quantile(ratios, [0.025, 0.975]))
    monkeypatch.setattr("kajiya.evals.resampling._PORTION", 1000)
    assert all_figures() == pytest.approx(in_one_piece, rel=1e-9)


def test_memory_of_an_interval_does_not_grow_with_resamples_times_rows() -> None:
    import tracemalloc

    values = np.random.default_rng(11).random(40_000)
    tracemalloc.start()
    s.ratio_interval(values, np.ones_like(values), resamples=200)
    s.compare(s.mean_scores(values[:20_000]), s.mean_scores(values[20_000:40_000]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20  # in one piece: 200 MB and 320 MB


def test_many_discordant_rows_and_ranks_take_no_quadratic_time() -> None:
    calls = 0

    def median(rows: np.ndarray) -> float:
        nonlocal calls
        calls += 1
        return float(np.median(rows[:, 0]))

    random = np.random.default_rng(12)
    a = random.normal(size=(3000, 1))
    first = s.Scores(a, median, by_rows=True)
    second = s.Scores(a + 0.1 + random.normal(0, 0.5, size=a.shape), median, by_rows=True)
    found = s.compare(first, second)
    assert calls < 3000  # one of each row left out would be 6,000 alone
    # Of a mean the blocks must say what the rows say.
    by_mean = [s.Scores(each.rows, lambda rows: float(rows[:, 0].mean()), by_rows=True) for each in (first, second)]
    blocks = s.compare(*by_mean)
    rows = s.compare(s.mean_scores(a[:, 0]), s.mean_scores(second.rows[:, 0]))
    assert blocks.effect_size == pytest.approx(rows.effect_size, rel=0.15)
    assert found.n_needed is not None
    wrong = np.arange(40_000) < 20_400
    assert s.mcnemar(wrong, ~wrong) == pytest.approx(stats.binomtest(20_400, 40_000).pvalue)


def test_a_verdict_says_where_test_and_interval_disagree_and_sources_are_few() -> None:
    found = s.compare(s.mean_scores(np.zeros(40)), s.mean_scores(np.random.default_rng(0).normal(0.4, 1, 40)))
    apart = dataclasses.replace(found, interval=(-0.1, 0.6), p_value=0.03)
    assert "the test alone would show one, the interval does not, with n = 40" in s.comparison_words(apart, "A", "B")
    apart = dataclasses.replace(found, interval=(0.1, 0.6), p_value=0.07)
    assert "the interval alone would show one, the test does not, with n = 40" in s.comparison_words(apart, "A", "B")
    assert s.few_groups_words(2) == "interval from 2 sources, too few for 95 %"
    assert s.few_groups_words(1) == s.few_groups_words(6) == ""
    few = figure_of(Measured(s.mean_scores([1.0, 2.0]), "mean"), None)
    assert few["signature"] == "mean; interval from 2 sources, too few for 95 %"
