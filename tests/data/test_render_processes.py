"""Rows rendered by several processes: the same shards as in one, the same refusals; a process that is killed is said."""

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kajiya.config.schema import DataConfig, RenderConfig, SourceConfig
from kajiya.data import render_processes
from kajiya.data.corpus import build_corpus
from kajiya.data.documents import open_documents
from kajiya.data.render import open_renderer
from kajiya.data.render_processes import RenderProcesses, RowsTask, processes_for
from kajiya.data.shards import Rendering, build_shards
from kajiya.errors import DataError
from kajiya.run.store import Artifact, Store


def conversation(number: int) -> list[dict[str, Any]]:
    """Answers of weights that differ; every hundredth row has none that is trained."""
    weights = (0, 0) if number % 100 == 50 else (1 + number % 5 / 4, number % 3)
    turns = [("user", f"Question {number}?", 0), ("assistant", f"Answer {number}.", weights[0])]
    turns += [("user", "And then?", 0), ("assistant", "Nothing " * (number % 40 + 1), weights[1])]
    return [{"role": role, "content": content, "weight": weight} for role, content, weight in turns]


@pytest.fixture(scope="module")
def prepared(small: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Artifact, Rendering]:
    root = tmp_path_factory.mktemp("rows")
    (root / "rows.jsonl").write_text("".join(json.dumps({"messages": conversation(i)}) + "\n" for i in range(700)))
    source = SourceConfig("jsonl", {"files": str(root / "rows.jsonl")})
    config = DataConfig(source=source, heldout_every=4, shard_bytes=100_000, on_unreadable="drop", near_duplicate=None)
    corpus, _ = build_corpus(config, Store(root / "store"))
    rendering = Rendering(
        partial(open_renderer, small.tokenizer.path, RenderConfig(), "chat"), 1, "chat", ("kajiya.data.render",)
    )
    return config, corpus, rendering


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_processes, "_WORTH_BYTES", 100_000)  # the held-out side is smaller
    monkeypatch.setattr(render_processes, "usable_cores", lambda: 2)
    monkeypatch.setattr(
        render_processes, "peak_memory", lambda: 2**29
    )  # tests before may have taken more than the cap leaves
    monkeypatch.setattr("kajiya.data.shards.CHUNK_BYTES", 9_000)


def test_the_shards_are_those_of_one_process(
    small: Any,
    prepared: tuple[DataConfig, Artifact, Rendering],
    two_processes: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, corpus, rendering = prepared
    assert processes_for(open_documents(corpus.path, "train"), 4096) == 2
    assert processes_for(open_documents(corpus.path, "heldout"), 4096) == 1
    shared, _ = build_shards(config, corpus, small.tokenizer, Store(tmp_path / "a"), rendering=rendering)
    error = replace(config, on_unreadable="error")
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: has no target.*\nThe row: .*\nMend or remove it"):
        build_shards(error, corpus, small.tokenizer, Store(tmp_path / "c"), rendering=rendering)
    monkeypatch.setattr(render_processes, "usable_cores", lambda: 1)
    alone, _ = build_shards(config, corpus, small.tokenizer, Store(tmp_path / "b"), rendering=rendering)
    assert shared.digest == alone.digest
    assert shared.facts["train"] == alone.facts["train"]
    assert shared.facts["train"]["dropped"]["documents"] > 2
    assert shared.facts["peak_memory_bytes"] > alone.facts["peak_memory_bytes"] + 2 * 50 * 2**20


def test_few_rows_and_little_memory_are_for_one_process(prepared: tuple[DataConfig, Artifact, Rendering]) -> None:
    documents = open_documents(prepared[1].path, "train")
    assert documents.n_bytes < 2**20
    assert processes_for(documents, 100_000) == 1


def test_a_process_that_is_killed_is_said(prepared: tuple[DataConfig, Artifact, Rendering]) -> None:
    _, corpus, rendering = prepared
    task = RowsTask(corpus.path, "train", rendering.open, np.dtype("<u2"), 1, drops=True)
    with RenderProcesses(task, 1) as processes:
        assert len(processes(0, 10).lengths) == 10
    assert processes.peak_bytes > 50 * 2**20
    with pytest.raises(DataError, match=r"has ended by itself \(exit status -9\)"):
        _kill_within(RenderProcesses(task, 1))


def _kill_within(begun: RenderProcesses) -> None:
    with begun as processes:
        begun._processes[0].running.send_signal(signal.SIGKILL)
        processes(10, 20)
