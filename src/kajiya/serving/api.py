"""OpenAI's API over the engine, with health, metrics and the playground page."""

import asyncio
import base64
import secrets
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kajiya.config.schema import ServeConfig
from kajiya.data.chat import ChatTemplate
from kajiya.errors import DataError, RequestError
from kajiya.serving.engine import Engine
from kajiya.serving.faults import add_error_handlers, error_reply
from kajiya.serving.generation import Generation, Prompt
from kajiya.serving.metrics import CONTENT_TYPE, Metrics
from kajiya.serving.protocol import ChatBody, CompletionBody, EmbeddingBody
from kajiya.serving.replies import ChatShape, CompletionShape
from kajiya.serving.sequence import SamplingParams
from kajiya.serving.text import byte_reader
from kajiya.serving.worker import Worker

_LONG_TEXT = 20_000
"""Characters past which a text is tokenized off the event loop."""
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)


def create_app(engine: Engine, tokenizer: Any, name: str, cfg: ServeConfig) -> FastAPI:
    """The web application that serves `engine` as the model `name`; its life is the life of the engine's thread."""
    metrics = Metrics()
    worker = Worker(engine, metrics)
    service = Service(engine, tokenizer, name, cfg, worker, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    app = FastAPI(title="Kajiya", lifespan=lifespan, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    app.include_router(_openai_routes(service))
    app.include_router(_own_routes(service))
    app.add_middleware(_Gate, api_key=cfg.api_key, metrics=metrics)
    return app


class Service:
    """What the routes share: the engine's worker, the tokenizer, the model's name and the settings."""

    def __init__(
        self, engine: Engine, tokenizer: Any, name: str, cfg: ServeConfig, worker: Worker, metrics: Metrics
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.chat = ChatTemplate(tokenizer)
        self.name = name
        self.cfg = cfg
        self.worker = worker
        self.metrics = metrics
        self.read_bytes = byte_reader(tokenizer)
        self.created = int(time.time())

    def model_card(self) -> dict[str, Any]:
        """The model in `/v1/models`; the last two fields are this server's own."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "kajiya",
            "max_model_len": self.engine.context_tokens,
            "has_chat_template": bool(self.tokenizer.chat_template),
        }

    def require_model(self, name: str) -> None:
        """Raise a 404 for any other model."""
        if name != self.name:
            raise RequestError(
                f"The model {name!r} does not exist here; this server has {self.name!r}.",
                code="model_not_found",
                param="model",
                status=404,
            )

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds."""
        if len(text) > _LONG_TEXT:
            return await asyncio.to_thread(self._encode, text)
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids

    def answer_tokens(self, asked: int | None, longest_prompt: int, param: str) -> int:
        """Longest answer: what was asked for, or the default cut to what the context leaves."""
        context = self.engine.context_tokens
        room = context - longest_prompt
        if room < (1 if asked is None else 0):
            raise RequestError(
                f"This model's context length is {context} tokens, but the prompt has {longest_prompt}"
                f"{'' if room < 0 else ', which leaves none for the answer'}.",
                code="context_length_exceeded",
                param=param,
            )
        return min(self.cfg.default_max_tokens, room) if asked is None else asked

    async def texts_or_ids(self, given: Any, param: str) -> list[tuple[list[int], str | None]]:
        """Each item of a checked `prompt` or `input` as token ids, with its text where it was one."""
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
        for item in given:
            if not isinstance(item, str):
                self.engine.check_ids(item, param)
        return [(await self.tokenize(item), item) if isinstance(item, str) else (item, None) for item in given]


def _openai_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [service.model_card()]})

    @router.get("/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        service.require_model(name)
        return JSONResponse(service.model_card())

    @router.post("/completions")
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        service.require_model(body.model)
        prompts = []
        for ids, text in await service.texts_or_ids(body.prompt, "prompt"):
            start = service.tokenizer.bos_token_id
            start = service.tokenizer.eos_token_id if start is None else start
            # An empty prompt stands for the beginning of a document, as in OpenAI's API.
            ids = ids or ([] if start is None else [start])
            if text is None and body.echo:
                text = service.tokenizer.decode(ids, skip_special_tokens=True)
            prompts.append(Prompt(ids, text if body.echo else None))
        longest = max(len(prompt.ids) for prompt in prompts)
        params = _sampling(
            body,
            max_tokens=service.answer_tokens(body.max_tokens, longest, "prompt"),
            n_logprobs=body.logprobs or 0,
            prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        )
        shape = CompletionShape(service.name, service.read_bytes, body.logprobs)
        generation = Generation(service.worker, service.metrics, shape, body.with_usage)
        await generation.begin(prompts, body.n or 1, params, body.stops, service.tokenizer)
        return generation.stream() if body.stream else await generation.reply(http)

    @router.post("/chat/completions")
    async def chat(body: ChatBody, http: HttpRequest) -> Response:
        service.require_model(body.model)
        try:
            ids = service.chat.ids(body.plain_messages(), add_generation_prompt=True)
        except DataError as error:
            raise RequestError(str(error), param="messages") from error
        params = _sampling(
            body,
            max_tokens=service.answer_tokens(body.answer_tokens, len(ids), "messages"),
            n_logprobs=body.top_logprobs or 0,
        )
        shape = ChatShape(service.name, service.read_bytes, bool(body.logprobs))
        generation = Generation(service.worker, service.metrics, shape, body.with_usage)
        await generation.begin([Prompt(ids)], body.n or 1, params, body.stops, service.tokenizer)
        return generation.stream() if body.stream else await generation.reply(http)

    @router.post("/embeddings")
    async def embeddings(body: EmbeddingBody) -> JSONResponse:
        service.require_model(body.model)
        inputs = [ids for ids, _ in await service.texts_or_ids(body.input, "input")]
        data = []
        for index, ids in enumerate(inputs):
            # One at a time between two steps, so that running answers go on.
            vector = await service.worker.call(lambda ids=ids: service.engine.embed(ids))  # type: ignore[misc]
            packed: Any = vector
            if body.encoding_format == "base64":
                packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            data.append({"object": "embedding", "index": index, "embedding": packed})
        n_tokens = sum(len(ids) for ids in inputs)
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})

    return router


def _own_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:
        is_alive = service.worker.is_alive
        facts = {
            "status": "ok" if is_alive else "engine stopped",
            "model": service.name,
            "running": service.engine.scheduler.n_running,
            "waiting": service.engine.scheduler.n_waiting,
        }
        return JSONResponse(facts, 200 if is_alive else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        service.metrics.refresh(service.engine)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @router.get("/")
    async def playground() -> HTMLResponse:
        page = resources.files("kajiya.serving").joinpath("playground.html").read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"})

    return router


def _sampling(
    body: CompletionBody | ChatBody, *, max_tokens: int, n_logprobs: int, prompt_logprobs: bool = False
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        n_logprobs=n_logprobs,
        prompt_logprobs=prompt_logprobs,
        ignore_eos=bool(body.ignore_eos),
    )


class _Gate:
    """Checks the key before anything of a request is read, and counts and times the reply."""

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics) -> None:
        self._app = app
        self._key = api_key.encode() if api_key else None
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["path"].startswith("/v1/") and not self._has_key(scope):
                refusal = error_reply(
                    "This server needs an API key: send it as 'Authorization: Bearer <key>'.",
                    401,
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal(scope, receive, watched)
            else:
                await self._app(scope, receive, watched)
        finally:
            endpoint = _endpoint(scope["path"])
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.duration.labels(endpoint).observe(time.perf_counter() - begun)

    def _has_key(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, b"Bearer " + self._key)


def _endpoint(path: str) -> str:
    """The path as a label: one of the server's own, so that strangers cannot fill the metrics with theirs."""
    known = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/models", "/health", "/metrics", "/")
    return path if path in known else "other"
