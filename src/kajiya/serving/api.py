"""OpenAI's API over the engine, with health, metrics and the playground page."""

import asyncio
import base64
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, Response

from kajiya.config.schema import ServeConfig
from kajiya.errors import RequestError
from kajiya.serving.engine import Engine
from kajiya.serving.faults import add_error_handlers
from kajiya.serving.gate import add_gate
from kajiya.serving.generation import Generation, Prompt, unless_gone
from kajiya.serving.hosts import Host, Hosts, Source, source_of
from kajiya.serving.metrics import CONTENT_TYPE, Metrics
from kajiya.serving.protocol import AdapterBody, ChatBody, CompletionBody, EmbeddingBody, ModelBody, NameBody
from kajiya.serving.replies import ChatShape, CompletionShape
from kajiya.serving.sequence import SamplingParams
from kajiya.serving.tools import call_schema, check_tools, format_or_call, refuse_strict

_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)


def create_app(
    engine: Engine,
    tokenizer: Any,
    name: str,
    cfg: ServeConfig,
    others: Mapping[str, Source] | None = None,
    load: Callable[[Path], Engine] | None = None,
) -> FastAPI:
    """The web application that serves `engine` as the model `name`; its life is the life of the engines' threads.

    `others` are models that are loaded when they are first asked for; `load` opens further ones at run time, where
    `serve.allow_loading` lets clients ask for that.
    """
    metrics = Metrics()
    interval = cfg.stream_interval if isinstance(cfg.stream_interval, int) else None
    first = Host(name, engine, tokenizer, metrics, interval)
    hosts = Hosts(first, metrics, others or {}, cfg.idle_unload_s, interval)
    service = Service(hosts, cfg, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        hosts.start()
        # A second signal ends the server at once and cancels this: a thread within a step must not outlive it even so.
        with suppress(asyncio.CancelledError):
            yield
        await hosts.stop()

    app = FastAPI(title="Kajiya", lifespan=lifespan, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    app.include_router(_openai_routes(service))
    app.include_router(_own_routes(service))
    if cfg.allow_loading and load is not None:
        app.include_router(_loading_routes(service, load))
    add_gate(app, cfg, metrics)
    return app


class Service:
    """What the routes share: the models, the settings and the metrics."""

    def __init__(self, hosts: Hosts, cfg: ServeConfig, metrics: Metrics) -> None:
        self.hosts = hosts
        self.cfg = cfg
        self.metrics = metrics

    async def begin(
        self, body: CompletionBody | ChatBody, host: Host, shape: Any, prompts: list[Prompt], params: SamplingParams
    ) -> Generation:
        """Submit the requests of a call."""
        generation = Generation(host.worker, self.metrics, shape, bool(body.stream), body.with_usage)
        await generation.begin(prompts, body.n or 1, params, body.stops, host.tokenizer)
        return generation


def _openai_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": service.hosts.cards()})

    @router.get("/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        card = next((card for card in service.hosts.cards() if card["id"] == name), None)
        if card is None:
            # The error that names the models that are here; nothing is loaded for it.
            await service.hosts.find(name)
        return JSONResponse(card)

    @router.post("/completions")
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        host, adapter = await service.hosts.find(body.model)
        prompts = []
        for ids, text in await host.texts_or_ids(body.prompt, "prompt"):
            start = host.tokenizer.bos_token_id
            start = host.tokenizer.eos_token_id if start is None else start
            # An empty prompt stands for the beginning of a document, as in OpenAI's API.
            ids = ids or ([] if start is None else [start])
            if text is None and body.echo:
                text = host.tokenizer.decode(ids, skip_special_tokens=True)
            prompts.append(Prompt(ids, text if body.echo else None, adapter))
        longest = max(len(prompt.ids) for prompt in prompts)
        params = _sampling(
            body,
            max_tokens=host.answer_tokens(body.max_tokens, service.cfg, longest, "prompt", "max_tokens"),
            n_logprobs=body.logprobs or 0,
        )
        params = replace(params, prompt_logprobs=bool(body.echo) and body.logprobs is not None)
        shape = CompletionShape(body.model, host.read_bytes, body.logprobs)
        generation = await service.begin(body, host, shape, prompts, params)
        return generation.stream() if body.stream else await generation.reply(http)

    @router.post("/chat/completions")
    async def chat(body: ChatBody, http: HttpRequest) -> Response:
        host, adapter = await service.hosts.find(body.model)
        ids = await host.chat_ids(body.messages, body.offered)
        params = _sampling(
            body,
            max_tokens=host.answer_tokens(body.answer_tokens, service.cfg, len(ids), "messages", body.length),
            n_logprobs=body.top_logprobs or 0,
        )
        tools = check_tools(body.offered)
        are_several = bool(body.parallel_tool_calls)
        called = call_schema(tools, body.tool_choice, are_several)
        if called is None and params.grammar is None:
            refuse_strict(body.offered)
        if called is not None and params.grammar is not None:
            problem = "response_format and a tool_choice that binds the answer to a call exclude each other"
            raise RequestError(problem, param="response_format")
        if params.grammar is not None and tools:
            called = format_or_call(params.grammar, tools, are_several)
        params = replace(params, grammar=called or params.grammar)
        max_calls = 1 if body.parallel_tool_calls is False else None
        shape = ChatShape(body.model, host.read_bytes, bool(body.logprobs), tuple(tools), max_calls)
        generation = await service.begin(body, host, shape, [Prompt(ids, None, adapter)], params)
        return generation.stream() if body.stream else await generation.reply(http)

    @router.post("/embeddings")
    async def embeddings(body: EmbeddingBody, http: HttpRequest) -> Response:
        host, adapter = await service.hosts.find(body.model)
        inputs = [ids for ids, _ in await host.texts_or_ids(body.input, "input")]
        return await unless_gone(http, _embedded(host, adapter, inputs, body))

    return router


async def _embedded(host: Host, adapter: str | None, inputs: list[list[int]], body: EmbeddingBody) -> Response:
    data = []
    for index, ids in enumerate(inputs):
        vector = await host.worker.embed(ids, adapter)
        packed: Any = vector
        if body.encoding_format == "base64":
            packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": packed})
    n_tokens = sum(len(ids) for ids in inputs)
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})


def _loading_routes(service: Service, load: Callable[[Path], Engine]) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/load_lora_adapter")
    async def load_adapter(body: AdapterBody) -> JSONResponse:
        if not body.lora_path:
            raise RequestError("lora_path is missing", code="missing_required_parameter", param="lora_path")
        host, _ = await service.hosts.find(body.model or service.hosts.first.name)
        if any(card["id"] == body.lora_name for card in service.hosts.cards()):
            raise RequestError(
                f"a model with the name {body.lora_name!r} is here already", param="lora_name", status=409
            )
        await host.load_adapter(body.lora_name, Path(body.lora_path))
        return JSONResponse({"object": "list", "data": service.hosts.cards()})

    @router.post("/unload_lora_adapter")
    async def unload_adapter(body: AdapterBody) -> JSONResponse:
        host, adapter = await service.hosts.find(body.lora_name)
        if adapter is None:
            raise RequestError(f"{body.lora_name!r} is no adapter", param="lora_name")
        await host.unload_adapter(adapter)
        return JSONResponse({"object": "list", "data": service.hosts.cards()})

    @router.post("/load_model")
    async def load_model(body: ModelBody) -> JSONResponse:
        service.hosts.add(source_of(body.name, Path(body.folder), load))
        try:
            await service.hosts.find(body.name)
        except BaseException:
            # What could not be loaded is no model of this server.
            await service.hosts.remove(body.name)
            raise
        return JSONResponse({"object": "list", "data": service.hosts.cards()})

    @router.post("/unload_model")
    async def unload_model(body: NameBody) -> JSONResponse:
        await service.hosts.remove(body.name)
        return JSONResponse({"object": "list", "data": service.hosts.cards()})

    return router


def _own_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:
        hosts = service.hosts.loaded
        is_alive = all(host.worker.is_alive for host in hosts)
        facts = {
            "status": "ok" if is_alive else "engine stopped",
            "model": service.hosts.first.name,
            "running": sum(host.engine.scheduler.n_running for host in hosts),
            "waiting": sum(host.engine.scheduler.n_waiting for host in hosts),
            "engines": {host.name: host.engine.facts.note for host in hosts},
        }
        return JSONResponse(facts, 200 if is_alive else 503)

    @router.get("/ready")
    async def ready() -> JSONResponse:
        # Ready: a request sent now would not be refused for want of room.
        hosts = service.hosts.loaded
        has_room = all(host.worker.is_alive and host.engine.scheduler.n_room > 0 for host in hosts)
        return JSONResponse({"status": "ready" if has_room else "busy"}, 200 if has_room else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        service.metrics.refresh([host.engine for host in service.hosts.loaded])
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @router.get("/")
    async def playground() -> HTMLResponse:
        return playground_page()

    return router


def playground_page() -> HTMLResponse:
    """The page that talks to the API of the server that it came from."""
    page = resources.files("kajiya.serving").joinpath("playground.html").read_text(encoding="utf-8")
    return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"})


def _sampling(body: CompletionBody | ChatBody, *, max_tokens: int, n_logprobs: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        # No mass at all: the most probable token is the smallest set that reaches it.
        top_k=1 if body.top_p == 0 else body.top_k,
        top_p=body.top_p or 1.0,
        seed=body.seed,
        n_logprobs=n_logprobs,
        ignore_eos=bool(body.ignore_eos),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=body.biases(),
        grammar=body.schema_text,
    )
