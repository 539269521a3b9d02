"""Schemathesis over the server's own OpenAPI document: whatever is sent, no answer is a 5xx and the server goes on."""

import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kajiya.config.schema import ServeConfig
from kajiya.serving.api import create_app

from .conftest import NAME, open_engine, running

SAMPLES = 60
NEEDED = {"model", "messages", "prompt", "input", "lora_name", "lora_path", "path"}
ADDRESSES = {
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "POST /v1/embeddings",
    "POST /v1/load_lora_adapter",
    "POST /v1/unload_lora_adapter",
    "POST /v1/load_model",
    "POST /v1/unload_model",
    "GET /health",
    "GET /ready",
    "GET /metrics",
    "GET /",
}


@pytest.mark.slow
def test_nothing_that_the_document_allows_or_forbids_breaks_the_server(model_folder: Path, tokenizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports
        import schemathesis
        from schemathesis.generation import GenerationMode

    engine = open_engine(model_folder, max_batch=8, max_waiting=200)
    cfg = ServeConfig(allow_loading=True, default_max_tokens=4)
    statuses: dict[str, set[int]] = {}
    with running(create_app(engine, tokenizer, NAME, cfg, {}, open_engine)) as url:
        document = httpx.get(f"{url}/openapi.json").json()
        _name_the_model(document)
        schema = schemathesis.openapi.from_dict(document)
        for found in schema.get_all_operations():
            operation = found.ok()
            seen = statuses[f"{operation.method.upper()} {operation.path}"] = set()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                # Of an address without a body nothing can be wrong: any text is a name.
                cases = operation.as_strategy(generation_mode=mode)
                if operation.body or mode == GenerationMode.POSITIVE:
                    seen |= _statuses(cases, url)
                # Of twenty fields at once some do not go together; of few, any two are tried.
                if operation.body and mode == GenerationMode.POSITIVE:
                    seen |= _statuses(st.builds(_with_few_fields, cases, st.lists(st.integers(0, 99), max_size=2)), url)
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
    assert statuses.keys() == ADDRESSES
    for address in ("POST /v1/completions", "POST /v1/chat/completions", "POST /v1/embeddings"):
        assert {200, 400} <= statuses[address], (address, statuses)
    assert engine.is_idle
    assert engine.scheduler.pool.n_free == engine.scheduler.pool.n_blocks


def _statuses(cases: Any, url: str) -> set[int]:
    """Send what is drawn; the statuses that came back."""
    seen = set()

    @settings(max_examples=SAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def send(case: Any) -> None:
        reply = case.call(base_url=url, timeout=60)
        seen.add(reply.status_code)
        assert reply.status_code < 500, (case.as_curl_command(), reply.text)

    send()
    return seen


def _with_few_fields(case: Any, picked: list[int]) -> Any:
    """The case with what it must have, and of its other fields those that were picked."""
    if isinstance(case.body, dict) and (others := sorted(case.body.keys() - NEEDED)):
        kept = NEEDED | {others[i % len(others)] for i in picked}
        case.body = {name: value for name, value in case.body.items() if name in kept}
    return case


def _name_the_model(document: dict[str, Any]) -> None:
    """Have requests name the model that is here, and ask for short texts; any other name is a 404 before all else."""
    for body in document["components"]["schemas"].values():
        properties = body.get("properties", {})
        if "messages" in properties or "prompt" in properties or "input" in properties:
            properties["model"] = {"const": NAME}
        if "messages" in properties:
            # Of roles in any order templates take next to none.
            turn = {"const": [{"role": "user", "content": "Why?"}]}
            properties["messages"] = {"anyOf": [turn, properties["messages"]]}
