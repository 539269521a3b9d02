"""Baselines, intervals and samples; the evaluation artifact of a real run adds up."""

import json
import lzma

import numpy as np
import pytest
from tests.conftest import Finished

from kajiya.data.documents import open_documents
from kajiya.evals import baselines
from kajiya.evals.baselines import xz, xz_primed, xz_size
from kajiya.evals.results import compare_results, text_result
from kajiya.evals.samples import unseen_functions
from kajiya.evals.statistics import ratio_interval
from kajiya.run.store import open_artifact


def test_xz_is_xz() -> None:
    data = bytes(range(256)) * 300 + b"the quick brown fox" * 1000
    assert abs(xz_size(data) - len(lzma.compress(data, preset=9))) <= 8
    assert xz(b"", data) == 8 * xz_size(data) / len(data)


def test_priming_helps_where_the_texts_are_alike() -> None:
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, 50_000).astype(np.uint8).tobytes()
    assert xz_primed(train, train[1000:21_000]) < 0.5
    assert xz_primed(train, rng.integers(0, 256, 20_000).astype(np.uint8).tobytes()) > 7.9


def test_long_texts_are_compressed_a_portion_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    train = rng.integers(97, 123, 60_000).astype(np.uint8)
    heldout = train[-9_000:].copy()
    whole = xz_size(train.tobytes() + heldout.tobytes())
    monkeypatch.setattr(baselines, "_PORTION_BYTES", 777)
    assert xz_size(train, heldout) == whole
    monkeypatch.setattr(baselines, "PRIMING_BYTES", 20_000)
    end = bytes(train[-20_000:])
    assert xz_primed(train, heldout) == xz_primed(end, heldout) != xz_primed(bytes(train[:20_000]), heldout)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        sizes = rng.integers(50, 500, 60).astype(float)
        low, high = ratio_interval(sizes * rng.normal(2.0, 0.5, 60), sizes, resamples=400, seed=trial)
        hits += low <= 2.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ratio_interval(np.zeros(0), np.zeros(0))


def test_the_evaluation_adds_up(finished: Finished) -> None:
    artifacts = finished.trained.run.manifest()["artifacts"]
    evaluation = open_artifact(finished.store.root / artifacts["evaluation"]["path"])
    heldout = open_documents(finished.store.root / artifacts["corpus"]["path"], "heldout")
    rows = [json.loads(line) for line in (evaluation.path / "documents.jsonl").read_text().splitlines()]
    facts = evaluation.facts
    assert [row["document"] for row in rows] == list(heldout.names)
    assert facts["n_bytes"] == sum(row["n_bytes"] for row in rows) == heldout.n_bytes
    nats = sum(row["nats"] for row in rows)
    assert facts["bits_per_byte"] == pytest.approx(nats / np.log(2) / heldout.n_bytes)
    assert facts["perplexity"] == pytest.approx(np.exp(nats / sum(row["n_targets"] for row in rows)))
    assert facts["fingerprint"].keys() >= {"data", "template", "code", "engine", "dtype", "sampling", "model"}
    assert facts["fingerprint"]["dtype"] == facts["dtype"]
    assert facts["fingerprint"]["model"] == finished.trained.model.digest
    result = text_result(evaluation.path, facts)
    assert [row["row"] for row in result.rows()] == list(heldout.names)
    assert compare_results(result, result, "bits_per_byte").first == pytest.approx(facts["bits_per_byte"])
    low, high = facts["bits_per_byte_interval"]
    assert low <= facts["bits_per_byte"] <= high
    figures = open_artifact(finished.store.root / artifacts["baselines"]["path"]).facts["baselines"]
    assert figures["xz-primed"]["bits_per_byte"] < figures["xz"]["bits_per_byte"]
    assert figures["xz"]["n_bytes"] == facts["n_bytes"]
    assert figures["xz-primed"]["n_primed_bytes"] == figures["xz-primed"]["n_training_bytes"] > 0


def test_samples_are_functions_of_heldout_documents(finished: Finished) -> None:
    artifacts = finished.trained.run.manifest()["artifacts"]
    heldout = open_documents(finished.store.root / artifacts["corpus"]["path"], "heldout")
    functions = unseen_functions(heldout, 4)
    assert functions
    for each in functions:
        text = heldout.text(heldout.names.index(each.document))
        assert text.startswith(each.context)
        assert text[len(each.context) :].startswith(each.body)
        assert f"def {each.name}" in each.prompt
    folder = finished.store.root / artifacts["evaluation"]["path"]
    samples = json.loads((folder / "samples.json").read_text())
    assert len(samples) == 1
    assert samples[0]["body"] == functions[0].body
    assert isinstance(samples[0]["completion"], str)
