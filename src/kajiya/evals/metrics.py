"""Metrics of text answers, each as statistics of single rows, so that intervals and paired tests work for all of them."""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kajiya.errors import MissingExtraError
from kajiya.evals.answers import Answer
from kajiya.evals.confine import why_unconfined
from kajiya.evals.sandbox import run_program
from kajiya.evals.statistics import Scores, mean_scores

if TYPE_CHECKING:
    from kajiya.evals.tasks import Task


@dataclass(frozen=True)
class Measured:
    """What a metric says of a task's answers."""

    scores: Scores
    signature: str = ""
    """How the figure was computed, where there are several customs."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further findings, JSON."""
    notes: Sequence[str] = ()
    """A word on each row, or none."""
    more: Mapping[str, "Measured"] = field(default_factory=dict)
    """Figures beside it, by name, each with its own interval."""


def exact_match(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Share of answers that equal the target but for white space around them."""
    return Measured(shares([float(each.text.strip() == each.target.strip()) for each in answers]))


def shares(values: Sequence[float] | np.ndarray) -> Scores:
    """The mean of one share a row, 0 to 1, which is told in points of a hundred."""
    return mean_scores(values, points=100)


def token_f1(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Mean F1 of the words of answer and target, lower-cased, without punctuation and articles (SQuAD, arXiv:1606.05250)."""
    return Measured(shares([_f1(_words(each.text), _words(each.target)) for each in answers]), "SQuAD v1.1")


def _words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _f1(answer: list[str], target: list[str]) -> float:
    common = sum((Counter(answer) & Counter(target)).values())
    if not answer or not target:
        return float(answer == target)
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / len(target)
    return 2 * precision * recall / (precision + recall)


def bleu(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Corpus BLEU (Papineni et al., 2002) by sacreBLEU, 0 to 100, with its signature."""
    metric = _sacrebleu("BLEU")()
    rows = np.array([_bleu_statistics(metric, each) for each in answers], dtype=np.float64)

    def figure(sums: np.ndarray) -> float:
        return float(metric._compute_score_from_stats([float(value) for value in sums]).score)

    return Measured(Scores(rows, figure, points=1), str(metric.get_signature()))


def chrf(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Corpus chrF (Popović, 2015) by sacreBLEU, 0 to 100, with its signature."""
    metric = _sacrebleu("CHRF")()
    rows = np.array([_bleu_statistics(metric, each) for each in answers], dtype=np.float64)

    def figure(sums: np.ndarray) -> float:
        return float(metric._compute_score_from_stats([float(value) for value in sums]).score)

    return Measured(Scores(rows, figure, points=1), str(metric.get_signature()))


def _bleu_statistics(metric: Any, answer: Answer) -> list[int]:
    # sacreBLEU's own extraction, one row at a time: its corpus score is a function of the rows' sums.
    statistics: list[int] = metric._extract_corpus_statistics([answer.text], [[answer.target]])[0]
    return statistics


def _sacrebleu(name: str) -> Any:
    try:
        import sacrebleu.metrics as found
    except ModuleNotFoundError as error:
        raise MissingExtraError("sacrebleu", "metrics", "BLEU and chrF") from error
    return vars(found)[name]


def rouge_l(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Mean F-measure of the longest common subsequence (Lin, 2004) by rouge-score, with stemming."""
    return _rouge(answers, "rougeL")


def rouge_1(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Mean F-measure of single words by rouge-score, with stemming."""
    return _rouge(answers, "rouge1")


def rouge_2(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Mean F-measure of pairs of words by rouge-score, with stemming."""
    return _rouge(answers, "rouge2")


def _rouge(answers: Sequence[Answer], kind: str) -> Measured:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise MissingExtraError("rouge-score", "metrics", "ROUGE") from error
    scorer = RougeScorer([kind], use_stemmer=True)
    found = [scorer.score(each.target, each.text)[kind].fmeasure for each in answers]
    return Measured(shares(found), f"{kind}, stemmed, F1")


def pass_at_k(answers: Sequence[Answer], task: "Task") -> Measured:
    """Mean chance that one of k answers passes its tests: 1 − C(n − c, k) / C(n, k) (Chen et al., arXiv:2107.03374, eq. 1).

    k is 1 and those of the task's `k`, else, with as many samples, 5, 10 and 100.
    """
    from kajiya.evals.tasks import test_program

    passed, notes, why = [], [], why_unconfined()
    for each in answers:
        programs = [test_program(task, each.row, text) for text in each.texts]
        ends = [run_program(program, seconds=task.seconds, memory_mb=task.memory_mb) for program in programs]
        n_passed = sum(end.is_passed for end in ends)
        passed.append(n_passed)
        notes.append(f"{n_passed} of {len(ends)} passed; the first: {ends[0].reason}")

    def at(k: int) -> Measured:
        rates = [estimate_pass(task.samples, n_passed, k) for n_passed in passed]
        signature = f"pass@{k} of {task.samples} samples" + (f"; programs were not confined: {why}" if why else "")
        return Measured(shares(rates), signature, notes=notes)

    further = [k for k in task.k or (5, 10, 100) if 1 < k <= task.samples]
    return replace(at(1), more={f"pass@{k}": at(k) for k in further})


def estimate_pass(n: int, n_passed: int, k: int) -> float:
    """The unbiased estimate of pass@k from `n_passed` of `n` samples."""
    return 1.0 - math.comb(n - n_passed, k) / math.comb(n, k)


def judge(answers: Sequence[Answer], task: "Task") -> Measured:
    """Share of rows in which a judging model prefers the answer to the reference; asked twice, with the places swapped."""
    from kajiya.evals.judge import judge_pairs

    assert task.judge is not None
    found = judge_pairs(task.judge, [(each.prompt, each.text, each.target) for each in answers])
    n_silent = sum(not verdict.is_complete for verdict in found)
    n_flipped = sum(verdict.is_complete and not verdict.is_consistent for verdict in found)
    n = max(1, len(found))
    details = {"changed_its_mind_when_swapped": n_flipped / n, "gave_no_verdict": n_silent / n}
    signature = f"{task.judge.model}, both orders, ½ for a tie or a change of mind"
    if n_silent:
        signature += f"; ½ also for {n_silent} of {n} rows without a verdict"
    return Measured(shares([v.score for v in found]), signature, details, [v.note for v in found])
