"""The tokenizer: a byte-level BPE trained on the training text, or one that exists; either way it must give text back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kajiya.config.digest import digest
from kajiya.config.schema import DataConfig, RenderConfig, TokenizerConfig
from kajiya.data.chat import saved_template
from kajiya.data.documents import Documents, open_documents
from kajiya.data.encode import encode_texts, open_encoder
from kajiya.data.formats import row_text
from kajiya.data.origin import resolve_commit
from kajiya.data.progress import OnEvent, Progress, silent
from kajiya.data.tokenizer_text import TrainingText, needs_no_cap, pieces_of, text_within
from kajiya.errors import ConfigError, DataError
from kajiya.run.code import code_revision
from kajiya.run.files import read_json
from kajiya.run.store import Artifact, Store, produce

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

STAGE = "tokenizer"
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[^\S\r\n]*)?"
    r"|\s*[\r\n][^\S\r\n]*"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""What no merge crosses: a word with the sign before it, up to three digits, signs, white space.

As in cl100k_base (OpenAI, tiktoken), but a line end takes the next line's indentation with it: on source code that makes
9 % fewer tokens than GPT-2's pattern at a vocabulary of 8,192."""

_PLAIN_CLASS = "TokenizersBackend"
"""What Transformers writes of a tokenizer that is a `tokenizer.json` and nothing more."""
_CHECK_BYTES = 64 * 2**20
_ONLY_READ = ("labelled", "seq2seq")
"""Rows whose text no model is asked to give back as it was: a tokenizer for them may lose case or white space."""


def build_tokenizer(
    config: TokenizerConfig,
    corpus: Artifact,
    store: Store,
    on_event: OnEvent = silent,
    render: RenderConfig | None = None,
    memory_mib: int = DataConfig.memory_mib,
) -> tuple[Artifact, bool]:
    """Train a tokenizer on the corpus's training documents, or load one, and prove that it gives held-out text back.

    Of more text than the trainer can hold in `memory_mib`, documents spread evenly are taken, and that is said. Returns the
    artifact, whose folder `AutoTokenizer.from_pretrained` loads, and whether it was there already. Its facts: `vocab_size`,
    `bos_id`, `eos_id`, `pad_id`, `trained`, `trained_on` (bytes, one piece in `every`; `None` if loaded), `added_tokens`
    (new ids of `add_tokens` and `add_special_tokens`, the last of the vocabulary), `round_trip` (documents and bytes checked;
    `None` for rows that are only read), and where it came from. It carries the chat template of `render`, so that all that
    is made with it renders alike. Raises `ConfigError` or `DataError` for one that cannot be loaded, is not lossless, or has
    no end-of-text token.
    """
    loaded = _load(config) if config.path is not None else None
    kind = str(corpus.facts["format"])
    own = None if loaded is None else loaded[0].chat_template
    template = saved_template(render or RenderConfig(), kind, own)
    train = open_documents(corpus.path, "train")

    def make(folder: Path) -> dict[str, Any]:
        if loaded is None:
            text = text_within(train, kind, memory_mib, words())
            tokenizer = _train(config, text, on_event)
            origin: dict[str, Any] = {"trained_on": {"bytes": text.n_bytes, "every": text.every}}
        else:
            tokenizer, origin = loaded[0], {"trained_on": None} | loaded[1]
        n_known = len(tokenizer)
        _add_tokens(tokenizer, config)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        saved = load_tokenizer(folder)
        facts: dict[str, Any] = origin | {
            "trained": loaded is None,
            "vocab_size": len(saved),
            "bos_id": start_id(saved),
            "eos_id": saved.eos_token_id,
            "pad_id": saved.pad_token_id,
            "added_tokens": len(saved) - n_known,
        }
        if loaded is None and len(saved) < config.vocab_size:
            on_event(
                "warning",
                text=f"tokenizer: {len(saved)} tokens instead of tokenizer.vocab_size={config.vocab_size}: the training "
                f"text has no more pairs seen tokenizer.min_frequency={config.min_frequency} times or more",
            )
        checked = None if kind in _ONLY_READ else _check_round_trip(saved, open_encoder(folder), corpus)
        return facts | {"round_trip": checked}

    settings = (
        {"vocab_size": config.vocab_size, "min_frequency": config.min_frequency}
        | ({} if needs_no_cap(train, memory_mib) else {"memory_mib": memory_mib})
        if loaded is None
        else {"loaded": _tokenizer_digest(loaded[0])}
    ) | {"template": template, "added": [config.add_tokens, config.add_special_tokens]}
    return produce(
        store,
        STAGE,
        code=code_revision("kajiya.data.tokenizer"),
        config=settings,
        parents={"corpus": corpus},
        make=make,
    )


def load_tokenizer(folder: Path, max_tokens: int | None = None) -> "PreTrainedTokenizerFast":
    """The tokenizer in `folder`; with `max_tokens`, declared for a model of that many positions."""
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and read_json(settings).get("tokenizer_class") == _PLAIN_CLASS:
        # What AutoTokenizer would take, without its look at every architecture, which brings torch into the process.
        from transformers import TokenizersBackend

        tokenizer = cast(
            "PreTrainedTokenizerFast", TokenizersBackend.from_pretrained(str(folder), local_files_only=True)
        )
    else:
        from transformers import AutoTokenizer

        tokenizer = cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
    if max_tokens is not None:
        tokenizer.model_max_length = max_tokens
    return tokenizer


# ---------------------------------------------------------------- training


def start_id(tokenizer: Any) -> int:
    """The token that a document begins with: the tokenizer's begin-of-text, or its end-of-text where it has none."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return int(begin)


def _train(config: TokenizerConfig, text: TrainingText, on_event: OnEvent) -> "PreTrainedTokenizerFast":
    if text.every > 1:
        on_event(
            "warning",
            text=f"tokenizer: trained on one piece in {text.every} of the text, spread evenly (about "
            f"{text.n_bytes / 2**20:,.0f} of {text.documents.n_bytes / 2**20:,.0f} MiB): more would not fit into "
            "data.memory_mib",
        )
    progress = Progress(on_event, STAGE, "bytes", text.n_bytes)

    def texts() -> Iterator[str]:
        for piece in text.texts():
            yield piece
            progress.add(len(piece.encode()))
        progress.end()

    backend = train_bpe(texts(), config.vocab_size, config.min_frequency)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def words() -> "PreTokenizer":
    """Cuts a text into the words that no merge crosses, their bytes as characters."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_bpe(texts: Iterator[str], vocab_size: int, min_frequency: int) -> "Tokenizer":
    """A byte-level BPE (Sennrich et al., arXiv:1508.07909; bytes as in GPT-2) of at most `vocab_size` tokens.

    Every text has an encoding, and decoding it gives the text back. A prompt gets `<|bos|>` in front, as documents have.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = words()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return backend


# ---------------------------------------------------------------- tokens of one's own


def _add_tokens(tokenizer: "PreTrainedTokenizerFast", config: TokenizerConfig) -> None:
    """Add the config's tokens; one that the vocabulary has already keeps its id."""
    from tokenizers import AddedToken

    for field in ("add_tokens", "add_special_tokens"):
        names = getattr(config, field)
        if any(not name for name in names):
            raise ConfigError(f"tokenizer.{field}", "holds an empty string")
        is_special = field == "add_special_tokens"
        tokenizer.add_tokens([AddedToken(name, special=is_special, normalized=False) for name in names])


# ---------------------------------------------------------------- loading


def _load(config: TokenizerConfig) -> tuple["PreTrainedTokenizerFast", dict[str, Any]]:
    """The tokenizer at `path`, and what the manifest says of its origin."""
    from transformers import AutoTokenizer

    assert config.path is not None
    folder = Path(config.path).expanduser()
    commit = None if folder.exists() else resolve_commit(config.path, config.revision, "model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if commit is None else config.path, revision=commit, local_files_only=commit is None
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"tokenizer.path: {config.path!r} holds no tokenizer that Transformers can load: {reason}\n"
            "Give a folder with tokenizer.json, or null to train one."
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            "tokenizer.path", f"{config.path!r} has no fast form (tokenizer.json)", "Convert it, or choose another."
        )
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        # BERT's kind has its own names for the ends of a text.
        tokenizer.eos_token, tokenizer.bos_token = tokenizer.sep_token, tokenizer.cls_token
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "tokenizer.path",
            f"{config.path!r} has no end-of-text token, which separates documents",
            "Set eos_token in its tokenizer_config.json.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Old tokenizers drop the space before a full stop when they decode; that is no round trip.
    tokenizer.clean_up_tokenization_spaces = False
    return cast("PreTrainedTokenizerFast", tokenizer), {"path": config.path, "revision": commit}


def _tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    return digest(
        {
            "backend": json.loads(tokenizer.backend_tokenizer.to_str()),
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "template": tokenizer.chat_template,
        }
    )


# ---------------------------------------------------------------- proof


def _check_round_trip(tokenizer: "PreTrainedTokenizerFast", encoder: "Tokenizer", corpus: Artifact) -> dict[str, int]:
    """Encode and decode the held-out documents, and training documents spread evenly, up to 64 MiB of each.

    Raises `DataError` for the first that does not come back, or whose ids differ between the saved file and Transformers.
    """
    checked = {"documents": 0, "bytes": 0}
    heldout = open_documents(corpus.path, "heldout")
    for documents, n_bytes in ((heldout, _CHECK_BYTES), (open_documents(corpus.path, "train"), heldout.n_bytes)):
        for name, document in _sample(documents, min(n_bytes, _CHECK_BYTES)):
            start = 0
            for text in pieces_of(row_text(corpus.facts["format"], document)):
                ids = encode_texts(encoder, [text])[0].tolist()
                _require_same(name, start, text, str(tokenizer.decode(ids, skip_special_tokens=True)))
                start += len(text)
                checked["bytes"] += len(text.encode())
            checked["documents"] += 1
    return checked


def _sample(documents: Documents, n_bytes: int) -> Iterator[tuple[str, str]]:
    every = max(1, -(-documents.n_bytes // max(1, n_bytes)))
    for index in range(0, len(documents), every):
        yield documents.names[index], documents.text(index)


def _require_same(name: str, start: int, text: str, decoded: str) -> None:
    if decoded == text:
        return
    at = next((i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b), min(len(text), len(decoded)))
    was, became = text[at : at + 12], decoded[at : at + 12]
    raise DataError(
        f"tokenizer: it does not give its text back: in {name}, at character {start + at}, {was!r} became {became!r}.\n"
        "Choose a lossless (byte-level) tokenizer, or train one with tokenizer.path=null."
    )
