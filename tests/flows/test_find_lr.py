"""`--find-lr` on real text: a plot and a suggestion, and nothing that a run of the config would take for its own."""

import json
from collections.abc import Callable
from pathlib import Path

from kajiya.config.schema import Config
from kajiya.flows.find_lr import find_lr
from kajiya.run.folder import list_runs
from kajiya.run.store import Store


def test_it_leaves_a_plot_and_no_run(small_config: Callable[..., Config], tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = find_lr(small_config("train.compile=off"), store, steps=20)
    assert found.plot.read_bytes().startswith(b"\x89PNG")
    kept = json.loads((found.plot.parent / "lr-range.json").read_text())
    assert kept["suggestion"] == found.test.suggestion
    assert min(kept["rates"]) < found.test.suggestion < max(kept["rates"])
    assert list_runs(store) == []
