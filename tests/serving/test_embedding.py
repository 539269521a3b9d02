"""Texts that are read for their vectors: in pieces, between the steps of what else runs, and no more of them than may wait."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from kajiya.config.schema import ServeConfig
from kajiya.errors import RequestError
from kajiya.serving.api import create_app
from kajiya.serving.engine import Engine

from .conftest import NAME, open_engine, running


@pytest.mark.parametrize("runner", ["native", "transformers", "plain"])
def test_pieces_make_the_vector_of_the_whole(model_folder: Path, reference: Any, runner: str) -> None:
    engine = open_engine(model_folder, runner=runner)
    engine.scheduler.step_tokens = 16
    ids = [1 + 7 * i % 500 for i in range(45)]
    with torch.no_grad():
        hidden_D = reference.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
    expected = (hidden_D / hidden_D.norm()).tolist()
    assert engine.embed(ids) == pytest.approx(expected, abs=1e-5)
    pieces = list(engine.embedding(ids))
    assert pieces[:-1] == [None, None]
    assert pieces[-1] == pytest.approx(expected, abs=1e-5)
    assert engine.scheduler.pool.n_free == engine.scheduler.pool.n_blocks


def test_blocks_come_back_however_it_ends(model_folder: Path) -> None:
    engine = open_engine(model_folder)
    engine.scheduler.step_tokens = 16
    pool = engine.scheduler.pool
    begun = engine.embedding([5] * 40)
    assert next(begun) is None
    assert pool.n_free < pool.n_blocks
    begun.close()
    assert pool.n_free == pool.n_blocks
    # A failure in between takes all blocks back by itself.
    begun = engine.embedding([5] * 40)
    assert next(begun) is None
    engine.fail_all("out of memory, say")
    with pytest.raises(RequestError, match="failed"):
        next(begun)
    assert pool.n_free == pool.n_blocks


def _noting(engine: Engine) -> list[str]:
    """What the engine's runner is asked for, in order."""
    asked: list[str] = []
    run, hidden = engine.runner.run, engine.runner.hidden

    def noted_run(plan: Any) -> Any:
        asked.append("step")
        time.sleep(0.005)
        return run(plan)

    def noted_hidden(chunk: Any) -> Any:
        asked.append("piece")
        return hidden(chunk)

    engine.runner.run = noted_run  # type: ignore[method-assign]
    engine.runner.hidden = noted_hidden  # type: ignore[method-assign]
    return asked


def test_running_answers_go_on_between_the_pieces(model_folder: Path, tokenizer: Any) -> None:
    engine = open_engine(model_folder)
    engine.scheduler.step_tokens = 8
    asked = _noting(engine)
    with running(create_app(engine, tokenizer, NAME, ServeConfig())) as url, ThreadPoolExecutor(3) as pool:
        body = {"model": NAME, "prompt": "x", "max_tokens": 180, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            texts = [
                pool.submit(httpx.post, f"{url}/v1/embeddings", json={"model": NAME, "input": [5] * 64}, timeout=60)
                for _ in range(3)
            ]
            assert [text.result().status_code for text in texts] == [200] * 3
            assert [line for line in lines if line][-1] == "data: [DONE]"
    assert asked.count("piece") == 24
    # As long as the answer ran: never two pieces in a row, of one text or of several.
    during = asked[: len(asked) - asked[::-1].index("step")]
    assert during.count("piece") > 8
    assert ("piece", "piece") not in pairwise(during)


def test_more_than_may_wait_are_told_to_try_again(model_folder: Path, tokenizer: Any) -> None:
    engine = open_engine(model_folder, max_waiting=2)
    read, go_on = engine.runner.hidden, threading.Event()

    def held(chunk: Any) -> Any:
        go_on.wait(60)
        return read(chunk)

    engine.runner.hidden = held  # type: ignore[method-assign]
    with running(create_app(engine, tokenizer, NAME, ServeConfig())) as url, ThreadPoolExecutor(4) as pool:
        body = {"model": NAME, "input": "x"}
        texts = [pool.submit(httpx.post, f"{url}/v1/embeddings", json=body, timeout=60) for _ in range(4)]
        # Two are held; the others are refused at once.
        ended = as_completed(texts, timeout=60)
        refused = [next(ended).result(), next(ended).result()]
        go_on.set()
        assert sorted(text.result().status_code for text in texts) == [200, 200, 429, 429]
    for reply in refused:
        assert reply.json()["error"]["code"] == "queue_full"
        assert int(reply.headers["retry-after"]) >= 1
