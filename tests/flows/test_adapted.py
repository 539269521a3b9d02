"""A model trained through an adapter: its base from the store, what is left, evaluated, served, gone on with."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tests.conftest import Finished
from transformers import AutoModelForCausalLM

from kajiya.api import load, use_adapter
from kajiya.config.compose import compose
from kajiya.config.schema import Config, ServeConfig
from kajiya.errors import ConfigError, StoreError
from kajiya.evals.answers import LocalModel
from kajiya.flows.targets import find_model, with_folders
from kajiya.flows.train import Trained, train
from kajiya.models.adapt import adapter_names, adapter_off
from kajiya.models.open import open_model
from kajiya.models.weights_digest import weights_digest
from kajiya.run.store import Store
from kajiya.serving.hosts import source_of
from kajiya.serving.sequence import SamplingParams
from kajiya.serving.server import open_engine


def on_base(finished: Finished) -> tuple[str, ...]:
    """Settings that start from the model of `finished`, by its run: other tests leave newer ones of the same recipe."""
    run = finished.trained.run.id
    return f"model.path={run}", f"tokenizer.path={run}", "optim=adamw", "eval.samples=1"


@pytest.fixture(scope="module")
def adapted(
    finished: Finished, small_config: Callable[..., Config]
) -> tuple[Trained, list[tuple[str, dict[str, Any]]]]:
    heard: list[tuple[str, dict[str, Any]]] = []
    config = small_config(
        *on_base(finished), "name=small-lora", "adapter.name=lora", "adapter.options.r=4", "model.quantize=nf4"
    )
    trained = train(config, finished.store, on_event=lambda kind, **fields: heard.append((kind, fields)))
    return trained, heard


def test_the_base_is_a_parent_and_the_trained_share_is_recorded(adapted: Any, finished: Finished) -> None:
    trained, heard = adapted
    manifest = trained.run.manifest()
    parents = json.loads((trained.model.path / "manifest.json").read_text())["parents"]
    assert parents["base"]["digest"] == finished.trained.model.digest
    assert manifest["artifacts"]["base"]["digest"] == finished.trained.model.digest
    n_trainable = manifest["derived"]["adapter.n_trainable"]
    assert 0 < n_trainable < manifest["derived"]["model.n_params"] / 2
    assert manifest["plan"]["n_trainable"] == trained.model.facts["n_trainable"] == n_trainable
    assert [fields["facts"]["n_trainable"] for kind, fields in heard if kind == "plan"] == [n_trainable]
    assert trained.model.facts["base"] == {
        "path": f"../{finished.trained.model.path.name}",
        "digest": weights_digest(finished.trained.model.path),
        "quantize": "nf4",
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_it_is_evaluated_sampled_and_loads_in_plain_peft(adapted: Any, finished: Finished) -> None:
    trained, _ = adapted
    evaluation = find_artifact_facts(trained, finished.store, "evaluation")
    assert evaluation["n_samples"] == 1
    assert evaluation["perplexity"] > 1
    base = AutoModelForCausalLM.from_pretrained(finished.trained.model.path)
    peft = PeftModel.from_pretrained(base, trained.model.path)
    assert any("lora_" in name for name, _ in peft.named_parameters())
    model, tokenizer = load(trained.model.path, finished.store.root)
    assert len(tokenizer) == 512
    assert model.config.vocab_size == 512
    named = {"by_run": trained.run.id, "by_path": trained.model.path}
    several, tokenizer = load(finished.trained.run.id, finished.store.root, adapters=named)
    assert len(tokenizer) == 512
    assert adapter_names(several) == ["by_run", "by_path"]
    use_adapter(several, "by_path")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(several(input_ids=ids).logits, model(input_ids=ids).logits)


def test_tasks_are_asked_of_the_adapted_model(adapted: Any, finished: Finished) -> None:
    """log p of a choice is that of the base with the adapter added, and not the base's own."""
    folder = adapted[0].model.path
    local = LocalModel(folder, 4)
    ((found, _),) = local.choose(["def read(self"], [["):", " import"]])
    module = open_model(folder, torch.float32, is_merged=False)
    base = open_model(finished.trained.model.path, torch.float32)
    ids = local._ids("def read(self", False, 64)
    chosen = local._encode("):")
    expected = []
    for each in (module, base):
        with torch.no_grad():
            logprobs = each(input_ids=torch.tensor([[*ids, *chosen]]), use_cache=False).logits[0].log_softmax(-1)
        expected.append(sum(float(logprobs[len(ids) - 1 + i, token]) for i, token in enumerate(chosen)))
    assert found == pytest.approx(expected[0], abs=1e-3)
    assert abs(expected[0] - expected[1]) > 2e-3
    assert local.dtype("choose") == "float32"


TOKENS = (
    "adapter.name=lora",
    "adapter.options.r=4",
    "tokenizer.add_tokens=['<think>']",
    "train.steps=4",
    "eval.samples=0",
)
"""An adapter that is taught a token which its base does not know."""


def test_an_adapter_that_leaves_the_rows_of_added_tokens_is_refused(
    finished: Finished, small_config: Callable[..., Config]
) -> None:
    some = ("adapter.options.train_embeddings=true",)
    for options in ((), some):
        config = small_config(*on_base(finished), *TOKENS, *options, "name=small-token")
        with pytest.raises(ConfigError, match=r"tokenizer: adds tokens, .*\n.*adapter.options.train_head=true"):
            train(config, finished.store)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_tokens_are_added_beside_an_adapter_that_trains_their_rows(
    finished: Finished, small_config: Callable[..., Config]
) -> None:
    """The base stays as it is; whoever opens the adapter gives it rows, and the adapter brings their weights along."""
    whole = ("adapter.options.train_embeddings=true", "adapter.options.train_head=true")
    trained = train(small_config(*on_base(finished), *TOKENS, *whole, "name=small-token"), finished.store)
    assert trained.model is not None
    model, tokenizer = load(trained.model.path, finished.store.root)
    assert len(tokenizer) == model.config.vocab_size == 513
    ids = torch.tensor([tokenizer.encode("import <think> os")])
    assert 512 in ids
    merged = open_model(trained.model.path, torch.float32, is_merged=True)
    plain = AutoModelForCausalLM.from_pretrained(finished.trained.model.path)
    assert plain.config.vocab_size == 512
    plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    peft = PeftModel.from_pretrained(plain, trained.model.path)
    with torch.no_grad():
        logits = [each.eval().float()(input_ids=ids, use_cache=False).logits for each in (model, merged, peft)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[0], logits[2], atol=1e-4, rtol=0)
    with adapter_off(model), torch.no_grad():
        base = open_model(finished.trained.model.path, torch.float32)
        known = torch.tensor([tokenizer.encode("import os")])
        off, before = (each.float()(input_ids=known, use_cache=False).logits for each in (model, base))
    torch.testing.assert_close(off[..., :512], before, atol=1e-4, rtol=0)


def test_it_is_served_by_the_name_of_its_run(
    adapted: Any, finished: Finished, small_config: Callable[..., Config]
) -> None:
    """Over its base, or as a model of its own; what was trained beside NF4 weights is not served over the plain ones."""
    settings = ("name=small-plain-lora", "adapter.name=lora", "adapter.options.r=4", "train.steps=4", "eval.samples=0")
    trained = train(small_config(*on_base(finished), *settings), finished.store)
    assert trained.model is not None
    base = finished.trained.model.path
    cfg = ServeConfig(adapters={"tuned": trained.run.id}, precision="fp32", device="cpu", max_batch=2)
    engine = open_engine(with_folders(cfg, finished.store), base)
    assert engine.adapters == {"tuned": trained.model.path}
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    beside = engine.generate([[1, 2, 3]], params, "tuned")[0].token_ids
    assert len(beside) == 4
    in_bits = with_folders(replace(cfg, adapters={"tuned": adapted[0].run.id}), finished.store)
    with pytest.raises(ConfigError, match="kajiya merge"):
        open_engine(in_bits, base)
    further = with_folders(replace(cfg, adapters={}, models={"own": trained.run.id}), finished.store)
    own, _ = source_of(
        "own", Path(further.models["own"]), lambda folder: open_engine(replace(cfg, adapters={}), folder)
    ).open()
    assert own.generate([[1, 2, 3]], params)[0].token_ids == beside


def find_artifact_facts(trained: Trained, store: Store, name: str) -> dict[str, Any]:
    entry = trained.run.manifest()["artifacts"][name]
    facts: dict[str, Any] = json.loads((store.root / entry["path"] / "manifest.json").read_text())["facts"]
    return facts


def test_a_teacher_is_kept_once_and_named_by_its_digest(
    finished: Finished, small_config: Callable[..., Config]
) -> None:
    settings = (
        "name=small-distilled", "optim=adamw", "train.steps=4", "train.loss.name=distill", "train.loss.options.top_k=5",
        f"tokenizer.path={finished.trained.run.id}", "eval.samples=0",
    )  # fmt: skip
    by_name = train(small_config(*settings, f"train.loss.options.teacher={finished.trained.run.id}"), finished.store)
    manifest = by_name.run.manifest()
    teacher = finished.trained.model
    assert manifest["artifacts"]["teacher"]["digest"] == teacher.digest
    kept = manifest["artifacts"]["teacher_kept"]["path"]
    ids = np.load(finished.store.root / kept / "ids.npy")
    facts = find_artifact_facts(by_name, finished.store, "teacher_kept")
    assert ids.shape == (facts["places"], 5)
    assert facts["vocab_size"] == 512
    # Where the teacher lies is no part of what is trained: its copy elsewhere makes the same run.
    elsewhere = shutil.copytree(teacher.path, finished.store.root.parent / "teacher-elsewhere")
    again = train(small_config(*settings, f"train.loss.options.teacher={elsewhere}"), finished.store)
    assert again.run.id == by_name.run.id
    assert str(teacher.path) not in json.dumps(
        json.loads((by_name.model.path / "manifest.json").read_text())["parents"]
    )


def test_preferences_are_learnt_through_an_adapter_whose_base_is_the_reference(finished: Finished) -> None:
    run = finished.trained.run.id
    config = compose(
        "stdlib-dpo",
        [
            f"model.path={run}", f"tokenizer.path={run}", "data.source.options.packages=email json xml",
            "data.source.options.max_bytes=300", "data.max_lost_fraction=1", "train.steps=3", "train.micro_batch=2",
            "track.trackers=[]",
        ],
    )  # fmt: skip
    trained = train(config, finished.store)
    assert trained.model is not None
    listed = trained.run.manifest()["artifacts"]
    assert "reference" not in listed
    assert listed["base"]["digest"] == finished.trained.model.digest
    figures = find_artifact_facts(trained, finished.store, "evaluation")["figures"]
    assert {"loss", "rewards/accuracies", "rewards/margins"} <= figures.keys()
    states = {each["name"]: each["state"] for each in trained.run.manifest()["proof"]["findings"]}
    assert states["accumulation"] == states["start"] == states["reload"] == "passed"


@pytest.mark.slow
def test_a_recipe_goes_on_from_it(adapted: Any, finished: Finished, small_config: Callable[..., Config]) -> None:
    config = small_config(
        "model.path=small-lora", "tokenizer.path=small-lora", "name=small-freeze", "optim=adamw", "train.steps=4",
        "adapter.name=freeze", "adapter.options.train=lm_head", "eval.samples=0",
    )  # fmt: skip
    again = train(config, finished.store)
    assert again.model is not None
    before, after = (load(folder, finished.store.root)[0] for folder in (adapted[0].model.path, again.model.path))
    down = "model.layers.0.mlp.down_proj"
    merged = before.get_submodule(down)
    expected = merged.base_layer.weight + merged.get_delta_weight("default")
    torch.testing.assert_close(after.get_submodule(down).weight, expected)


@pytest.mark.slow
def test_an_adapter_without_a_base_of_its_own_brings_it_along(
    finished: Finished, small_config: Callable[..., Config]
) -> None:
    config = small_config(
        "name=scratch-prefix", "optim=adamw", "adapter.name=prefix", "adapter.options.n_tokens=2", "train.steps=4",
        "model.init=normal", "model.zero_outputs=false",
    )  # fmt: skip
    trained = train(config, finished.store)
    assert (trained.model.path / "base" / "config.json").is_file()
    assert "virtual tokens" in find_artifact_facts(trained, finished.store, "evaluation")["note"]
    weights = trained.model.path / "base" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(StoreError, match=r"corrupt|belongs to weights"):
        load(trained.model.path, finished.store.root)


@pytest.mark.slow
def test_a_prompt_begins_as_the_text_that_it_is_given(finished: Finished, small_config: Callable[..., Config]) -> None:
    config = small_config(
        *on_base(finished), "name=small-prompt", "adapter.name=prompt", "adapter.options={n_tokens: 5, text: 'def f'}",
        "optim.lr=1e-9", "train.steps=2", "preflight.skip=[learning,trainable]",
    )  # fmt: skip
    trained = train(config, finished.store)
    module, tokenizer = load(trained.model.path, finished.store.root)
    ids = tokenizer.encode("def f", add_special_tokens=False)
    assert len(ids) < 5
    begun = module.get_input_embeddings().weight[(5 * ids)[:5]]
    torch.testing.assert_close(module.virtual_tokens.embedding.weight, begun, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_stand_in_is_small_of_the_same_architecture_and_said(
    finished: Finished, small_config: Callable[..., Config]
) -> None:
    heard: list[str] = []
    config = small_config(
        "name=standing-in", "model.path=someone/Llama-8B", "model.stand_in=true", "model.n_params=null", "optim=adamw",
        "model.hidden_size=4096", "model.n_layers=32", "model.n_heads=32", "model.n_kv_heads=8", "model.ffn_size=14336",
        "tokenizer.path=someone/Llama-8B", "adapter.name=lora", "train.steps=2", "eval.samples=0",
    )  # fmt: skip
    trained = train(
        config, finished.store, on_event=lambda kind, **f: heard.append(f["text"]) if kind == "warning" else None
    )
    assert any("stands in for someone/Llama-8B" in text for text in heard)
    shape = json.loads((trained.model.path / "base" / "config.json").read_text())
    assert (shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]) == (256, 2, 896)
    assert shape["num_attention_heads"] == 4 * shape["num_key_value_heads"]


def test_names_that_are_not_there_are_named(finished: Finished, small_config: Callable[..., Config]) -> None:
    with pytest.raises(StoreError, match="no-such-run"):
        train(small_config("model.path=no-such-run", "tokenizer.path=no-such-run"), finished.store)
    with pytest.raises(ConfigError, match="stand_in"):
        small_config("model.stand_in=true")
    with pytest.raises(ConfigError, match="quantize"):
        small_config("model.quantize=nf4")
    with pytest.raises(
        ConfigError, match=r"what adapter.name=freeze saves is a whole model, and nf4 weights cannot be saved"
    ):
        small_config("model.quantize=nf4", "adapter.name=freeze", "adapter.options.train=norm")
    manifests = [json.loads(path.read_bytes()) for path in finished.store.root.glob("runs/*/manifest.json")]
    of_recipe = [each for each in manifests if each["name"] == "stdlib-pretrain" and each["status"] == "finished"]
    known = {each["artifacts"]["model"]["digest"] for each in of_recipe}
    assert find_model("stdlib-pretrain", finished.store).model.digest in known


def test_the_packaged_recipes_compose() -> None:
    config = compose("stdlib-lora")
    assert config.adapter.name == "lora"
    assert Path(str(config.model.path)).name == "stdlib-pretrain"
