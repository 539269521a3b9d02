"""Values of a row's columns, checked: what is no text, no list, no number is said with the place where it stands."""

import json
from typing import Any


class RowError(Exception):
    """What is wrong with a row, to be read after its name."""


def text_of(value: Any, where: str, *, is_empty_allowed: bool = False) -> str:
    """The text under `where`: a string, or its UTF-8 bytes. Raises `RowError` for anything else, and for an empty one."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            line = value.count(b"\n", 0, error.start) + 1
            raise RowError(f"is not utf-8 under {where!r}: byte 0x{value[error.start]:02x} on line {line}") from error
    if not isinstance(value, str):
        held = "nothing (null)" if value is None else f"a value of type {type(value).__name__}"
        raise RowError(f"holds {held} under {where!r}, not text")
    require_unicode(value, where)
    if not is_empty_allowed and not value.strip():
        raise RowError(f"is empty under {where!r}")
    return value


def require_unicode(value: Any, where: str) -> None:
    """Raise `RowError` for half of a surrogate pair anywhere in a value that JSON can hold."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"holds a lone surrogate (\\u{ord(value[error.start]):04x}) under {where!r}") from error
    elif isinstance(value, dict):
        for key, inner in value.items():
            require_unicode(key, where)
            require_unicode(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            require_unicode(inner, f"{where}[{index}]")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError(f"has the key {next(key for key in made if keys.count(key) > 1)!r} twice")
    return made


_JSON = json.JSONDecoder(object_pairs_hook=_once)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds. Raises `ValueError` or `RecursionError` for no JSON, `RowError` for a key that stands twice."""
    return _JSON.decode(text if isinstance(text, str) else text.decode())


def json_of(value: Any, where: str) -> Any:
    """The value, or what its text holds as JSON where it is a text."""
    if isinstance(value, (str, bytes)):
        try:
            return parse_json(value)
        except RowError as error:
            raise RowError(f"{error} under {where!r}") from error
        except (ValueError, RecursionError) as error:
            raise RowError(f"holds a text under {where!r} that is no JSON: {error}") from error
    return value


def list_of(value: Any, where: str) -> list[Any]:
    """A list, or the JSON text of one; empty where there is nothing."""
    found = None if value == "" else json_of(value, where)
    if found is None or found == {}:
        return []
    if not isinstance(found, list):
        raise RowError(f"holds a {type(found).__name__} under {where!r}, not a list")
    return found


def objects_of(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of objects, or the JSON text of one."""
    found = json_of(value, where)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        held = "nothing (null)" if found is None else f"a {type(found).__name__}"
        raise RowError(f"holds {held} under {where!r}, not a list of objects")
    return found


def escaped(text: str) -> str:
    """The text with lone surrogates written as `\\udXXX`, so that any file and screen can hold it."""
    return text.encode(errors="backslashreplace").decode()


def excerpt(value: Any, length: int = 300) -> str:
    """A value as JSON in one line, for an error; at most `length` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    text = escaped(" ".join(text.split()))
    return text if len(text) <= length else text[: length - 1] + "…"
