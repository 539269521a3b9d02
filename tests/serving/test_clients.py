"""Clients of the OpenAI API that others have written, against the real server."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import NAME, open_engine

PROMPT = "def wrap(text, width):"


@pytest.fixture
def chatted(tokenizer: Any, greedy: Callable[..., list[int]]) -> Callable[..., str]:
    """What the plain model says greedily behind a conversation, rendered as training renders it.

    Without an end that is no whole character: the server keeps that back.
    """
    from kajiya.data.chat import render_chat

    def say(messages: list[dict[str, str]], n_tokens: int) -> str:
        ids = render_chat(tokenizer, messages, add_generation_prompt=True)
        found = greedy(ids, n_tokens)
        return str(tokenizer.decode(found, skip_special_tokens=True)).rstrip("\ufffd")

    return say


def test_the_api_model_of_lm_eval_scores_as_the_engine_does(
    model_folder: Path, tokenizer: Any, server_url: str
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is in the extra eval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm-eval's own imports
        from lm_eval.api.instance import Instance
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        model = LocalCompletionsAPI(
            base_url=f"{server_url}/v1/completions",
            model=NAME,
            tokenizer=str(model_folder),
            tokenizer_backend="huggingface",
            num_concurrent=1,
            max_length=180,
        )
        pairs = [("def wrap(text,", " width):"), ("x = (", "1 + 2)"), ("class A", ":\n    pass")]
        asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        found = model.loglikelihood(asked, disable_tqdm=True)
    engine = open_engine(model_folder)
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
        # The whole text's tokens, those past as many as the context has alone: lm-eval's own convention.
        assert logprob == pytest.approx(sum(engine.score(whole)[len(before) - 1 :]), abs=1e-3)


def test_tasks_are_asked_of_an_endpoint_as_of_the_model_itself(
    model_folder: Path, tokenizer: Any, server_url: str, tmp_path: Path
) -> None:
    import json

    from kajiya.config.compose import compose
    from kajiya.flows.report import report_targets
    from kajiya.flows.task_evaluation import Asked, evaluate_tasks
    from kajiya.run.store import Store

    rows = [{"q": f"def f{i}(self", "a": "):", "b": ", other=None):"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, more in (
        ("choose", {"choices": ["{{ a }}", "{{ b }}"], "target": "0", "metrics": ["accuracy", "ece"]}),
        ("generate", {"target": "{{ a }}", "metrics": ["exact_match", "chrf"], "max_tokens": 6}),
        ("embed", {"target": "{{ a }}", "metrics": ["recall_at_k"]}),
    ):
        task = {"rows": "rows.jsonl", "prompt": "{{ q }}", "kind": name} | more
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    tasks = [str(tmp_path / f"{name}.yaml") for name in ("choose", "generate", "embed")]
    store, config = Store(tmp_path / "store"), compose("stdlib-pretrain")
    url = f"{server_url}/v1"
    chosen, written, _ = evaluate_tasks(Asked(url, tasks), config, store)
    engine = open_engine(model_folder)
    for row in chosen.rows():
        for choice, logprob in zip(row["choices"], row["logprobs"], strict=True):
            ids = tokenizer.encode(row["prompt"] + choice)
            ends = [len(tokenizer.decode(ids[: n + 1])) for n in range(len(ids))]
            first = next(n for n, end in enumerate(ends) if end > len(row["prompt"]))
            assert logprob == pytest.approx(sum(engine.score(ids)[first - 1 :]), abs=1e-3)
    assert all(row["answers"][0] for row in written.rows())
    assert written.fingerprint.model == f"{url} {NAME}"
    assert written.fingerprint.dtype == "unknown"
    # An endpoint has no run, and yet its results stand in a report, beside those of the folder that it serves.
    evaluate_tasks(Asked(str(model_folder), tasks[1:2]), config, store)
    page = report_targets([url, str(model_folder)], store, tmp_path / "report").read_text(encoding="utf-8")
    assert url in page
    assert "they differ in" not in page
    assert "These evaluations differ in their rows, prompts, code, engine, precision or sampling" in page


def test_langchain_chats_streams_batches_and_binds(server_url: str, chatted: Callable[..., str]) -> None:
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        base_url=f"{server_url}/v1", api_key="none", model=NAME, temperature=0, max_completion_tokens=8, max_retries=0
    )
    messages = [SystemMessage("Be brief."), HumanMessage("Rain?")]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}]
    expected = chatted(plain, 8)
    reply = chat.invoke(messages)
    assert reply.content == expected
    assert reply.usage_metadata is not None
    assert reply.usage_metadata["output_tokens"] == 8
    assert reply.response_metadata["finish_reason"] == "length"

    pieces = list(chat.stream(messages, stream_usage=True))
    assert "".join(str(piece.content) for piece in pieces) == expected
    assert len(pieces) > 2  # text, the end, the usage: how many tokens come together is a matter of time
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == 8

    questions = ["One?", "Two?", "Three?"]
    found = chat.batch(questions)
    assert [one.content for one in found] == [chatted([{"role": "user", "content": each}], 8) for each in questions]

    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(messages)
    content = scored.response_metadata["logprobs"]["content"]
    assert len(content) == 8
    assert all(len(one["top_logprobs"]) == 2 for one in content)


def test_langchain_gets_objects_by_schema_and_calls_of_tools(roomy_url: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{roomy_url}/v1", api_key="none", model=NAME, temperature=0, max_retries=0)
    schema = {
        "title": "Size",
        "description": "A size.",
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    }
    bound = chat.with_structured_output(schema, method="json_schema", strict=True)
    found = bound.invoke("A size?")
    assert isinstance(found, dict)
    assert list(found) == ["n"]
    assert 0 <= found["n"] <= 99
    calling = chat.bind_tools([schema], tool_choice="Size")
    reply = calling.invoke("A size?")
    assert [call["name"] for call in reply.tool_calls] == ["Size"]
    assert 0 <= reply.tool_calls[0]["args"]["n"] <= 99
    assert reply.response_metadata["finish_reason"] == "tool_calls"


def test_llama_index_completes_chats_and_streams(
    server_url: str, chatted: Callable[..., str], tokenizer: Any, greedy: Callable[..., list[int]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports
        from llama_index.core.llms import ChatMessage
        from llama_index.llms.openai_like import OpenAILike

    given = {"api_base": f"{server_url}/v1", "api_key": "none", "model": NAME, "temperature": 0, "max_tokens": 8}
    chat = OpenAILike(**given, is_chat_model=True, context_window=192, max_retries=0)
    messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Rain?")]
    expected = chatted([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}], 8)
    assert chat.chat(messages).message.content == expected
    pieces = list(chat.stream_chat(messages))
    assert "".join(piece.delta or "" for piece in pieces) == expected

    plain = OpenAILike(**given, is_chat_model=False, context_window=192, max_retries=0)
    expected = tokenizer.decode(greedy(tokenizer.encode(PROMPT), 8), skip_special_tokens=True).rstrip("\ufffd")
    assert plain.complete(PROMPT).text == expected
    streamed = list(plain.stream_complete(PROMPT))
    assert streamed[-1].text == expected
