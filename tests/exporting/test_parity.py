"""The measures against their definitions, and what is past a tolerance."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kajiya.errors import ParityError
from kajiya.exporting.evidence import gather, halved, perplexity
from kajiya.exporting.parity import TOLERANCES, compare, distance, require_parity

Make = Callable[..., Any]
IDS = [[0, 5, 9, 33, 7, 8, 12, 90, 4], [0, 60, 61, 62, 63, 1]]
ROWS = [halved(ids) for ids in IDS]


def test_the_measures_are_those_of_their_definitions(tiny_model: Make) -> None:
    parent, result = tiny_model(seed=0).eval(), tiny_model(seed=1).eval()
    found = compare(parent, result, gather(parent, ROWS))
    kl = same = nll = 0.0
    worst = 0.0
    for row in IDS:
        with torch.no_grad():
            a, b = (model(input_ids=torch.tensor([row])).logits[0].double() for model in (parent, result))
        p, q = a.softmax(-1), b.softmax(-1)
        kl += float((p * (p / q).log()).sum())
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
        nll -= sum(math.log(q[i, row[i + 1]]) for i in range(len(row) - 1))
        worst = max(worst, float((a - b).abs().max()))
    n_tokens = sum(len(row) for row in IDS)
    assert found.n_tokens == n_tokens
    assert found.kl == pytest.approx(kl / n_tokens, rel=1e-4)
    assert found.top1 == pytest.approx(same / n_tokens)
    assert found.perplexity == pytest.approx(math.exp(nll / (n_tokens - 2)), rel=1e-4)
    assert found.perplexity == pytest.approx(perplexity(result, ROWS), rel=1e-5)
    assert found.max_difference == pytest.approx(worst, rel=1e-3)
    assert found.problems() != []


def test_equal_models_agree_in_all(tiny_model: Make) -> None:
    parent = tiny_model().eval()
    found = compare(parent, tiny_model().eval(), gather(parent, ROWS))
    assert (found.max_difference, found.kl, found.top1, found.greedy) == (0.0, 0.0, 1.0, 1.0)
    require_parity("it", [found])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1.0, math.nan])
def test_one_wrong_weight_is_past_the_tolerance(dtype: torch.dtype, value: float, tiny_model: Make) -> None:
    parent, result = (tiny_model(init_std=0.5).to(dtype).eval() for _ in range(2))
    with torch.no_grad():
        result.model.layers[1].mlp.down_proj.weight[3, :8] += value
    with pytest.raises(ParityError, match="does not compute what its parent does"):
        require_parity("the result", [compare(parent, result, gather(parent, ROWS))])


def test_weights_that_were_rounded_are_held_to_the_tolerance_of_their_dtype(tiny_model: Make) -> None:
    """In float32 too: their logits differ by more than float32's own tolerance, and by less than bf16's."""
    parent, result = (tiny_model(init_std=0.1).eval() for _ in range(2))
    result.to(torch.bfloat16).to(torch.float32)
    with pytest.raises(ParityError, match="a logit differs by"):
        require_parity("the result", [compare(parent, result, gather(parent, ROWS))])
    found = compare(parent, result, gather(parent, ROWS), stored=torch.bfloat16)
    assert found.tolerance == TOLERANCES[torch.bfloat16]
    assert found.rounding is None
    require_parity("the result", [found])


def test_what_rounding_does_to_the_parent_itself_is_taken_off(tiny_model: Make) -> None:
    parent, rounded = (tiny_model(init_std=0.5).eval() for _ in range(2))
    rounded.to(torch.bfloat16)
    evidence = gather(parent, ROWS)
    alone = compare(parent, rounded, evidence)
    assert alone.kl > 1e-3
    with pytest.raises(ParityError, match="KL"):
        require_parity("the result", [alone])
    rounding = distance(parent, rounded, evidence, torch.bfloat16)
    found = compare(parent, rounded, evidence, rounding=rounding)
    assert found.rounding is not None
    assert (found.rounding.kl, found.rounding.top1) == (found.kl, found.top1) == (alone.kl, alone.top1)
    require_parity("the result", [found])
    with torch.no_grad():
        other = tiny_model(init_std=0.5).eval().to(torch.bfloat16)
        other.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(ParityError, match="does not compute what its parent does"):
        require_parity("the result", [compare(parent, other, evidence, rounding=rounding)])


def test_tokens_that_the_dtype_cannot_tell_apart_are_tied() -> None:
    class Two(torch.nn.Module):
        """Of two tokens, the second's logit is larger by `lead`, and the others' are far below."""

        def __init__(self, lead: float, dtype: torch.dtype) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor([8.0, 8.0 + lead, -8.0, -9.0]).to(dtype))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(*tokens.shape, -1)

    for dtype, lead, share in (
        (torch.bfloat16, 0.0625, 1.0),
        (torch.bfloat16, 0.125, 0.0),
        (torch.float32, 0.0625, 0.0),
    ):
        parent = Two(-lead, dtype)
        found = compare(parent, Two(lead, dtype), gather(parent, [halved([0, 1, 2])]))
        assert found.top1 == share, (dtype, lead)


class Table(torch.nn.Module):
    """A token's logits are its row of the table [V, V]."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits[tokens]


def cycle(dtype: torch.dtype = torch.float32) -> Table:
    """Each of eight tokens is followed by the next one, but for 3, behind which 6 comes."""
    logits = 8 * torch.eye(8).roll(1, dims=1)
    logits[3] = 8 * torch.eye(8)[6]
    return Table(logits.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_that_goes_on_otherwise_is_refused_though_it_agrees_on_the_rows(dtype: torch.dtype) -> None:
    """The rows never show what comes behind 6, which the parent's own continuation of them does."""
    parent, result = cycle(), cycle(dtype)
    evidence = gather(parent, [halved([0, 1, 2, 3])])
    assert evidence.continued[0].ids[:8] == (0, 1, 2, 3, 6, 7, 0, 1)
    require_parity("the result", [compare(parent, result, evidence)])
    with torch.no_grad():
        result.logits[6] = result.logits[5]
    found = compare(parent, result, evidence)
    assert (found.kl, found.top1) == (0.0, 1.0)
    assert found.greedy is not None
    assert found.greedy < 0.9
    with pytest.raises(ParityError, match=r"goes on greedily as its parent does at .* of 24 tokens"):
        require_parity("the result", [found])


def test_a_perplexity_that_moves_is_refused_though_kl_and_top1_hardly_do() -> None:
    """A rare token that the text has and the models think unlikely costs little divergence, and much perplexity."""
    parent, result = cycle(), cycle(torch.bfloat16)
    with torch.no_grad():
        result.logits[3, 4] = -4.0
    evidence = gather(parent, [halved([0, 1, 2, 3, 4])])
    found = compare(parent, result, evidence)
    assert found.kl < 1e-3
    assert found.top1 == found.greedy == 1.0
    with pytest.raises(ParityError, match=r"perplexity .*, the parent's .* \(allowed: a change of 1.00%\)"):
        require_parity("the result", [found])
    rounding = distance(parent, result, evidence, torch.bfloat16)
    held = compare(parent, result, evidence, rounding=rounding)
    assert held.allowed.perplexity == pytest.approx(0.01 + abs(found.perplexity / found.parent_perplexity - 1))
    require_parity("the result", [held])
