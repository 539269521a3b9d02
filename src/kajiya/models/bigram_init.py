"""Embedding and output head that begin as a bigram model, in closed form.

With blocks that begin as the identity, a model's first logits are head · norm(embedding). A low-rank factorization of the bigrams'
smoothed log-odds (after Levy & Goldberg, Neural Word Embedding as Implicit Matrix Factorization, 2014) puts into both what a
model would else spend its first hundreds of steps on; statistics of the whole corpus, seen in half a second.

Shape letters: V vocabulary, D hidden width, R = D − 2 rank of the factorization.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from kajiya.data.bigrams import Bigrams
from kajiya.errors import ConfigError

_SMOOTHING = 100.0
"""Weight of the unigram distribution, in counts (a Dirichlet prior): P(b|a) = (n_ab + μ P(b)) / (n_a + μ)."""
_LARGEST_NORM = 6.0
"""Longer rows of the first factor are cut to this norm: the hidden state's norm is the same for all tokens."""


@dataclass(frozen=True)
class Beginning:
    """Where the residual stream holds what, after `begin_from_bigrams`."""

    constant_at: int
    """Coordinate that has the same value in every token's embedding."""
    constant: float
    """That value."""
    spare: slice
    """Coordinates that are zero in the embedding and in the head."""
    scale: float
    """What the embedding is multiplied by, so that the norm of its rows is √D."""


def begin_from_bigrams(
    model: Any, bigrams: Bigrams, seed: int, *, n_spare: int = 0, spare_norm: float = 0.0
) -> Beginning:
    """Set the embedding and the head of `model` so that its first logits are those of the bigram model.

    The last `n_spare` coordinates stay zero; `spare_norm` is the norm, before scaling, that the caller will give them in the
    embedding. Needs untied weights, zero outputs of the blocks and a final RMS norm with weights of one, as the config ensures
    for Llama and its kin. Raises `ConfigError` where the model has no such parts.
    """
    embedding_VD = model.get_input_embeddings().weight
    head_VD = model.get_output_embeddings().weight
    if embedding_VD is head_VD:
        raise ConfigError("model.init", "bigram needs a head of its own: set model.tied=false")
    width = embedding_VD.shape[1]
    rank = width - 2 - n_spare
    left_VR, right_VR, log_unigram_V = factorize(bigrams, rank, seed)
    left_VR, right_VR = (torch.nn.functional.pad(each, (0, rank - each.shape[1])) for each in (left_VR, right_VR))
    left_VR *= (_LARGEST_NORM / left_VR.norm(dim=1, keepdim=True)).clamp(max=1.0)
    # Two more coordinates: one that carries the unigram logits, and one that fills each row up to the same norm,
    # which the final norm then leaves alone.
    centred_V = log_unigram_V - log_unigram_V.mean()
    unit = float(centred_V.std())
    fill_V1 = (_LARGEST_NORM**2 - left_VR.square().sum(dim=1, keepdim=True)).clamp(min=0).sqrt()
    spare_VS = torch.zeros(len(left_VR), n_spare)
    full_VD = torch.cat([left_VR, torch.full_like(fill_V1, unit), fill_V1, spare_VS], dim=1)
    answer_VD = torch.cat([right_VR, centred_V[:, None] / unit, torch.zeros_like(fill_V1), spare_VS], dim=1)
    scale = math.sqrt(width) / math.hypot(_LARGEST_NORM, unit, spare_norm)
    with torch.no_grad():
        embedding_VD.copy_(full_VD * scale)
        head_VD.copy_(answer_VD / scale)
    return Beginning(constant_at=rank, constant=unit * scale, spare=slice(width - n_spare, width), scale=scale)


def factorize(bigrams: Bigrams, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors [V, R] and [V, R] whose products are log P(b|a) / P(b) up to a constant for each a, and log P [V]; float32.

    A randomized SVD (Halko, Martinsson & Tropp, 2011) of the log-odds, weighted by the square root of both tokens' counts.
    """
    size = bigrams.vocab_size
    first, second = torch.from_numpy(bigrams.first), torch.from_numpy(bigrams.second)
    count = torch.from_numpy(bigrams.count).float()
    unigram = torch.zeros(size).index_add_(0, second, count) + 0.1
    unigram /= unigram.sum()
    # Up to a constant of its row the log-odds are log(1 + n_ab / (μ P(b))): zero where a pair was never seen.
    odds = torch.log1p(count / (_SMOOTHING * unigram[second]))
    row = (torch.zeros(size).index_add_(0, first, count) + 1).sqrt()
    column = (unigram * count.sum() + 1).sqrt()
    matrix = torch.sparse_coo_tensor(
        torch.stack([first, second]), odds * row[first] * column[second], (size, size), check_invariants=False
    ).coalesce()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        forward, backward = matrix.to_sparse_csr(), matrix.t().coalesce().to_sparse_csr()
    rank = min(rank, size)
    basis = torch.linalg.qr(forward @ torch.randn(size, rank, generator=torch.Generator().manual_seed(seed))).Q
    basis = torch.linalg.qr(forward @ torch.linalg.qr(backward @ basis).Q).Q
    left, singular, right = torch.linalg.svd((backward @ basis).T, full_matrices=False)
    root = singular.sqrt()
    return (basis @ left) * root / row[:, None], right.T * root / column[:, None], unigram.log()
