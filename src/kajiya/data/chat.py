"""A conversation as token ids: the tokenizer's own chat template, or a plain default where it has none."""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from kajiya.errors import DataError


def default_template() -> str:
    """The Jinja template for tokenizers that bring none: headed turns, each answer closed by the end-of-sequence token."""
    return resources.files("kajiya.data").joinpath("chat.jinja").read_text(encoding="utf-8")


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> list[int]:
    """Token ids of a conversation; with `add_generation_prompt` it ends where the assistant's next answer begins.

    Messages are `{"role": system, user or assistant; "content": text}`. Raises `DataError` for an order of roles, or
    anything else, that the template refuses.
    """
    from jinja2 import TemplateError

    if not messages:
        raise DataError("a conversation needs at least one message")
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=None if tokenizer.chat_template else default_template(),
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses these messages: {error}") from error
    return ids
