"""Metrics against the libraries they are named after; the sandbox; the judge against a stub endpoint."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest

from kajiya.errors import DataError, KajiyaError
from kajiya.evals import metrics as m
from kajiya.evals import metrics_labels as ml
from kajiya.evals.answers import Answer, Endpoint, Sampling
from kajiya.evals.judge import judge_pairs
from kajiya.evals.sandbox import run_program
from kajiya.evals.statistics import compare, interval
from kajiya.evals.tasks import JudgeConfig

TEXTS = ["the cat sat on the mat", "a quick brown fox jumps", "hello there world", "to be or not to be that is it"]
TARGETS = ["the cat is on the mat", "the quick brown fox jumped over", "hello world", "to be or not to be"]


def _texts() -> list[Answer]:
    return [Answer({}, "", target, (text,)) for text, target in zip(TEXTS, TARGETS, strict=True)]


def _value(metric: Any, answers: list[Answer]) -> float:
    return float(metric(answers, None).scores.value())


def test_bleu_and_chrf_are_sacrebleus() -> None:
    import sacrebleu

    assert _value(m.bleu, _texts()) == pytest.approx(sacrebleu.corpus_bleu(TEXTS, [TARGETS]).score)
    assert _value(m.chrf, _texts()) == pytest.approx(sacrebleu.corpus_chrf(TEXTS, [TARGETS]).score)
    assert m.bleu(_texts(), None).signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")  # type: ignore[arg-type]
    low, high = interval(m.bleu(_texts(), None).scores)  # type: ignore[arg-type]
    assert low < _value(m.bleu, _texts()) < high


def test_rouge_f1_and_exact_match() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    theirs = [RougeScorer(["rougeL"], use_stemmer=True).score(b, a)["rougeL"].fmeasure
              for a, b in zip(TEXTS, TARGETS, strict=True)]  # fmt: skip
    assert _value(m.rouge_l, _texts()) == pytest.approx(np.mean(theirs))
    # "cat sat on mat" against "cat is on mat": 3 words in common of 4 and 4.
    assert m.token_f1(_texts()[:1], None).scores.value() == pytest.approx(0.75)  # type: ignore[arg-type]
    answers = [Answer({}, "", "yes", (" yes\n",)), Answer({}, "", "yes", ("no",))]
    assert _value(m.exact_match, answers) == 0.5


def _chosen(n: int = 60, n_classes: int = 3) -> list[Answer]:
    random = np.random.default_rng(0)
    choices = tuple("abc"[:n_classes])
    return [
        Answer(
            {},
            "",
            choices[random.integers(n_classes)],
            ("a",),
            choices,
            tuple(random.normal(size=n_classes)),
            (1,) * n_classes,
        )
        for _ in range(n)
    ]


def test_classification_is_scikit_learns_and_torchmetrics() -> None:
    import torch
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score
    from torchmetrics.classification import MulticlassCalibrationError

    for n_classes in (2, 3):
        answers = _chosen(n_classes=n_classes)
        right = np.array([answer.choices.index(answer.target) for answer in answers])
        shares = np.stack([ml.probabilities(answer) for answer in answers])
        picked = shares.argmax(axis=1)
        assert _value(ml.accuracy, answers) == pytest.approx(accuracy_score(right, picked))
        assert _value(ml.macro_f1, answers) == pytest.approx(f1_score(right, picked, average="macro"))
        assert ml.macro_f1(answers, None).details["confusion"] == confusion_matrix(right, picked).tolist()  # type: ignore[arg-type]
        area = roc_auc_score(right, shares[:, 1] if n_classes == 2 else shares, multi_class="ovr")
        assert _value(ml.auroc, answers) == pytest.approx(area)
        theirs = MulticlassCalibrationError(n_classes, n_bins=15, norm="l1")(torch.tensor(shares), torch.tensor(right))
        assert _value(ml.calibration_error, answers) == pytest.approx(float(theirs), abs=1e-6)


def test_regression_is_scikit_learns() -> None:
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    random = np.random.default_rng(1)
    right = random.normal(size=30)
    written = right + random.normal(0, 0.3, size=30)
    answers = [
        Answer({}, "", repr(float(r)), (f"it is {float(w)!r} or so",)) for r, w in zip(right, written, strict=True)
    ]
    assert _value(ml.rmse, answers) == pytest.approx(root_mean_squared_error(right, written))
    assert _value(ml.mae, answers) == pytest.approx(mean_absolute_error(right, written))
    assert _value(ml.r2, answers) == pytest.approx(r2_score(right, written))
    silent = ml.rmse([*answers, Answer({}, "", "1", ("no idea",))], None)  # type: ignore[arg-type]
    assert silent.details["answers_without_a_number"] == 1
    with pytest.raises(DataError, match="must be a number"):
        ml.rmse([Answer({}, "", "one", ("1",))], None)  # type: ignore[arg-type]


def test_vectors() -> None:
    eye = np.eye(4, dtype=np.float32)
    near = eye + 0.1
    answers = [Answer({}, "", str(i), ("",), vectors=(near[i], eye[i] if i else -eye[0])) for i in range(4)]
    found = ml.recall_at_k(answers, None)  # type: ignore[arg-type]
    assert found.scores.value() == 0.75  # row 0's target is no nearer than those of the others
    assert found.more["recall@5"].scores.value() == 1.0
    assert found.more["mrr"].scores.value() == pytest.approx((1 / 4 + 3) / 4)
    blobs = np.array([[0, 1], [1, 0], [0, 1.01], [1.01, 0]], dtype=np.float32)
    grouped = [Answer({}, "", "ab"[i % 2], ("",), vectors=(blobs[i], blobs[i])) for i in range(4)]
    assert ml.clustering(grouped, None).scores.value() == pytest.approx(1.0)  # type: ignore[arg-type]


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    from itertools import combinations

    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 4)):
        drawn = [any(i < c for i in chosen) for chosen in combinations(range(n), k)]
        assert m.estimate_pass(n, c, k) == pytest.approx(np.mean(drawn))


def test_paired_comparison_of_a_corpus_metric() -> None:
    from itertools import product

    import sacrebleu

    others = ["the cat sat", "a brown fox", "hello there", "to be it is"]
    found = compare(
        m.bleu([Answer({}, "", b, (a,)) for a, b in zip(others, TARGETS, strict=True)], None).scores,  # type: ignore[arg-type]
        m.bleu(_texts(), None).scores,  # type: ignore[arg-type]
    )
    assert found.test == "exact permutation"

    def difference(swaps: tuple[bool, ...]) -> float:
        pairs = [(b, a) if swap else (a, b) for swap, a, b in zip(swaps, others, TEXTS, strict=True)]
        first, second = (sacrebleu.corpus_bleu([pair[i] for pair in pairs], [TARGETS]).score for i in (0, 1))
        return second - first

    every = [abs(difference(swaps)) for swaps in product((False, True), repeat=4)]
    assert found.difference == pytest.approx(difference((False,) * 4))
    assert found.p_value == pytest.approx(np.mean([each >= abs(found.difference) - 1e-9 for each in every]))


# ---------------------------------------------------------------- sandbox


def test_programs_are_held_to_their_limits() -> None:
    def run(source: str, seconds: float = 10.0) -> m.Any:
        return run_program(source, seconds=seconds, memory_mb=512)

    assert run("print('fine')").is_passed
    assert "AssertionError" in run("assert 1 == 2").reason
    assert "timed out" in run("while True: pass", seconds=0.5).reason
    assert "MemoryError" in run("x = bytearray(2**31)").reason
    assert not run("open('big', 'wb').write(b'x' * 2**22)").is_passed
    assert run("import os; assert set(os.environ) <= {'HOME', 'TMPDIR', 'OMP_NUM_THREADS', 'LC_CTYPE'}").is_passed
    assert run("import os; assert os.listdir('.') == []").is_passed
    assert "SIGKILL" in run("import os; os.kill(os.getpid(), 9)").reason


# ---------------------------------------------------------------- a stub endpoint


class _Stub(BaseHTTPRequestHandler):
    asked: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "stub"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        if self.path == "/v1/embeddings":
            self._reply({"data": [{"embedding": [3.0, 4.0]} for _ in body["input"]]})
        elif self.path == "/v1/completions":
            self._reply({"choices": [{"text": body["prompt"].upper() + "\nmore"}] * body["n"]})
        else:
            self._reply({"choices": [{"message": {"content": self._judge(body["messages"][0]["content"])}}]})

    @staticmethod
    def _judge(text: str) -> str:
        """Prefers `good`; of two equals the first one; says nothing useful of `odd`."""
        first, second = text.split("Answer 1:\n")[1].split("\n\nAnswer 2:\n")
        second = second.split("\n\nReason")[0]
        if "odd" in text:
            return "I cannot say."
        if ("good" in first) != ("good" in second):
            return f"Because.\nVERDICT: {1 if 'good' in first else 2}"
        return "VERDICT: 1"

    def _reply(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing on the screen."""


@pytest.fixture
def url() -> Iterator[str]:
    _Stub.asked = []
    server = HTTPServer(("127.0.0.1", 0), _Stub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_judge_is_asked_in_both_orders(url: str) -> None:
    rows = [("q", "good", "bad"), ("q", "bad", "good"), ("q", "same", "same"), ("q", "odd", "bad")]
    found = judge_pairs(JudgeConfig(url, "stub"), rows)
    assert [(each.score, each.is_consistent) for each in found] == [
        (1.0, True),
        (0.0, True),
        (0.5, False),
        (0.5, False),
    ]
    assert len(_Stub.asked) == 8
    with pytest.raises(KajiyaError, match="never gave a verdict"):
        judge_pairs(JudgeConfig(url, "stub"), rows[3:])


def test_an_endpoint_answers_tasks(url: str) -> None:
    endpoint = Endpoint(url)
    assert endpoint.model == "stub"
    assert endpoint.complete(["ab"], Sampling(8, 0.5, 1, 2, ("\n",), False)) == [("AB", "AB")]
    assert _Stub.asked[0]["stop"] == ["\n"]
    assert np.allclose(endpoint.embed(["x"]), [[0.6, 0.8]])
    with pytest.raises(KajiyaError, match="does not answer"):
        Endpoint("http://127.0.0.1:9/v1", "none").complete(["a"], Sampling(1, 0, 0, 1, (), False))
