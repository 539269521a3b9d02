"""Held-out text scored over HTTP: what the model's own log-probabilities say of the same documents."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import small_overrides
from typer.testing import CliRunner

from kajiya.cli import app
from kajiya.config.compose import compose
from kajiya.config.schema import Config, ServeConfig
from kajiya.data.corpus import build_corpus
from kajiya.data.documents import Documents, open_documents
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import KajiyaError
from kajiya.evals.endpoint import Endpoint
from kajiya.evals.evaluate_endpoint import score_text
from kajiya.evals.results import text_result
from kajiya.evals.scoring import score_documents
from kajiya.flows.evaluate import evaluate
from kajiya.flows.report import report_targets
from kajiya.run.store import Store
from kajiya.serving.api import create_app

from .conftest import CONTEXT, NAME, open_engine, running

LETTERS = ("naïve", "東京", "«ça»", "🙂")
LN2 = float(np.log(2))


@pytest.fixture(scope="module")
def started_url(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The tiny model under a tokenizer that puts its end-of-text token in front of a text."""
    from tokenizers import Tokenizer, processors

    folder = tmp_path_factory.mktemp("started") / "model"
    shutil.copytree(model_folder, folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = ("<|end|>", backend.token_to_id("<|end|>"))
    backend.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[start])
    backend.save(str(folder / "tokenizer.json"))
    with running(create_app(open_engine(folder), load_tokenizer(folder), NAME, ServeConfig())) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """`config("eval.context_tokens=…")`: small files, one in two held out."""
    root = tmp_path_factory.mktemp("text")
    for n in range(12):
        letters = " ".join(LETTERS[: n % 5])
        lines = "".join(f"value_{n}_{i} = {n * i}  # {letters}\n" for i in range(1 + n % 4))
        (root / f"module_{n}.py").write_text(lines, encoding="utf-8")
    given = (
        f"data.source.options.root={root}",
        "data.heldout_every=2",
        "data.duplicates=off",
        "eval.context_tokens=191",
    )
    return lambda *more: compose("stdlib-pretrain", small_overrides(*given, *more))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def _heldout(config: Config, store: Store) -> Documents:
    return open_documents(build_corpus(config.data, store)[0].path, "heldout")


def _local(reference: Any, documents: list[list[int]], context: int, stride: int) -> np.ndarray:
    """Nats of each document, of which the first token is read and not scored."""
    ids = [np.array(each) for each in documents]
    return score_documents(reference, ids, context_tokens=context, stride=stride, batch=4, device=torch.device("cpu"))


@pytest.mark.parametrize("has_start", [True, False])
def test_bits_per_byte_over_http_are_those_of_the_model_itself(
    has_start: bool, server_url: str, started_url: str, reference: Any, tokenizer: Any, config: Callable[..., Config],
    store: Store,
) -> None:  # fmt: skip
    documents = _heldout(config(), store)
    texts = list(documents.texts())
    assert len(texts) > 2
    assert any(letter in text for text in texts for letter in LETTERS)
    ids = [tokenizer.encode(text) for text in texts]
    assert 1 < max(len(each) for each in ids) < CONTEXT
    n_bytes = np.diff(documents.offsets)
    n_first = np.array([len(tokenizer.decode(each[:1]).encode()) for each in ids])
    if has_start:
        ids = [[0, *each] for each in ids]
    else:
        n_bytes = n_bytes - n_first
    url = started_url if has_start else f"{server_url}/v1"
    evaluation, baselines = evaluate(url, config(), store)
    facts = evaluation.facts
    nats = _local(reference, ids, CONTEXT, CONTEXT)
    rows = [json.loads(line) for line in (evaluation.path / "documents.jsonl").read_text("utf-8").splitlines()]
    assert [row["document"] for row in rows] == list(documents.names)
    assert [row["n_bytes"] for row in rows] == n_bytes.tolist()
    assert [row["n_targets"] for row in rows] == [len(each) - 1 for each in ids]
    assert np.allclose([row["nats"] for row in rows], nats, rtol=1e-4, atol=1e-3)
    assert facts["bits_per_byte"] == pytest.approx(nats.sum() / LN2 / n_bytes.sum(), rel=1e-4)
    assert facts["perplexity"] == pytest.approx(np.exp(nats.sum() / sum(len(each) - 1 for each in ids)), rel=1e-3)
    assert facts["n_unscored_bytes"] == (0 if has_start else n_first.sum())
    low, high = facts["bits_per_byte_interval"]
    assert low <= facts["bits_per_byte"] <= high
    assert baselines is not None
    assert baselines.facts["baselines"]["xz"]["n_bytes"] == documents.n_bytes
    fingerprint = facts["fingerprint"]
    assert (fingerprint["engine"], fingerprint["dtype"], fingerprint["model"]) == ("http", "unknown", f"{url} {NAME}")
    kept = text_result(evaluation.path, facts).rows()
    assert [row["row"] for row in kept] == list(documents.names)
    bits, sizes = np.array([row["bits_per_byte: statistics"] for row in kept]).sum(axis=0)
    assert bits / sizes == pytest.approx(facts["bits_per_byte"])


@pytest.mark.parametrize(("context", "stride"), [(60, 30), (40, 40)])
def test_windows_over_http_are_those_of_the_model_itself(
    context: int, stride: int, server_url: str, reference: Any, tokenizer: Any
) -> None:
    text = "".join(f"wrap(text, width={n})\n" for n in range(10, 99))
    ids = tokenizer.encode(text)
    # The last local window reaches back as far as it can, which takes knowing how many tokens follow: a full one is alike.
    ids = ids[: context + 1 + (len(ids) - context - 1) // stride * stride]
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text) == ids
    assert len(ids) > 4 * context
    found = score_text(Endpoint(f"{server_url}/v1").echo, text, context, stride)
    assert found.n_tokens == len(ids) - 1
    assert found.nats == pytest.approx(_local(reference, [ids], context, stride)[0], rel=1e-4)


def test_windows_as_long_as_the_endpoints_context(started_url: str, tokenizer: Any) -> None:
    text = "".join(f"wrap(text, width={n})  # naïve 東京 🙂\n" for n in range(10, 60))
    echo = Endpoint(started_url).echo
    found = score_text(echo, text, CONTEXT, CONTEXT // 2)
    assert (found.n_bytes, found.n_unscored_bytes) == (len(text.encode()), 0)
    assert found.n_tokens == len(tokenizer.encode(text))
    with pytest.raises(KajiyaError, match=r"context length is 192(.|\n)* lower eval\.context_tokens"):
        score_text(echo, text, 4 * CONTEXT, 2 * CONTEXT)


def test_eval_of_an_endpoint_and_a_report_of_it(
    started_url: str, config: Callable[..., Config], store: Store, tmp_path: Path
) -> None:
    root = config().data.source.options["root"]
    words = ["eval", started_url, *small_overrides(f"data.source.options.root={root}", "data.heldout_every=2")]
    words += ["data.duplicates=off", "eval.context_tokens=191", "--model-name", NAME, "--store", str(store.root)]
    told = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    assert facts["bits_per_byte"] > 0
    assert facts["baselines"]
    shown = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "bits per byte" in shown.stdout
    page = report_targets([started_url], store, tmp_path / "report").read_text(encoding="utf-8")
    assert "held-out text" in page
    assert started_url in page
    refused = CliRunner().invoke(app, [*words, "--model-name", "another"])
    assert isinstance(refused.exception, KajiyaError)
    assert "another" in str(refused.exception)
