"""Text to token ids, fast, and so that text never turns into a special token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kajiya.errors import StoreError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def open_encoder(folder: Path) -> "Tokenizer":
    """The encoder of the tokenizer in `folder`: no padding, no cutting, special tokens' names taken as plain text."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(_file(folder)))
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def encode_texts(encoder: "Tokenizer", texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text, int64, without any token added; all cores are used."""
    return [
        np.array(encoding.ids, dtype=np.int64)
        for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False)
    ]


# ---------------------------------------------------------------- in bulk


class BulkEncoder(Protocol):
    """Encodes many texts at once, as `encode_texts` does."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts one behind the other, uint32, and where each text's begin, and the end; int64 [n + 1]."""
        ...


@dataclass(frozen=True)
class PlainBulkEncoder:
    """The tokenizer's own encoder."""

    encoder: "Tokenizer"

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `BulkEncoder`'s."""
        encoded = encode_texts(self.encoder, texts)
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in encoded], out=offsets[1:])
        return np.concatenate([*encoded, np.zeros(0, dtype=np.int64)]).astype(np.uint32), offsets


_KEPT_TEXT = 2**25
"""Characters after which the fast encoder is opened anew: what it keeps grows with the words that it has seen."""


class FastBulkEncoder:
    """The same tokenizer in the package `fastokens`, which keeps what it has encoded before.

    Raises whatever the package raises for a tokenizer that it cannot read.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._json = tokenizer_json
        self._open()

    def _open(self) -> None:
        from fastokens import Tokenizer

        self.encoder: Any = Tokenizer.from_json_str(self._json)
        self._n_seen = 0

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `BulkEncoder`'s."""
        if self._n_seen > _KEPT_TEXT:
            self._open()
        self._n_seen += sum(map(len, texts))
        ids, offsets = self.encoder.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8").astype(np.int64)


@dataclass(frozen=True)
class OpenedEncoder:
    """A bulk encoder, and why it is this one."""

    bulk: BulkEncoder
    words: str

    @property
    def is_fast(self) -> bool:
        """Whether it is another than the tokenizer's own."""
        return isinstance(self.bulk, FastBulkEncoder)


def open_bulk_encoder(folder: Path, sample: Iterable[str]) -> OpenedEncoder:
    """The fastest encoder of the tokenizer in `folder` that gives the tokenizer's own ids on the `sample` and on hard text.

    That is `fastokens` where it is installed, can read the tokenizer and agrees; else the tokenizer itself. The words say
    which, and why.
    """
    return fastest_encoder(open_encoder(folder), sample)


def fastest_encoder(encoder: "Tokenizer", sample: Iterable[str]) -> OpenedEncoder:
    """As `open_bulk_encoder`, of an encoder without padding, cutting and special tokens."""
    plain = PlainBulkEncoder(encoder)
    if find_spec("fastokens") is None:
        return OpenedEncoder(plain, bulk_words())
    try:
        fast = FastBulkEncoder(encoder.to_str())
    except Exception as error:  # the package has no narrower one: whatever it cannot read, the tokenizer can
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return OpenedEncoder(plain, f"tokenizers, since fastokens cannot read this tokenizer: {first}")
    for text in [*HARD_TEXTS, *(f"a{name} {name}b" for name in _added_tokens(plain.encoder)), *sample]:
        if not np.array_equal(fast.encode([text])[0], plain.encode([text])[0]):
            return OpenedEncoder(plain, f"tokenizers, since fastokens gives other ids for {text[:40]!r}")
    return OpenedEncoder(fast, "fastokens, its ids equal to the tokenizer's own on a sample")


def bulk_words() -> str:
    """The encoder that is tried first, in words; what brings a faster one, where it is missing."""
    if find_spec("fastokens") is None:
        return "tokenizers (pip install 'kajiya[fast]' brings an encoder many times faster)"
    return "fastokens where its ids are the tokenizer's own"


HARD_TEXTS = (
    "",
    " ",
    "  a  b   c    \t\t d \n\n\n e\r\n\r\n f\r g \u00a0\u2003\u200b h\u2028i\u2029",
    "don't I'll we'VE they'Re x'y 'quoted' \u2019s",
    "1 12 123 1234 12345.678e-9 0x1F \u0661\u0662\u0663 \u00bd\u00b2",
    "caf\u00e9 cafe\u0301 \ufb01 \u00c5 A\u030a \u212b \u1e9e\u00df \u0130i\u0307 \u01c5",
    "\u935b\u51b6\u5c4b \ud55c\uad6d\uc5b4",
    "\u0e20\u0e32\u0e29\u0e32 \u0939\u093f\u0928\u094d\u0926\u0940 \u05e2\u05d1 \u0639\u0631\u0628\u064a",
    "\U0001f525\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5 \u2764\ufe0f \U00010348 \U000e0041",
    "\x00\x01\x7f\x85\ufeff\ufffd\uffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa________________-----------======#######",
    "def f(x):\n\treturn {'a': [1, 2], \"b\": x ** 2}  # \\n\n    if not x: ...\n",
    "<s></s><unk><pad>[CLS][SEP][MASK]<|endoftext|><|im_start|>user<|im_end|>\u2581\u0120\u010a##ing",
    "https://example.org/a_b?c=%20&d=e#f CamelCaseIdentifierXMLHttpRequest SCREAMING_SNAKE iPhone",
)
"""Where encoders are known to part: white space of all kinds, contractions, numbers, accents composed and not, scripts
without spaces, emoji joined and flagged, control characters, long runs, names of special tokens."""


def _added_tokens(encoder: "Tokenizer") -> list[str]:
    return [token.content for token in encoder.get_added_tokens_decoder().values()]


def _file(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise StoreError(f"{path}: no such file; no tokenizer is there")
    return path
