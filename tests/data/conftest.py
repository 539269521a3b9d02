"""A small corpus made once: three packages of the standard library, and files with what is hard to keep."""

import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from kajiya.config.schema import DataConfig, SourceConfig, TokenizerConfig
from kajiya.data.corpus import build_corpus
from kajiya.data.shards import build_shards
from kajiya.data.tokenizer import build_tokenizer
from kajiya.run.store import Artifact, Store

HARD = {
    "hard/crlf.py": "x = 1\r\ny = 2\r\n\r\n\r\nz = 3\r",
    "hard/bom.py": "\ufeffprint('a byte-order mark')\n",
    "hard/special.py": "eos = '<|eos|>'\nbos = '<|bos|><|pad|>'\n<|bos|><|eos|>",
    "hard/unicode.py": "# \u935b\u51b6 \U0001f525 e\u0301 \u0000 \u2028 \u00a0 tab\there\n",
    "hard/spaces.py": "   leading\n\n\n\t\t  mixed   \n   ",
    "hard/no_newline.py": "x",
}


@dataclass(frozen=True)
class Small:
    """The small corpus and what was made from it."""

    root: Path
    store: Store
    config: DataConfig
    corpus: Artifact
    tokenizer: Artifact
    shards: Artifact


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    root = tmp_path_factory.mktemp("library")
    for package in ("asyncio", "json", "email"):
        shutil.copytree(
            Path(sysconfig.get_paths()["stdlib"], package),
            root / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name, text in HARD.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(text.encode())
    store = Store(tmp_path_factory.mktemp("store"))
    # Shards far smaller than the corpus, so that rows lie across files.
    config = DataConfig(
        source=SourceConfig("stdlib", {"root": str(root)}), heldout_every=5, row_tokens=64, shard_bytes=30_011
    )
    corpus, _ = build_corpus(config, store)
    tokenizer, _ = build_tokenizer(TokenizerConfig(vocab_size=1024), corpus, store)
    shards, _ = build_shards(config, corpus, tokenizer, store)
    return Small(root, store, config, corpus, tokenizer, shards)
