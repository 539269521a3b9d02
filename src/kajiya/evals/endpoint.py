"""A model behind the OpenAI API, wherever it runs: it answers, and scores given texts where it echoes their log-probabilities."""

import copy
import email.utils
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kajiya.errors import KajiyaError
from kajiya.evals.answers import Sampling, cut_at
from kajiya.evals.echo import Echo, read_echo
from kajiya.evals.replies import Replies

AT_ONCE = 8
"""Requests under way together."""
_EMBEDDED_AT_ONCE = 64
_TIMEOUT_S = 300.0
_TRIES = 6
_LONGEST_WAIT_S = 60.0
_PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses after which the same request is sent again."""
_REFUSALS = (400, 413, 422)
"""What an endpoint answers to a request that it will not take, however often it is sent."""


class RefusedError(KajiyaError):
    """A request that an endpoint does not take as it is: a text longer than its context, an option that it does not know."""


class Endpoint:
    """A model behind `<url>/completions`, `/chat/completions` and `/embeddings` of the OpenAI API."""

    engine = "http"

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._replies: Replies | None = None
        self.model = model or self._first_model()

    def remembering(self, replies: Replies) -> "Endpoint":
        """The same endpoint, whose replies are kept, and which is not asked again for what is kept already."""
        same = copy.copy(self)
        same._replies = replies
        return same

    def dtype(self, kind: str) -> str:
        """An endpoint does not say in what it computes."""
        return "unknown"

    def _first_model(self) -> str:
        models = self.post("/models", None)["data"]
        if not models:
            raise KajiyaError(f"{self.url} serves no model")
        return str(models[0]["id"])

    def post(self, path: str, body: dict[str, Any] | None) -> Any:
        """The answer's JSON, of an earlier attempt where it is kept; `body` `None` is a GET. Raises as `send`."""
        if self._replies is None or body is None:
            return self.send(path, body)
        return self._replies.of(path, body, lambda: self.send(path, body))

    def send(self, path: str, body: dict[str, Any] | None) -> Any:
        """The answer's JSON.

        Where it says that it is busy or in trouble (408, 429, 5xx), it is asked again, as it wishes; where it does not answer
        in time or breaks off, too, longer apart each time. Raises `KajiyaError` with the address and what it said,
        `RefusedError` where it was the request that it did not take.
        """
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers)
        for attempt in range(_TRIES):
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                said = error.read().decode("utf-8", "replace")[:300]
                if error.code in _PASSING and attempt < _TRIES - 1:
                    time.sleep(_wait_s(error.headers["Retry-After"], attempt))
                    continue
                kind = RefusedError if error.code in _REFUSALS else KajiyaError
                raise kind(f"{self.url}{path} answered {error.code}: {said}") from error
            except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
                if _is_passing(error) and attempt < _TRIES - 1:
                    time.sleep(_wait_s(None, attempt))
                    continue
                raise KajiyaError(f"{self.url}{path} does not answer: {error}") from error
        raise AssertionError("the last try returns or raises")

    def complete(self, prompts: Sequence[str], sampling: Sampling) -> list[tuple[str, ...]]:
        """One request a row, a few at once; an endpoint that gives fewer answers than asked for is asked for the rest.

        Raises `KajiyaError` where it gives none.
        """

        def ask(prompt: str) -> tuple[str, ...]:
            texts: list[str] = []
            while len(texts) < sampling.samples:
                found = self._draw(prompt, sampling, len(texts))
                if not found:
                    raise KajiyaError(f"{self.url} answered a request without any choice in its reply.")
                texts += found
            return tuple(cut_at(text, sampling.stop) for text in texts[: sampling.samples])

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, prompts))

    def _draw(self, prompt: str, sampling: Sampling, n_there: int) -> list[str]:
        """The answers that are still missing, with a seed that no answer before them had."""
        body: dict[str, Any] = {
            "model": self.model, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature,
            "seed": sampling.seed + n_there, "n": sampling.samples - n_there,
        }  # fmt: skip
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.is_chat:
            reply = self.post("/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]})
            return [choice["message"]["content"] or "" for choice in reply["choices"]]
        return [choice["text"] or "" for choice in self.post("/completions", body | {"prompt": prompt})["choices"]]

    def choose(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
        """Σ log p over each choice's tokens, echoed by the endpoint; a token that begins in the prompt counts with the choice.

        Raises `KajiyaError` where the endpoint echoes no log-probabilities.
        """
        pairs = [(prompt, choice) for prompt, row in zip(prompts, choices, strict=True) for choice in row]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            scores = iter(list(pool.map(lambda pair: self._score(*pair), pairs)))
        return [tuple(next(scores) for _ in row) for row in choices]

    def _score(self, prompt: str, choice: str) -> float:
        begin = len(prompt.encode())
        logprobs = [piece.logprob for piece in self.echo(prompt + choice).pieces if piece.end > begin]
        known = [each for each in logprobs if each is not None]
        if len(known) < len(logprobs):
            raise KajiyaError(
                f"{self.url} gives no log-probability of a text's first token: a prompt must not be empty."
            )
        return float(sum(known))

    def echo(self, text: str) -> Echo:
        """A text under the model. Raises `KajiyaError` where the endpoint echoes no log-probabilities of it."""
        body = {"model": self.model, "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
        found = self.post("/completions", body)["choices"][0].get("logprobs")
        if not found or not found.get("token_logprobs"):
            raise KajiyaError(
                f"{self.url} does not echo the log-probabilities of a given text (echo and logprobs of /completions), which "
                "held-out text and tasks of kind choose need.\nServe the model with `kajiya serve` or vLLM, or name tasks of "
                "kind generate with --tasks."
            )
        return read_echo(text, found["tokens"], found["token_logprobs"])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """By the endpoint's embeddings, a portion of the texts at a time."""
        found: list[list[float]] = []
        for first in range(0, len(texts), _EMBEDDED_AT_ONCE):
            portion = list(texts[first : first + _EMBEDDED_AT_ONCE])
            data = self.post("/embeddings", {"model": self.model, "input": portion})["data"]
            found += [each["embedding"] for each in data]
        vectors = np.array(found, dtype=np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(lengths, 1e-12))


def _is_passing(error: Exception) -> bool:
    """Whether the same request may be answered later: a reply that came too late or broke off, not one that nobody heard."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return isinstance(cause, (TimeoutError, ConnectionResetError, BrokenPipeError, http.client.HTTPException))


def _wait_s(wish: str | None, attempt: int) -> float:
    """Seconds to wait: as the `Retry-After` header says, in seconds or as a date, else longer each time."""
    if wish is None:
        return min(float(2**attempt), _LONGEST_WAIT_S)
    if wish.strip().isdigit():
        return min(float(wish), _LONGEST_WAIT_S)
    try:
        seconds = email.utils.parsedate_to_datetime(wish).timestamp() - time.time()
    except ValueError:
        seconds = float(2**attempt)
    return min(max(seconds, 0.0), _LONGEST_WAIT_S)
