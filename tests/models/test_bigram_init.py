"""The closed-form beginning against the bigram counts themselves."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import Finished

from kajiya.config.schema import ModelConfig
from kajiya.data.bigrams import Bigrams, count_bigrams
from kajiya.data.shards import open_split
from kajiya.errors import ConfigError
from kajiya.models.bigram_init import begin_from_bigrams, factorize
from kajiya.models.build import Vocabulary, build_model
from kajiya.models.induction_init import begin_with_induction


def _bigrams(size: int = 40, n: int = 40_000) -> Bigrams:
    """A Markov chain in which each token is mostly followed by two others."""
    rng = np.random.default_rng(0)
    tokens = [0]
    for _ in range(n):
        last = tokens[-1]
        choices = ((3 * last + 1) % size, (5 * last + 2) % size, int(rng.integers(size)))
        tokens.append(choices[rng.choice(3, p=[0.6, 0.3, 0.1])])
    keys, counts = np.unique(np.array(tokens[:-1]) * size + np.array(tokens[1:]), return_counts=True)
    return Bigrams(keys // size, keys % size, counts, size)


def _entropy(bigrams: Bigrams) -> float:
    """Mean −log P(b|a) under the counts, nats: what no bigram model is below."""
    of_first = np.bincount(bigrams.first, weights=bigrams.count, minlength=bigrams.vocab_size)
    return float(-(bigrams.count * np.log(bigrams.count / of_first[bigrams.first])).sum() / bigrams.count.sum())


def _loss(logits_VV: torch.Tensor, bigrams: Bigrams) -> float:
    log_p = logits_VV.log_softmax(1)[torch.from_numpy(bigrams.first), torch.from_numpy(bigrams.second)]
    return float(-(log_p * torch.from_numpy(bigrams.count)).sum() / bigrams.count.sum())


def test_full_rank_factors_are_near_the_bigram_model() -> None:
    bigrams = _bigrams()
    left, right, log_unigram = factorize(bigrams, 40, 0)
    assert _loss(left @ right.T + log_unigram, bigrams) < _entropy(bigrams) + 0.35
    unigram = np.bincount(bigrams.second, weights=bigrams.count, minlength=40) / bigrams.count.sum()
    np.testing.assert_allclose(log_unigram.exp().numpy(), unigram, rtol=0.02)


def test_a_model_begins_as_the_bigram_model() -> None:
    bigrams = _bigrams()
    config = ModelConfig(n_params=None, hidden_size=64, n_layers=2, n_heads=2, tied=False, zero_outputs=True)
    model = build_model(config, Vocabulary(40, 0, 1, 2), 0).module.eval()
    with torch.no_grad():
        before = model(torch.arange(40)[:, None], use_cache=False).logits[:, 0]
        begin_from_bigrams(model, bigrams, 0)
        after = model(torch.arange(40)[:, None], use_cache=False).logits[:, 0]
    assert _loss(before, bigrams) > np.log(40) - 0.2
    assert _loss(after, bigrams) < _entropy(bigrams) + 0.5


@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_with_induction_it_begins_by_copying_as_well(n_kv_heads: int) -> None:
    bigrams = _bigrams(size=400)
    config = ModelConfig(
        n_params=None,
        hidden_size=128,
        n_layers=2,
        n_heads=2,
        n_kv_heads=n_kv_heads,
        tied=False,
        zero_outputs=True,
        rope_theta=1e6,
    )
    model = build_model(config, Vocabulary(400, 0, 1, 2), 0).module.eval()
    begin_with_induction(model, bigrams, 0)
    once = torch.stack([torch.randperm(400, generator=torch.Generator().manual_seed(i))[:60] for i in range(4)])
    twice = torch.cat([once, once], dim=1)
    with torch.no_grad():
        logits = model(twice, use_cache=False).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), twice[:, 1:], reduction="none")
    # The text is random, so that nothing but copying can tell what comes next.
    assert nll[:, :59].mean() > 5
    assert nll[:, 60:].mean() < 3


def test_one_block_is_too_few_for_induction() -> None:
    config = ModelConfig(n_params=None, hidden_size=128, n_layers=1, n_heads=2, tied=False, zero_outputs=True)
    model = build_model(config, Vocabulary(40, 0, 1, 2), 0).module
    with pytest.raises(ConfigError, match="two blocks"):
        begin_with_induction(model, _bigrams(), 0)


def test_tied_weights_are_refused() -> None:
    model = build_model(ModelConfig(n_params="60k", zero_outputs=True), Vocabulary(40, 0, 1, 2), 0).module
    with pytest.raises(ConfigError, match=r"model\.tied=false"):
        begin_from_bigrams(model, _bigrams(), 0)


def test_counts_are_those_of_the_documents(finished: Finished) -> None:
    shards: Path = finished.store.root / finished.trained.run.manifest()["artifacts"]["shards"]["path"]
    bigrams = count_bigrams(shards, 512)
    split = open_split(shards, "train")
    expected: dict[tuple[int, int], int] = {}
    for index in range(split.n_documents):
        ids = split.document(index).tolist()
        for pair in itertools.pairwise(ids):
            expected[pair] = expected.get(pair, 0) + 1
    got = dict(
        zip(zip(bigrams.first.tolist(), bigrams.second.tolist(), strict=True), bigrams.count.tolist(), strict=True)
    )
    assert got == expected
