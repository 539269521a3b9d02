"""A language model as judge of two answers, asked in both orders: its liking for a place is not a liking for an answer."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kajiya.errors import ConfigError, KajiyaError
from kajiya.evals.answers import Sampling
from kajiya.evals.endpoint import Endpoint

if TYPE_CHECKING:
    from kajiya.evals.tasks import JudgeConfig

_PROMPT = """{question}

Request:
{request}

Answer 1:
{first}

Answer 2:
{second}

Reason briefly. Then end with a line of its own: VERDICT: 1, VERDICT: 2 or VERDICT: TIE."""
_VERDICT = re.compile(r"VERDICT:\s*(1|2|TIE)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Judgement:
    """Of one row: 1 for the answer, 0 for the reference, ½ where neither holds in both orders, or a verdict is missing."""

    score: float
    is_consistent: bool
    is_complete: bool
    """Whether it gave a verdict both times."""
    note: str


def judge_pairs(judge: "JudgeConfig", rows: Sequence[tuple[str, str, str]]) -> list[Judgement]:
    """Judge (request, answer, reference) triples, each twice with the places swapped (Zheng et al., arXiv:2306.05685, 3.4).

    Raises `KajiyaError` when the endpoint fails, or where no judgement at all holds a verdict, and `ConfigError` without the
    key that the task names.
    """
    endpoint = Endpoint(judge.url, judge.model, _key(judge))
    prompts = []
    for request, answer, reference in rows:
        for first, second in ((answer, reference), (reference, answer)):
            prompts.append(_PROMPT.format(question=judge.question, request=request, first=first, second=second))
    sampling = Sampling(judge.max_tokens, 0.0, 0, 1, (), True)
    said = [texts[0] for texts in endpoint.complete(prompts, sampling)]
    verdicts = [_read(text) for text in said]
    if rows and all(verdict is None for verdict in verdicts):
        raise KajiyaError(f"The judge {judge.model} never gave a verdict; it said: {said[0][:200]!r}")
    return [_combine(verdicts[i], verdicts[i + 1]) for i in range(0, len(verdicts), 2)]


def _key(judge: "JudgeConfig") -> str | None:
    if judge.key_variable is None:
        return None
    key = os.environ.get(judge.key_variable)
    if not key:
        raise ConfigError(
            "judge.key_variable", f"the environment has no {judge.key_variable}, which is to hold the judge's key"
        )
    return key


def _read(text: str) -> str | None:
    found = _VERDICT.findall(text)
    return found[-1].upper() if found else None


def _combine(straight: str | None, swapped: str | None) -> Judgement:
    """`straight`: the answer stood first; `swapped`: second."""
    first = {"1": 1.0, "2": 0.0, "TIE": 0.5}.get(straight or "")
    second = {"1": 0.0, "2": 1.0, "TIE": 0.5}.get(swapped or "")
    if first is None or second is None:
        return Judgement(0.5, False, False, "no verdict")
    if first == second:
        return Judgement(first, True, True, {1.0: "answer", 0.0: "reference", 0.5: "tie"}[first])
    return Judgement(0.5, False, True, "changed its mind when the answers changed places")
