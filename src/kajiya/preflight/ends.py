"""Where the model stops, and whether the text that it learns from ends there."""

from kajiya.models.outputs import named_ends
from kajiya.preflight.subject import Finding, Subject, failed

ANSWERED = ("chat", "prompt", "instruction", "preference", "feedback")
"""Kinds of rows that hold answers of an assistant, or ask for them."""


def unstoppable(subject: Subject) -> Finding | None:
    """Where the model does not stop at what its text ends with."""
    tokenizer, stops = subject.tokenizer, named_ends(subject.setup.model)
    if stops is not None and tokenizer.eos_token_id not in stops:
        return failed(
            f"the model's generation config ends at {sorted(stops) or 'nothing'}, the text ends with {tokenizer.eos_token_id}",
            "Set eos_token_id of the base's generation_config.json to the tokenizer's.",
        )
    return _template_without_end(subject)


def stops_of(subject: Subject) -> set[int]:
    """Ids at which the model ends an answer."""
    return named_ends(subject.setup.model) or {subject.tokenizer.eos_token_id}


def _template_without_end(subject: Subject) -> Finding | None:
    """For conversations: the template must end an answer with a token that the model stops at."""
    tokenizer, kind, render = subject.tokenizer, subject.corpus.facts["format"], subject.config.data.render
    is_plain = kind != "chat" and render.prompt_style == "plain"
    if kind not in ANSWERED or is_plain or not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    # A template may write it in other letters; where it writes something else, its rows are looked at all the same.
    at = text.lower().rfind("answer")
    if at < 0:
        return None
    behind = tokenizer.encode(text[at + len("answer") :], add_special_tokens=False)
    if stops_of(subject) & set(behind):
        return None
    return failed(
        "the chat template ends an answer with no token that the model stops at",
        "Set tokenizer.chat_template or its eos_token.",
    )
