"""`kajiya merge`: an adapter into its base with its certificate, a corrupted one refused, several models into one."""

import json
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.conftest import Finished
from transformers import AutoModelForCausalLM

from kajiya.config.compose import compose
from kajiya.config.schema import AdapterConfig, ModelConfig
from kajiya.data.progress import silent
from kajiya.data.shards import open_split
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError, ParityError
from kajiya.exporting import merge as merging
from kajiya.exporting.evidence import gather
from kajiya.flows import merge as flow
from kajiya.flows.merge import Joining, held_rows, merge_targets
from kajiya.flows.report_certificates import certificates_section, parity_blocks
from kajiya.flows.report_facts import gather_run
from kajiya.flows.report_page import Notice, Table
from kajiya.flows.stages import Stages
from kajiya.flows.targets import find_model
from kajiya.flows.train import prepare_data
from kajiya.models.adapt import transform
from kajiya.models.adapter_files import Base, save_adapter
from kajiya.models.build import build_model, vocabulary_of
from kajiya.models.load import load_model
from kajiya.models.save import save_model
from kajiya.models.tasks import Task
from kajiya.models.weights_digest import weights_digest


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe over a small text, whose held-out documents are compared on."""
    path = tmp_path / "small.yaml"
    root = Path(sysconfig.get_paths()["stdlib"]) / "email"
    path.write_text(f"data: {{heldout_every: 5, source: {{name: stdlib, options: {{root: '{root}'}}}}}}\n")
    return str(path)


def make_adapter(folder: Path, base: Path, quantized: str = "none", seed: int = 0) -> str:
    module = load_model(base)
    transform(module, AdapterConfig("lora", {"r": 4, "init": "gaussian"}), quantized, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_adapter(module, load_tokenizer(base), folder, Base(str(base), weights_digest(base), quantized))
    return str(folder)


@pytest.mark.parametrize("quantized", ["none", "nf4"])
def test_an_adapter_is_merged_and_certified(quantized: str, finished: Finished, recipe: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", finished.trained.model.path, quantized)
    model, certificate = merge_targets([adapter], finished.store, recipe=recipe)
    single, half = certificate.facts["parity"]
    assert single["dtype"] == "float32"
    assert single["max_difference"] <= 1e-4
    assert single["top1"] == single["greedy"] == 1.0
    assert single["perplexity"] == pytest.approx(single["parent_perplexity"], rel=1e-4)
    assert half["dtype"] == "bfloat16"
    assert ("nf4 ones stand for" in certificate.facts["base"]) == (quantized == "nf4")
    plain = AutoModelForCausalLM.from_pretrained(model.path)
    base = load_model(finished.trained.model.path)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(plain.get_parameter(name), base.get_parameter(name))
    again, _ = merge_targets([adapter], finished.store, recipe=recipe)
    assert again.digest == model.digest


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_of_experts_and_single_tokens_by_peft_is_merged_and_certified(
    finished: Finished, recipe: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(finished.trained.model.path)
    sizes: Any = {"n_params": None, "hidden_size": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "ffn_size": 16}
    config = ModelConfig(name="mixtral", max_positions=256, options={"num_local_experts": 3}, **sizes)
    save_model(build_model(config, vocabulary_of(tokenizer), 0).module, tokenizer, tmp_path / "base")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=experts, trainable_token_indices=[7, 9], task_type="CAUSAL_LM"
    )
    made: Any = get_peft_model(load_model(tmp_path / "base"), settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(tmp_path / "adapter")
    model, certificate = merge_targets([str(tmp_path / "adapter")], finished.store, recipe=recipe)
    single, _ = certificate.facts["parity"]
    assert single["max_difference"] <= 1e-4
    assert single["top1"] == single["greedy"] == 1.0
    theirs = made.merge_and_unload().state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(model.path).state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-6)


def test_a_corrupted_merge_fails_and_leaves_nothing(
    finished: Finished, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter", finished.trained.model.path, seed=7)
    saved = merging.save_model

    def corrupt(module: Any, tokenizer: Any, folder: Path) -> None:
        with torch.no_grad():
            module.model.layers[0].self_attn.o_proj.weight[0, 0] += 1.0
        saved(module, tokenizer, folder)

    before = sorted(path for path in finished.store.root.glob("artifacts/*/*"))
    monkeypatch.setattr(merging, "save_model", corrupt)
    with pytest.raises(ParityError, match="a logit differs by"):
        merge_targets([adapter], finished.store, recipe=recipe)
    left = sorted(path for path in finished.store.root.glob("artifacts/*/*"))
    assert [path for path in left if path.parent.name in ("model", "certificate")] == [
        path for path in before if path.parent.name in ("model", "certificate")
    ]


def test_several_models_are_joined_and_measured(finished: Finished, recipe: str, tmp_path: Path) -> None:
    base = finished.trained.model.path
    adapters = [make_adapter(tmp_path / f"adapter{seed}", base, seed=seed) for seed in (1, 2)]
    model, certificate = merge_targets(
        adapters, finished.store, base=str(base), joining=Joining("ties", "1,3"), recipe=recipe
    )
    assert certificate.facts["mixing"]["weights"] == [1.0, 3.0]
    assert len(certificate.facts["parent_perplexities"]) == 2
    assert 1 < certificate.facts["perplexity"] < 600
    AutoModelForCausalLM.from_pretrained(model.path)
    with pytest.raises(ConfigError, match="numbers between commas"):
        merge_targets(adapters, finished.store, joining=Joining("linear", "a,b"), recipe=recipe)


@pytest.mark.parametrize(
    ("joining", "n", "base", "words"),
    [
        (Joining("ties"), 1, False, "--method: changes nothing where one adapter"),
        (Joining(weights="9,9"), 1, False, "--weights: changes nothing where one adapter"),
        (Joining("average"), 2, False, "--method: 'average' is not one of linear"),
        (Joining(density=0.5), 2, False, "--density: changes nothing for --method linear"),
        (Joining("ties", seed=1), 2, True, "--seed: changes nothing for --method ties"),
        (Joining("slerp"), 2, True, "--base: changes nothing for --method slerp"),
    ],
)
def test_what_changes_nothing_is_refused(joining: Joining, n: int, base: bool, words: str, finished: Finished) -> None:
    path = str(finished.trained.model.path)
    with pytest.raises(ConfigError, match=words):
        merge_targets([path] * n, finished.store, joining=joining, base=path if base else None)


def test_classifiers_are_not_mixed(finished: Finished, tmp_path: Path) -> None:
    base = finished.trained.model.path
    module = load_model(base, task=Task("classes", ("x", "y")))
    save_model(module, load_tokenizer(base), tmp_path / "classifier")
    with pytest.raises(ConfigError, match="is a classifier: it writes no text"):
        merge_targets([str(tmp_path / "classifier"), str(base)], finished.store)
    adapters = []
    for seed in (1, 2):
        module = load_model(base, task=Task("classes", ("x", "y")))
        transform(module, AdapterConfig("lora", {"r": 4}), "none", seed)
        adapters.append(tmp_path / f"adapter{seed}")
        save_adapter(
            module, load_tokenizer(base), adapters[-1], Base(str(base), weights_digest(base), "none", ("x", "y"))
        )
    with pytest.raises(ConfigError, match="adapter1 is a classifier: it writes no text"):
        merge_targets([str(each) for each in adapters], finished.store)


def test_a_whole_model_has_nothing_to_merge(finished: Finished) -> None:
    with pytest.raises(ConfigError, match="whole model already"):
        merge_targets(["stdlib-pretrain"], finished.store)


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "chat": lambda n: {
        "messages": [{"role": "user", "content": f"what of {n}"}, {"role": "assistant", "content": f"so much: {n}"}]
    },
    "preference": lambda n: {"prompt": f"what of {n}", "chosen": f"so much: {n}", "rejected": "nothing"},
    "seq2seq": lambda n: {"input": f"the bridge {n}", "target": f"die Br\u00fccke {n}"},
}


@pytest.mark.parametrize("kind", list(ROWS))
def test_the_rows_are_those_that_training_holds_out(kind: str, finished: Finished, tmp_path: Path) -> None:
    """To the token, with the template; what is given ends where the answer begins."""
    lines = [json.dumps(ROWS[kind](number)) + "\n" for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    source = f"source: {{name: jsonl, options: {{files: '{tmp_path}/rows.jsonl'}}}}"
    loss = {"chat": "next_token", "preference": "dpo", "seq2seq": "seq2seq"}[kind]
    (tmp_path / "rows.yaml").write_text(f"data: {{{source}, heldout_every: 4}}\ntrain: {{loss: {{name: {loss}}}}}\n")
    folder = finished.trained.model.path
    config = compose(str(tmp_path / "rows.yaml"), (f"tokenizer.path={folder}", "data.packing=bucketed"))
    data = prepare_data(config, finished.store, Stages(silent))
    split = open_split(data.shards.path, "heldout")
    rows = held_rows(config, data.corpus, find_model(str(folder), finished.store).model)
    assert len(rows) == split.n_documents > 5
    k = split.segments
    tokenizer = load_tokenizer(folder)
    for number, row in enumerate(rows):
        if kind == "seq2seq":
            assert list(row.ids) == split.document(number).tolist()
            assert row.n_given == split.offsets[2 * number + 1] - split.offsets[2 * number]
            continue
        start, stop = split.offsets[k * number + number % k : k * number + number % k + 2]
        assert list(row.ids) == split.read(start, stop).tolist()
        answer = str(tokenizer.decode(row.ids[row.n_given :]))
        assert answer.startswith("nothing" if kind == "preference" and number % 2 else "so much: ")


def test_a_merge_is_certified_on_rendered_rows(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps(ROWS["chat"](number)) + "\n" for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    source = f"source: {{name: jsonl, options: {{files: '{tmp_path}/rows.jsonl'}}}}"
    (tmp_path / "rows.yaml").write_text(f"data: {{{source}, heldout_every: 8}}\n")
    adapter = make_adapter(tmp_path / "adapter", finished.trained.model.path)
    seen: list[Any] = []

    def see(parent: Any, rows: Any, *given: Any) -> Any:
        seen.extend(rows)
        return gather(parent, rows, *given)

    monkeypatch.setattr(merging, "gather", see)
    merge_targets([adapter], finished.store, recipe=str(tmp_path / "rows.yaml"))
    texts = [str(load_tokenizer(Path(adapter)).decode(row.ids)) for row in seen]
    assert len(texts) > 3
    assert all("what of" in text and '"messages"' not in text for text in texts)


def test_the_run_lists_the_certificate_and_its_report_shows_it(
    own_finished: Finished, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run = own_finished.store, own_finished.trained.run
    adapter = make_adapter(tmp_path / "adapter", own_finished.trained.model.path)
    monkeypatch.setattr(flow, "find_model", lambda target, store: replace(find_model(target, store), run=run))
    _, certificate = merge_targets([adapter], store, recipe=recipe)
    assert run.manifest()["artifacts"]["merged float32"]["digest"] == certificate.digest
    section = certificates_section([gather_run(run, "model")])
    assert section is not None
    table = next(block for block in section.blocks if isinstance(block, Table))
    _, half = certificate.facts["parity"]
    shown = {(row[0], row[1]): row[2:] for row in table.rows}
    assert shown["float32", "largest difference of a logit"][1:] == ["0.0001", "\u2014", "0.0001"]
    assert shown["bfloat16", "KL, nats per token"] == [
        f"{each:.2g}" for each in (half["kl"], 1e-3, half["rounding"]["kl"], half["allowed"]["kl"])
    ]
    assert shown["bfloat16", "greedy continuation"][1] == "98.00%"
    assert len(shown) == 7
    reds = [block for block in section.blocks if isinstance(block, Notice) and block.level == "bad"]
    is_past = half["kl"] > 1e-3 or half["top1"] < 0.995 or half["greedy"] < 0.98
    assert len(reds) == is_past


def test_what_only_the_parents_rounding_lets_pass_is_red() -> None:
    parity = {
        "dtype": "bfloat16", "max_difference": 0.2, "kl": 2e-3, "top1": 0.999, "greedy": None, "perplexity": 10.1,
        "parent_perplexity": 10.0,
        "rounding": {"max_difference": 0.2, "kl": 1.9e-3, "top1": 0.999, "greedy": None, "perplexity": 10.05},
        "tolerance": {"max_difference": None, "kl": 1e-3, "top1": 0.995, "greedy": None, "perplexity": 0.02},
        "allowed": {"max_difference": None, "kl": 2.9e-3, "top1": 0.99, "greedy": None, "perplexity": 0.025},
    }  # fmt: skip
    table, notice = parity_blocks([parity])
    assert isinstance(table, Table)
    assert [row[1] for row in table.rows] == ["KL, nats per token", "top-1", "change of the perplexity"]
    assert table.rows[2][2:] == ["1.00%", "2.00%", "0.50%", "2.50%"]
    assert isinstance(notice, Notice)
    assert notice.level == "bad"
    assert notice.text.endswith("bfloat16: KL, nats per token 0.002, tolerance 0.001.")
