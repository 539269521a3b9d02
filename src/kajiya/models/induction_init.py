"""Blocks that begin as an induction circuit: what followed a token's last occurrence is predicted to follow it again.

Copying from the context is what a small model learns latest, and on text full of names what it gains most from: the circuit
(Olsson et al., In-context Learning and Induction Heads, arXiv:2209.11895) forms after tens of millions of tokens. Here it is
written down. Every token has a random code in coordinates that the bigram factors leave free. The first block's first head
looks one place back, by rotary phases alone, and notes the code found there; the second block's first head looks for places
whose note is the present token's code, and writes the code of the token found there, which the head translates into logits.
All of it is ordinary weights, trained from the first step on.

Shape letters: V vocabulary, D hidden width, H width of an attention head, C width of a code.
"""

import math
from typing import Any

import torch

from kajiya.data.bigrams import Bigrams
from kajiya.errors import ConfigError
from kajiya.models.bigram_init import begin_from_bigrams

_CODE_SHARE = 0.625
"""Width of a code over that of an attention head: the slowest rotary pairs, which hardly turn within a row, compare the codes."""
_CODE_NORM = 3.0
"""Norm of a code in the embedding, where the bigram factors' rows have 6."""
_PREVIOUS = 5.0
"""Attention logit by which the place before leads over its neighbours."""
_MATCH = 10.0
"""Attention logit of a place that stands behind the same token."""
_NOTE = 0.6
"""Norm of the noted code in the residual stream: small, since the output head reads it too."""
_ANSWER = 4.0
"""Norm of the code that a full copy writes into the residual stream."""
_GAIN = 6.0
"""Logit that a full copy gives its token."""


def begin_with_induction(model: Any, bigrams: Bigrams, seed: int) -> None:
    """Set embedding and head to the bigram model, and the first two blocks' first heads to an induction circuit.

    Needs what `begin_from_bigrams` needs, and rotary attention in at least two blocks. Raises `ConfigError` otherwise.
    """
    width = model.config.hidden_size
    blocks = model.base_model.layers
    if len(blocks) < 2:
        raise ConfigError("model.init", f"induction needs two blocks, model.n_layers is {len(blocks)}")
    head_width = blocks[0].self_attn.head_dim
    n_code = 2 * int(head_width * _CODE_SHARE / 2)
    if n_code < 2 or 2 * n_code + 2 >= width:
        raise ConfigError(
            "model.init",
            f"induction needs {2 * n_code} of model.hidden_size={width} for two codes, and more for the bigrams",
            "Raise model.hidden_size or model.n_heads.",
        )
    begin = begin_from_bigrams(model, bigrams, seed, n_spare=2 * n_code, spare_norm=_CODE_NORM)
    embedding_VD, head_VD = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(seed + 1)
    code_VC = torch.nn.functional.normalize(torch.randn(len(embedding_VD), n_code, generator=generator), dim=1)
    code_at = slice(begin.spare.start, begin.spare.start + n_code)
    note_at = slice(code_at.stop, begin.spare.stop)
    code_norm = _CODE_NORM * begin.scale
    with torch.no_grad():
        embedding_VD[:, code_at] = code_VC * code_norm
        head_VD[:, note_at] = code_VC * (_GAIN / _ANSWER)
        # The note is turned before it is written, or the output head would take it for an answer: the token before, again.
        turn_CC = torch.linalg.qr(torch.randn(n_code, n_code, generator=generator)).Q
        phases = model.base_model.rotary_emb.inv_freq.float()
        _look_back(blocks[0].self_attn, begin.constant_at, begin.constant, phases)
        _copy(blocks[0].self_attn, code_at, 1 / code_norm, note_at, turn_CC * _NOTE)
        _look_for(blocks[1].self_attn, code_at, 1 / code_norm, note_at, turn_CC.T / _NOTE)
        _copy(blocks[1].self_attn, code_at, 1 / code_norm, note_at, torch.eye(n_code) * _ANSWER)


def _look_back(attention: Any, constant_at: int, constant: float, phases: torch.Tensor) -> None:
    """Head 0 attends one place back: constant query and key whose rotary phases differ by one place.

    The logit of a place Δ back is Σ cos((Δ − 1) θ), over the rotary angles θ of one place.
    """
    half, width = len(phases), attention.head_dim
    strength = math.sqrt(_PREVIOUS * math.sqrt(width) / float((1 - phases.cos()).sum())) / constant
    query, key = (torch.zeros(width, attention.q_proj.in_features) for _ in range(2))
    key[:half, constant_at] = strength
    query[:half, constant_at] = strength * phases.cos()
    query[half:, constant_at] = -strength * phases.sin()
    attention.q_proj.weight[:width] = query
    attention.k_proj.weight[:width] = key


def _look_for(attention: Any, code_at: slice, unit: float, note_at: slice, back_CC: torch.Tensor) -> None:
    """Head 0 attends to places whose note is the present token's code, compared in the slowest rotary pairs."""
    width = attention.head_dim
    n_code = code_at.stop - code_at.start
    first = torch.arange(width // 2 - n_code // 2, width // 2)
    places = torch.cat([first, first + width // 2])
    strength = math.sqrt(_MATCH * math.sqrt(width))
    query, key = (torch.zeros(width, attention.q_proj.in_features) for _ in range(2))
    query[places, code_at] = torch.eye(n_code) * (strength * unit)
    key[places, note_at] = back_CC * strength
    attention.q_proj.weight[:width] = query
    attention.k_proj.weight[:width] = key


def _copy(attention: Any, code_at: slice, unit: float, note_at: slice, write_CC: torch.Tensor) -> None:
    """Head 0 writes the code of the token it attends to, as `write_CC` turns and scales it; other heads write nothing."""
    n_code = code_at.stop - code_at.start
    value = torch.zeros(attention.head_dim, attention.v_proj.in_features)
    value[:n_code, code_at] = torch.eye(n_code) * unit
    attention.v_proj.weight[: attention.head_dim] = value
    attention.o_proj.weight.zero_()
    attention.o_proj.weight[note_at, :n_code] = write_CC
