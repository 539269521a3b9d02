"""The sampler against closed forms: since it inverts the distribution function, evenly spread u give exact frequencies."""

import math

import pytest
import torch

from kajiya.serving.rows import rows_of
from kajiya.serving.sampler import Sampler, choose, with_logprobs
from kajiya.serving.sequence import SamplingParams

LOGITS = [2.0, -1.0, 0.5, 3.0, 0.0, 1.0]
N = 20_000


def _frequencies(params: SamplingParams, logits: list[float] = LOGITS) -> list[float]:
    """Shares of the tokens over evenly spread u."""
    rows = torch.tensor(logits).expand(N, -1)
    tokens = choose(rows, [params] * N, [(i + 0.5) / N for i in range(N)])
    return (torch.bincount(tokens, minlength=len(logits)) / N).tolist()


def _expected(temperature: float, kept: set[int]) -> list[float]:
    weights = [math.exp(x / temperature) if i in kept else 0.0 for i, x in enumerate(LOGITS)]
    return [weight / sum(weights) for weight in weights]


ALL = set(range(6))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_plain_sampling_has_the_frequencies_of_the_softmax(temperature: float) -> None:
    found = _frequencies(SamplingParams(temperature=temperature))
    assert found == pytest.approx(_expected(temperature, ALL), abs=2 / N)


def test_top_k_keeps_the_most_probable() -> None:
    assert _frequencies(SamplingParams(top_k=3)) == pytest.approx(_expected(1.0, {3, 0, 5}), abs=2 / N)
    assert _frequencies(SamplingParams(top_k=1)) == [0, 0, 0, 1, 0, 0]
    assert _frequencies(SamplingParams(top_k=99)) == pytest.approx(_expected(1.0, ALL), abs=2 / N)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    # Sorted masses: token 3 0.591…, token 0 0.217…, token 5 0.080…
    masses = _expected(1.0, ALL)
    below, above = masses[3] + masses[0] - 1e-4, masses[3] + masses[0] + 1e-4
    assert _frequencies(SamplingParams(top_p=below)) == pytest.approx(_expected(1.0, {3, 0}), abs=2 / N)
    assert _frequencies(SamplingParams(top_p=above)) == pytest.approx(_expected(1.0, {3, 0, 5}), abs=2 / N)
    assert _frequencies(SamplingParams(top_p=1e-9)) == [0, 0, 0, 1, 0, 0]


def test_top_p_speaks_of_what_top_k_left() -> None:
    masses = _expected(1.0, {3, 0})
    both = SamplingParams(top_k=2, top_p=masses[3] - 1e-4)
    assert _frequencies(both) == [0, 0, 0, 1, 0, 0]
    both = SamplingParams(top_k=2, top_p=masses[3] + 1e-4)
    assert _frequencies(both) == pytest.approx(masses, abs=2 / N)


def test_temperature_zero_is_greedy_and_a_tiny_one_is_finite() -> None:
    assert _frequencies(SamplingParams(temperature=0)) == [0, 0, 0, 1, 0, 0]
    assert _frequencies(SamplingParams(temperature=1e-300)) == [0, 0, 0, 1, 0, 0]
    assert _frequencies(SamplingParams(temperature=1e-300, top_p=0.9)) == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=4), SamplingParams(top_p=0.999)])
def test_a_token_without_mass_is_never_drawn(params: SamplingParams) -> None:
    rows = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    for u in (0.0, 0.5, 1 - 2**-53):
        assert choose(rows, [params], [u]).item() in (1, 3)


def test_rows_of_different_settings_in_one_batch() -> None:
    rows = torch.tensor(LOGITS).expand(4, -1)
    params = [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=2), SamplingParams(top_p=0.7)]
    for u in (0.05, 0.35, 0.65, 0.95):
        together = choose(rows, params, [u] * 4).tolist()
        alone = [choose(rows[:1], [one], [u]).item() for one in params]
        assert together == alone


def test_agrees_with_the_filters_of_transformers() -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 300, generator=generator) * 3
    filtered = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(50)(None, logits / 0.7))
    allowed = filtered > -torch.inf
    params = [SamplingParams(temperature=0.7, top_k=50, top_p=0.8)] * 8
    seen = torch.zeros_like(allowed)
    for i in range(4000):
        tokens = choose(logits, params, [(i + 0.5) / 4000] * 8)
        seen[torch.arange(8), tokens] = True
    assert bool((seen == allowed).all())


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    rows = rows_of(torch.tensor([LOGITS, LOGITS]))
    first, second = with_logprobs(rows, [4, 3], 3)
    log_total = math.log(sum(math.exp(x) for x in LOGITS))
    assert first.logprob == pytest.approx(0.0 - log_total)
    assert [token for token, _ in first.top] == [3, 0, 5]
    assert [value for _, value in first.top] == pytest.approx([3 - log_total, 2 - log_total, 1 - log_total])
    assert second.top == first.top
    assert second.logprob == pytest.approx(3.0 - log_total)
    assert all(one.top == () for one in with_logprobs(rows, [3, 3], 0))


def test_a_seeded_stream_is_repeatable_and_its_own() -> None:
    rows = [rows_of(torch.zeros(1, 1000)), rows_of(torch.zeros(1, 1000))]
    params = [SamplingParams(seed=5), SamplingParams(seed=6)]

    def draws(company: bool) -> list[int]:
        sampler = Sampler()
        sampler.begin("a", 5)
        sampler.begin("b", 6)
        n = 2 if company else 1
        found = []
        for _ in range(20):
            found.append(sampler.draw(["a", "b"][:n], rows[:n], params[:n])[0][0].token)
            sampler.used("a", 1)
        return found

    assert draws(company=True) == draws(company=False)
    assert len(set(draws(company=False))) > 15


def test_looking_ahead_draws_what_would_have_been_drawn_one_by_one() -> None:
    one, five = rows_of(torch.zeros(1, 1000)), rows_of(torch.zeros(5, 1000))
    params = [SamplingParams(seed=5)]
    plain, ahead = Sampler(), Sampler()
    plain.begin("a", 5)
    ahead.begin("a", 5)
    expected = []
    for _ in range(12):
        expected.append(plain.draw(["a"], [one], params)[0][0].token)
        plain.used("a", 1)
    found: list[int] = []
    for n_confirmed in (1, 5, 2, 4):
        found += [each.token for each in ahead.draw(["a"], [five], params)[0][:n_confirmed]]
        ahead.used("a", n_confirmed)
    assert found == expected
