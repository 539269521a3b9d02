"""Where the beginnings of a conversation end in its text: each is rendered once, also over the turns in which it grows."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

_MOST = 4096
_UNSURE = ("strftime_now", "random", "lipsum")
"""What gives one template several texts for the same messages."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a beginning, as it is and without what may be left out at its end: lengths and digests."""

    lengths: tuple[int, int]
    digests: tuple[bytes, bytes]


class Memory:
    """What beginnings were rendered as, by digests of their messages; some thousands of them.

    Several threads may use it at a time.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, Rendered] = {}

    def get(self, key: bytes) -> Rendered | None:
        """What is known of a beginning."""
        return self._known.get(key)

    def keep(self, key: bytes, rendered: Rendered) -> None:
        """Know a beginning from here on."""
        if len(self._known) >= _MOST:
            self._known = {}
        self._known[key] = rendered

    def __len__(self) -> int:
        return len(self._known)


def is_sure(source: str) -> bool:
    """Whether a template gives the same messages the same text at any time."""
    return not any(name in source for name in _UNSURE)


class Beginnings:
    """The first messages of one conversation, any number of them, in its text, which ends with the prompt of an answer or does not.

    `render` makes a text of so many messages, with the prompt of an answer or without, or says `None` where it cannot; `ending` is
    what it may close that text with and not each answer.
    """

    def __init__(
        self,
        memory: Memory,
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        text: str,
        is_prompt: bool,
        render: Callable[[int, bool], str | None],
        ending: str,
    ) -> None:
        self._memory = memory
        self._text = _Digests(text)
        self._render = render
        self._ending = ending
        running = blake2b(_bytes(tools), digest_size=16)
        self._keys = [running.digest()]
        for message in messages:
            running.update(_bytes(message) + b"\0")
            self._keys.append(running.digest())
        # The next turn has it for a beginning.
        memory.keep(self._key(len(messages), is_prompt), _rendered(text, ending))

    def _key(self, n_messages: int, is_prompt: bool) -> bytes:
        return self._keys[n_messages] + (b"p" if is_prompt else b"")

    def length(self, n_messages: int, is_prompt: bool) -> int | None:
        """Length of the text of the first `n_messages` where the whole text begins with it; `None` where it does not."""
        if not n_messages:
            return 0
        key = self._key(n_messages, is_prompt)
        rendered = self._memory.get(key)
        if rendered is None:
            text = self._render(n_messages, is_prompt)
            if text is None:
                return None
            rendered = _rendered(text, self._ending)
            self._memory.keep(key, rendered)
        for length, digest in zip(rendered.lengths, rendered.digests, strict=True):
            if self._text.of(length) == digest:
                return length
        return None


def _rendered(text: str, ending: str) -> Rendered:
    shorter = text.removesuffix(ending)
    digests = _Digests(text)
    open_end = digests.of(len(shorter))
    whole = digests.of(len(text))
    assert open_end is not None
    assert whole is not None
    return Rendered((len(text), len(shorter)), (whole, open_end))


class _Digests:
    """Digests of the beginnings of a text, quickest where they are asked for from the shortest on."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._begin()

    def _begin(self) -> None:
        self._at, self._running = 0, blake2b(digest_size=16)

    def of(self, length: int) -> bytes | None:
        """The digest of the first `length` characters; `None` where there are not so many."""
        if length > len(self._text):
            return None
        if length < self._at:
            self._begin()
        self._running.update(self._text[self._at : length].encode("utf-8", "surrogatepass"))
        self._at = length
        return self._running.digest()


def _bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
