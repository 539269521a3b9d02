"""What a run used is told; reports compare runs in pairs. The replay itself is run by its verb, in `test_verbs`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tests.conftest import Finished

from kajiya.config.schema import Config
from kajiya.flows.report import write_report
from kajiya.flows.report_comparison import _compare_documents
from kajiya.flows.report_facts import gather
from kajiya.flows.train import train
from kajiya.run.usage import usage_with


def test_usage_adds_up() -> None:
    first = usage_with(None)
    second = usage_with(first)
    assert second["cpu_seconds"] >= 2 * first["cpu_seconds"] > 0
    assert second["peak_bytes"] >= first["peak_bytes"] > 2**20


def test_a_report_of_two_runs_compares_them_by_document(
    own_finished: Finished, small_config: Callable[..., Config], tmp_path: Path
) -> None:
    other = train(small_config("seed=5", "train.steps=24", "eval.baselines=[]"), own_finished.store)
    runs = [own_finished.trained.run, other.run]
    text = write_report(runs, tmp_path).with_name("report.md").read_text()
    assert "## Paired comparison" in text
    assert "On bits per byte," in text
    assert "## Cost" in text
    assert "nothing was measured at the socket" in text
    a, b = gather(runs)
    found = _compare_documents(a, b)
    bits = [np.array([each.bits for each in run.documents]) for run in (a, b)]
    n_bytes = np.array([each.n_bytes for each in a.documents])
    assert found.difference == pytest.approx((bits[1].sum() - bits[0].sum()) / n_bytes.sum())

    def gap(x: np.ndarray, y: np.ndarray) -> float:
        return float((y.sum() - x.sum()) / n_bytes.sum())

    theirs = stats.permutation_test(bits, gap, permutation_type="samples", n_resamples=np.inf)
    assert found.p_value == pytest.approx(theirs.pvalue)
