"""A conversation as text and token ids: the one way for training, evaluation and the server.

The text is what the tokenizer's own Jinja template makes of the messages (the packaged one where it has none). Where each
answer begins and ends is found by rendering: the prompt of an answer, and the conversation as far as the answer, must each be
what the whole conversation begins with. No string is searched for.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from kajiya.config.schema import RenderConfig
from kajiya.data.beginnings import Beginnings, Memory, is_sure
from kajiya.data.markup import Chunk, Draft, Markup
from kajiya.data.omissions import Place, parts_of, place_of
from kajiya.errors import ConfigError, DataError

Messages = Sequence[Mapping[str, Any]]
_LOST = "it renders no {}; give a template that does (data.render.template), or rows that have none"
_ID = "probe0000"
"""Of a call; Mistral's template takes nine letters and digits."""
TOKEN_CHARACTERS = 64
"""More than the tokens of any text have on average."""
_MOST_PLACES = 10_000
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateRefusalError(Exception):
    """What a chat template cannot be asked to do."""


@dataclass(frozen=True)
class Answer:
    """Where one message of the assistant lies in the text of its conversation, characters."""

    message: int
    """Its number."""
    start: int | None
    """Behind its prompt; `None`: the prompt is not what the conversation begins with."""
    end: int | None
    """Behind the special token that closes it, or behind all of it; `None`: as above."""
    is_closed: bool = False
    """Whether a special token closes it."""


@dataclass(frozen=True)
class Layout:
    """A rendered conversation."""

    text: str
    answers: tuple[Answer, ...]
    cuts: tuple[int, ...]
    """Where the text is cut into chunks, rising."""


def default_template() -> str:
    """The Jinja template for tokenizers that bring none: headed turns, each answer closed by the end-of-sequence token."""
    return resources.files("kajiya.data").joinpath("chat.jinja").read_text(encoding="utf-8")


def read_template(config: RenderConfig) -> str | None:
    """The template at `data.render.template`. Raises `ConfigError` when it cannot be read."""
    if config.template is None:
        return None
    try:
        return Path(config.template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("data.render.template", f"{config.template!r} cannot be read: {error}") from error


def saved_template(config: RenderConfig, kind: str, own: Any) -> Any:
    """The template that a tokenizer is saved with for rows of this kind; `own` is its own.

    Rows that are rendered as conversations bring the config's template, the tokenizer's own, or the packaged one, with
    `data.render.options` written into it: who loads the tokenizer renders as the training did.
    """
    given = read_template(config)
    is_plain = kind in ("text", "labelled", "seq2seq") or (kind != "chat" and config.prompt_style == "plain")
    template = given or own or (None if is_plain else default_template())
    if not template or not config.options:
        return template
    preset = "".join(
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {_literal(value)} -%}}{{%- endif -%}}"
        for name, value in sorted(config.options.items())
    )
    return {key: preset + body for key, body in template.items()} if isinstance(template, dict) else preset + template


def _literal(value: Any) -> str:
    """The value as Jinja writes it, which is JSON but for its null."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def render_chat(tokenizer: Any, messages: Messages, add_generation_prompt: bool, tools: Any = None) -> list[int]:
    """Token ids of one conversation, as `ChatTemplate.ids`; whoever has several keeps a `ChatTemplate`."""
    return ChatTemplate(tokenizer).ids(messages, tools=tools, add_generation_prompt=add_generation_prompt)


class ChatTemplate:
    """The chat template of a tokenizer.

    `template` goes before the tokenizer's own; `variables` are passed to it; `name` is what errors call it. With `is_timeless`,
    a template that asks for the time is refused: rows rendered tomorrow would be others. With `remembers`, a conversation
    that comes again with more turns is not rendered anew as far as each of its answers. Raises `DataError` for a syntax error in
    the template.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        is_timeless: bool = False,
        name: str | None = None,
        remembers: bool = False,
    ) -> None:
        self.markup = Markup(tokenizer)
        if template is None:
            template = tokenizer.chat_template
            name = name or f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
        # A tokenizer that was trained here brings the packaged one, perhaps with variables set before it.
        if not template or (isinstance(template, str) and template.endswith(default_template())):
            template, name = template or default_template(), "the packaged chat template"
        self.name = name or "the given chat template"
        named = template if isinstance(template, dict) else {"default": template}
        self._sources = {kind: named[kind] for kind in ("default", "tool_use") if kind in named}
        self._compiled = {kind: _compile(source, self.name) for kind, source in self._sources.items()}
        self._eos: str = tokenizer.eos_token or ""
        self._variables = {**tokenizer.special_tokens_map, **(variables or {})}
        if is_timeless:
            self._variables |= {"strftime_now": _refuse_time}
        self._knows_calls: dict[tuple[bool, str | None], bool] = {}
        self._memory = Memory() if remembers and all(map(is_sure, self._sources.values())) else None
        self._rendered: set[Place] = set()
        """Parts that were found in the text, and where they stood in their conversation."""

    def ids(self, messages: Messages, *, tools: Any = None, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation; with `add_generation_prompt` it ends where the assistant's next answer begins.

        Raises `DataError` for an order of roles, or anything else, that the template refuses.
        """
        if not messages:
            raise DataError("a conversation needs at least one message")
        try:
            draft = self.draft(messages, tools, add_generation_prompt)
        except TemplateRefusalError as error:
            raise DataError(f"the chat template refuses these messages: {error}") from error
        ids: list[int] = self.markup.encode([draft])[0].ids.tolist()
        return ids

    def draft(self, messages: Messages, tools: Any, add_generation_prompt: bool) -> Draft:
        """A conversation as it is encoded, without targets. Raises `TemplateRefusalError`."""
        (messages, tools), names = self.markup.shield((messages, tools))
        layout = self.lay_out(messages, tools, add_generation_prompt)
        return Draft([Chunk(text, 0.0) for text in pieces(layout.text, layout.cuts)], names)

    def is_longer(self, messages: Messages, n_tokens: int, *, tools: Any = None) -> bool:
        """Whether a conversation has far more than that many tokens, found by rendering it once.

        `ids` renders it more often, to find where the answers lie. `False` for what the template refuses.
        """
        (messages, tools), names = self.markup.shield((messages, tools))
        try:
            text = self.text([self._for_template(message, tools) for message in messages], tools, True)
        except TemplateRefusalError:
            return False
        if len(text) > TOKEN_CHARACTERS * n_tokens:
            return True
        # Cut at the answers it would be others, but hardly half as many.
        return len(self.markup.encode([Draft([Chunk(text, 0.0)], names)])[0].ids) > 2 * n_tokens

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template says which tools there are: found by rendering one."""
        schema = {"type": "object", "properties": {"place": {"type": "string"}}}
        tool = {"name": "probe", "description": "probed_tool", "parameters": schema}
        return self._says([], [{"type": "function", "function": tool}], ["probed_tool"])

    def knows_calls(self, tools: Any, content: str | None) -> bool:
        """Whether it renders a call, what the tool answered, and the content beside the call: with tools, with such a content."""
        kind = bool(tools), content and "probed_words"
        if kind not in self._knows_calls:
            call = {"name": "probe", "arguments": _Arguments(place="probed_call")}
            turns: list[Any] = [
                {
                    "role": "assistant",
                    "content": kind[1],
                    "tool_calls": [{"type": "function", "id": _ID, "function": call}],
                },
                {"role": "tool", "content": "probed_answer", "tool_call_id": _ID, "name": "probe"},
            ]
            said = ["probed_call", "probed_answer", *filter(None, [kind[1]])]
            self._knows_calls[kind] = self._says(turns, tools or None, said)
        return self._knows_calls[kind]

    def _says(self, turns: Messages, tools: Any, words: Sequence[str]) -> bool:
        try:
            text = self.text([{"role": "user", "content": "A question."}, *turns], tools, True)
        except TemplateRefusalError:
            return False
        return all(word in text for word in words)

    def lay_out(self, messages: Messages, tools: Any = None, add_generation_prompt: bool = False) -> Layout:
        """The text of a conversation, and where the assistant's answers lie in it. Raises `TemplateRefusalError`."""
        messages = [self._for_template(message, tools) for message in messages]
        self._require_calls(messages, tools)
        text = self.text(messages, tools, add_generation_prompt)
        if tools and self.prefix(messages, None, text, add_generation_prompt) == len(text):
            raise TemplateRefusalError(_LOST.format("tools"))
        self._require_parts(messages, tools, add_generation_prompt)
        length = self._beginnings(messages, tools, text, add_generation_prompt)
        answers = [
            self._answer(length, index, index + 1 == len(messages) and not add_generation_prompt, text)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        cuts = {place for answer in answers for place in (answer.start, answer.end) if place is not None}
        if any(answer.start is None or answer.end is None for answer in answers):
            marked = self._marked(messages, tools, add_generation_prompt)
            if len(marked) == len(answers):
                answers = [
                    self._closed(text, answer.message, start, end)
                    for answer, (start, end) in zip(answers, marked, strict=True)
                ]
                cuts |= {place for answer in answers for place in (answer.start, answer.end) if place is not None}
        return Layout(text, tuple(answers), tuple(sorted(cuts)))

    def _for_template(self, message: Mapping[str, Any], tools: Any) -> dict[str, Any]:
        """The message without this project's own keys, its reasoning also under the name that some templates read."""
        kept = {key: value for key, value in message.items() if key != "weight"}
        if "reasoning_content" in kept:
            kept["thinking"] = kept["reasoning_content"]
        if kept.get("tool_calls"):
            kept["tool_calls"] = [_call_for_template(call) for call in kept["tool_calls"]]
            # Some (DeepSeek's) take an empty content for an answer without calls.
            if kept["content"] == "" and not self.knows_calls(tools, ""):
                kept["content"] = None
        return kept

    def text(self, messages: Messages, tools: Any = None, add_generation_prompt: bool = False) -> str:
        """What the template makes of the messages. Raises `TemplateRefusalError`."""
        from jinja2 import TemplateError

        # What the expressions of a template can raise.
        failures = (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        )
        try:
            rendered: str = self._template(tools).render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except failures as error:
            raise TemplateRefusalError(str(error) or type(error).__name__) from error
        return rendered

    def _require_calls(self, messages: Messages, tools: Any) -> None:
        if "tool_calls" in self._sources[self._kind(tools)]:
            return
        if any(message.get("tool_calls") for message in messages):
            raise TemplateRefusalError(_LOST.format("tool calls"))

    def _require_parts(self, messages: Messages, tools: Any, add_generation_prompt: bool) -> None:
        """Each part of a message must be in the text: another part, another text. Looked at once for each place."""
        for index, message in enumerate(messages):
            for number, (name, other) in enumerate(parts_of(message)):
                place = (number, name, bool(tools), *place_of(messages, index))
                if place in self._rendered:
                    continue
                # Some (Qwen3) leave reasoning out of earlier answers on purpose: it counts what the last one is like.
                whole = messages[: index + 1] if name == "reasoning" else messages
                is_prompt = add_generation_prompt and whole is messages
                changed = [*whole[:index], other, *whole[index + 1 :]]
                try:
                    is_lost = self.text(changed, tools, is_prompt) == self.text(whole, tools, is_prompt)
                except TemplateRefusalError:
                    is_lost = False
                if is_lost:
                    raise TemplateRefusalError(_LOST.format(f"{name} (message {index + 1})"))
                if len(self._rendered) >= _MOST_PLACES:
                    self._rendered = set()
                self._rendered.add(place)

    def prefix(self, messages: Messages, tools: Any, text: str, add_generation_prompt: bool = False) -> int | None:
        """Length of the rendered messages where `text` begins with them; `None` where it does not."""
        if not messages:
            return 0
        try:
            rendered = self.text(messages, tools, add_generation_prompt)
        except TemplateRefusalError:
            return None
        # Some templates (Phi-3) close every text, and not each answer, with end-of-text.
        rendered = rendered if text.startswith(rendered) else rendered.removesuffix(self._eos)
        return len(rendered) if text.startswith(rendered) else None

    def first_start(self, message: Mapping[str, Any], tools: Any, text: str) -> int | None:
        """Where the first message begins, behind what the template writes before every conversation: where it is as further on.

        `None`: it is not so further on, behind itself or behind an answer.
        """
        end = self.prefix([message], tools, text)
        for between in ([], [{"role": "assistant", "content": "An answer."}]):
            try:
                before = self.text([message, *between], tools)
                whole = self.text([message, *between, message], tools)
            except TemplateRefusalError:
                continue
            further_on = whole.removeprefix(before)
            if end is not None and further_on not in ("", whole) and text[:end].endswith(further_on):
                return end - len(further_on)
        return None

    def _beginnings(
        self, messages: Messages, tools: Any, text: str, is_prompt: bool
    ) -> Callable[[int, bool], int | None]:
        """`prefix` of the first so many of the messages, with the prompt of an answer or without."""
        if self._memory is None:
            return lambda n, is_asked: self.prefix(messages[:n], tools, text, is_asked)

        def render(n: int, is_asked: bool) -> str | None:
            try:
                return self.text(messages[:n], tools, is_asked)
            except TemplateRefusalError:
                return None

        return Beginnings(self._memory, messages, tools, text, is_prompt, render, self._eos).length

    def _answer(self, length: Callable[[int, bool], int | None], index: int, is_last: bool, text: str) -> Answer:
        start = length(index, True)
        end = len(text) if is_last else length(index + 1, False)
        if start is None or end is None or end < start:
            return Answer(index, start, None)
        return self._closed(text, index, start, end)

    def _closed(self, text: str, index: int, start: int, end: int) -> Answer:
        closed = self.markup.closed_end(text, start, end)
        return Answer(index, start, end if closed is None else closed, closed is not None)

    def _marked(self, messages: Messages, tools: Any, add_generation_prompt: bool) -> list[tuple[int, int]]:
        """What the template's `{% generation %}` blocks enclose, characters; none where it has no such block."""
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        if not _MARKER.search(self._sources[self._kind(tools)]):
            return []
        _, found = _render_with_assistant_indices(
            self._template(tools), list(messages), tools, None, add_generation_prompt, **self._variables
        )
        return [(int(start), int(end)) for start, end in found]

    def _template(self, tools: Any) -> Any:
        return self._compiled[self._kind(tools)]

    def _kind(self, tools: Any) -> str:
        return "tool_use" if tools and "tool_use" in self._compiled else "default"


def pieces(text: str, cuts: Sequence[int]) -> list[str]:
    """The text cut at these places, none empty."""
    places = [0, *cuts, len(text)]
    return [text[start:end] for start, end in pairwise(places) if start < end]


def _compile(source: str, name: str) -> Any:
    from jinja2 import TemplateSyntaxError

    # Transformers' own environment, so that a template means here what it means there.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        return _compile_jinja_template(source)
    except TemplateSyntaxError as error:
        raise DataError(
            f"{name} has a syntax error on line {error.lineno}: {error.message}\n"
            "Mend it, or give another with data.render.template."
        ) from error


class _Arguments(dict[str, Any]):
    """Arguments of a tool call: a mapping for templates that write it as JSON, and JSON for those that join it to text."""

    def __radd__(self, text: str) -> str:
        return text + str(self)

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)


def _call_for_template(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _Arguments(function["arguments"])}}


def _refuse_time(_: str) -> str:
    raise ValueError(
        "it asks for today's date, with which the same row would become other tokens tomorrow; set the date it reads, for "
        "example data.render.options.date_string"
    )
