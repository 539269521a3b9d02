"""Documents of any kind to examples: token ids, and the weight of each as a target."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from kajiya.config.schema import RenderConfig
from kajiya.data.chat import ChatTemplate, Layout, Messages, TemplateRefusalError
from kajiya.data.chat import read_template as read_template
from kajiya.data.encoding import RenderMany
from kajiya.data.examples import Example, Segment
from kajiya.data.markup import Chunk, Draft
from kajiya.data.tokenizer import load_tokenizer
from kajiya.data.values import RowError, excerpt
from kajiya.errors import DataError

_BATCH_ROWS = 256
_SAMPLE_ROWS = 64
"""Rows on which a faster encoder must give the tokenizer's own ids before it is taken."""


@dataclass(frozen=True)
class Refusal:
    """A row that cannot be rendered."""

    name: str
    reason: str
    """What is wrong with it, to be read after the name."""
    row: str
    """Its beginning."""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}\nThe row: {self.row}"


def open_renderer(
    folder: Path, config: RenderConfig, kind: str, classes: Sequence[str] | None = None, origin: str | None = None
) -> RenderMany:
    """What renders rows with the tokenizer in `folder`; else as `Renderer`."""
    return Renderer(load_tokenizer(folder), config, kind, classes, origin).render_many


class Renderer:
    """Renders the documents of one kind (`data.format`) with one tokenizer.

    `classes` are the names of a labelled corpus's classes (its fact `classes`); `None`: its labels are values. `origin` is where
    the tokenizer came from, which errors name. Raises `ConfigError` for a template that cannot be read, `DataError` for one with
    a syntax error.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: RenderConfig,
        kind: str,
        classes: Sequence[str] | None = None,
        origin: str | None = None,
    ) -> None:
        self.kind = kind
        self._config = config
        named = (
            f"the chat template {config.template}" if config.template else origin and f"the chat template of {origin}"
        )
        self._template = ChatTemplate(tokenizer, read_template(config), config.options, is_timeless=True, name=named)
        self._markup = self._template.markup
        self._is_quick = False
        self._eos: int = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id
        self._lead, self._tail = _around(tokenizer)
        self._numbers = None if classes is None else {name: number for number, name in enumerate(classes)}
        drafts: dict[str, Callable[[Any], tuple[list[Draft], float | int | None]]] = {
            "text": self._draft_text,
            "prompt": self._draft_prompt,
            "instruction": self._draft_completion,
            "chat": self._draft_chat,
            "preference": self._draft_preference,
            "feedback": self._draft_completion,
            "labelled": self._draft_labelled,
            "seq2seq": self._draft_seq2seq,
        }
        self._draft = drafts[kind]

    def render(self, document: str, name: str = "the row") -> Example:
        """One document of the corpus. Raises `DataError`, with the row shown, for what cannot be trained on."""
        (rendered,) = self.render_many([(name, document)])
        if isinstance(rendered, Refusal):
            raise DataError(str(rendered))
        return rendered

    def render_many(self, documents: Iterable[tuple[str, str]]) -> Iterator[Example | Refusal]:
        """An example, or what is wrong, for each (name, document), in order; encoded in batches on all cores."""
        waiting = iter(documents)
        while batch := list(islice(waiting, _BATCH_ROWS)):
            if not self._is_quick and len(batch) == _BATCH_ROWS:
                self._markup.quicken([document for _, document in batch[:_SAMPLE_ROWS]])
                self._is_quick = True
            planned: list[tuple[list[Draft], float | int | None] | Refusal] = []
            for name, document in batch:
                try:
                    planned.append(self._draft(document if self.kind == "text" else json.loads(document)))
                except RowError as error:
                    planned.append(Refusal(name, str(error), excerpt(document)))
                except TemplateRefusalError as error:
                    planned.append(Refusal(name, f"is refused by {self._template.name}: {error}", excerpt(document)))
            segments = iter(
                self._markup.encode([draft for plan in planned if isinstance(plan, tuple) for draft in plan[0]])
            )
            for (name, document), plan in zip(batch, planned, strict=True):
                if isinstance(plan, Refusal):
                    yield plan
                    continue
                example = Example(tuple(next(segments) for _ in plan[0]), plan[1])
                problem = self._problem(example)
                yield example if problem is None else Refusal(name, problem, excerpt(document))

    def _problem(self, example: Example) -> str | None:
        for segment in example.segments:
            if self._bos is not None and self._bos != self._eos and segment.ids[:2].tolist() == [self._bos] * 2:
                return f"begins with two begin-of-text tokens (id {self._bos}): the chat template writes one more"
        # Labels are the targets of labelled rows; prompts have none; the input of a pair is no target.
        without: dict[str, Sequence[Segment]] = {"labelled": (), "prompt": (), "seq2seq": example.segments[1:]}
        trained = without.get(self.kind, example.segments)
        for segment in trained:
            if not (segment.weights[1:] > 0).any() and not (self.kind == "seq2seq" and len(segment.ids)):
                return (
                    f"has no target: none of its {len(segment.ids)} tokens is trained (data.render.train_on, weights)"
                )
        return None

    # ------------------------------------------------------------ texts

    def _draft_text(self, text: str) -> tuple[list[Draft], None]:
        start = self._eos if self._bos is None else self._bos
        return [Draft([Chunk(text, 1.0, is_literal=True)], lead=(start,), close=(self._eos,), close_weight=1.0)], None

    def _draft_labelled(self, row: Mapping[str, Any]) -> tuple[list[Draft], float | int]:
        close = self._tail or (self._eos,)
        label = float(row["label"]) if self._numbers is None else self._numbers[str(row["label"])]
        return [Draft([Chunk(row["text"], 0.0, is_literal=True)], lead=self._lead, close=close)], label

    def _draft_seq2seq(self, row: Mapping[str, Any]) -> tuple[list[Draft], None]:
        close = self._tail or (self._eos,)
        read = Draft([Chunk(row["input"], 0.0, is_literal=True)], lead=self._lead, close=close)
        # A tokenizer that closes its texts itself (T5, BART) opens targets as it opens texts; others open them with nothing.
        lead = self._lead if self._tail else ()
        said = Draft([Chunk(row["target"], 1.0, is_literal=True)], lead=lead, close=close, close_weight=1.0)
        return [read, said], None

    # ------------------------------------------------------------ answers

    def _draft_prompt(self, row: Mapping[str, Any]) -> tuple[list[Draft], None]:
        """As far as the answer begins, as the server shows it to the model."""
        prompt, tools = row["prompt"], row.get("tools")
        if not isinstance(prompt, str):
            return [self._template.draft(prompt, tools, add_generation_prompt=True)], None
        if self._config.prompt_style == "chat":
            turns = [*_system(row), {"role": "user", "content": prompt}]
            return [self._template.draft(turns, tools, add_generation_prompt=True)], None
        return [Draft([Chunk(self._plain_prompt(row), 0.0, is_literal=True)], lead=self._lead)], None

    def _draft_chat(self, row: Mapping[str, Any]) -> tuple[list[Draft], None]:
        n, messages = row.get("n_prompt", 0), row["messages"]
        return [self._completed(messages[:n], messages[n:], row.get("tools"), self._config.train_on)], None

    def _draft_completion(self, row: Mapping[str, Any]) -> tuple[list[Draft], int | None]:
        label = row.get("label")
        train_on = self._config.train_on if self.kind == "instruction" else "assistant"
        return [self._answered(row, row["completion"], train_on)], label

    def _draft_preference(self, row: Mapping[str, Any]) -> tuple[list[Draft], float]:
        margin = row.get("margin", 0.0)
        return [self._answered(row, row[key], "assistant") for key in ("chosen", "rejected")], margin

    def _answered(self, row: Mapping[str, Any], answer: Any, train_on: str) -> Draft:
        """A prompt and its answer, both texts or both messages; the answer is trained."""
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            return self._completed(prompt, answer, row.get("tools"), train_on)
        if self._config.prompt_style == "chat":
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            return self._conversation([*_system(row), *turns], row.get("tools"), train_on)
        prompt = self._plain_prompt(row)
        is_closed = self._config.append_eos != "never"
        if not is_closed:
            raise RowError("has an end-of-text that is never a target: data.render.append_eos=never")
        before_weight = 1.0 if train_on == "all" else 0.0
        chunks = [Chunk(prompt, before_weight, is_literal=True), Chunk(answer, 1.0, is_literal=True)]
        return Draft(chunks, lead=self._lead, close=(self._eos,), close_weight=1.0)

    def _plain_prompt(self, row: Mapping[str, Any]) -> str:
        if "tools" in row:
            raise RowError(
                "has tools, which a plain prompt does not say: data.render.prompt_style=plain (chat renders them)"
            )
        return f"{row['system']}\n\n{row['prompt']}" if "system" in row else str(row["prompt"])

    def _completed(self, prompt: Messages, answer: Messages, tools: Any, train_on: str) -> Draft:
        """A conversation of which only what answers the prompt is trained, unless all is."""
        before = prompt if train_on == "all" else [{"weight": 0.0, **message} for message in prompt]
        return self._conversation([*before, *answer], tools, train_on)

    def _conversation(self, messages: Messages, tools: Any, train_on: str) -> Draft:
        (messages, tools), names = self._markup.shield((messages, tools))
        layout = self._template.lay_out(messages, tools)
        weights = _weights(messages, train_on)
        rest = 1.0 if train_on == "all" else 0.0
        spans = self._spans(messages, tools, layout, weights, rest)
        close, close_weight = self._close(messages, layout, weights)
        trained = [answer for answer in layout.answers if weights[answer.message] > 0]
        last = layout.answers[-1] if close and close_weight else None
        endless = [answer for answer in trained if not answer.is_closed and answer is not last]
        if endless:
            raise RowError(
                f"has an end of the answer that is never a target: {self._template.name} closes message "
                f"{endless[0].message + 1} with no special token"
                + (" within {% generation %}" if not close and self._config.append_eos != "never" else "")
                + f" (data.render.append_eos={self._config.append_eos}"
                + ("; train_on=last trains the last answer alone)" if len(trained) > 1 else ")")
            )
        return Draft(_chunks(layout, spans, rest), names, close=close, close_weight=close_weight)

    def _close(self, messages: Messages, layout: Layout, weights: Sequence[float]) -> tuple[tuple[int, ...], float]:
        """End-of-text behind a last answer that nothing closes, and its weight."""
        last = layout.answers[-1] if layout.answers else None
        if last is None or last.message + 1 < len(messages) or self._config.append_eos == "never":
            return (), 0.0
        text = layout.text.rstrip()
        is_eos = last.is_closed and any(
            text.endswith(name) for name, number in self._markup.specials.items() if number == self._eos
        )
        wanted = not last.is_closed and last.end == len(layout.text)
        if self._config.append_eos == "always":
            wanted = not is_eos
        return ((self._eos,), weights[last.message]) if wanted else ((), 0.0)

    def _spans(
        self, messages: Messages, tools: Any, layout: Layout, weights: Sequence[float], rest: float
    ) -> list[tuple[int, int, float]]:
        """Start, end and weight of every message whose weight is not that of the rest of the text."""
        answers = {answer.message: answer for answer in layout.answers}
        spans = []
        for index, weight in enumerate(weights):
            if weight == rest:
                continue
            if index in answers:
                start, end = answers[index].start, answers[index].end
            else:
                start = self._template.prefix(messages[:index], tools, layout.text)
                end = self._template.prefix(messages[: index + 1], tools, layout.text)
            if index == 0 and weight > rest:
                start = self._template.first_start(messages[0], tools, layout.text)
                if start is None and end is not None:
                    raise RowError(
                        f"has weight={weight:g} on message 1, and where that begins cannot be told from what "
                        f"{self._template.name} writes before every conversation; leave the weight out"
                    )
            if start is None or end is None:
                raise RowError(
                    f"cannot be masked: {self._template.name} does not render the messages up to number {index + 1} as the "
                    "beginning of the whole conversation, and has no {% generation %} block for each answer; "
                    "train_on=last needs less of it, or give another template (data.render)"
                )
            spans.append((start, end, weight))
        return spans


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The message of a row that has its system prompt apart."""
    return [{"role": "system", "content": row["system"]}] if "system" in row else []


def _weights(messages: Messages, train_on: str) -> list[float]:
    """Weight of each message: its own, or what `train_on` says."""
    last_question = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    last_answer = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    is_trained: Callable[[int], bool] = {
        "assistant": lambda index: messages[index]["role"] == "assistant",
        "last": lambda index: index == last_answer,
        "completion": lambda index: messages[index]["role"] == "assistant" and index > last_question,
        "all": lambda index: True,
    }[train_on]
    return [message["weight"] if "weight" in message else float(is_trained(i)) for i, message in enumerate(messages)]


def _chunks(layout: Layout, spans: Sequence[tuple[int, int, float]], rest: float) -> list[Chunk]:
    places = sorted({0, len(layout.text), *layout.cuts, *(place for start, end, _ in spans for place in (start, end))})
    chunks = []
    for start, end in pairwise(places):
        weight = next((weight for low, high, weight in spans if low <= start < high), rest)
        chunks.append(Chunk(layout.text[start:end], weight))
    return chunks


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts before and behind a text by itself."""
    bare: list[int] = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
    full: list[int] = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    at = next(at for at in range(len(full)) if full[at : at + len(bare)] == bare)
    return tuple(full[:at]), tuple(full[at + len(bare) :])
