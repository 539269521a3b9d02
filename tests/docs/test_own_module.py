"""The page on one's own data and model: every file that it shows is written to a folder and used from there."""

import csv
import io
import json
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.docs import pages

from kajiya.config.compose import compose
from kajiya.config.schema import Config
from kajiya.data.corpus import build_corpus
from kajiya.errors import ConfigError
from kajiya.flows.train import Trained, train
from kajiya.run.events import read_events
from kajiya.run.store import Store

PAGE = pages.DOCS / "own-data-and-model.md"
QUICK = ("train.precision=fp32", "train.device=cpu", "train.compile=off", "eval.samples=0", "train.eval_rows=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the page's files, and some text in every form that the page reads."""
    root = tmp_path_factory.mktemp("own")
    shown = [block for block in pages.blocks(PAGE) if block.title]
    assert len(shown) >= 12
    for block in shown:
        path = root / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.body, encoding="utf-8")
    library = Path(sysconfig.get_paths()["stdlib"]) / "json"
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))}
    texts |= {path.stem: path.read_text(encoding="utf-8") for path in sorted((library.parent / "email").glob("*.py"))}
    (root / "my-texts" / "deeper").mkdir(parents=True)
    for number, (name, text) in enumerate(texts.items()):
        (root / "my-texts" / ("deeper" if number % 2 else "") / f"{name}.txt").write_text(text, encoding="utf-8")
    (root / "my-corpus.txt").write_text("<|endoftext|>".join(texts.values()), encoding="utf-8")
    _write_rows(root, list(texts.values()))
    return root


def _write_rows(root: Path, texts: list[str]) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = root / "my-rows"
    rows.mkdir()
    lines = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(texts))
    (rows / "a.jsonl").write_text(lines, encoding="utf-8")
    table = io.StringIO()
    csv.writer(table).writerows([["id", "body"], *enumerate(texts)])
    (rows / "a.csv").write_text(table.getvalue(), encoding="utf-8", newline="")
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), rows / "a.parquet")
    datasets.Dataset.from_dict({"body": texts}).save_to_disk(str(root / "my-dataset"))


def _enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Work in the folder, on one core: models as small as these are slower on two, and the machine may be shared."""
    patch.chdir(folder)
    patch.syspath_prepend(folder)
    patch.setattr("kajiya.run.provenance.usable_cores", lambda: 1)


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _enter(folder, monkeypatch)


@pytest.mark.parametrize("kind", ["text", "jsonl", "csv", "parquet", "hub"])
def test_each_kind_of_file_gives_the_same_documents(kind: str, folder: Path, tmp_path: Path) -> None:
    config = compose(f"{kind}.yaml", ["data.heldout_every=4", "data.near_duplicate=null"])
    corpus, _ = build_corpus(config.data, Store(tmp_path))
    entered = corpus.facts["ledger"]["entered"]
    files = list((folder / "my-texts").rglob("*.txt"))
    assert entered == {"documents": len(files), "bytes": sum(path.stat().st_size for path in files)}


def test_one_large_file_gives_the_same_documents(tmp_path: Path) -> None:
    quiet = ["data.heldout_every=4", "data.near_duplicate=null"]
    whole, _ = build_corpus(compose("text.yaml", quiet).data, Store(tmp_path))
    cut, _ = build_corpus(compose("one-file.yaml", quiet).data, Store(tmp_path))
    entered = [corpus.facts["ledger"]["entered"] for corpus in (whole, cut)]
    n = entered[0]["documents"]
    assert entered[1] == {"documents": n, "bytes": entered[0]["bytes"] + (n - 1) * len("<|endoftext|>")}


def test_the_recipe_and_the_group_of_a_config_dir_are_found(folder: Path) -> None:
    config = compose("letters", [], config_dir="my-conf")
    assert (config.name, config.optim.name, config.optim.lr) == ("letters", "adamw", 3e-4)
    assert config.optim.options == {"beta2": 0.99}
    assert compose("letters", ["optim=muon"], config_dir="my-conf").optim.name == "muon"


def test_weights_without_their_tokenizer_are_refused(folder: Path) -> None:
    assert compose("continue.yaml").model.path == "my-base-model"
    with pytest.raises(ConfigError, match=r"tokenizer\.path"):
        compose("continue.yaml", ["tokenizer.path=null"])


# ---------------------------------------------------------------- the module


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Any:
    """The config of the page's own module, made small and quick."""
    return lambda *more: compose(str(folder / "tiny.yaml"), [*QUICK, "track.trackers=[]", *more])


@pytest.fixture(scope="module")
def trained(folder: Path, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Store, Trained]:
    with pytest.MonkeyPatch.context() as patch:
        _enter(folder, patch)
        config, store = tiny(), Store(tmp_path_factory.mktemp("store"))
        return config, store, train(config, store)


def test_an_own_module_trains_through_the_same_loop(trained: tuple[Config, Store, Trained]) -> None:
    config, _, done = trained
    assert done.model is not None
    assert done.model.facts["steps"] == config.train.steps == 30
    losses = [event["values"] for event in read_events(done.run.folder) if event["kind"] == "metrics"]
    course = [values["train/nll"] for values in losses if "train/nll" in values]
    assert course[-1] < course[0] - 0.3
    manifest = done.run.manifest()
    assert manifest["status"] == "finished"
    assert set(manifest["artifacts"]) >= {"corpus", "tokenizer", "shards", "model", "baselines", "evaluation"}
    evaluation = json.loads(
        (done.run.store.root / manifest["artifacts"]["evaluation"]["path"] / "manifest.json").read_bytes()
    )
    assert 0 < evaluation["facts"]["bits_per_byte"] < 8


def test_the_saved_weights_are_the_modules_own(trained: tuple[Config, Store, Trained]) -> None:
    import my_models  # type: ignore[import-not-found]
    from safetensors.torch import load_file

    config, _, done = trained
    assert done.model is not None
    module = my_models.TinyAttention(**config.model.options)
    saved = load_file(done.model.path / "model.safetensors")
    assert saved.keys() == module.state_dict().keys()
    module.load_state_dict(saved)


def test_run_again_it_is_reused_and_edited_it_is_trained_anew(
    trained: tuple[Config, Store, Trained], folder: Path
) -> None:
    from kajiya.flows.stages import Stages
    from kajiya.flows.train import prepare_data, training_key

    config, store, done = trained
    heard: list[tuple[str, str]] = []

    def hear(kind: str, **fields: Any) -> None:
        if kind == "stage":
            heard.append((fields["name"], fields["state"]))

    again = train(config, store, on_event=hear)
    assert again.model == done.model
    assert ("train", "reused") in heard
    data = prepare_data(config, store, Stages(lambda *_, **__: None))
    before = training_key(config, data)
    source = folder / "my_models.py"
    text = source.read_text(encoding="utf-8")
    try:
        source.write_text(text.replace("nn.GELU()", "nn.SiLU()"), encoding="utf-8")
        assert training_key(config, data) != before
    finally:
        source.write_text(text, encoding="utf-8")
    assert training_key(config, data) == before


def test_the_documents_of_a_row_are_apart_for_a_module_that_takes_segments(folder: Path) -> None:
    import my_models

    from kajiya.data.batch import Batch
    from kajiya.models.hidden import all_logits

    torch.manual_seed(0)
    model = my_models.TinyAttention(vocab_size=32, width=16).eval()
    tokens = torch.randint(32, (1, 12))
    segments = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    batch = Batch(tokens, tokens, positions, segments, 12)
    changed = replace(batch, tokens=torch.cat([tokens[:, :5].flip(1) + 1, tokens[:, 5:]], dim=1) % 32)
    before, after = all_logits(model, batch), all_logits(model, changed)
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert not torch.equal(before[:, :5], after[:, :5])


def test_the_check_of_causality_runs_and_would_fail(folder: Path) -> None:
    (block,) = [block for block in pages.blocks(PAGE) if block.language == "python" and not block.title]
    torch.manual_seed(0)
    exec(compile(block.body, str(PAGE), "exec"), {})
    leaking = block.body.replace("model(tokens, **given), model(changed, **given)", "leak(tokens), leak(changed)")
    assert leaking != block.body

    def leak(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.flip(1).float()

    with pytest.raises(AssertionError):
        exec(compile(leaking, str(PAGE), "exec"), {"leak": leak})


def test_a_wrong_argument_is_refused_and_named(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"widht.*did you mean 'width'"):
        train(tiny("model.options.widht=8"), Store(tmp_path))


# ---------------------------------------------------------------- the parts


def test_own_source_optimizer_schedule_loss_and_tracker(folder: Path, tmp_path: Path) -> None:
    config = compose("parts.yaml", [*QUICK, "track.timeout_s=60"])
    done = train(config, Store(tmp_path))
    assert done.warnings == ()
    assert done.model is not None
    events = list(read_events(done.run.folder))
    metrics = [event for event in events if event["kind"] == "metrics"]
    rates = {event["step"]: event["values"]["train/lr"] for event in metrics if "train/lr" in event["values"]}
    # Three stairs of a quarter each, after 2 % of warm-up; the step behind progress 1 is never taken.
    assert rates == pytest.approx({5: 0.05, 10: 0.05 * 0.75, 15: 0.05 * 0.5, 20: 0.05 * 0.5})
    with (done.run.folder / "course.csv").open(newline="") as file:
        written = list(csv.reader(file))
    assert [[str(e["step"]), name] for e in metrics for name in e["values"]] == [row[:2] for row in written]
    ledger = json.loads((_path(done, "corpus") / "manifest.json").read_bytes())["facts"]["ledger"]
    assert ledger["entered"]["documents"] > 500


def _path(done: Trained, name: str) -> Path:
    return Path(done.run.store.root / done.run.manifest()["artifacts"][name]["path"])


def test_an_option_that_a_part_does_not_take_is_refused(folder: Path) -> None:
    for wrong in ("optim.options.momentun=0.1", "schedule.options.stair=2", "train.loss.options.smooth=1"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0].replace(".", r"\.")):
            compose("parts.yaml", [wrong])
