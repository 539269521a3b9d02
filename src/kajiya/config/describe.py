"""The config described for people and programs: a JSON schema with the words that stand beneath each field."""

import ast
import inspect
import itertools
import textwrap
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any

from kajiya.config.digest import to_plain
from kajiya.config.schema import Config
from kajiya.config.tables import TABLES

_JSON_TYPES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "object",
    tuple: "array",
    list: "array",
}
_JSON_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


@cache
def field_docs(section: type) -> dict[str, str]:
    """The docstring beneath each field of a dataclass, by field name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(section)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    docs = {}
    for node, following in itertools.pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[node.target.id] = str(following.value.value)
    return docs


def json_schema(section: type = Config) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a section, nested sections inside."""
    hints = typing.get_type_hints(section)
    docs = field_docs(section)
    properties = {}
    for item in fields(section):
        hint = hints[item.name]
        if is_dataclass(hint):
            properties[item.name] = json_schema(typing.cast(type, hint)) | {"description": docs.get(item.name, "")}
            continue
        entry: dict[str, Any] = {"description": docs.get(item.name, "")}
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        names = ["null" if k is type(None) else _JSON_TYPES[typing.get_origin(k) or k] for k in kinds]
        entry["type"] = names[0] if len(names) == 1 else names
        if item.metadata.get("choices"):
            entry["enum"] = [*item.metadata["choices"], *([None] if "null" in names else [])]
        for name, bound in item.metadata.get("bounds", {}).items():
            entry[_JSON_BOUNDS[name]] = bound
        if item.default is not MISSING:
            entry["default"] = to_plain(item.default)
        properties[item.name] = entry
    return {
        "type": "object",
        "description": inspect.getdoc(section) or "",
        "properties": properties,
        "additionalProperties": False,
    }


def whole_schema() -> dict[str, Any]:
    """JSON schema of the config, with the options of every name of every table under `$defs`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **json_schema(), "$defs": tables_schema()}


def tables_schema() -> dict[str, dict[str, Any]]:
    """For every table, each name's options as a JSON schema."""
    return {table: {name: json_schema(row.options) for name, row in rows.items()} for table, rows in TABLES.items()}
