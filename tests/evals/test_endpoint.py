"""Endpoints of the OpenAI API and the judge behind one, against a stub; a real server is in `tests/serving/test_clients.py`."""

import http.client
import json
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from kajiya.config.schema import DataConfig, EvalConfig, SourceConfig
from kajiya.data.corpus import build_corpus
from kajiya.errors import ConfigError, KajiyaError
from kajiya.evals import endpoint as endpoints
from kajiya.evals.answers import Answer, Sampling
from kajiya.evals.endpoint import Endpoint
from kajiya.evals.evaluate_endpoint import evaluate_endpoint, score_text
from kajiya.evals.judge import judge_pairs
from kajiya.evals.results import figure_of, measure
from kajiya.evals.run_task import Question, evaluate_task
from kajiya.evals.tasks import JudgeConfig, load_task, read_rows
from kajiya.run.holdings import collect_garbage
from kajiya.run.store import Store


class _Stub(BaseHTTPRequestHandler):
    asked: list[dict[str, Any]]
    busy: list[tuple[int, str | None]]
    """Status and `Retry-After` of the next replies."""
    key: str | None
    """What every request must bear."""
    echoes: bool
    """Whether each letter is given back as a token of one nat."""
    broken_at: str | None
    """The prompt that is answered by 500."""

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "stub"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub = type(self)
        if stub.busy:
            status, wait = stub.busy.pop(0)
            self._reply({"error": "busy"}, status, {} if wait is None else {"Retry-After": wait})
            return
        if stub.key is not None and self.headers["Authorization"] != f"Bearer {stub.key}":
            self._reply({"error": "no key"}, 401)
            return
        if stub.broken_at is not None and body["prompt"] == stub.broken_at:
            self._reply({"error": "broken"}, 500)
            return
        stub.asked.append(body)
        if self.path == "/v1/embeddings":
            self._reply({"data": [{"embedding": [3.0, 4.0 * len(text)]} for text in body["input"]]})
        elif self.path == "/v1/completions" and "echo" in body:
            tokens = list(body["prompt"])
            echoed = {"tokens": tokens, "token_logprobs": [None, *[-1.0] * (len(tokens) - 1)]} if stub.echoes else None
            self._reply({"choices": [{"text": body["prompt"], "logprobs": echoed}]})
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

    def _reply(self, content: Any, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing on the screen."""


@pytest.fixture
def url() -> Iterator[str]:
    _Stub.asked, _Stub.busy, _Stub.key, _Stub.broken_at, _Stub.echoes = [], [], None, None, False
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
    assert [each.is_complete for each in found] == [True, True, True, False]
    assert len(_Stub.asked) == 8
    with pytest.raises(KajiyaError, match="never gave a verdict"):
        judge_pairs(JudgeConfig(url, "stub"), rows[3:])


def test_an_endpoint_answers_tasks(url: str) -> None:
    endpoint = Endpoint(url)
    assert endpoint.model == "stub"
    assert endpoint.complete(["ab"], Sampling(8, 0.5, 1, 2, ("\n",), False)) == [("AB", "AB")]
    assert _Stub.asked[0]["stop"] == ["\n"]
    assert np.allclose(endpoint.embed(["x"]), [[0.6, 0.8]])
    with pytest.raises(KajiyaError, match="does not echo the log-probabilities of a given text"):
        endpoint.choose(["a"], [["b", "c"]])
    with pytest.raises(KajiyaError, match="does not answer"):
        Endpoint("http://127.0.0.1:9/v1", "none").complete(["a"], Sampling(1, 0, 0, 1, (), False))


def test_a_busy_endpoint_is_asked_again_as_it_wishes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(endpoints.time, "sleep", waited.append)
    _Stub.busy = [(429, "7"), (503, None), (503, formatdate(0)), (429, "3600")]
    found = Endpoint(url, "stub").complete(["ab"], Sampling(8, 0.0, 1, 1, (), False))
    assert found == [("AB\nmore",)]
    assert waited == [7, 2, 0, 60]
    _Stub.busy = [(503, "1")] * 6
    with pytest.raises(KajiyaError, match="answered 503"):
        Endpoint(url, "stub").embed(["a"])
    _Stub.busy = [(500, None), (502, None), (504, None)]
    assert Endpoint(url, "stub").embed(["x"]).shape == (1, 2)
    _Stub.busy = [(404, "1")]
    with pytest.raises(KajiyaError, match="answered 404"):
        Endpoint(url, "stub").embed(["a"])
    assert _Stub.busy == []


def test_a_reply_that_breaks_off_is_asked_for_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(endpoints.time, "sleep", waited.append)
    real, faults = urllib.request.urlopen, [TimeoutError("timed out"), ConnectionResetError("reset"),
                                            http.client.RemoteDisconnected("gone"), http.client.IncompleteRead(b"")]  # fmt: skip

    def fail(*words: Any, **more: Any) -> Any:
        if faults:
            raise faults.pop(0)
        return real(*words, **more)

    monkeypatch.setattr(endpoints.urllib.request, "urlopen", fail)
    assert Endpoint(url, "stub").embed(["x"]).shape == (1, 2)
    assert waited == [1, 2, 4, 8]
    faults[:] = [TimeoutError("timed out")] * 9
    with pytest.raises(KajiyaError, match="does not answer: timed out"):
        Endpoint(url, "stub").embed(["a"])
    assert len(faults) == 3


def test_an_endpoint_that_ignores_n_is_asked_for_the_rest(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Endpoint(url, "stub").complete(["Answer 1:\ngood\n\nAnswer 2:\nbad"], Sampling(8, 0.7, 5, 3, (), True))
    assert [len(texts) for texts in found] == [3]
    assert [(body["n"], body["seed"]) for body in _Stub.asked] == [(3, 5), (2, 6), (1, 7)]
    endpoint = Endpoint(url, "stub")
    monkeypatch.setattr(endpoint, "post", lambda path, body: {"choices": []})
    with pytest.raises(KajiyaError, match="without any choice"):
        endpoint.complete(["a"], Sampling(8, 0.7, 5, 3, (), True))


def test_many_texts_are_embedded_in_portions(url: str) -> None:
    texts = ["x" * (1 + i % 5) for i in range(150)]
    found = Endpoint(url, "stub").embed(texts)
    assert [len(body["input"]) for body in _Stub.asked] == [64, 64, 22]
    assert np.allclose(found[:, 1] / found[:, 0], [4 * len(text) / 3 for text in texts], rtol=1e-5)


@pytest.mark.parametrize(
    ("choice", "tokens", "first"),
    [
        ("name():", ["def", " ", "name", "():"], 2),  # the choice begins with a token
        ("name():", ["def", " n", "ame", "():"], 1),  # a token holds the prompt's end and the choice's beginning
        ("name():", ["<s>", "def", " ", "name", "():"], 3),  # a token in front that the text does not have
        ("é():", ["def", " ", "bytes:\\xc3", "bytes:\\xa9", "():"], 2),  # its first letter is spread over tokens
    ],
)
def test_the_tokens_of_a_choice_are_told_from_the_prompts(
    url: str, monkeypatch: pytest.MonkeyPatch, choice: str, tokens: list[str], first: int
) -> None:
    logprobs = [None, *(-(2.0**n) for n in range(1, len(tokens)))]
    found = {"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": logprobs}}]}
    endpoint = Endpoint(url)
    monkeypatch.setattr(endpoint, "post", lambda path, body: found)
    assert endpoint.choose(["def "], [[choice]]) == [(-sum(2.0**n for n in range(first, len(tokens))),)]


def test_a_choice_without_a_prompt_needs_a_token_in_front(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint(url)
    replies = [(["a", "b"], [None, -1.0]), (["<s>", "a", "b"], [None, -2.0, -1.0]), (["x", "b"], [None, -1.0])]
    found = iter({"choices": [{"logprobs": {"tokens": each, "token_logprobs": own}}]} for each, own in replies)
    monkeypatch.setattr(endpoint, "post", lambda path, body: next(found))
    with pytest.raises(KajiyaError, match="a prompt must not be empty"):
        endpoint.choose([""], [["ab"]])
    assert endpoint.choose([""], [["ab"]]) == [(-3.0,)]
    with pytest.raises(KajiyaError, match="The endpoint's tokens are not those of the text"):
        endpoint.choose([""], [["ab"]])


def test_held_out_text_needs_an_endpoint_that_echoes(url: str) -> None:
    with pytest.raises(
        KajiyaError, match=r"does not echo the log-probabilities.*\nServe the model with `kajiya serve`"
    ):
        score_text(Endpoint(url).echo, "a text", 8, 4)
    _Stub.busy = [(400, None)]
    with pytest.raises(KajiyaError, match=r"answered 400.*\nIt was sent 2 bytes of text.*lower eval\.context_tokens"):
        score_text(Endpoint(url).echo, "é", 8, 4)
    _Stub.busy = [(422, None)] * 8
    with pytest.raises(KajiyaError, match=r"answered 422.*\nIt was sent 4 bytes of text"):
        score_text(Endpoint(url).echo, "a" * 100, 8, 4)
    assert _Stub.busy == []


def test_the_metric_judge_asks_with_the_key_of_the_environment(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "one"}\n')
    judge = {"url": url, "model": "stub", "key_variable": "KAJIYA_TEST_JUDGE_KEY"}
    body = {"rows": "rows.jsonl", "prompt": "{{ q }}", "target": "bad", "metrics": ["judge"], "judge": judge}
    (tmp_path / "task.yaml").write_text(json.dumps(body))
    task = load_task(tmp_path / "task.yaml")
    answers = [Answer({}, "q", "bad", (text,)) for text in ("good", "good", "same")]
    answers[2] = Answer({}, "q", "same", ("same",))
    _Stub.key = "s3cret"
    monkeypatch.delenv("KAJIYA_TEST_JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="the environment has no KAJIYA_TEST_JUDGE_KEY"):
        measure(task, answers)
    monkeypatch.setenv("KAJIYA_TEST_JUDGE_KEY", "s3cret")
    found = measure(task, answers)["judge"]
    assert found.scores.value() == pytest.approx(2.5 / 3)
    assert found.details == {"changed_its_mind_when_swapped": pytest.approx(1 / 3), "gave_no_verdict": 0}
    silent = measure(task, [answers[0], Answer({}, "odd", "bad", ("good",))])["judge"]
    assert silent.details == {"changed_its_mind_when_swapped": 0, "gave_no_verdict": 0.5}
    assert silent.signature.endswith("½ also for 1 of 2 rows without a verdict")
    assert list(found.notes) == ["answer", "answer", "changed its mind when the answers changed places"]
    assert "s3cret" not in json.dumps([task.settings(), figure_of(found, None)])
    other = load_task(tmp_path / "task.yaml", "x")
    assert other.template_digest == task.template_digest
    _Stub.key = "another"
    with pytest.raises(KajiyaError, match=r"answered 401"):
        measure(task, answers)


def _asked_prompts() -> list[str]:
    prompts = sorted(body["prompt"] for body in _Stub.asked)
    _Stub.asked.clear()
    return prompts


def test_an_endpoint_that_breaks_is_asked_for_the_rest_alone(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints.time, "sleep", lambda _: None)
    monkeypatch.setattr(endpoints, "AT_ONCE", 1)
    rows = ["a", "b", "b", "c", "d"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": each}) + "\n" for each in rows))
    body = {"rows": "rows.jsonl", "prompt": "{{ q }}", "target": "{{ q | upper }}", "metrics": ["exact_match"]}
    (tmp_path / "task.yaml").write_text(json.dumps(body | {"stop": ["\n"]}))
    task, said = load_task(tmp_path / "task.yaml"), list[str]()
    store = Store(tmp_path / "store", lambda kind, text: said.append(f"{kind}: {text}"))
    question = Question(task, read_rows(task, None, None), 0)

    def evaluate() -> float:
        artifact, was_there = evaluate_task(question, Endpoint(url), f"{url} stub", store)
        assert not was_there
        return float(artifact.facts["figures"]["exact_match"]["value"])

    _Stub.broken_at = "d"
    with pytest.raises(KajiyaError, match="answered 500"):
        evaluate()
    assert _asked_prompts() == ["a", "b", "b", "c"]
    assert said.pop().startswith("note: 4 replies of the endpoint are kept in ")
    (kept,) = (store.root / "replies").iterdir()
    with kept.open("ab") as file:
        file.write(b"a line cut sh")  # by a power cut
    garbage = collect_garbage(store)
    assert garbage.unfinished == [f"replies/{kept.name}"]
    with pytest.raises(KajiyaError, match="answered 500"):
        evaluate()
    assert _asked_prompts() == []
    _Stub.broken_at = None
    assert evaluate() == 1.0
    assert _asked_prompts() == ["d"]
    assert "note: 4 replies of the endpoint are kept of an earlier attempt" in said[-1]
    assert list((store.root / "replies").iterdir()) == []
    assert evaluate() == 1.0
    assert _asked_prompts() == rows, "it is asked anew when nothing was broken off"


def test_held_out_text_goes_on_where_its_endpoint_broke(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints.time, "sleep", lambda _: None)
    monkeypatch.setattr("kajiya.evals.evaluate_endpoint.AT_ONCE", 1)
    texts = [" ".join(f"{n * word:x}" for word in range(30)) for n in range(1001, 1013)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = SourceConfig("jsonl", {"files": str(tmp_path / "texts.jsonl")})
    store = Store(tmp_path / "store", lambda kind, text: None)
    corpus, _ = build_corpus(DataConfig(source=source, heldout_every=2, row_tokens=32), store)
    _Stub.echoes = True

    def evaluate() -> Mapping[str, Any]:
        return evaluate_endpoint(EvalConfig(), Endpoint(url), corpus, store, context_tokens=32)[0].facts

    whole = evaluate()
    last = _Stub.asked[-1]["prompt"]
    prompts = _asked_prompts()
    assert len(prompts) > 4
    _Stub.broken_at = last
    with pytest.raises(KajiyaError, match="answered 500"):
        evaluate()
    assert sorted([*_asked_prompts(), last]) == prompts
    _Stub.broken_at = None
    again = evaluate()
    assert _asked_prompts() == [last]
    assert again["nats"] == whole["nats"]
