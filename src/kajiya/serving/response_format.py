"""What a request says that its answer must look like: a text, a JSON object, or JSON of a schema."""

import json
from collections.abc import Collection
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kajiya.errors import RequestError
from kajiya.serving.messages import require_known


class JsonSchema(BaseModel):
    """The schema of a `response_format`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str | None = None
    description: str | None = None
    content: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """An answer fulfils its schema with and without."""

    @model_validator(mode="before")
    @classmethod
    def _check(cls, given: Any) -> Any:
        return _known_part(given, ("name", "description", "schema", "strict"), "response_format.json_schema")


class ResponseFormat(BaseModel):
    """What an answer must look like."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="before")
    @classmethod
    def _check(cls, given: Any) -> Any:
        return _known_part(given, ("type", "json_schema"), "response_format")

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError(
                "response_format has json_schema with the type json_schema only", param="response_format"
            )
        return self

    @property
    def schema_text(self) -> str | None:
        """The JSON schema that the answer is to fulfil; `None` for free text."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.content)
        return json.dumps({"type": "object"}) if self.type == "json_object" else None


def _known_part(given: Any, known: Collection[str], where: str) -> Any:
    if isinstance(given, dict):
        require_known(given, known, where, "response_format")
    return given
