"""The tokenizer: gives every text back, loads with plain Transformers, and refuses one that is not lossless."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.conftest import HARD
from tests.data.families import FAMILIES, SAYS, USER, tokenizer_of
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kajiya.config.schema import DataConfig, RenderConfig, SourceConfig, TokenizerConfig
from kajiya.data.chat import ChatTemplate, default_template
from kajiya.data.corpus import build_corpus
from kajiya.data.documents import open_documents
from kajiya.data.encode import encode_texts, open_encoder
from kajiya.data.render import Renderer
from kajiya.data.tokenizer import build_tokenizer, load_tokenizer, train_bpe
from kajiya.errors import ConfigError, DataError, StoreError
from kajiya.run.store import Store


def test_every_document_comes_back(small) -> None:
    tokenizer = load_tokenizer(small.tokenizer.path)
    encoder = open_encoder(small.tokenizer.path)
    for split in ("train", "heldout"):
        texts = list(open_documents(small.corpus.path, split).texts())
        encoded = encode_texts(encoder, texts)
        assert [tokenizer.decode(ids.tolist()) for ids in encoded] == texts
        assert [encoder.decode(ids.tolist()) for ids in encoded] == texts


@pytest.fixture(scope="module")
def encoder(small) -> Tokenizer:
    return open_encoder(small.tokenizer.path)


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back_without_a_special_token(encoder: Tokenizer, text: str) -> None:
    for candidate in (text, text + "<|eos|>" + text, "<|bos|>" + text):
        (ids,) = encode_texts(encoder, [candidate])
        assert encoder.decode(ids.tolist()) == candidate
        assert not {0, 1, 2} & set(ids.tolist())


def test_plain_transformers_loads_it(small) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small.tokenizer.path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert len(tokenizer) == small.tokenizer.facts["vocab_size"] == 1024
    # A prompt begins as documents do, and no prefix space is added.
    ids = tokenizer("def f(x):\n    return x")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "def f(x):\n    return x"
    # Transformers' own clean-up would write "a, b."
    assert tokenizer.decode(tokenizer("a , b . n't")["input_ids"], skip_special_tokens=True) == "a , b . n't"
    assert ids[1:] == encode_texts(open_encoder(small.tokenizer.path), ["def f(x):\n    return x"])[0].tolist()
    assert load_tokenizer(small.tokenizer.path, max_tokens=77).model_max_length == 77


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_a_tokenizer_is_reading_it_with_transformers(family: str, tmp_path: Path) -> None:
    """Servers and trainings read it by the shorter way; ids, texts, tokens and template are those of AutoTokenizer."""
    from transformers import AutoTokenizer

    made = tokenizer_of(family)
    made.save_pretrained(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    texts = [
        "def f(x):\n    return x",
        " a , b . n't",
        "Nîmes 日本 🙂\n\n",
        "".join(map(str, theirs.all_special_tokens)),
    ]
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids
        for skipped in (True, False):
            assert ours.decode(ids, skip_special_tokens=skipped) == theirs.decode(ids, skip_special_tokens=skipped)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.added_tokens_decoder == theirs.added_tokens_decoder
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.chat_template == theirs.chat_template == made.chat_template
    if made.chat_template is not None:
        said = [theirs.apply_chat_template([USER, SAYS], tokenize=False), ChatTemplate(ours).text([USER, SAYS])]
        assert said[0] == said[1]


def test_facts(small) -> None:
    facts = dict(small.tokenizer.facts)
    checked = facts.pop("round_trip")
    assert facts.pop("trained_on") == {"bytes": open_documents(small.corpus.path, "train").n_bytes, "every": 1}
    assert facts == {"trained": True, "vocab_size": 1024, "bos_id": 0, "eos_id": 1, "pad_id": 2, "added_tokens": 0}
    heldout = open_documents(small.corpus.path, "heldout")
    assert checked["documents"] > len(heldout)
    assert checked["bytes"] > heldout.n_bytes


def test_training_is_a_function_of_the_text(small) -> None:
    texts = list(open_documents(small.corpus.path, "train").texts())
    saved = Tokenizer.from_file(str(small.tokenizer.path / "tokenizer.json"))
    assert train_bpe(iter(texts), 1024, 2).to_str() == saved.to_str()


def test_a_line_end_takes_the_indentation_with_it() -> None:
    backend = train_bpe(iter(["if x:\n        return y\n" * 50]), 400, 2)
    tokens = [backend.decode([id_]) for id_ in backend.encode("if x:\n        return", add_special_tokens=False).ids]
    assert tokens == ["if", " x", ":\n        ", "return"]


def test_a_vocabulary_that_stays_small_is_said(small, tmp_path: Path) -> None:
    said = []
    config = TokenizerConfig(vocab_size=50_000, min_frequency=200)
    artifact, _ = build_tokenizer(config, small.corpus, Store(tmp_path), lambda kind, **f: said.append((kind, f)))
    size = artifact.facts["vocab_size"]
    assert 260 < size < 50_000
    warnings = [fields["text"] for kind, fields in said if kind == "warning"]
    assert len(warnings) == 1
    assert f"{size} tokens instead of tokenizer.vocab_size=50000" in warnings[0]


def test_it_is_reused(small) -> None:
    assert build_tokenizer(TokenizerConfig(vocab_size=1024), small.corpus, small.store) == (small.tokenizer, True)
    other, reused = build_tokenizer(TokenizerConfig(vocab_size=300), small.corpus, small.store)
    assert not reused
    assert other.key != small.tokenizer.key


# ---------------------------------------------------------------- loaded


def saved_tokenizer(folder: Path, backend: Tokenizer, **special: str) -> str:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


def gpt2_like() -> Tokenizer:
    """As GPT-2's: one special token, no padding token, text cut at 8 tokens by its own settings."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["import os, sys"] * 10, trainer)
    backend.enable_truncation(8)
    return backend


def test_a_folder_is_loaded(small, tmp_path: Path) -> None:
    path = saved_tokenizer(
        tmp_path / "gpt2", gpt2_like(), bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=8
    )
    store = Store(tmp_path / "store")
    artifact, reused = build_tokenizer(TokenizerConfig(path=path), small.corpus, store)
    assert not reused
    facts = artifact.facts
    assert (facts["trained"], facts["path"], facts["revision"]) == (False, path, None)
    assert (facts["bos_id"], facts["eos_id"], facts["pad_id"]) == (0, 0, 0)
    assert build_tokenizer(TokenizerConfig(path=path), small.corpus, store) == (artifact, True)
    text = HARD["hard/special.py"] + "<|endoftext|>"
    encoder = open_encoder(artifact.path)
    (ids,) = encode_texts(encoder, [text])
    assert len(ids) > 8
    assert 0 not in ids
    assert encoder.decode(ids.tolist()) == text


def test_a_hub_name_is_pinned_to_its_commit(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import transformers

    folder = saved_tokenizer(tmp_path / "hub", gpt2_like(), eos_token="<|endoftext|>")
    asked = []

    class Api:
        def repo_info(self, path: str, revision: str | None, repo_type: str) -> object:
            asked.append((path, revision, repo_type))
            return type("Info", (), {"sha": "c0ffee"})

    real = transformers.AutoTokenizer.from_pretrained

    def from_pretrained(path: str, **given: object) -> object:
        if path != "someone/words":
            return real(path, **given)
        asked.append((path, given))
        return real(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    config = TokenizerConfig(path="someone/words", revision="main")
    artifact, _ = build_tokenizer(config, small.corpus, Store(tmp_path / "store"))
    assert (artifact.facts["path"], artifact.facts["revision"]) == ("someone/words", "c0ffee")
    assert asked == [
        ("someone/words", "main", "model"),
        ("someone/words", {"revision": "c0ffee", "local_files_only": False}),
    ]


def test_one_that_does_not_give_its_text_back_is_refused(small, tmp_path: Path) -> None:
    backend = gpt2_like()
    backend.normalizer = normalizers.Lowercase()
    path = saved_tokenizer(tmp_path / "lower", backend, eos_token="<|endoftext|>")
    store = Store(tmp_path / "store")
    with pytest.raises(
        DataError, match=r"does not give its text back: in .*\.py, at character \d+, '.*' became '.*'\."
    ):
        build_tokenizer(TokenizerConfig(path=path), small.corpus, store)
    assert store.artifacts() == []


def test_one_that_cannot_be_used_is_refused(small, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"tokenizer.path: '.*empty' holds no tokenizer that Transformers can load"):
        build_tokenizer(TokenizerConfig(path=str(tmp_path / "empty")), small.corpus, store)
    path = saved_tokenizer(tmp_path / "endless", gpt2_like())
    with pytest.raises(ConfigError, match=r"tokenizer.path: '.*endless' has no end-of-text token"):
        build_tokenizer(TokenizerConfig(path=path), small.corpus, store)
    with pytest.raises(StoreError, match="no tokenizer is there"):
        open_encoder(tmp_path / "empty")


# ---------------------------------------------------------------- tokens of one's own, and the template


def chat_corpus(folder: Path, store: Store) -> Any:
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}. \u00fc"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(60)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig("jsonl", {"files": str(folder / "chat.jsonl")})
    return build_corpus(DataConfig(source=source, heldout_every=5, near_duplicate=None), store)[0]


def test_added_tokens_are_tokens_and_special_ones_are_never_read_in_a_text(small, tmp_path: Path) -> None:
    config = TokenizerConfig(vocab_size=1024, add_tokens=("<think>", "import"), add_special_tokens=("<|im_end|>",))
    artifact, _ = build_tokenizer(config, small.corpus, Store(tmp_path))
    assert artifact.facts["added_tokens"] == artifact.facts["vocab_size"] - 1024 > 0
    (ids,) = encode_texts(open_encoder(artifact.path), ["a<think><|im_end|>"])
    tokenizer = load_tokenizer(artifact.path)
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") >= 1024
    with pytest.raises(ConfigError, match=r"tokenizer.add_tokens: holds an empty string"):
        build_tokenizer(TokenizerConfig(vocab_size=1024, add_tokens=("",)), small.corpus, Store(tmp_path))


def test_the_tokenizer_of_conversations_is_trained_on_what_they_say_and_carries_its_template(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    corpus = chat_corpus(tmp_path / "rows", store)
    config = TokenizerConfig(vocab_size=320)
    plain, _ = build_tokenizer(config, corpus, store)
    tokenizer = load_tokenizer(plain.path)
    assert tokenizer.chat_template == default_template()
    # Nothing of the form that the rows are kept in has become a token.
    assert not [piece for piece in tokenizer.get_vocab() if "role" in piece or "content" in piece or '":' in piece]
    template = tmp_path / "mine.jinja"
    template.write_text("{{ head }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    options = {"head": 'the "top"\n', "n": 3, "flag": False, "nothing": None, "many": [1, {"a": "b"}]}
    render = RenderConfig(template=str(template), options=options)
    own, reused = build_tokenizer(config, corpus, store, render=render)
    assert not reused
    # Whoever loads the tokenizer, with Transformers alone, renders as the training does.
    messages = [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "One."}]
    text = load_tokenizer(own.path).apply_chat_template(messages, tokenize=False)
    assert text == 'the "top"\nSay 1.<|eos|>One.<|eos|>'
    trained = Renderer(load_tokenizer(own.path), render, "chat").render(json.dumps({"messages": messages}))
    assert load_tokenizer(own.path).decode(trained.segments[0].ids) == text
