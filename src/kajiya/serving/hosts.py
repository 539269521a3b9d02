"""The models of a server: each with an engine and a thread of its own, loaded when needed, let go when idle."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kajiya.config.schema import ServeConfig
from kajiya.data.chat import TOKEN_CHARACTERS, ChatTemplate, Messages
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError, RequestError
from kajiya.serving.adapters import is_adapter, read_adapter
from kajiya.serving.engine import Engine
from kajiya.serving.text import byte_reader
from kajiya.serving.tools import prompt_ids, too_long
from kajiya.serving.worker import StepWatcher, Worker

Opened = tuple[Engine, Any]
"""An engine and its tokenizer."""
_LONG_TEXT = 20_000
"""Characters past which texts are tokenized beside the event loop."""
_TEXT_COST = 200
"""Characters that take as long as beginning with a text, or a message, at all."""
_FEW_MESSAGES = 8
"""Messages up to which a conversation is rendered on the event loop: it is, once for each answer that is new."""


@dataclass(frozen=True)
class Source:
    """A model that can be loaded at any time."""

    name: str
    open: Callable[[], Opened]


class Host:
    """One model in memory."""

    def __init__(
        self, name: str, engine: Engine, tokenizer: Any, watcher: StepWatcher, stream_interval: int | None
    ) -> None:
        self.name = name
        self.engine = engine
        self.tokenizer = tokenizer
        self.chat = ChatTemplate(tokenizer, remembers=True)
        self.worker = Worker(engine, watcher, stream_interval)
        self.read_bytes = byte_reader(tokenizer)
        self.created = int(time.time())
        self.last_used = time.monotonic()
        if engine.eos_ids:
            engine.use_tokenizer(tokenizer)

    @property
    def most_tokens(self) -> int:
        """Longest prompt with its answer: what the context takes and the cache holds."""
        pool = self.engine.scheduler.pool
        return min(self.engine.context_tokens, pool.n_blocks * pool.block_tokens)

    def card(self, name: str) -> dict[str, Any]:
        """The model, or an adapter of it, in `/v1/models`; fields past `owned_by` are this server's own."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "kajiya",
            "max_model_len": self.most_tokens,
            "has_chat_template": bool(self.tokenizer.chat_template),
            "parent": None if name == self.name else self.name,
        }

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Serve the adapter in `folder` too. It is read beside the engine's thread: its base may take seconds to hash."""
        facts = self.engine.facts
        adapter = await asyncio.to_thread(read_adapter, folder, facts.shapes, facts.origin)
        await self.worker.call(lambda: self.engine.load_adapter(name, folder, adapter))

    async def chat_ids(self, messages: Messages, tools: Messages) -> list[int]:
        """Token ids of a conversation, rendered beside the event loop where it is long. Raises `RequestError` as `prompt_ids`."""
        read = partial(prompt_ids, self.chat, messages, tools, self.engine.context_tokens)
        is_short = len(messages) <= _FEW_MESSAGES and not tools
        if is_short and sum(len(str(each.get("content"))) for each in messages) <= _LONG_TEXT:
            return read()
        return await asyncio.to_thread(read)

    async def unload_adapter(self, name: str) -> None:
        """Serve an adapter no more. Raises `RequestError` while requests use it, or texts that are being read."""
        n_reading = self.worker.n_embedding(name)
        if n_reading:
            raise RequestError(
                f"{n_reading} texts are read with the adapter {name!r}; try again", param="name", status=409
            )
        await self.worker.call(lambda: self.engine.unload_adapter(name))

    async def _encode_all(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, with the special tokens that the tokenizer adds."""

        def encode() -> list[list[int]]:
            return [self.tokenizer(text, verbose=False)["input_ids"] for text in texts]

        is_short = sum(len(text) + _TEXT_COST for text in texts) <= _LONG_TEXT
        return encode() if is_short else await asyncio.to_thread(encode)

    def answer_tokens(self, asked: int | None, cfg: ServeConfig, longest_prompt: int, prompt: str, length: str) -> int:
        """Longest answer: what was asked for, or the default cut to what context and cache leave and the server allows.

        Errors name the parameters `prompt` and `length`.
        """
        most = cfg.max_answer_tokens
        if most is not None and asked is not None and asked > most:
            problem = f"{length} must be at most {most} on this server, not {asked}"
            raise RequestError(problem, code="invalid_value", param=length)
        room = self.most_tokens - longest_prompt
        if room < (1 if asked is None else 0):
            is_context = self.most_tokens == self.engine.context_tokens
            what = "This model's context length is" if is_context else "This server's cache holds"
            raise RequestError(
                f"{what} {self.most_tokens} tokens, but the prompt has {longest_prompt}"
                f"{'' if room < 0 else ', which leaves none for the answer'}.",
                code="context_length_exceeded" if is_context else "cache_exceeded",
                param=prompt,
            )
        return min(cfg.default_max_tokens, room, most or room) if asked is None else asked

    async def texts_or_ids(self, given: Any, param: str) -> list[tuple[list[int], str | None]]:
        """Each item of a checked `prompt` or `input` as token ids, with its text where it was one."""
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
        for item in given:
            if not isinstance(item, str):
                self.engine.check_ids(item, param)
            elif len(item) > TOKEN_CHARACTERS * self.engine.context_tokens:
                raise too_long(self.engine.context_tokens, param)
        encoded = iter(await self._encode_all([item for item in given if isinstance(item, str)]))
        return [(next(encoded), item) if isinstance(item, str) else (item, None) for item in given]


class Hosts:
    """Every model and adapter that requests can name."""

    def __init__(
        self,
        first: Host,
        watcher: StepWatcher,
        others: Mapping[str, Source],
        idle_unload_s: float | None,
        stream_interval: int | None,
    ) -> None:
        self.first = first
        self._watcher = watcher
        self._sources = dict(others)
        self._hosts = {first.name: first}
        self._kept: dict[str, dict[str, Path]] = {}
        """Adapters of models that were let go, by model and name: they come back when they are asked for."""
        self._idle_unload_s = idle_unload_s
        self._stream_interval = stream_interval
        self._loads: dict[Source, asyncio.Task[None]] = {}
        self._loading = asyncio.Lock()
        self._returning = asyncio.Lock()
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def loaded(self) -> list[Host]:
        """The models in memory."""
        return list(self._hosts.values())

    def cards(self) -> list[dict[str, Any]]:
        """Models and adapters, for `/v1/models`; models that are not in memory are listed too."""
        cards = [host.card(name) for host in self.loaded for name in (host.name, *host.engine.adapters)]
        asleep: list[tuple[str, str | None]] = [
            (each, None) for each in sorted(self._sources.keys() - self._hosts.keys())
        ]
        kept = [(name, model) for model, adapters in sorted(self._kept.items()) for name in adapters]
        return cards + [
            {"id": name, "object": "model", "created": 0, "owned_by": "kajiya", "parent": parent, "is_loaded": False}
            for name, parent in asleep + kept
        ]

    async def find(self, name: str) -> tuple[Host, str | None]:
        """The model that answers for `name`, and the adapter if it is one's; a model that sleeps is loaded. Raises a 404."""
        for host in self.loaded:
            if name == host.name or name in host.engine.adapters:
                host.last_used = time.monotonic()
                return host, None if name == host.name else name
        model = next((each for each, adapters in self._kept.items() if name in adapters), name)
        if model not in self._sources:
            raise self._unknown(name)
        host = await self._loaded(model)
        if name == model:
            return host, None
        async with self._returning:
            folder = self._kept.get(model, {}).get(name)
            if folder is not None:
                await host.load_adapter(name, folder)
                self._kept.get(model, {}).pop(name, None)
        return host, name

    async def _loaded(self, model: str) -> Host:
        """The model in memory. It is loaded once, however many ask for it, and to its end though they leave."""
        if model not in self._hosts:
            source = self._sources[model]
            if source not in self._loads:
                loading = asyncio.create_task(self._load(source))
                self._loads[source] = loading
                loading.add_done_callback(lambda _: self._loads.pop(source))
            await asyncio.shield(self._loads[source])
        host = self._hosts.get(model)
        if host is None:  # removed since
            raise self._unknown(model)
        host.last_used = time.monotonic()
        return host

    async def _load(self, source: Source) -> None:
        def opened() -> Host:
            return Host(source.name, *source.open(), self._watcher, self._stream_interval)

        async with self._loading:
            host = await asyncio.to_thread(opened)
            if self._sources.get(source.name) is source:  # and has not been removed meanwhile
                host.worker.start()
                self._hosts[source.name] = host

    def _unknown(self, name: str) -> RequestError:
        known = ", ".join(repr(card["id"]) for card in self.cards())
        return RequestError(
            f"The model {name!r} does not exist here; this server has {known}.",
            code="model_not_found",
            param="model",
            status=404,
        )

    def add(self, source: Source) -> None:
        """Have one more model, loaded when it is first asked for."""
        if any(card["id"] == source.name for card in self.cards()):
            raise RequestError(f"a model with the name {source.name!r} is here already", param="name", status=409)
        self._sources[source.name] = source

    async def remove(self, name: str) -> None:
        """Let go of a model for good. Raises `RequestError` for the one that the server was started with."""
        if name == self.first.name:
            raise RequestError(f"{name!r} is the model that this server was started with", param="name", status=409)
        if name not in self._sources:
            raise RequestError(f"no model {name!r} is here", param="name", status=404)
        host = self._hosts.pop(name, None)
        del self._sources[name]
        self._kept.pop(name, None)
        if host is not None:
            await host.worker.stop()

    # ---------------------------------------------------------------- life

    def start(self) -> None:
        """Start the engines' threads; on the event loop."""
        for host in self.loaded:
            host.worker.start()
        if self._idle_unload_s is not None:
            self._sweeper = asyncio.create_task(self._sweep(self._idle_unload_s))

    async def stop(self) -> None:
        """End the engines' threads."""
        tasks = [*self._loads.values(), *filter(None, [self._sweeper])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for host in self.loaded:
            await host.worker.stop()

    async def _sweep(self, idle_s: float) -> None:
        while True:
            await asyncio.sleep(min(idle_s / 4, 10))
            for name in [*self._hosts.keys() & self._sources.keys()]:
                await self._let_go(name, idle_s)

    async def _let_go(self, name: str, idle_s: float) -> None:
        """Let go of a model that is idle; a call of its own, so that nothing here holds the model when it is over."""
        host = self._hosts.get(name)
        if host is None:  # removed while another was let go
            return
        if not host.engine.is_idle or host.worker.n_open:
            host.last_used = time.monotonic()
        elif time.monotonic() - host.last_used > idle_s:
            del self._hosts[name]
            self._kept[name] = self._kept.get(name, {}) | host.engine.adapters
            await host.worker.stop()


def source_of(name: str, folder: Path, load: Callable[[Path], Engine]) -> Source:
    """A model in a folder (whole, or an adapter with its base), loaded by `load` with its tokenizer."""
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        raise ConfigError("serve.models", f"{name}: {str(folder)!r} is no folder with a saved model or adapter")

    def open_both() -> Opened:
        return load(folder), load_tokenizer(folder)

    return Source(name, open_both)
