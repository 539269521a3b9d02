"""The proof that a runner computes what the plain model does, made before it answers anyone.

Shape letters: T tokens, V vocabulary, N outputs, K inputs, G groups, I inputs of a group.
"""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from kajiya.errors import KajiyaError
from kajiya.serving.native.layout import GROUP
from kajiya.serving.scheduler import Chunk, Plan
from kajiya.serving.sequence import Request, SamplingParams, new_sequence

if TYPE_CHECKING:
    from kajiya.serving.runner import Runner

FALLBACK = "serve.runner=plain serves it without a cache, slowly; serve.engine=vllm hands it to vLLM."
_PROBE_TOKENS = 23
_PROBE_CHUNKS = (7, 4, 1, 10, 1)
TOLERANCE = {"fp32": 1e-3, "bf16": 0.15, "int8": 0.25, "int4": 0.25}
"""Largest root mean square difference between the runner's logits and the plain model's, in standard deviations of the
logits; bf16 holds for caches in 8 bits too. A wrong mask or position makes it about 1.4; rounding to bf16 reaches a tenth of its
tolerance in trained models. For weights in 8 and 4 bits the plain model has products of the same rounded weights and activations
(`plain_logits`), so that how coarse they are does not matter: what is left is the rounding of the cache, and activations that it
carries over to another integer."""
_INTEGERS = {"int8": (127, 127.0), "int4": (7, -8.0)}
"""Largest integer of a weight, and the one that the weight largest in size becomes; the smallest is one below the largest's
opposite."""


@torch.inference_mode()
def plain_logits(model: Any, weights: str = "fp32") -> torch.Tensor:
    """What the plain model says to the probe, fp32 [T, V]; with `weights` int8 or int4 with products rounded as the decoder's."""
    ids = probe_ids(model.config.get_text_config().vocab_size)
    with contextlib.ExitStack() as hooks:
        if weights in _INTEGERS:
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    hooks.callback(module.register_forward_hook(_rounded_product(weights)).remove)
        logits_TV: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return logits_TV.float()


def compare(runner: "Runner", plain_TV: torch.Tensor, precision: str, kind: str) -> None:
    """Read a few tokens through the cache, in chunks, and compare with the plain model.

    Raises `KajiyaError` when the two disagree: the model's architecture does something that the runner does not know, and
    would answer wrongly without a sign.
    """
    found_TV = read_logits(runner, probe_ids(plain_TV.shape[1]), _PROBE_CHUNKS)
    difference = (found_TV - plain_TV).square().mean().sqrt() / plain_TV.std().clamp(min=1e-6)
    if not difference.item() <= TOLERANCE[precision]:
        raise KajiyaError(
            f"The engine cannot drive a {kind} model: its logits differ from the plain model's by "
            f"{difference.item():.2g} standard deviations (allowed: {TOLERANCE[precision]:g}).\n{FALLBACK}"
        )


def read_logits(runner: "Runner", ids: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """The runner's logits [T, V] behind each of the tokens, read in chunks of these sizes through the first blocks of its cache."""
    request = Request("probe", tuple(ids), SamplingParams(max_tokens=0, prompt_logprobs=True))
    sequence = new_sequence(request, frozenset())
    # Not in order, as blocks come after a while.
    n_blocks = -(-len(ids) // runner.block_tokens)
    sequence.blocks = [min(block, runner.n_blocks - 1) for block in reversed(range(n_blocks))]
    pieces, start = [], 0
    for count in counts:
        chunk = Chunk(sequence, start, tuple(ids[start : start + count]))
        pieces.append(runner.run(Plan((), (chunk,)))["probe"].logits.clone())
        start += count
    return torch.cat(pieces)


def rounded_weights(weights_NK: torch.Tensor, kind: str) -> torch.Tensor:
    """The weights as the decoder's integers stand for them, fp32: in groups of inputs with a scale in bf16 (`quantize_group`)."""
    largest, peak_becomes = _INTEGERS[kind]
    groups_NGI = _groups(weights_NK)
    sizes_NGI = groups_NGI.abs()
    # The first of those that are largest in size: of w and −w, one becomes −8 and the other 7.
    first_NG = (sizes_NGI == sizes_NGI.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
    scales_NG1 = (groups_NGI.gather(-1, first_NG) / peak_becomes).bfloat16().float()
    integers_NGI = (groups_NGI / scales_NG1).nan_to_num(0.0, 0.0, 0.0).round().clamp(-largest - 1, largest)
    return (integers_NGI * scales_NG1).flatten(1)[:, : weights_NK.shape[1]]


def rounded_activations(x_TK: torch.Tensor) -> torch.Tensor:
    """Activations as they meet weights of 8 and 4 bits, fp32: in groups, the largest in size being 127 (`quantize_values`)."""
    groups_TGI = _groups(x_TK)
    peaks_TG1 = groups_TGI.abs().amax(-1, keepdim=True)
    integers_TGI = (groups_TGI * (127 / peaks_TG1)).nan_to_num(0.0, 0.0, 0.0).round()
    rounded_TK: torch.Tensor = (integers_TGI * (peaks_TG1 / 127)).flatten(1)[:, : x_TK.shape[1]]
    return rounded_TK


def _groups(matrix: torch.Tensor) -> torch.Tensor:
    padded: torch.Tensor = functional.pad(matrix.float(), (0, -matrix.shape[1] % GROUP))
    groups: torch.Tensor = padded.unflatten(1, (-1, GROUP))
    return groups


def _rounded_product(kind: str) -> Any:
    """A hook that has a module multiply as the decoder does."""

    def product(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x_TK = rounded_activations(inputs[0].flatten(0, -2))
        bias = None if module.bias is None else module.bias.float()
        found: torch.Tensor = functional.linear(x_TK, rounded_weights(module.weight, kind), bias)
        return found.view_as(output).to(output.dtype)

    return product


def probe_ids(vocab_size: int) -> list[int]:
    """The tokens that are read for the proof."""
    return [(7 + 31 * i) % vocab_size for i in range(_PROBE_TOKENS)]
