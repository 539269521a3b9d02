"""The chat formats of the main model families: template, special tokens, and where answers stand, said by hand.

The templates are written out from the families' published formats. `spans` reads answers off the finished text by the family's
own delimiters, which is how the format is described, and not how the package finds them.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kajiya.data.tokenizer import train_bpe

TEMPLATES = Path(__file__).with_name("templates")
Spans = list[tuple[int, int]]


def between(opening: str, closing: str) -> Callable[[str], Spans]:
    """From behind `opening` to behind the next `closing`."""
    pattern = re.compile(f"(?<={re.escape(opening)}).*?{re.escape(closing)}", re.DOTALL)
    return lambda text: [match.span() for match in pattern.finditer(text)]


def _mistral(text: str) -> Spans:
    """Behind a prompt or a tool's result, as far as the end-of-text token."""
    return [
        match.span(1) for match in re.finditer(r"\[/(?:INST|TOOL_RESULTS)\]((?:(?!\[INST\]).)*?</s>)", text, re.DOTALL)
    ]


def _deepseek(text: str) -> Spans:
    pattern = r"(?:<｜Assistant｜>|<｜tool▁outputs▁end｜>)(.*?<｜end▁of▁sentence｜>)"
    return [match.span(1) for match in re.finditer(pattern, text, re.DOTALL)]


@dataclass(frozen=True)
class Family:
    """One format."""

    template: str
    """File of its template."""
    specials: tuple[str, ...]
    eos: str
    bos: str | None
    spans: Callable[[str], Spans]
    """Where the answers stand in a finished text."""
    plain: tuple[str, ...] = ()
    """Added tokens that are not special."""
    has_system: bool = True
    has_tools: bool = False
    """Whether it says which tools there are."""
    has_calls: bool = False
    """Whether it renders calls of tools."""


IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FAMILIES = {
    "chatml": Family("chatml", IM, "<|im_end|>", None, between("<|im_start|>assistant\n", "<|im_end|>")),
    "qwen2.5": Family(
        "qwen2_5",
        ("<|endoftext|>", *IM),
        "<|im_end|>",
        None,
        between("<|im_start|>assistant\n", "<|im_end|>"),
        ("<tool_call>", "</tool_call>"),
        has_tools=True,
        has_calls=True,
    ),
    "qwen3": Family(
        "qwen3",
        ("<|endoftext|>", *IM),
        "<|im_end|>",
        None,
        between("<|im_start|>assistant\n", "<|im_end|>"),
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    "llama-3.1": Family(
        "llama3_1",
        HEADERS,
        "<|eot_id|>",
        "<|begin_of_text|>",
        between("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        has_tools=True,
        has_calls=True,
    ),
    "gemma": Family(
        "gemma",
        ("<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<bos>",
        between("<start_of_turn>model\n", "<end_of_turn>"),
        has_system=False,
    ),
    "mistral-v3": Family(
        "mistral_v3",
        (
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        "</s>",
        "<s>",
        _mistral,
        has_system=False,
        has_tools=True,
        has_calls=True,
    ),
    "deepseek-v3": Family(
        "deepseek_v3",
        (
            *(
                "<｜User｜>",
                "<｜Assistant｜>",
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁calls▁end｜>",
                "<｜tool▁call▁begin｜>",
            ),
            *("<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
            *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        ),
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        _deepseek,
        has_calls=True,
    ),
    "default": Family(
        "", (), "<|eos|>", "<|bos|>", between("### Assistant\n", "<|eos|>"), has_tools=True, has_calls=True
    ),
}


@cache
def tokenizer_of(name: str) -> Any:
    """A byte-level tokenizer with the family's special tokens and template."""
    family = FAMILIES[name]
    return with_template(
        None if not family.template else template(family.template),
        family.specials,
        family.eos,
        family.bos,
        family.plain,
    )


def template(name: str) -> str:
    """A template by the name of its file."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def with_template(
    source: str | None, specials: Sequence[str], eos: str, bos: str | None = None, plain: Sequence[str] = ()
) -> Any:
    """A byte-level tokenizer trained on a page of English, with these tokens added."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=train_bpe(iter([_PAGE]), 600, 2))
    named = {"eos_token": eos} | ({} if bos is None else {"bos_token": bos})
    made.add_special_tokens({"extra_special_tokens": list(specials), **named})
    made.add_tokens(list(plain))
    made.chat_template = source
    return made


_PAGE = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8") + "user\nassistant\nsystem\n" * 20

USER, SAYS = {"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}
MORE = [
    {"role": "user", "content": "And how many people\n\nlive there?"},
    {"role": "assistant", "content": "About 2.1 million."},
]
SYSTEM = {"role": "system", "content": "You answer in few words."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "id": "abcdef123", "function": {"name": "weather", "arguments": {"place": "Nîmes"}}}
    ],
}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": "sunny, 31 °C"}
WITH_CALL = [USER, CALL, RESULT, {"role": "assistant", "content": "It is sunny."}]
