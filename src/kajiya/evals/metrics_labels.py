"""Metrics of choices, classes, numbers and vectors; the figures are scikit-learn's and torchmetrics', tested against them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kajiya.errors import DataError, MissingExtraError
from kajiya.evals.answers import Answer
from kajiya.evals.metrics import Measured, shares
from kajiya.evals.statistics import Scores, mean_scores

if TYPE_CHECKING:
    from kajiya.evals.tasks import Task

_ECE_BINS = 15
_CONFUSED_CLASSES = 100


def _right(answer: Answer) -> int:
    """Number of the right choice: written as such, or as the choice's own text."""
    target = answer.target.strip()
    if target in answer.choices:
        return answer.choices.index(target)
    if re.fullmatch(r"\d+", target) and int(target) < len(answer.choices):
        return int(target)
    raise DataError(f"the target {target!r} is neither one of the choices {list(answer.choices)} nor the number of one")


def probabilities(answer: Answer) -> np.ndarray:
    """Softmax of the choices' log-probabilities, float64 [n choices]."""
    shifted = np.array(answer.logprobs) - max(answer.logprobs)
    weights = np.exp(shifted)
    return np.asarray(weights / weights.sum())


def accuracy(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Share of rows whose likeliest choice is the right one."""
    picked = [int(np.argmax(each.logprobs)) for each in answers]
    return Measured(shares([float(p == _right(each)) for p, each in zip(picked, answers, strict=True)]))


def accuracy_by_byte(answers: Sequence[Answer], _task: "Task") -> Measured:
    """The same after dividing each log-probability by the choice's bytes, so that long ones have no handicap."""
    values = [
        float(int(np.argmax(np.array(each.logprobs) / np.maximum(each.n_bytes, 1))) == _right(each)) for each in answers
    ]
    return Measured(shares(values))


def _labels(answers: Sequence[Answer]) -> tuple[np.ndarray, np.ndarray, int]:
    """Right and picked class of each row, and how many classes there are (the same in every row)."""
    n = {len(each.choices) for each in answers}
    if len(n) != 1:
        raise DataError("classes are the same in every row, but the rows have different numbers of choices")
    right = np.array([_right(each) for each in answers])
    return right, np.array([int(np.argmax(each.logprobs)) for each in answers]), n.pop()


def macro_f1(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Unweighted mean over classes of F1, as scikit-learn's `f1_score(average="macro")` over classes that occur.

    Its details hold the confusion matrix, right classes down and picked ones across, of at most 100 classes.
    """
    right, picked, n = _labels(answers)
    rows = np.column_stack([right, picked]).astype(np.float64)

    def table(drawn: np.ndarray) -> np.ndarray:
        pairs = (drawn[:, 0] * n + drawn[:, 1]).astype(np.int64)
        return np.bincount(pairs, minlength=n * n).reshape(n, n)

    def figure(drawn: np.ndarray) -> float:
        found = table(drawn)
        sizes = found.sum(axis=0) + found.sum(axis=1)
        present = sizes > 0
        return float((2 * np.diag(found)[present] / sizes[present]).mean())

    details: dict[str, Any] = {"classes": list(answers[0].choices)}
    if n <= _CONFUSED_CLASSES:
        details["confusion"] = table(rows).tolist()
    return Measured(Scores(rows, figure, by_rows=True, points=100), details=details)


def auroc(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Area under the ROC curve of the second of two classes; of more, the mean over classes of one against the rest."""
    right, _, n = _labels(answers)
    shares = np.stack([probabilities(each) for each in answers])
    rows = np.column_stack([right, shares])

    def area(is_positive: np.ndarray, score: np.ndarray) -> float:
        n_positive = int(is_positive.sum())
        n_negative = len(is_positive) - n_positive
        if not n_positive or not n_negative:
            return math.nan
        _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # Mann–Whitney: ties share a rank
        return float((ranks[is_positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))

    def figure(drawn: np.ndarray) -> float:
        areas = [area(drawn[:, 0] == c, drawn[:, 1 + c]) for c in ([1] if n == 2 else range(n))]
        known = [each for each in areas if not math.isnan(each)]
        return float(np.mean(known)) if known else math.nan

    return Measured(Scores(rows, figure, by_rows=True, points=100), "one against the rest" if n > 2 else "")


def calibration_error(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Expected calibration error over 15 equal bins of the likeliest choice's probability (Guo et al., arXiv:1706.04599)."""
    rows = np.zeros((len(answers), 3 * _ECE_BINS))
    for row, each in zip(rows, answers, strict=True):
        shares = probabilities(each)
        picked = int(np.argmax(shares))
        bin_ = min(_ECE_BINS - 1, max(0, math.ceil(shares[picked] * _ECE_BINS) - 1))
        row[3 * bin_ : 3 * bin_ + 3] = 1.0, shares[picked], float(picked == _right(each))

    def figure(sums: np.ndarray) -> float:
        bins = sums.reshape(_ECE_BINS, 3)
        return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum())

    return Measured(Scores(rows, figure, is_lower_better=True, points=100), f"{_ECE_BINS} equal bins, top choice")


# ---------------------------------------------------------------- numbers


_MISS = "an answer without a number counts as the value farthest from the target among all targets"


@dataclass(frozen=True)
class _Numbers:
    """Written and right numbers; an answer without a number is a miss, and is told.

    A miss counts as wrong as an answer within the targets' range can be: the mean of the targets, say, would flatter a model
    that writes nothing.
    """

    written: np.ndarray
    right: np.ndarray
    notes: list[str]

    @property
    def details(self) -> dict[str, Any]:
        n_missing = sum(map(bool, self.notes))
        return {"answers_without_a_number": n_missing} | ({"rule": _MISS} if n_missing else {})

    @property
    def signature(self) -> str:
        n_missing = sum(map(bool, self.notes))
        return f"{n_missing} of {len(self.notes)} answers hold no number; {_MISS}" if n_missing else ""

    def measured(self, scores: Scores) -> Measured:
        """A figure with what is to be said of it."""
        return Measured(scores, self.signature, self.details, self.notes)


def _numbers(answers: Sequence[Answer]) -> _Numbers:
    right = np.array([_number(each.target) for each in answers])
    if np.isnan(right).any():
        raise DataError("a regression's target must be a number in every row")
    written = np.array([_number(each.text) for each in answers])
    low, high = right.min(), right.max()
    # Of a single target there is no range: a miss is then off by the target's size.
    farthest = np.where(right - low > high - right, low, high) if low < high else right + np.maximum(1, np.abs(right))
    notes = ["no number" if math.isnan(value) else "" for value in written]
    return _Numbers(np.where(np.isnan(written), farthest, written), right, notes)


_NUMBER = re.compile(
    r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"  # 12  1,000.5  .5  1e-3
)


def _number(text: str) -> float:
    found = _NUMBER.search(text)
    return float(found[0].replace(",", "")) if found else math.nan


def rmse(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Root mean squared error of the first number that an answer holds."""
    found = _numbers(answers)
    rows = np.column_stack([(found.written - found.right) ** 2, np.ones(len(answers))])
    return found.measured(Scores(rows, lambda sums: math.sqrt(sums[0] / sums[1]), is_lower_better=True))


def mae(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Mean absolute error of the first number that an answer holds."""
    found = _numbers(answers)
    return found.measured(mean_scores(np.abs(found.written - found.right), True))


def r2(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Coefficient of determination of the first number that an answer holds."""
    found = _numbers(answers)
    right = found.right
    rows = np.column_stack([(found.written - right) ** 2, right, right**2, np.ones(len(right))])

    def figure(sums: np.ndarray) -> float:
        residual, total, squares, n = sums
        spread = squares - total**2 / n
        return 1 - residual / spread if spread > 0 else math.nan

    return found.measured(Scores(rows, figure))


# ---------------------------------------------------------------- vectors


def _vectors(answers: Sequence[Answer]) -> tuple[np.ndarray, np.ndarray]:
    if any(each.vectors is None for each in answers):
        raise DataError("this metric needs a task of kind embed")
    pairs: list[Any] = [each.vectors for each in answers]
    return np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs])


def recall_at_k(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Share of prompts whose own target is the nearest of all by cosine (recall@1); and recall@5, recall@10, MRR."""
    queries, documents = _vectors(answers)
    similar = queries @ documents.T
    own = np.diag(similar)[:, None]
    names = np.array([each.target for each in answers])
    # A tie with another target counts against the own one; the same text twice is one target.
    ranks = ((similar >= own) & (names[:, None] != names[None, :])).sum(axis=1) + 1
    among = f"among {len(answers)} targets"
    more = {f"recall@{k}": Measured(shares((ranks <= k).astype(float)), f"recall@{k} {among}") for k in (5, 10)}
    more["mrr"] = Measured(shares(1 / ranks), f"mean of 1 / rank {among}")
    return Measured(shares((ranks == 1).astype(float)), f"recall@1 {among}", more=more)


def clustering(answers: Sequence[Answer], _task: "Task") -> Measured:
    """Normalized mutual information of k-means clusters of the prompts' vectors and the targets as labels (scikit-learn)."""
    try:
        from sklearn.cluster import KMeans
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "metrics", "Clustering") from error
    vectors, _ = _vectors(answers)
    names = sorted({each.target for each in answers})
    labels = np.array([names.index(each.target) for each in answers])
    found = KMeans(len(names), n_init=10, random_state=0).fit_predict(vectors)
    return Measured(clustering_scores(labels, found), f"k-means, k = {len(names)}, 10 starts")


def clustering_scores(labels: np.ndarray, clusters: np.ndarray) -> Scores:
    """Normalized mutual information of labels and clusters, both int [n].

    Clusters are numbered after the labels that they overlap with most (the assignment that maximizes it): the figure does not
    change, and those of two models can change places row by row.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import normalized_mutual_info_score

    n = int(max(labels.max(), clusters.max())) + 1
    overlap = np.bincount(clusters * n + labels, minlength=n * n).reshape(n, n)
    of_cluster, label = linear_sum_assignment(-overlap)
    rows = np.column_stack([labels, label[np.argsort(of_cluster)][clusters]]).astype(np.float64)

    def figure(drawn: np.ndarray) -> float:
        return float(normalized_mutual_info_score(drawn[:, 0], drawn[:, 1]))

    return Scores(rows, figure, by_rows=True, points=100)
