"""Completions of functions that the model has never seen, beside the real ones."""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kajiya.data.documents import Documents
from kajiya.data.encode import encode_texts, open_encoder
from kajiya.data.tokenizer import load_tokenizer, start_id
from kajiya.serving.engine import Engine
from kajiya.serving.sequence import SamplingParams


@dataclass(frozen=True)
class UnseenFunction:
    """A function of a held-out document, cut behind its signature and docstring."""

    document: str
    name: str
    context: str
    """The document's text up to and with the docstring."""
    prompt: str
    """The signature and docstring alone."""
    body: str
    """What really follows."""


def unseen_functions(documents: Documents, n: int) -> list[UnseenFunction]:
    """`n` documented functions of the held-out documents, from as many documents as there are, in the order of a hash."""
    firsts: dict[str, UnseenFunction] = {}
    for index, name in enumerate(documents.names):
        found = list(_functions(name, documents.text(index)))
        if found:
            firsts[name] = min(found, key=lambda each: _order(each.document + each.name))
    return sorted(firsts.values(), key=lambda each: _order(each.document))[:n]


def sample_completions(
    engine: Engine, folder: Path, functions: list[UnseenFunction], *, max_tokens: int, temperature: float, seed: int
) -> list[dict[str, str]]:
    """The model's continuation of each function, drawn by the engine that serves; prompts keep their nearest context."""
    tokenizer = load_tokenizer(folder)
    encoded = encode_texts(open_encoder(folder), [each.context for each in functions])
    room = engine.context_tokens - max_tokens - 1
    prompts = [[start_id(tokenizer), *ids[-room:].tolist()] for ids in encoded]
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    completions = engine.generate(prompts, params)
    return [
        asdict(function)
        | {"context": "", "completion": tokenizer.decode(completion.token_ids, skip_special_tokens=True)}
        for function, completion in zip(functions, completions, strict=True)
    ]


def _functions(document: str, text: str) -> Iterator[UnseenFunction]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # held-out text may be any text; what is no Python has no functions
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or len(node.body) < 2:
            continue
        docstring, following, end = node.body[0], node.body[1], node.end_lineno
        size = (end or 0) - (docstring.end_lineno or 0)
        if docstring.end_lineno is None or following.lineno <= docstring.end_lineno or not 2 <= size <= 25:
            continue
        yield UnseenFunction(
            document=document,
            name=node.name,
            context="".join(lines[: docstring.end_lineno]),
            prompt="".join(lines[node.lineno - 1 : docstring.end_lineno]),
            body="".join(lines[docstring.end_lineno : end]),
        )


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
