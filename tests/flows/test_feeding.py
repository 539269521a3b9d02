"""What a loss is fed with: rows prepared and measured, models that must keep texts apart, look-ups out of the step's way."""

import json
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Finished
from tests.data.families import MORE, SAYS, USER, tokenizer_of
from transformers import AutoConfig, AutoModelForCausalLM

from kajiya.config.compose import compose
from kajiya.config.schema import Config, DataConfig, LossConfig, SourceConfig
from kajiya.data.loader import Feed
from kajiya.data.progress import silent
from kajiya.data.render import Refusal
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError, DataError
from kajiya.flows import balance, feeding
from kajiya.flows.feeding import Feeding, open_feeding, rendering_of, require_isolation
from kajiya.flows.stages import Stages
from kajiya.flows.train import prepare_data, train
from kajiya.run.store import Artifact, Store

# ---------------------------------------------------------------- what is lost stops the work


def rows(path: Path, lines: Iterable[str], **settings: Any) -> DataConfig:
    path.write_text("".join(line + "\n" for line in lines))
    source = SourceConfig("jsonl", {"files": str(path)})
    return DataConfig(source=source, heldout_every=5, near_duplicate=None, row_tokens=64, **settings)


def begun(config: Config, store: Store, words: str) -> list[str]:
    """The stages that were begun before it stopped with these words."""
    heard: list[str] = []

    def hear(kind: str, **fields: Any) -> None:
        if kind == "stage" and fields["state"] == "begun":
            heard.append(fields["name"])

    with pytest.raises(DataError, match=words):
        prepare_data(config, store, Stages(hear))
    return heard


def test_too_many_unreadable_rows_stop_the_work_before_anything_is_made_of_the_others(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    lines = [json.dumps({"text": f"row {number}"}) if number % 20 else "{" for number in range(200)]
    config = replace(small_config(), data=rows(tmp_path / "rows.jsonl", lines, on_unreadable="drop"))
    words = r"data.max_lost_fraction=0.01: 5.00% of the rows are lost .*\nChange data.on_unreadable"
    assert begun(config, Store(tmp_path / "store"), words) == ["corpus"]


def test_too_many_long_rows_stop_the_work_behind_the_packing(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    lines = [
        json.dumps({"prompt": f"Q {number}", "completion": "and so on " * (1 if number % 20 else 40)})
        for number in range(200)
    ]
    config = replace(small_config(), data=rows(tmp_path / "rows.jsonl", lines, on_long="drop"))
    words = r"data.max_lost_fraction=0.01: .*% of the bytes are lost .*\nChange data.row_tokens, data.max_tokens or data.on_long"
    assert begun(config, Store(tmp_path / "store"), words) == ["corpus", "tokenizer", "shards", "packing"]
    allowed = replace(config, data=replace(config.data, max_lost_fraction=1.0))
    assert prepare_data(allowed, Store(tmp_path / "store"), Stages(silent)).packing is not None


def test_the_margin_of_a_preference_reaches_the_loss(small_config: Callable[..., Config], tmp_path: Path) -> None:
    """Under the name that the data give it; a row that says none has 0."""
    given = [None if number % 3 == 0 else number / 4 - 2 for number in range(40)]
    pairs = [{"prompt": f"Q {number}", "chosen": f"yes {number}", "rejected": f"no {number}"} for number in range(40)]
    said = [{} if margin is None else {"by": margin} for margin in given]
    lines = [json.dumps(pair | more) for pair, more in zip(pairs, said, strict=True)]
    data = rows(tmp_path / "rows.jsonl", lines, columns={"margin": "by"})
    data = replace(data, row_tokens=128)
    config = replace(small_config(), data=data)
    config = replace(config, train=replace(config.train, loss=LossConfig("reward")))
    made = prepare_data(config, Store(tmp_path / "store"), Stages(silent))
    vocabulary = load_tokenizer(made.tokenizer.path)
    loader = open_feeding(config, made, None).loader(batch=4)
    found = {}
    while loader.row < loader.rows_per_epoch:
        batch = loader.next()
        assert batch.labels.dtype == torch.float32
        for example, margin in enumerate(batch.labels.tolist()):
            text = vocabulary.decode(batch.rows.tokens[batch.owner == 2 * example])
            found[int(text.split("yes ")[1].split("<")[0])] = margin
    assert len(found) > 30
    assert all(margin == (given[number] or 0) for number, margin in found.items())
    lines[0] = lines[1].replace("-1.75", '"much"')
    broken = replace(config, data=rows(tmp_path / "rows.jsonl", lines, columns={"margin": "by"}))
    with pytest.raises(DataError, match="margin='much', which is no finite number"):
        prepare_data(broken, Store(tmp_path / "store"), Stages(silent))


def _feedback(folder: Path, labels: Iterable[bool], n_answers: int, **options: Any) -> Config:
    """KTO of answers to questions, `n_answers` to each, with one word of its own for each question and each answer."""
    lines = [
        json.dumps({"prompt": f"what of q{k // n_answers}", "completion": f"a{k // n_answers}x{k}", "label": label})
        for k, label in enumerate(labels)
    ]
    config = compose(
        "stdlib-pretrain",
        ["train.loss.name=kto", "train.row_growth=[]", "data.packing=bucketed", "tokenizer.vocab_size=300"],
    )
    data = replace(rows(folder / "rows.jsonl", lines), packing="bucketed")
    return replace(config, data=data, train=replace(config.train, loss=LossConfig("kto", options)))


@pytest.mark.parametrize("n_answers", [1, 2, 3])
def test_ktos_mismatched_answers_are_to_other_prompts(n_answers: int, tmp_path: Path) -> None:
    """Rows that were made of pairs have the same prompt twice, one behind the other."""
    config = _feedback(tmp_path, [k % 2 == 0 for k in range(60)], n_answers)
    data = prepare_data(config, Store(tmp_path / "store"), Stages(silent))
    feeding = open_feeding(config, data, None)
    tokenizer = load_tokenizer(data.tokenizer.path)
    n_seen = 0
    for batch in feeding.heldout():
        other = batch.mismatched
        for number in range(len(other.examples)):
            text = str(tokenizer.decode(other.rows.tokens[other.owner == number], skip_special_tokens=True))
            question, answer = re.search(r"what of q(\d+)", text), re.search(r"a(\d+)x", text)
            assert question is not None
            assert answer is not None, text
            assert question[1] != answer[1], text
            n_seen += 1
    assert n_seen > 5


@pytest.mark.parametrize(
    ("n_good", "options", "words"),
    [
        (20, {}, None),
        (20, {"desirable_weight": 0.95}, None),
        (22, {}, None),
        (18, {}, "18 good and 22 bad answers weigh 0.818 to 1"),
        (36, {}, "36 good and 4 bad answers weigh 9 to 1 .*undesirable_weight between 6.75 and 9 balances them"),
        (36, {"undesirable_weight": 8.0}, None),
        (
            4,
            {"undesirable_weight": 2.0},
            "weigh 0.0556 to 1 .*options.desirable_weight between 18 and 24 balances them",
        ),
        (40, {}, "all 40 answers are good ones"),
    ],
)
def test_labels_out_of_proportion_are_said_with_the_weights_that_balance_them(
    n_good: int, options: dict[str, float], words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.array([1] * n_good + [0] * (40 - n_good))
    monkeypatch.setattr(balance, "open_split", lambda folder, split: SimpleNamespace(labels=labels))
    said = balance.balance_words(LossConfig("kto", options), tmp_path)
    assert said is None if words is None else re.search(words, str(said)), said


def test_the_proportion_of_labels_is_heard_before_anything_is_trained(tmp_path: Path) -> None:
    heard: list[str] = []

    def hear(kind: str, **fields: Any) -> None:
        if kind == "warning":
            heard.append(fields["text"])

    prepare_data(_feedback(tmp_path, [k % 10 != 0 for k in range(60)], 1), Store(tmp_path / "store"), Stages(hear))
    assert len(heard) == 1
    assert "train.loss.options.undesirable_weight between" in heard[0]


def test_a_setting_that_changes_nothing_stops_the_work_behind_the_corpus(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    lines = [json.dumps({"text": f"row {number}"}) for number in range(50)]
    config = replace(small_config(), data=rows(tmp_path / "rows.jsonl", lines, on_long="drop"))
    heard: list[str] = []
    with pytest.raises(
        ConfigError, match=r"data\.on_long: drop changes nothing for text rows with the packing concatenate"
    ):
        prepare_data(config, Store(tmp_path / "store"), Stages(lambda kind, **_: heard.append(kind)))
    assert heard.count("stage") == 2, "begun and ended: the corpus"


@pytest.mark.slow
def test_real_pairs_fill_their_rows(tmp_path: Path) -> None:
    config = compose("stdlib-sft")
    data = prepare_data(config, Store(tmp_path), Stages(silent))
    assert data.packing is not None
    facts = data.packing.facts["train"]
    assert facts["examples"] > 5_000
    assert facts["fill"] >= 0.99


# ---------------------------------------------------------------- texts of a row apart


class Whole(torch.nn.Module):
    """A module that is not told the segments."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens) @ self.embedding.weight.T


class Apart(Whole):
    """One that is."""

    def forward(self, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens)


def test_a_module_that_cannot_keep_texts_apart_is_refused_where_they_share_rows(
    small_config: Callable[..., Config],
) -> None:
    own = "model.name=my_package:Whole"
    with pytest.raises(ConfigError, match=r"data.isolate: .*Whole.forward takes no `segments`"):
        require_isolation(small_config(own), "text", Whole(8))
    require_isolation(small_config(own), "text", Apart(8))
    require_isolation(small_config(own, "data.isolate=false"), "text", Whole(8))
    require_isolation(small_config(own, "data.packing=bucketed"), "text", Whole(8))
    require_isolation(small_config(own), "instruction", Whole(8))  # a row each, since the config cannot know
    require_isolation(small_config(), "text", model("llama", hidden_size=16, num_attention_heads=2))
    mamba = model("mamba", hidden_size=16, state_size=4)
    require_isolation(small_config("model.name=mamba"), "text", mamba)
    with pytest.raises(ConfigError, match=r"data.isolate: .*MambaForCausalLM carries a state along the row"):
        require_isolation(small_config("model.name=mamba", "data.packing=concatenate"), "text", mamba)


def model(name: str, **sizes: int) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, num_hidden_layers=1, vocab_size=50, **sizes))


def test_a_run_with_such_a_module_stops_before_its_first_step(
    small_config: Callable[..., Config], own_finished: Finished
) -> None:
    config = small_config("model.name=tests.flows.test_feeding:Whole", "model.options={vocab_size: 512}")
    with pytest.raises(ConfigError, match=r"data.isolate: .*\nSet data.packing=bucketed"):
        train(config, own_finished.store)


# ---------------------------------------------------------------- out of the step's way


def test_look_ups_are_made_where_rows_are_read_ahead(own_finished: Finished) -> None:
    shards = own_finished.store.root / own_finished.trained.run.manifest()["artifacts"]["shards"]["path"]
    in_main: list[bool] = []

    def enrich(split: str) -> Callable[[Any], Any]:
        def note(batch: Any) -> Any:
            in_main.append(threading.current_thread() is threading.main_thread())
            return split, batch

        return note

    made = Feeding(shards, Feed(64), seed=0, micro_batch=2, enrich=enrich, loss="next_token").loader()
    split, batch = made.next()
    assert (split, batch.tokens.shape) == ("train", (2, 64))
    assert in_main[0] is False
    assert made.at(0)[0] == "train"


def test_batches_for_a_gpu_are_pinned(own_finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    config, gpu = own_finished.config, torch.device("cuda", 1)
    data = prepare_data(config, own_finished.store, Stages(silent))
    monkeypatch.setattr(feeding, "pinned", lambda batch, device: (batch, device))
    batch, device = open_feeding(config, data, None, device=gpu).loader().next()
    assert (batch.tokens.shape, device) == ((2, 64), gpu)
    assert open_feeding(config, data, None, device=torch.device("cpu")).loader().next().tokens.shape == (2, 64)
    assert next(iter(open_feeding(config, data, None, device=gpu).heldout(2))).tokens.shape == (2, 64)


# ---------------------------------------------------------------- templates by their names


def test_a_refusal_names_the_template_by_what_the_config_says(tmp_path: Path) -> None:
    tokenizer_of("qwen3").save_pretrained(tmp_path)
    corpus, tokenizer = (Artifact(tmp_path, stage, "k", "d", {"format": "chat"}) for stage in ("corpus", "tokenizer"))
    row = json.dumps({"messages": [USER, SAYS, *MORE]})
    for override, words in (
        ("tokenizer.path=Qwen/Qwen3-8B", "the chat template of Qwen/Qwen3-8B"),
        (f"data.render.template={write(tmp_path)}", f"the chat template {tmp_path}/mine.jinja"),
    ):
        config = compose("stdlib-sft", [override])
        rendering = rendering_of(config, corpus, tokenizer)
        assert rendering is not None
        (refused,) = rendering.open()([("row 1", row)])
        assert isinstance(refused, Refusal)
        assert words in refused.reason


def write(folder: Path) -> Path:
    path = folder / "mine.jinja"
    path.write_text("{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}")
    return path
