"""Kinds of rows: found by their columns, brought into one canonical form each, which is the document of the corpus.

Canonical forms (JSON; a text stays a plain text):

    prompt        {"prompt": text | [message …], "system"?: text, "tools"?: [tool …], "row"?: {column: value} (`data.keep`)}
    instruction   {"prompt": text | [message …], "completion": text | [message …], "system"?: text, "tools"?: [tool …],
                  "row"?: as of a prompt}
    chat          {"messages": [message …], "tools"?: [tool …], "n_prompt"?: how many messages an instruction's prompt were}
    preference    {"prompt": text | [message …], "chosen": …, "rejected": … (as the prompt), "margin"?: number,
                  "system"?, "tools"?}
    feedback      {"prompt": text | [message …], "completion": …, "label": 0 or 1, "system"?, "tools"?}
    labelled      {"text": text, "label": class name (text or integer) or value (float)}
    seq2seq       {"input": text, "target": text}
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kajiya.data.conversations import Message, message_text, messages_of, require_order, tools_of
from kajiya.data.values import RowError, json_of, text_of
from kajiya.errors import DataError

Columns = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """One kind of rows."""

    variants: Mapping[frozenset[str], frozenset[str]]
    """Sets of columns that make a row of this kind; and for each, the columns that are read beside them where they are."""
    normalise: Callable[[Columns], Any]
    """The canonical form of a row. Raises `RowError`."""


def _text(row: Columns) -> str:
    return text_of(row["text"], "text", is_empty_allowed=True)


def _prompt(row: Columns) -> dict[str, Any]:
    """What is to be answered: a text, or messages, the last of which is not the assistant's."""
    if not _is_list(row["prompt"]):
        made: dict[str, Any] = {"prompt": text_of(row["prompt"], "prompt")}
    else:
        made = {"prompt": _turns(row["prompt"], "user", "prompt")}
        require_order([*made["prompt"], {"role": "assistant"}], "prompt")
    return _with_system(made, row) | _tools(row)


def _instruction(row: Columns) -> dict[str, Any]:
    if "completion" in row:
        made = _prompt_and_completion(row)
    else:
        prompt = text_of(row["instruction"], "instruction")
        more = row.get("input")
        if more is not None and (more := text_of(more, "input", is_empty_allowed=True)).strip():
            prompt = f"{prompt}\n\n{more}"
        made = {"prompt": prompt, "completion": text_of(row["output"], "output")}
    return _with_system(made, row) | _tools(row)


def _with_system(made: dict[str, Any], row: Columns) -> dict[str, Any]:
    """With the text under `system`, which stands at the head of a prompt that is messages."""
    system = row.get("system")
    if system is None or not (system := text_of(system, "system", is_empty_allowed=True)).strip():
        return made
    if isinstance(made["prompt"], str):
        return made | {"system": system}
    if made["prompt"][0]["role"] == "system":
        raise RowError("has a system message under 'system' and at the head of its messages")
    return made | {"prompt": [{"role": "system", "content": system}, *made["prompt"]]}


def _prompt_and_completion(row: Columns) -> dict[str, Any]:
    """Both texts, or both messages."""
    prompt, completion = row["prompt"], row["completion"]
    if not _is_list(prompt) and not _is_list(completion):
        return {"prompt": text_of(prompt, "prompt"), "completion": text_of(completion, "completion")}
    before, answer = _turns(prompt, "user", "prompt"), _turns(completion, "assistant", "completion")
    require_order([*before, *answer], "prompt and completion")
    if answer[0]["role"] != "assistant":
        raise RowError(f"has a message of the {answer[0]['role']} at the head of 'completion', not of the assistant")
    return {"prompt": before, "completion": answer}


def _chat(row: Columns) -> dict[str, Any]:
    where = "messages" if "messages" in row else "conversations"
    messages = messages_of(row[where], where, system=row.get("system"))
    require_order(messages, where)
    return {"messages": messages} | _tools(row)


def _preference(row: Columns) -> dict[str, Any]:
    chosen, rejected = (json_of(row[key], key) if _is_list(row[key]) else row[key] for key in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list):
        made = _conversation_pair(prompt, chosen, rejected)
    elif isinstance(chosen, list) or isinstance(rejected, list):
        raise RowError("holds messages under one of 'chosen' and 'rejected' and a text under the other")
    else:
        made = _text_pair(prompt, text_of(chosen, "chosen"), text_of(rejected, "rejected"))
    if made["chosen"] == made["rejected"]:
        raise RowError("has the same answer under 'chosen' and 'rejected'")
    return _with_system(made, row) | _tools(row) | _margin(row)


def _conversation_pair(prompt: Any, chosen: list[Any], rejected: list[Any]) -> dict[str, Any]:
    ours, theirs = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
    shared = 0
    while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
        shared += 1
    # What both say is the prompt as far as the last message that is not the assistant's.
    while shared and ours[shared - 1]["role"] == "assistant":
        shared -= 1
    before = ours[:shared]
    if prompt is not None and prompt != "":
        stated = _turns(prompt, "user", "prompt")
        if before and stated != before[-len(stated) :]:
            raise RowError("has a prompt that is not what 'chosen' and 'rejected' begin with")
        before = before or stated
    answers = ours[shared:], theirs[shared:]
    for answer, where in zip(answers, ("chosen", "rejected"), strict=True):
        if not answer or answer[0]["role"] != "assistant":
            raise RowError(f"has no answer of the assistant under {where!r} behind what both begin with")
        require_order([*before, *answer], where)
    return {"prompt": before, "chosen": answers[0], "rejected": answers[1]}


def _text_pair(prompt: Any, chosen: str, rejected: str) -> dict[str, Any]:
    if prompt is not None and _is_list(prompt):
        before = _turns(prompt, "user", "prompt")
        require_order([*before, {"role": "assistant"}], "prompt")
        answers = ([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))
        return {"prompt": before, **dict(zip(("chosen", "rejected"), answers, strict=True))}
    if prompt is not None:
        return {"prompt": text_of(prompt, "prompt"), "chosen": chosen, "rejected": rejected}
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if shared is None else shared
    # The border stands before the last white space, which belongs to the answers.
    shared = _word_start(chosen, shared)
    if not chosen[:shared].strip():
        raise RowError("has no prompt: neither a column 'prompt', nor a beginning that 'chosen' and 'rejected' share")
    if not chosen[shared:].strip() or not rejected[shared:].strip():
        raise RowError("has no answer of its own in one of 'chosen' and 'rejected': the other begins with it")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _word_start(text: str, at: int) -> int:
    """Where the white space before the word around `at` begins, so that a shared first letter splits no word."""
    while at and not text[at - 1].isspace():
        at -= 1
    return len(text[:at].rstrip())


def _margin(row: Columns) -> dict[str, Any]:
    """By how much the chosen one is better, where the row says it."""
    given = row.get("margin")
    if given is None or given == "":
        return {}
    try:
        margin = float("nan") if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        margin = float("nan")
    if not math.isfinite(margin):
        raise RowError(f"has margin={given!r}, which is no finite number")
    return {"margin": margin}


def _feedback(row: Columns) -> dict[str, Any]:
    made = _prompt_and_completion(row) | {"label": _truth(row["label"])}
    return _with_system(made, row) | _tools(row)


def _labelled(row: Columns) -> dict[str, Any]:
    label = row["label"]
    if isinstance(label, bool):
        label = int(label)
    elif isinstance(label, (str, bytes)):
        label = text_of(label, "label")
    elif not isinstance(label, (int, float)):
        raise RowError(
            f"holds {'nothing' if label is None else type(label).__name__} under 'label', not a class or a number"
        )
    elif label != label or abs(label) == float("inf"):
        raise RowError(f"holds {label} under 'label', which is no finite number")
    return {"text": text_of(row["text"], "text"), "label": label}


def _seq2seq(row: Columns) -> dict[str, Any]:
    return {"input": text_of(row["input"], "input"), "target": text_of(row["target"], "target")}


_NONE: frozenset[str] = frozenset()
_ASIDE = frozenset({"system", "tools"})
PROMPT = "prompt"
"""The kind of rows that no answer makes of another kind."""
KEEPING = (PROMPT, "instruction")
"""Kinds whose rows keep columns for rewards."""

FORMATS: Mapping[str, Format] = {
    "text": Format({frozenset({"text"}): _NONE}, _text),
    PROMPT: Format({frozenset({"prompt"}): _ASIDE}, _prompt),
    "instruction": Format(
        {frozenset({"prompt", "completion"}): _ASIDE, frozenset({"instruction", "output"}): _ASIDE | {"input"}},
        _instruction,
    ),
    "chat": Format({frozenset({"messages"}): _ASIDE, frozenset({"conversations"}): _ASIDE}, _chat),
    "preference": Format({frozenset({"chosen", "rejected"}): _ASIDE | {"prompt", "margin"}}, _preference),
    "feedback": Format({frozenset({"prompt", "completion", "label"}): _ASIDE}, _feedback),
    "labelled": Format({frozenset({"text", "label"}): _NONE}, _labelled),
    "seq2seq": Format({frozenset({"input", "target"}): _NONE}, _seq2seq),
}
"""Every kind of rows by its name in `data.format`."""


_ASKED: Mapping[str, str] = dict.fromkeys((PROMPT, "instruction", "preference", "feedback"), "prompt") | {
    "labelled": "text",
    "seq2seq": "input",
}


def prompt_of(kind: str, document: str) -> str | None:
    """What the row asks, its system prompt too, in a form to compare; `None` of text and conversations, which are one whole."""
    if kind not in _ASKED:
        return None
    row = json.loads(document)
    return json.dumps([row.get("system"), row[_ASKED[kind]]])


def canonical(kind: str, made: Any) -> str:
    """The document of a canonical form. Raises `RowError` for what JSON cannot hold."""
    if kind == "text":
        return str(made)
    try:
        return json.dumps(made, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"holds what JSON cannot: {error}") from error


def as_chat(made: dict[str, Any]) -> dict[str, Any]:
    """The canonical form of an instruction as that of a conversation; what is its prompt is said where that is messages."""
    if isinstance(made["prompt"], str):
        system = [{"role": "system", "content": made["system"]}] if "system" in made else []
        turns = [{"role": "user", "content": made["prompt"]}, {"role": "assistant", "content": made["completion"]}]
        chat: dict[str, Any] = {"messages": [*system, *turns]}
    else:
        chat = {"messages": [*made["prompt"], *made["completion"]], "n_prompt": len(made["prompt"])}
    return chat | ({"tools": made["tools"]} if "tools" in made else {})


def class_names(labels: Iterable[Any]) -> list[str] | None:
    """Names of the classes among labels, in the order of their numbers; `None` where the labels are values.

    Texts and integers are classes, sorted; one float makes all of them values. Raises `DataError` for texts among numbers.
    """
    found = set(labels)
    if any(isinstance(label, float) for label in found) and not any(isinstance(label, str) for label in found):
        return None
    if len({type(label) for label in found}) > 1:
        some = sorted(map(str, found))[:6]
        raise DataError(
            f"data.format: texts and numbers are mixed under 'label' ({', '.join(some)} …).\n"
            "Make them all texts or integers (classes), or all numbers (a regression)."
        )
    return [str(label) for label in sorted(found)]


def row_text(kind: str, document: str) -> str:
    """What a document says, without the form it is kept in: for training a tokenizer, and for finding duplicates."""
    if kind == "text":
        return document
    row = json.loads(document)
    parts: list[str] = []
    for key in ("system", "prompt", "messages", "input", "text", "completion", "chosen", "rejected", "target"):
        value = row.get(key)
        if isinstance(value, str):
            parts.append(value)
        elif value is not None:
            parts += [message_text(message) for message in value]
    if row.get("tools"):
        parts.append(json.dumps(row["tools"], ensure_ascii=False))
    return "\n\n".join(parts)


def _turns(value: Any, role: str, where: str) -> list[Message]:
    """Messages, or the text of one."""
    if _is_list(value):
        return messages_of(value, where)
    return [{"role": role, "content": text_of(value, where)}]


def _tools(row: Columns) -> dict[str, Any]:
    tools = tools_of(row.get("tools"))
    return {"tools": tools} if tools else {}


def _is_list(value: Any) -> bool:
    """Whether a column holds messages: a list, or the JSON text of one."""
    if isinstance(value, list):
        return True
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if not isinstance(value, str) or not value.lstrip().startswith('[{"'):
        return False
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, list) and all(
        isinstance(item, dict) and bool({"role", "from"} & item.keys()) for item in found
    )


def _truth(value: Any) -> int:
    words = {"true": 1, "1": 1, "false": 0, "0": 0}
    if isinstance(value, (bool, int)) and value in (0, 1):
        return int(value)
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise RowError(f"has label={value!r}, which is neither true nor false")
