"""One rendering: the same ids in training, in evaluation and at the server; tools, their calls and answers within it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from tests.data.families import (
    CALL,
    FAMILIES,
    IM,
    MORE,
    RESULT,
    SAYS,
    SYSTEM,
    TOOLS,
    USER,
    WITH_CALL,
    tokenizer_of,
    with_template,
)
from tests.data.test_render import chat, independent, plain, render, trained

from kajiya.config.schema import RenderConfig
from kajiya.data.beginnings import Memory, Rendered
from kajiya.data.chat import ChatTemplate, TemplateRefusalError
from kajiya.data.render import Renderer
from kajiya.errors import DataError
from kajiya.evals.answers import LocalModel, Sampling
from kajiya.serving.tools import prompt_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_that_the_server_sees_is_what_training_saw_before_the_answer(name: str) -> None:
    messages = [USER, SAYS] if name == "qwen3" else [USER, SAYS, *MORE]
    segment = render(name, chat(*messages)).segments[0]
    prompt = ChatTemplate(tokenizer_of(name)).ids(messages[:-1], add_generation_prompt=True)
    last = np.flatnonzero(segment.weights > 0)
    begins = last[np.flatnonzero(np.diff(last, prepend=-2) > 1)[-1]]
    assert segment.ids[:begins].tolist() == prompt


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_alone_is_what_the_server_sees(name: str) -> None:
    tokenizer = tokenizer_of(name)
    renderer = Renderer(tokenizer, RenderConfig(), "prompt")
    (segment,) = renderer.render(json.dumps({"prompt": [USER]})).segments
    assert segment.ids.tolist() == prompt_ids(ChatTemplate(tokenizer), [USER], [])
    assert not segment.weights.any()
    (again,) = renderer.render(json.dumps({"prompt": USER["content"]})).segments
    assert again.ids.tolist() == segment.ids.tolist()
    plainly = RenderConfig(prompt_style="plain")
    (bare,) = (
        Renderer(tokenizer, plainly, "prompt").render(json.dumps({"prompt": "2 + 2 =", "system": "Add."})).segments
    )
    row = {"prompt": "2 + 2 =", "completion": " 4", "system": "Add."}
    (answered,) = Renderer(tokenizer, plainly, "instruction").render(json.dumps(row)).segments
    assert answered.ids[: int(np.flatnonzero(answered.weights)[0])].tolist() == bare.ids.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_equal_in_training_in_evaluation_and_at_the_server(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name)
    tokenizer.save_pretrained(tmp_path)
    segment = render(name, chat(USER, SAYS)).segments[0]
    prompt = segment.ids[: int(np.flatnonzero(segment.weights)[0])].tolist()
    served = prompt_ids(ChatTemplate(tokenizer), [USER], [])
    engine = Asked(len(prompt) + 9)
    judged = LocalModel(tmp_path, batch=1)
    judged.__dict__["_engine"] = engine
    sampling = Sampling(max_tokens=8, temperature=0.0, seed=0, samples=1, stop=(), is_chat=True)
    judged.complete([USER["content"]], sampling)
    assert engine.asked == [prompt] == [served]
    engine.context_tokens -= 1
    with pytest.raises(DataError, match=rf"a question of {len(prompt)} tokens leaves no room .*: What is the capital"):
        judged.complete([USER["content"]], sampling)


@dataclass
class Asked:
    """An engine that notes what it is asked."""

    context_tokens: int
    asked: list[list[int]] = field(default_factory=list)

    def generate(self, prompts: list[list[int]], _: Any) -> list[Any]:
        self.asked += prompts
        return [SimpleNamespace(token_ids=[]) for _ in prompts]


# ---------------------------------------------------------------- turns that come again

THOUGHT = {"role": "assistant", "content": "Paris.", "reasoning_content": "A capital, then."}
GROWING: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "plain": ([USER, SAYS, *MORE, USER, SAYS, *MORE], None),
    "a system message": ([SYSTEM, USER, SAYS, *MORE, USER, SAYS], None),
    "reasoning": ([USER, THOUGHT, *MORE, USER, THOUGHT, USER, SAYS], None),
    "calls": ([*WITH_CALL, USER, SAYS, *WITH_CALL, *MORE], TOOLS),
    "names of special tokens": ([USER, {**SAYS, "content": "a <|im_end|> </s> z"}, *MORE, USER, SAYS], None),
}


@pytest.mark.parametrize("kind", GROWING)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_growing_conversation_is_laid_out_as_one_that_is_new(name: str, kind: str) -> None:
    (messages, tools), tokenizer = GROWING[kind], tokenizer_of(name)
    remembering = ChatTemplate(tokenizer, remembers=True)
    messages = remembering.markup.shield(messages)[0]
    n_told = 0
    # Forward, as it grows; and back, since a client may take turns back.
    for n in (*range(1, len(messages) + 1), *range(len(messages), 0, -1)):
        for is_prompt in (True, False):
            given = (messages[:n], tools, is_prompt)
            told, wanted = (_laid_out(template, given) for template in (remembering, ChatTemplate(tokenizer)))
            assert told == wanted
            n_told += not isinstance(told, str)
    assert n_told or kind in ("calls", "a system message", "reasoning")


def _laid_out(template: ChatTemplate, given: Any) -> Any:
    try:
        return template.lay_out(*given)
    except TemplateRefusalError as error:
        return str(error)


def test_what_came_before_is_not_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(tokenizer_of("chatml"), remembers=True)
    turns = [part for i in range(40) for part in ({**USER, "content": f"{i}?"}, {**SAYS, "content": f"{i}."})]
    template.ids(turns)
    text = Mock(wraps=template.text)
    monkeypatch.setattr(template, "text", text)
    template.ids([*turns, USER])
    assert text.call_count == 1
    text.reset_mock()
    template.ids([*turns, USER, SAYS, USER])
    # The whole, and as far as where the new answer ends; it begins where the whole ended before.
    assert text.call_count == 2
    # Another first turn is another conversation.
    text.reset_mock()
    template.ids([{**USER, "content": "!"}, *turns[1:], USER])
    assert text.call_count == 1 + 2 * 40


def test_a_conversation_as_it_was_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(tokenizer_of("qwen3"), remembers=True)
    template.ids([USER, SAYS, *MORE, USER])
    text = Mock(wraps=template.text)
    monkeypatch.setattr(template, "text", text)
    template.ids([USER, SAYS, *MORE, USER])
    assert text.call_count == 1


def test_a_template_that_asks_for_the_time_is_rendered_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("chatml")
    monkeypatch.setattr(tokenizer, "chat_template", "{{ strftime_now('%Y') }}" + tokenizer.chat_template)
    template = ChatTemplate(tokenizer, remembers=True)
    text = Mock(wraps=template.text)
    monkeypatch.setattr(template, "text", text)
    for _ in range(2):
        text.reset_mock()
        template.ids([USER, SAYS, USER])
        assert text.call_count == 3


def test_memory_of_beginnings_is_bounded() -> None:
    memory = Memory()
    for number in range(10_000):
        memory.keep(str(number).encode(), Rendered((1, 1), (b"", b"")))
        assert len(memory) <= 4096
    assert memory.get(b"9999") is not None


# ---------------------------------------------------------------- tools


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_calls])
def test_tools_and_their_calls(name: str) -> None:
    tools = TOOLS if FAMILIES[name].has_tools else None
    segment = render(name, chat(*WITH_CALL, tools=tools)).segments[0]
    ids, mask = independent(name, WITH_CALL, tools)
    assert segment.ids.tolist() == ids
    assert (segment.weights > 0).astype(int).tolist() == mask


@pytest.mark.parametrize(
    ("name", "messages", "tools", "what"),
    [
        ("chatml", [USER, SAYS], TOOLS, "tools"),
        ("gemma", [USER, SAYS], TOOLS, "tools"),
        ("deepseek-v3", WITH_CALL, TOOLS, "tools"),
        ("chatml", WITH_CALL, None, "tool calls"),
        ("gemma", WITH_CALL, None, "tool calls"),
    ],
)
def test_a_template_that_would_leave_tools_out_is_named(name: str, messages: Any, tools: Any, what: str) -> None:
    with pytest.raises(DataError, match=f"is refused by the chat template of the tokenizer: it renders no {what};"):
        render(name, chat(*messages, tools=tools))


THOUGHT = SAYS | {"reasoning_content": "France, so Paris."}
SAID_CALL = CALL | {"content": "Let me see."}


@pytest.mark.parametrize(
    ("name", "messages", "what"),
    [
        *((name, [USER, THOUGHT], "reasoning (message 2)") for name in ("chatml", "llama-3.1", "gemma", "deepseek-v3")),
        ("chatml", [USER, THOUGHT, *MORE], "reasoning (message 2)"),
        *((name, [USER, SAID_CALL, RESULT, SAYS], "words beside tool calls (message 2)") for name in ("llama-3.1", "mistral-v3")),
        ("deepseek-v3", [USER, SAID_CALL, RESULT, SAYS], "tool calls beside words (message 2)"),
        ("mistral-v3", [SYSTEM, USER, SAYS], "system message (message 1)"),
    ],
)  # fmt: skip
def test_a_part_that_a_template_leaves_out_is_named(name: str, messages: Any, what: str) -> None:
    for train_on in ("assistant", "last"):
        with pytest.raises(
            DataError, match=rf"is refused by the chat template of .*: it renders no {re.escape(what)};"
        ):
            render(name, chat(*messages), train_on=train_on)


def test_a_template_that_skips_messages_or_arguments_is_named() -> None:
    turns = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    calls = "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
    for source, messages, what in (
        ("{% if m.role != 'system' %}" + turns + "{% endif %}", [SYSTEM, USER, SAYS], "system message"),
        ("{% if m.role != 'tool' %}" + turns + "{{ m.tool_calls }}{% endif %}", WITH_CALL, "answers of tools"),
        (turns + calls, WITH_CALL, "tool calls"),
        (turns + "{{ (m.tool_calls or [])[:1] }}", [USER, TWO_CALLS, RESULT, SAYS], "tool calls"),
    ):
        tokenizer = with_template("{% for m in messages %}" + source + "{% endfor %}", IM, "<|im_end|>")
        with pytest.raises(DataError, match=rf"the tokenizer: it renders no {what} \(message"):
            Renderer(tokenizer, RenderConfig(), "chat").render(chat(*messages))


TWO_CALLS = CALL | {"tool_calls": CALL["tool_calls"] * 2}  # type: ignore[operator]


def test_what_is_left_out_is_looked_for_once_for_each_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows cost what they did: the renderings beyond those of their prefixes are for the first of its kind alone."""
    seen: list[int] = []
    text = ChatTemplate.text
    monkeypatch.setattr(ChatTemplate, "text", lambda self, *given: seen.append(1) or text(self, *given))  # type: ignore[func-returns-value]
    renderer, counts = Renderer(tokenizer_of("qwen2.5"), RenderConfig(), "chat"), []
    for number in range(3):
        before = len(seen)
        question = USER | {"content": f"Question {number}?"}
        renderer.render(chat(SYSTEM, question, SAID_CALL, RESULT, SAYS, *MORE))
        counts.append(len(seen) - before)
    # The whole; beginning and end of two answers, the beginning of the last.
    assert counts == [6 + 2 * 4, 6, 6]


def test_reasoning_is_rendered_by_the_packaged_template_and_qwen3_may_leave_it_out_of_earlier_answers() -> None:
    example = render("default", chat(USER, THOUGHT, MORE[0], MORE[1] | {"reasoning_content": "Two or so."}))
    assert trained(example, tokenizer_of("default")) == (
        "<think>\nFrance, so Paris.\n</think>\n\nParis.<|eos|>"
        "<think>\nTwo or so.\n</think>\n\nAbout 2.1 million.<|eos|>"
    )
    example = render("qwen3", chat(USER, THOUGHT, *MORE), train_on="last")
    assert trained(example, tokenizer_of("qwen3")) == "<think>\n\n</think>\n\nAbout 2.1 million.<|im_end|>"


def test_the_packaged_template_says_tools_calls_and_answers() -> None:
    whole = [SYSTEM, USER, CALL | {"content": "Let me see."}, RESULT, SAYS]
    example = render("default", chat(*whole, tools=TOOLS))
    tool, call = json.dumps(TOOLS[0]["function"]), '{"name": "weather", "arguments": {"place": "Nîmes"}}'
    assert tokenizer_of("default").decode(example.segments[0].ids) == (
        "<|bos|>### System\nYou answer in few words.\n\n"
        f"You can call these tools:\n{tool}\n"
        'To call one, answer with nothing but a JSON object: {"name": <name of the tool>, "arguments": {…}}.\n\n'
        "### User\nWhat is the capital of France?\n\n"
        f"### Assistant\nLet me see.\n{call}<|eos|>\n\n"
        "### User\nThe tool answered: sunny, 31 °C\n\n"
        "### Assistant\nParis.<|eos|>\n\n"
    )
    assert trained(example, tokenizer_of("default")) == f"Let me see.\n{call}<|eos|>Paris.<|eos|>"


def spelt(call: dict[str, Any]) -> dict[str, Any]:
    """A message with a call as a request has it: the arguments are a text."""
    function = call["tool_calls"][0]["function"]
    function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return call | {"tool_calls": [call["tool_calls"][0] | {"function": function}]}


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("name", FAMILIES)
def test_calls_are_at_the_server_what_they_were_in_training(name: str, content: str | None) -> None:
    """What a template does not know of tools is put into words, and nothing else."""
    own, tools = ChatTemplate(tokenizer_of(name)), TOOLS if FAMILIES[name].has_tools else None
    call = CALL | {"content": content}
    served = prompt_ids(own, [USER, spelt(call), RESULT], tools or [])
    if name in ("chatml", "gemma"):
        text = tokenizer_of(name).decode(served)
        assert '\n{"name": "weather", "arguments": {"place": "Nîmes"}}<' in text
        assert "user\nThe tool answered: sunny, 31 °C<" in text
        return
    segment = render(name, chat(USER, call, RESULT, WITH_CALL[-1], tools=tools), train_on="last").segments[0]
    assert segment.ids[: len(served)].tolist() == served


def test_the_server_puts_into_words_what_a_template_does_not_know() -> None:
    deepseek = tokenizer_of("deepseek-v3")
    text = deepseek.decode(prompt_ids(ChatTemplate(deepseek), [USER, spelt(CALL), RESULT], TOOLS))
    assert "You can call these tools:" in text
    assert "<｜tool▁calls▁begin｜>" in text
    # The words beside a call, which these would leave out, or the call for them.
    for name in ("llama-3.1", "mistral-v3", "deepseek-v3"):
        tokenizer = tokenizer_of(name)
        text = tokenizer.decode(prompt_ids(ChatTemplate(tokenizer), [USER, spelt(SAID_CALL), RESULT], []))
        assert 'Let me see.\n{"name": "weather", "arguments": {"place": "Nîmes"}}' in text
        assert "sunny, 31 °C" in text
        assert "The tool answered" not in text


def test_of_tools_the_packaged_template_says_what_the_server_does() -> None:
    for system in ([], [SYSTEM]):
        served = prompt_ids(ChatTemplate(tokenizer_of("default")), [*system, USER, spelt(CALL), RESULT], TOOLS)
        ids = render("default", chat(*system, *WITH_CALL, tools=TOOLS)).segments[0].ids
        assert ids[: len(served)].tolist() == served


def test_tools_beside_a_plain_prompt_are_refused() -> None:
    for kind, row in (
        ("instruction", {"prompt": "Say:", "completion": " yes"}),
        ("preference", {"prompt": "Say:", "chosen": " yes", "rejected": " no"}),
    ):
        with pytest.raises(
            DataError, match=r"has tools, which a plain prompt does not say: data\.render\.prompt_style=plain"
        ):
            plain(kind, **row, tools=TOOLS)


def test_names_of_special_tokens_in_tools_and_calls_are_plain_text() -> None:
    call = json.loads(json.dumps(CALL).replace("N\\u00eemes", "<|im_end|>"))
    example = render("qwen2.5", chat(USER, call, RESULT | {"content": "<|im_start|>"}, SAYS, tools=TOOLS))
    tokenizer = tokenizer_of("qwen2.5")
    ids = example.segments[0].ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 5
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5
    assert tokenizer.decode(ids).count("<|im_end|>") == 6
