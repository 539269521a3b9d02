"""Conversations as token ids: the plain default template, and a tokenizer's own."""

from typing import Any
from unittest.mock import Mock

import pytest
from tests.data.families import FAMILIES, tokenizer_of

from kajiya.data import markup
from kajiya.data.chat import ChatTemplate, render_chat
from kajiya.errors import DataError

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Why?"}
SAY = {"role": "assistant", "content": "Because."}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes as tokens, with an end token and no template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(["<|end|>", *alphabet])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def test_the_default_template_heads_the_turns_and_closes_each_answer(tokenizer: Any) -> None:
    ids = render_chat(tokenizer, [SYSTEM, ASK, SAY, ASK], add_generation_prompt=True)
    assert tokenizer.decode(ids) == (
        "### System\nBe brief.\n\n### User\nWhy?\n\n### Assistant\nBecause.<|end|>\n\n### User\nWhy?\n\n### Assistant\n"
    )
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_prompt_is_the_beginning_of_the_whole_conversation(tokenizer: Any) -> None:
    whole = render_chat(tokenizer, [ASK, SAY], add_generation_prompt=False)
    prompt = render_chat(tokenizer, [ASK], add_generation_prompt=True)
    assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([SAY], "message 1 is of the assistant"),
        ([SYSTEM, SAY], "message 2 is of the assistant"),
        ([ASK, ASK], "message 2 is of the user"),
        ([ASK, SYSTEM], "message 2 is of the system"),
        ([SYSTEM, ASK, SAY, SAY], "message 4 is of the assistant"),
        ([ASK, SAY], "last message must be of the user"),
        ([SYSTEM], "last message must be of the user"),
        ([], "at least one message"),
    ],
)
def test_a_broken_order_of_roles_is_named(tokenizer: Any, messages: list[dict[str, str]], words: str) -> None:
    with pytest.raises(DataError, match=words):
        render_chat(tokenizer, messages, add_generation_prompt=True)


def test_a_template_of_the_tokenizers_own_goes_first(tokenizer: Any) -> None:
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert own.decode(render_chat(own, [ASK], add_generation_prompt=True)) == "[Why?]>"
    with pytest.raises(DataError, match="no system here"):
        render_chat(own, [SYSTEM, ASK], add_generation_prompt=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_template_knows_of_tools_is_found_by_rendering(name: str) -> None:
    """DeepSeek's writes calls and results, but says nothing of which tools there are."""
    template = ChatTemplate(tokenizer_of(name))
    assert template.knows_tools == (name in ("qwen2.5", "llama-3.1", "mistral-v3", "default"))
    assert template.knows_calls(None, None) == (name not in ("chatml", "gemma"))
    assert template.knows_calls(None, "Let me see.") == (name in ("qwen2.5", "qwen3", "default"))


def test_a_tokenizer_without_a_fast_form_is_named() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(DataError, match=r"is a ByT5Tokenizer, which has no fast form"):
        ChatTemplate(ByT5Tokenizer())


def test_conversations_are_encoded_beside_one_another(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread comes in between, and its texts drive out those that are known."""
    template = ChatTemplate(tokenizer)
    expected = template.ids([ASK, SAY, ASK])
    monkeypatch.setattr(markup, "_MAX_KNOWN", 0)
    encode_all = template.markup._encode_all
    is_first = True

    def beside(pieces: Any) -> Any:
        nonlocal is_first
        if is_first:
            is_first = False
            template.ids([{"role": "user", "content": "Another."}])
        return encode_all(pieces)

    monkeypatch.setattr(template.markup, "_encode_all", beside)
    assert template.ids([ASK, SAY, ASK]) == expected


def test_a_conversation_that_is_far_too_long_is_known_by_one_rendering(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate(tokenizer)
    turns = [ASK, *[SAY, ASK] * 50]
    n_tokens = len(template.ids(turns))
    text = Mock(wraps=template.text)
    monkeypatch.setattr(template, "text", text)
    assert template.is_longer(turns, n_tokens // 3)
    assert not template.is_longer(turns, n_tokens)
    assert template.is_longer([{"role": "user", "content": " " * 6500}], 100)
    assert text.call_count == 3
    # What is wrong with it is said by who renders it.
    assert not template.is_longer([SAY], 1)
