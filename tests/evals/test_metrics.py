"""Metrics against the libraries they are named after; the sandbox."""

import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kajiya.errors import DataError
from kajiya.evals import metrics as m
from kajiya.evals import metrics_labels as ml
from kajiya.evals.answers import Answer
from kajiya.evals.confine import why_unconfined
from kajiya.evals.sandbox import run_program
from kajiya.evals.statistics import compare, interval
from kajiya.evals.tasks import Task

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
    # No number is a miss: as wrong as an answer among the targets can be, and not the mean of them, which nobody wrote.
    silent = [Answer({}, "", str(target), ("no idea",)) for target in (0, 1, 10)]
    assert _value(ml.mae, silent) == pytest.approx((10 + 9 + 10) / 3)
    assert _value(ml.r2, silent) < -1
    assert _value(ml.mae, silent[:1]) == 1
    found = ml.rmse([*answers, silent[1]], None)  # type: ignore[arg-type]
    assert found.details["answers_without_a_number"] == 1
    assert found.signature.startswith("1 of 31 answers hold no number; an answer without a number counts as the value")
    assert ml.rmse(answers, None).signature == ""  # type: ignore[arg-type]
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


@pytest.mark.parametrize(
    ("text", "number"),
    [(".5", 0.5), ("-.25", -0.25), ("1,000", 1000), ("about 12,345,678.5 km", 12345678.5), ("3.2e-1", 0.32), ("+7.", 7),
     ("1,2 and 3", 1), ("1,0000", 1), ("10-5", 10)],
)  # fmt: skip
def test_numbers_are_read_as_they_are_written(text: str, number: float) -> None:
    assert ml._number(text) == number
    answers = [Answer({}, "", str(number), (text,)), Answer({}, "", "2", ("2",))]
    assert _value(ml.rmse, answers) == 0


def test_clusterings_are_compared_by_the_rows_clusters() -> None:
    from sklearn.metrics import normalized_mutual_info_score

    random = np.random.default_rng(0)
    labels = random.integers(0, 3, size=200)
    noise = random.random(200)
    good = np.where(noise < 0.9, labels, (labels + 1) % 3)
    bad = np.where(noise < 0.5, labels, random.integers(0, 3, size=200))
    first, second = ml.clustering_scores(labels, (bad + 1) % 3), ml.clustering_scores(labels, (good + 2) % 3)
    assert second.value() == pytest.approx(normalized_mutual_info_score(labels, good))
    assert (second.rows[:, 1] == good).all()  # numbered as the labels are
    found = compare(first, second)
    assert found.difference > 0.3
    assert found.p_value < 0.01
    again = compare(second, ml.clustering_scores(labels, (good + 1) % 3))
    assert (again.difference, again.p_value) == (pytest.approx(0), 1.0)


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


@pytest.mark.parametrize("ending", ["", "while True: pass", "raise ValueError('wrong')"])
def test_what_a_program_has_started_is_gone_behind_it(ending: str) -> None:
    """Also what has left its session, and what that has started, whether the program ends by itself or runs out of time."""
    mark = f"600.{secrets.randbelow(10**9):09d}"
    started = (
        "import os, time\n"
        "for _ in range(2):\n"
        "    if not os.fork():\n"
        "        os.setsid()\n"
        "        os.fork()\n"
        f"        os.execv('/usr/bin/sleep', ['sleep', '{mark}'])\n"
        "def is_one(process):\n"
        "    try:\n"
        f"        return '{mark}' in open(f'/proc/{{process}}/cmdline').read()\n"
        "    except OSError:\n"
        "        return False\n"
        "while sum(map(is_one, filter(str.isdigit, os.listdir('/proc')))) < 4:\n"
        f"    time.sleep(0.01)\n{ending}\n"
    )
    found = run_program(started, seconds=2 if ending.startswith("while") else 30, memory_mb=512)
    assert found.is_passed == (not ending), found.reason
    assert ("timed out" in found.reason) == ending.startswith("while")
    assert ("ValueError: wrong" in found.reason) == ending.startswith("raise")
    assert [each for each in Path("/proc").iterdir() if each.name.isdigit() and mark in _command(each)] == []


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def test_a_program_finds_names_of_its_own_alone() -> None:
    own = "assert not [each for each in globals() if not each.startswith('__')] and '__file__' not in globals(), globals()"
    assert run_program(own, seconds=10, memory_mb=512).reason == "passed"
    annotated = (
        "from __future__ import annotations\nimport dataclasses, typing\nclass B: pass\n"
        "@dataclasses.dataclass\nclass A:\n    x: B\nassert typing.get_type_hints(A) == {'x': B}"
    )
    assert run_program(annotated, seconds=10, memory_mb=512).reason == "passed"


@pytest.mark.parametrize("early", ["import sys\nsys.exit(0)", "raise SystemExit", "import os\nos._exit(0)"])
def test_a_program_that_exits_before_its_tests_does_not_pass(early: str) -> None:
    found = run_program(f"def f(x): return 0\n{early}\nassert f(1) == 1", seconds=10, memory_mb=512)
    assert not found.is_passed
    assert "exited before its last line" in found.reason


@pytest.mark.skipif(why_unconfined() is not None, reason=str(why_unconfined()))
def test_a_program_changes_files_in_its_own_folder_alone(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")

    def run(source: str) -> Any:
        return run_program(f"import os, pathlib\nkept = {str(kept)!r}\n{source}", seconds=10, memory_mb=512)

    for harm in ("os.remove(kept)", "open(kept, 'w')", "os.truncate(kept, 0)", "os.rename(kept, 'here')",
                 "os.mkdir(kept + '-more')", "os.symlink(kept, kept + '-link')", "os.link(kept, 'here')"):  # fmt: skip
        assert "Permission" in run(harm).reason or "cross-device" in run(harm).reason.lower(), harm
    assert run("assert open(kept).read() == 'mine'").is_passed
    own = "pathlib.Path('a').mkdir(); open('a/b', 'w').write('x'); os.rename('a/b', 'c'); os.remove('c'); os.rmdir('a')"
    assert run(own).is_passed
    assert run("open(os.devnull, 'w').write('x')").is_passed
    assert run("import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)").is_passed
    assert [each.name for each in tmp_path.iterdir()] == ["kept.txt"]
    assert kept.read_text() == "mine"


def test_where_the_kernel_does_not_confine_the_figure_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kajiya.evals.confine._version", lambda: 0)
    monkeypatch.setattr("kajiya.evals.metrics.why_unconfined", why_unconfined.__wrapped__)
    task = Task("t", "", "", ("pass_at_k",), tests="assert {{ answer }} == 1")
    found = m.pass_at_k([Answer({}, "", "", ("1",))], task)
    assert found.scores.value() == 1
    assert "not confined: this system has no Landlock" in found.signature
