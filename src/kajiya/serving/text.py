"""From tokens to text, piece by piece: whole characters only, and nothing that may yet turn out to be a stop string."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

_CONTEXT_TOKENS = 6
"""Tokens before the new ones that are decoded with them, since some tokenizers join or space words by what precedes."""
_WINDOW_TOKENS = 64
_UNFINISHED = "\ufffd"
_MAX_UNFINISHED = 3
"""Bytes of a UTF-8 character that may still be waiting for its last one."""


class TextStream:
    """Decodes a growing list of tokens; a character whose bytes are spread over tokens comes out when it is whole."""

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._decode = decoder_of(tokenizer)
        self._window = list(context[-_CONTEXT_TOKENS:])
        self._n_context = len(self._window)
        self._n_emitted = len(self._decode(self._window).rstrip(_UNFINISHED))

    def push(self, token: int) -> str:
        """The text that has become certain with this token."""
        self._window.append(token)
        text = self._decode(self._window)
        n_unfinished = min(len(text) - len(text.rstrip(_UNFINISHED)), _MAX_UNFINISHED)
        if n_unfinished and len(self._window) > _WINDOW_TOKENS:
            n_unfinished = 0  # A long run of bytes that are no text at all: given out as it is.
        certain = text[: len(text) - n_unfinished]
        new = certain[self._n_emitted :]
        self._n_emitted = max(self._n_emitted, len(certain))
        if not n_unfinished:
            self._move_on()
        return new

    def push_all(self, tokens: Sequence[int]) -> str:
        """What `push` says of each in turn, decoded together where all characters are whole."""
        if len(tokens) > 1:
            window = [*self._window, *tokens]
            text = self._decode(window)
            certain = text.rstrip(_UNFINISHED)
            n_unfinished = len(text) - len(certain)
            # An unfinished end is left to those that follow, while there is room for them before it is too long a run.
            can_wait = n_unfinished <= _MAX_UNFINISHED and len(window) <= _WINDOW_TOKENS // 2
            if _UNFINISHED not in certain and (can_wait or not n_unfinished):
                new = certain[self._n_emitted :]
                self._window, self._n_emitted = window, max(self._n_emitted, len(certain))
                if not n_unfinished:
                    self._move_on()
                return new
        return "".join([self.push(token) for token in tokens])

    def _move_on(self) -> None:
        """Leave behind what need not be decoded again."""
        if len(self._window) > self._n_context + _CONTEXT_TOKENS:
            self._window = self._window[-_CONTEXT_TOKENS:]
            self._n_context = len(self._window)
            self._n_emitted = len(self._decode(self._window))


def decoder_of(tokenizer: Any) -> Callable[[list[int]], str]:
    """A function from token ids to their text without special tokens: what `tokenizer.decode` says, at a third of its time.

    A tokenizer that decodes in a way of its own, or cleans up behind itself, is asked itself.
    """
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    is_plain = (
        issubclass(kind, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerFast.decode
        and kind._decode is PreTrainedTokenizerFast._decode
        and not tokenizer.clean_up_tokenization_spaces
    )
    decode = tokenizer.backend_tokenizer.decode if is_plain else tokenizer.decode
    return partial(decode, skip_special_tokens=True)


class StopMatcher:
    """Passes text on up to the first stop string; holds back an end that may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        if not self._stops:
            return text
        if self.is_stopped:
            return ""
        for character in text:
            self._held += character
            # By characters, so that the result does not depend on how the text is cut into tokens: the stop string
            # that is complete first ends the text, the longest of those that are complete at once.
            found = max((len(stop) for stop in self._stops if self._held.endswith(stop)), default=0)
            if found:
                self.is_stopped = True
                passed, self._held = self._held[:-found], ""
                return passed
        keep = max(overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def flush(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def byte_reader(tokenizer: Any) -> Callable[[int], bytes]:
    """A function from a token id to the bytes that the token stands for."""
    alphabet = _byte_alphabet() if _is_byte_level(tokenizer) else None

    def read(token: int) -> bytes:
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in tokenizer.added_tokens_decoder:
            return bytes(piece.encode())
        if alphabet is not None:
            return b"".join(alphabet.get(character, character.encode()) for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return bytes(piece.replace("▁", " ").encode())

    return read


def token_text(raw: bytes) -> str:
    """A token's bytes as text, or as `bytes:\\x…` where they are a part of a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _is_byte_level(tokenizer: Any) -> bool:
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    kinds = {decoder.get("type")} | {part["type"] for part in decoder.get("decoders", ())}
    return "ByteLevel" in kinds


def _byte_alphabet() -> dict[str, bytes]:
    """Character of GPT-2's byte-level alphabet → the byte it stands for (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): bytes([byte]) for byte in printable}
    return characters | {chr(256 + place): bytes([byte]) for place, byte in enumerate(others)}
