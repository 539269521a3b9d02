"""The proof within the flow: what it is kept under, and what it makes of rows of conversations that went wrong on their way."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kajiya.config.compose import compose
from kajiya.config.schema import Config
from kajiya.config.validate import CHECKS
from kajiya.data import example_rows, render
from kajiya.data.batch import NO_TARGET, Seq2SeqBatch
from kajiya.errors import ProofError
from kajiya.flows.plan import prove_recipe
from kajiya.run.store import Store

_OWN = """
import torch


def loss(model, batch, chunk_tokens: int = 512, factor: float = {factor}):
    logits = model(batch.tokens, position_ids=batch.positions, use_cache=False).logits.flatten(0, 1).float()
    value = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), reduction="sum")
    return {{"loss": (factor * value, "targets")}}, {{}}
"""


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of a step is nobody's concern here."""
    monkeypatch.setattr("kajiya.flows.planning._ENOUGH_S", {"by time": 0.0, "by steps": 0.0})


def _only(*names: str) -> str:
    return f"preflight.skip=[{','.join(name for name in CHECKS if name not in names)}]"


# ---------------------------------------------------------------- what a verdict is kept under


def test_a_verdict_is_kept_until_settings_or_own_code_change(
    small_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "my_proven_loss.py"
    source.write_text(_OWN.format(factor=1.0))
    monkeypatch.syspath_prepend(tmp_path)
    store = Store(tmp_path / "store")

    def proven(*more: str) -> str:
        heard: list[str] = []

        def hear(kind: str, **fields: Any) -> None:
            if kind == "stage" and fields["name"] == "prove":
                heard.append(fields["state"])

        own = ("optim=adamw", "train.loss.name=my_proven_loss:loss", _only("schedule"), *more)
        prove_recipe(small_config(*own), store, hear)
        return heard[-1]

    assert proven() == "done"
    assert proven() == "reused"
    assert proven("seed=7", "train.steps=40", "train.eval_every=5") == "reused"
    assert proven("optim.lr=1e-3") == "done"
    with monkeypatch.context() as patch:
        patch.setattr("kajiya.flows.prove.package_versions", lambda: {"transformers": "another"})
        assert proven() == "done"
    source.write_text(_OWN.format(factor=2.0))
    assert proven() == "done"
    source.write_text(_OWN.format(factor=1.0))
    assert proven() == "reused"
    sys.modules.pop("my_proven_loss")


def test_a_step_is_measured_once_unless_the_length_hangs_on_it(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")

    def step_seconds(*more: str) -> float:
        heard: list[float] = []

        def hear(kind: str, **fields: Any) -> None:
            if kind == "plan":
                heard.append(fields["facts"]["step_seconds"])

        prove_recipe(small_config(_only("schedule"), *more), store, hear)
        return heard[-1]

    first = step_seconds()
    assert step_seconds("seed=7", "optim.lr=1e-3", "train.steps=40") == first
    assert step_seconds("train.micro_batch=4") != first
    assert step_seconds("train.steps=null", "train.minutes=1") != first


# ---------------------------------------------------------------- rows of conversations


def _conversations(folder: Path) -> Path:
    """Two questions and answers in each row, all different."""
    words = ["stone", "river", "lamp", "window", "garden", "bridge", "paper", "engine", "summer", "shadow"]
    lines = []
    for number in range(60):
        a, b, c = (words[(number * k + k) % 10] for k in (1, 3, 7))
        turns = [
            ("user", f"Question {number}: what of the {a}?"),
            ("assistant", f"The {a} of number {number} lies beside the {b}."),
            ("user", f"And the {c} {number}?"),
            ("assistant", f"Behind the {b} stands {c} number {number}."),
        ]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    (folder / "chat.jsonl").write_text("".join(lines))
    return folder / "chat.jsonl"


_RECIPE = """
name: small-chat
defaults:
  - optim: adamw
  - schedule: wsd
data:
  source:
    name: jsonl
    options:
      files: {files}
  near_duplicate: null
  heldout_every: 6
  row_tokens: 256
tokenizer:
  vocab_size: 400
model:
  n_params: 60k
  n_layers: 2
train:
  minutes: null
  steps: 12
  micro_batch: 2
  precision: fp32
"""


def _chat_config(folder: Path, *more: str) -> Config:
    (folder / "recipe.yaml").write_text(_RECIPE.format(files=_conversations(folder)))
    return compose(str(folder / "recipe.yaml"), list(more))


def _inverted(patch: pytest.MonkeyPatch) -> None:
    honest = render._weights
    patch.setattr(render, "_weights", lambda messages, train_on: [1.0 - w for w in honest(messages, train_on)])


def _all_trained(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(render, "_weights", lambda messages, train_on: [1.0] * len(messages))


def _last_answer_alone(patch: pytest.MonkeyPatch) -> None:
    honest = render._weights
    patch.setattr(render, "_weights", lambda messages, train_on: honest(messages, "last"))


def _changed(patch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Have the rows changed when they are full."""
    honest = example_rows._Canvas.finish

    def finish(canvas: Any, kind: Any) -> Any:
        change(canvas)
        return honest(canvas, kind)

    patch.setattr(example_rows._Canvas, "finish", finish)


def _ends_masked(patch: pytest.MonkeyPatch) -> None:
    def change(canvas: Any) -> None:
        canvas._weights[canvas._targets == canvas._split.eos_id] = 0

    _changed(patch, change)


def _no_ends(patch: pytest.MonkeyPatch) -> None:
    def change(canvas: Any) -> None:
        for table in (canvas._tokens, canvas._targets):
            table[table == canvas._split.eos_id] = 7

    _changed(patch, change)


def _first_answer_endless(patch: pytest.MonkeyPatch) -> None:
    def change(canvas: Any) -> None:
        canvas._weights[(canvas._targets == canvas._split.eos_id) & (canvas._segments == 0)] = 0

    _changed(patch, change)


def _packed_as_one(patch: pytest.MonkeyPatch) -> None:
    honest = example_rows._Canvas._put

    def put(canvas: Any, row: int, source: int, n: int) -> None:
        honest(canvas, row, source, n)
        canvas._n_segments[row] = 1

    patch.setattr(example_rows._Canvas, "_put", put)


ROW_BUGS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None] | None, str]] = {
    "sound": (None, ""),
    "inverted mask": (_inverted, "targets: a text of a row"),
    "questions trained too": (_all_trained, "targets: a text of a row is trained, and is not to be"),
    "first answers left out": (_last_answer_alone, "targets: a text of a row is to be trained, and is not"),
    "ends masked": (_ends_masked, "targets: .* answers have no end"),
    "no ends": (_no_ends, "targets: .* answers have no end"),
    "some answers endless": (_first_answer_endless, "targets: .* answers have no end"),
    "two documents in one segment": (_packed_as_one, "isolation: at .* places"),
}


@pytest.mark.parametrize("name", ROW_BUGS)
def test_rows_of_conversations_are_what_they_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bug, words = ROW_BUGS[name]
    config = _chat_config(tmp_path, _only("targets", "isolation"))
    if bug is not None:
        bug(monkeypatch)
        with pytest.raises(ProofError, match=words):
            prove_recipe(config, Store(tmp_path / "store"))
        return
    facts = prove_recipe(config, Store(tmp_path / "store"))
    texts = {each["name"]: each["text"] for each in facts["findings"]}
    (found, of) = (int(word) for word in texts["targets"].split("; ")[1].split(" texts")[0].split(" of "))
    assert found == of >= 4 * 40
    assert "the documents before the end of one" in texts["isolation"]


@pytest.mark.parametrize("train_on", ["last", "completion", "all"])
def test_no_false_alarm_whatever_is_trained(train_on: str, tmp_path: Path) -> None:
    facts = prove_recipe(
        _chat_config(tmp_path, _only("targets"), f"data.render.train_on={train_on}"), Store(tmp_path / "store")
    )
    assert facts["findings"][0]["state"] == "passed"


def test_a_template_without_an_end_is_found(tmp_path: Path) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text(
        "{%- for message in messages -%}{{ message.role }}: {{ message.content }}\n{%- endfor -%}"
        "{%- if add_generation_prompt -%}assistant: {% endif -%}"
    )
    config = _chat_config(tmp_path, _only("targets"), f"data.render.template={template}", "data.render.train_on=last")
    with pytest.raises(ProofError, match="template ends an answer with no token"):
        prove_recipe(config, Store(tmp_path / "store"))


_CHANGING = (
    "{{%- for message in messages -%}}<|im_start|>{{{{ message.role }}}}\n{{{{ message.content | {filter} }}}}<|eos|>\n"
    "{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}<|im_start|>assistant\n{{% endif -%}}"
)


@pytest.mark.parametrize("bug", [None, _inverted])
@pytest.mark.parametrize("changed", ["upper", "replace(' ', '_')"])
def test_a_template_that_changes_the_texts_leaves_them_unproven(
    changed: str, bug: Callable[[pytest.MonkeyPatch], None] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no mistake, and nothing is said to be proven that is not."""
    template = tmp_path / "changing.jinja"
    template.write_text(_CHANGING.format(filter=changed))
    if bug is not None:
        bug(monkeypatch)
    more = (f"data.render.template={template}", "tokenizer.add_special_tokens=['<|im_start|>']")
    (found,) = prove_recipe(_chat_config(tmp_path, _only("targets"), *more), Store(tmp_path / "store"))["findings"][:1]
    assert found["state"] == "skipped"
    assert "the chat template changes the others" in found["text"]


def test_texts_are_compared_whatever_a_template_does_with_them() -> None:
    from kajiya.preflight.said import Said, compare

    text, trained = "HEADaskedENDtoldEND", [False] * 12 + [True] * 7
    asked, told = Said(" asked\n", False, False), Said("told ", True, True)
    assert compare([asked, told], text, trained) == (2, None)
    assert compare([asked, Said("changed by the template", True, True), told], text, trained) == (2, None)
    assert compare([asked, told], text, [not each for each in trained]) == (0, asked)
    # A text that occurs in both kinds of run is found where it is of its kind.
    assert compare([Said("END", True, True)], text, trained) == (1, None)
    # What was cut off is not looked for in what is left of the text before it.
    rest = [asked, Said("told at length", True, True), Said("old", False, False)]
    assert compare(rest, text, trained, is_whole=False) == (1, None)


# ---------------------------------------------------------------- pairs of an encoder–decoder

_WORDS = ["stone", "river", "lamp", "window", "garden", "bridge", "paper", "engine", "summer", "shadow"]


def _pairs_config(folder: Path, *more: str) -> Config:
    """Questions and answers, all different, for a small T5."""
    lines = []
    for number in range(60):
        a, b, c = (_WORDS[(number * k + k) % 10] for k in (1, 3, 7))
        row = {
            "input": f"What of the {a} in number {number}?",
            "target": f"The {b} of {number}\n lies  beside its {c}.",
        }
        lines.append(json.dumps(row) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    (folder / "recipe.yaml").write_text(_RECIPE.format(files=folder / "pairs.jsonl").replace("small-chat", "small-t5"))
    given = ["model.name=t5", "train.loss.name=seq2seq", "train.micro_batch=4", _only("targets"), *more]
    return compose(str(folder / "recipe.yaml"), given)


def _rolled(batch: Seq2SeqBatch, *names: str) -> Seq2SeqBatch:
    return replace(batch, **{name: vars(batch)[name].roll(1, 0) for name in names})


def _without_ends(batch: Seq2SeqBatch) -> Seq2SeqBatch:
    targets = batch.targets.clone()
    targets[torch.arange(len(targets)), (targets != NO_TARGET).sum(dim=1) - 1] = NO_TARGET
    return replace(batch, targets=targets)


def _without_beginnings(batch: Seq2SeqBatch) -> Seq2SeqBatch:
    targets = batch.targets.clone()
    targets[:, :2] = NO_TARGET
    return replace(batch, targets=targets)


def _read_as_said(batch: Seq2SeqBatch) -> Seq2SeqBatch:
    return replace(batch, tokens=torch.where(batch.targets == NO_TARGET, batch.tokens, batch.targets))


def _begun_elsewhere(batch: Seq2SeqBatch) -> Seq2SeqBatch:
    return replace(batch, tokens=torch.cat([batch.tokens[:, :1] + 7, batch.tokens[:, 1:]], dim=1))


PAIR_BUGS: dict[str, tuple[Callable[[Seq2SeqBatch], Seq2SeqBatch], str]] = {
    "sound": (lambda batch: batch, ""),
    "targets of other rows": (
        lambda batch: _rolled(batch, "targets", "tokens"),
        "is to say .* and the row's target is",
    ),
    "inputs of other rows": (lambda batch: _rolled(batch, "inputs", "inputs_mask"), "reads .* and the row's input is"),
    "beginnings masked": (_without_beginnings, "is to say .* and the row's target is"),
    "ends masked": (_without_ends, "targets have no end that is learnt"),
    "the decoder reads what it says": (_read_as_said, "does not read the token before"),
    "another start token": (_begun_elsewhere, "does not read the token before"),
}


@pytest.mark.parametrize("name", PAIR_BUGS)
def test_pairs_are_what_their_rows_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bug, words = PAIR_BUGS[name]
    honest = example_rows.PairRows.batch
    monkeypatch.setattr(example_rows.PairRows, "batch", lambda rows, places: bug(honest(rows, places)))
    if words:
        with pytest.raises(ProofError, match=f"targets: .*{words}"):
            prove_recipe(_pairs_config(tmp_path), Store(tmp_path / "store"))
        return
    facts = prove_recipe(_pairs_config(tmp_path), Store(tmp_path / "store"))
    text = facts["findings"][0]["text"]
    assert "input and target of each of 48 pairs" in text
    assert "an end is learnt in each of 48 whole targets" in text


def test_a_pair_that_is_rendered_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards themselves say something else, for example an input that is to be said."""
    honest = render.Renderer._draft_seq2seq
    monkeypatch.setattr(
        render.Renderer, "_draft_seq2seq", lambda renderer, row: honest(renderer, row | {"target": row["input"]})
    )
    with pytest.raises(ProofError, match=r"targets: .*is to say 'What of"):
        prove_recipe(_pairs_config(tmp_path), Store(tmp_path / "store"))


def test_pairs_that_are_cut_are_the_beginnings_of_their_rows(tmp_path: Path) -> None:
    more = ("data.row_tokens=16", "data.on_long=cut", "data.max_lost_fraction=1")
    facts = prove_recipe(_pairs_config(tmp_path, *more), Store(tmp_path / "store"))
    assert facts["findings"][0]["state"] == "passed"
    assert "an end is learnt in each of 0 whole targets" in facts["findings"][0]["text"]


def test_a_tokenizer_that_loses_something_is_asked_what_it_makes_of_a_text() -> None:
    from kajiya.preflight.prove_pairs import is_text_of

    class Lower:
        """It knows small letters alone."""

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [ord(letter) for letter in text.lower()]

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(map(chr, ids))

    assert is_text_of("a river", "A  River", Lower(), is_whole=True)
    assert not is_text_of("a riv", "A River", Lower(), is_whole=True)
    assert is_text_of("a riv\ufffd", "A River", Lower(), is_whole=False)
    assert not is_text_of("a stone", "A River", Lower(), is_whole=False)
