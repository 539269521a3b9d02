"""Every adapter that is a change of weights is merged and certified, whatever its base is stored in and its head says."""

import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tests.training.conftest import VOCABULARY
from transformers import PreTrainedTokenizerFast

from kajiya.config.schema import AdapterConfig, ModelConfig
from kajiya.data.tokenizer import train_bpe
from kajiya.errors import ConfigError, ParityError
from kajiya.exporting import merge as merging
from kajiya.exporting import parity
from kajiya.exporting.evidence import halved
from kajiya.exporting.merge import merge_adapter, merge_models
from kajiya.exporting.mixing import Mixing
from kajiya.listings import merge_lines
from kajiya.models.adapt import has_adapter, transform
from kajiya.models.build import build_model, vocabulary_of
from kajiya.models.load import load_model
from kajiya.models.open import open_model
from kajiya.models.save import save_model
from kajiya.models.tasks import CAUSAL, Task, auto_class
from kajiya.models.trained import save_trained
from kajiya.serving.loading import load_engine

IDS = [[(5 + 7 * i * (row + 1)) % 94 + 3 for i in range(60)] for row in range(16)]
ROWS = [halved(ids) for ids in IDS]
KINDS: list[tuple[str, dict[str, Any], str]] = [
    ("lora", {"init": "gaussian"}, "none"),
    ("lora", {"rslora": True}, "none"),
    ("lora", {"init": "pissa"}, "none"),
    ("lora", {"init": "olora"}, "none"),
    ("lora", {"train_embeddings": True, "train_head": True}, "none"),
    ("dora", {}, "none"),
    ("ia3", {}, "none"),
    ("lora", {}, "nf4"),
    ("lora", {}, "int8"),
    ("lora", {}, "torchao-int8"),
    ("dora", {}, "nf4"),
]
EACH = pytest.mark.parametrize(
    ("name", "options", "quantized"), KINDS, ids=lambda each: "-".join(each) if isinstance(each, dict) else each
)


@pytest.fixture
def sharp(tmp_path: Path) -> Callable[..., Path]:
    """`sharp(task, dtype)`: the folder of a base whose logits are as far apart as those of a trained model."""

    def make(task: Task = CAUSAL, dtype: torch.dtype = torch.float32) -> Path:
        architecture = {"masked": "bert", "seq2seq": "t5"}.get(task.name, "llama")
        config = ModelConfig(name=architecture, n_params="40k", max_positions=64, init_std=0.15)
        folder = tmp_path / f"base-{task.name}-{dtype}"
        module: Any = build_model(config, VOCABULARY, 0, task).module
        module.to(dtype).save_pretrained(folder)
        return folder

    return make


def _adapter(
    base: Path, folder: Path, tokenizer: Any, kind: tuple[str, dict[str, Any], str], task: Task = CAUSAL
) -> Path:
    """An adapter of that kind, moved from its beginning, as training leaves it."""
    name, options, quantized = kind
    config = ModelConfig(path=str(base), quantize=quantized)
    module = build_model(config, VOCABULARY, 0, task).module
    options = options if name == "ia3" else {"r": 4} | options
    transform(module, AdapterConfig(name, options), quantized, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    save_trained(config, module, tokenizer, folder, lambda: module)
    return folder


@EACH
def test_it_is_merged_and_held_to_its_tolerance_in_each_dtype(
    name: str, options: dict[str, Any], quantized: str, sharp: Callable[..., Path], small_tokenizer: Any, tmp_path: Path
) -> None:
    adapter = _adapter(sharp(), tmp_path / "adapter", small_tokenizer, (name, options, quantized))
    facts = merge_adapter(adapter, tmp_path / "merged", ROWS, into=None, base=None)
    single, half = facts["parity"]
    assert single["dtype"] == facts["dtype"] == "float32"
    assert single["max_difference"] <= 1e-4
    assert single["top1"] == single["greedy"] == 1.0
    assert half["dtype"] == "bfloat16"
    assert single["rounding"] is None
    assert half["rounding"]["kl"] > 0
    assert half["kl"] <= half["rounding"]["kl"] + 1e-3
    assert half["top1"] >= half["allowed"]["top1"]
    limits = {"max_difference": None, "kl": 1e-3, "top1": 0.995, "greedy": 0.98, "perplexity": 0.01}
    assert half["tolerance"] == limits
    assert half["allowed"]["kl"] == half["rounding"]["kl"] + 1e-3
    assert half["allowed"]["top1"] <= half["rounding"]["top1"] - 0.005
    assert "rounding alone, allowed on top of the tolerances: KL" in merge_lines(facts)[2]
    assert (f"{quantized} ones stand for" in facts["base"]) == (quantized != "none")
    merged, plain = load_model(tmp_path / "merged"), load_model(sharp())
    assert not has_adapter(merged)
    ids = torch.tensor(IDS[:2])
    with torch.no_grad():
        expected = open_model(adapter, torch.float32)(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
        assert (expected - plain(input_ids=ids).logits).abs().max() > 0.01


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("mixtral", {"num_local_experts": 3}), ("qwen3_moe", {"num_experts": 3, "num_experts_per_tok": 2})],
)
def test_what_plain_peft_adapts_of_a_mixture_is_merged_and_served(
    architecture: str, options: dict[str, Any], small_tokenizer: Any, tmp_path: Path
) -> None:
    """Every linear layer, the experts and the embeddings of two tokens."""
    sizes: Any = {"n_params": None, "hidden_size": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "ffn_size": 16}
    config = ModelConfig(name=architecture, max_positions=64, init_std=0.15, options=options, **sizes)
    build_model(config, VOCABULARY, 0).module.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the ranks of experts among modules
        settings = LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[5, 6], task_type="CAUSAL_LM")
        made: Any = get_peft_model(load_model(tmp_path / "base"), settings)
    assert any(name.endswith("experts.lora_A.default.weight") for name, _ in made.named_parameters())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(tmp_path / "adapter")
    small_tokenizer.save_pretrained(tmp_path / "adapter")
    facts = merge_adapter(tmp_path / "adapter", tmp_path / "merged", ROWS, into=None, base=None)
    assert facts["parity"][0]["max_difference"] <= 1e-4
    assert facts["parity"][0]["top1"] == facts["parity"][0]["greedy"] == 1.0
    with torch.no_grad():
        expected = made.eval()(input_ids=torch.tensor(IDS[:1])).logits.log_softmax(-1)[0]
        found = load_model(tmp_path / "merged")(input_ids=torch.tensor(IDS[:1])).logits.log_softmax(-1)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for served in ("adapter", "merged"):
        engine = load_engine(tmp_path / served, precision="fp32")
        scores = torch.tensor(engine.score(IDS[0]))
        rows = torch.arange(len(scores))
        torch.testing.assert_close(scores, expected[rows, torch.tensor(IDS[0])[1:]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_virtual_tokens_are_refused_by_name(
    name: str, sharp: Callable[..., Path], small_tokenizer: Any, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    config = ModelConfig(path=str(sharp()))
    module = build_model(config, VOCABULARY, 0).module
    transform(module, AdapterConfig(name, {"n_tokens": 2}), "none", seed=0)
    save_trained(config, module, small_tokenizer, adapter, lambda: module)
    with pytest.raises(ConfigError, match=f"{name.upper()}_TUNING adds virtual tokens"):
        merge_adapter(adapter, tmp_path / "merged", ROWS, into=None, base=None)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("stored", "into", "written"),
    [
        (torch.float32, "bf16", "bfloat16"),
        (torch.float32, "fp16", "float16"),
        (torch.bfloat16, None, "bfloat16"),
        (torch.bfloat16, "fp32", "float32"),
    ],
)
def test_it_is_written_in_the_bases_dtype_or_in_another(
    stored: torch.dtype,
    into: str | None,
    written: str,
    sharp: Callable[..., Path],
    small_tokenizer: Any,
    tmp_path: Path,
) -> None:
    adapter = _adapter(sharp(dtype=stored), tmp_path / "adapter", small_tokenizer, KINDS[0])
    facts = merge_adapter(adapter, tmp_path / "merged", ROWS, into=into, base=None)
    assert facts["dtype"] == written
    dtype = getattr(torch, written)
    assert {each.dtype for each in load_file(tmp_path / "merged" / "model.safetensors").values()} == {dtype}
    assert [each["dtype"] for each in facts["parity"]] == [
        "float32",
        "bfloat16" if dtype == torch.float32 else written,
    ]
    # Weights that were rounded cannot agree to float32's digits, whatever computes them.
    limits = [each["tolerance"]["max_difference"] for each in facts["parity"]]
    assert limits == [1e-4 if dtype == torch.float32 else None, None]
    with pytest.raises(ConfigError, match="fp8"):
        merge_adapter(adapter, tmp_path / "merged", ROWS, into="fp8", base=None)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_one_dtype_past_its_tolerance_is_enough(
    held: torch.dtype, sharp: Callable[..., Path], small_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = _adapter(sharp(), tmp_path / "adapter", small_tokenizer, KINDS[0])
    limits = {**parity.TOLERANCES, held: parity.Tolerance(top1=1.1)}
    monkeypatch.setattr(parity, "TOLERANCES", limits)
    with pytest.raises(ParityError, match=f"in {str(held).removeprefix('torch.')}"):
        merge_adapter(adapter, tmp_path / "merged", ROWS, into=None, base=None)


@pytest.mark.parametrize("is_corrupt", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "task",
    [Task("classes", ("ham", "spam", "eggs")), Task("score"), Task("seq2seq"), Task("masked")],
    ids=lambda task: task.name,
)
def test_heads_of_other_kinds_are_merged_and_compared_by_what_they_say(
    task: Task,
    stored: torch.dtype,
    is_corrupt: bool,
    sharp: Callable[..., Path],
    small_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beginning = sharp(CAUSAL if task.has_new_head else task, stored)
    adapter = _adapter(beginning, tmp_path / "adapter", small_tokenizer, KINDS[0], task)
    if is_corrupt:
        saved = merging.save_model

        def corrupt(module: Any, tokenizer: Any, folder: Path) -> None:
            weights = [each for each in module.parameters() if each.dim() == 2]
            with torch.no_grad():
                weights[len(weights) // 2].mul_(-1)
            saved(module, tokenizer, folder)

        monkeypatch.setattr(merging, "save_model", corrupt)
        with pytest.raises(ParityError):
            merge_adapter(adapter, tmp_path / "merged", ROWS, into=None, base=None)
        return
    facts = merge_adapter(adapter, tmp_path / "merged", ROWS, into=None, base=None)
    assert [each["greedy"] for each in facts["parity"]] == [None, None]
    assert [each["perplexity"] is None for each in facts["parity"]] == [task.name != "seq2seq"] * 2
    assert len(merge_lines(facts)) == 3
    again = auto_class(task).from_pretrained(tmp_path / "merged")
    if task.name == "classes":
        assert again.config.id2label == {0: "ham", 1: "spam", 2: "eggs"}
        assert again.config.pad_token_id is not None


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_a_tied_and_an_untied_model_are_mixed_tensor_by_tensor(
    order: tuple[bool, bool], base: Callable[..., Path], small_tokenizer: Any, tmp_path: Path
) -> None:
    """The joint model's head is apart, and neither of the two is written over the other."""
    folders = [base(tied, seed) for seed, tied in enumerate(order)]
    for folder in folders:
        small_tokenizer.save_pretrained(folder)
    facts = merge_models(
        folders, tmp_path / "joint", ROWS[:2], mixing=Mixing("linear", (1.0, 3.0)), base=None, into="bf16"
    )
    assert facts["dtype"] == "bfloat16"
    one, two = (load_model(folder) for folder in folders)
    joint = load_model(tmp_path / "joint")
    assert joint.get_output_embeddings().weight is not joint.get_input_embeddings().weight
    for name, tensor in joint.state_dict().items():
        expected = one.state_dict()[name] / 4 + two.state_dict()[name] * 3 / 4
        assert torch.equal(tensor, expected.bfloat16().float()), name


def test_models_of_other_tokens_are_not_mixed(tmp_path: Path) -> None:
    folders = []
    for words in ("aa bb\n", "zz qq\n"):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=train_bpe(iter([words] * 20), 270, 2), eos_token="<|eos|>", pad_token="<|pad|>"
        )
        module = build_model(ModelConfig(n_params="40k", max_positions=64), vocabulary_of(tokenizer), 0).module
        folders.append(tmp_path / words[0])
        save_model(module, tokenizer, folders[-1])
    with pytest.raises(ConfigError, match=r"have other tokens: '.*' is number [0-9]+ in one of them alone"):
        merge_models(folders, tmp_path / "joint", ROWS, mixing=Mixing("linear", (1.0, 1.0)), base=None)
    assert not (tmp_path / "joint").exists()


@pytest.mark.parametrize("quantized", ["none", "nf4"])
def test_no_more_than_two_models_are_held_at_a_time(
    quantized: str, sharp: Callable[..., Path], small_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = _adapter(sharp(), tmp_path / "adapter", small_tokenizer, ("lora", {}, quantized))
    held: list[weakref.ref[Any]] = []
    most = 0

    def watched(opened: Callable[..., Any]) -> Callable[..., Any]:
        def opens(*given: Any, **named: Any) -> Any:
            nonlocal most
            module = opened(*given, **named)
            held.append(weakref.ref(module.get_input_embeddings().weight))
            most = max(most, sum(each() is not None for each in held))
            return module

        return opens

    monkeypatch.setattr(merging, "open_model", watched(open_model))
    monkeypatch.setattr(merging, "load_model", watched(load_model))
    gc.disable()  # what is let go is free at once, not when cycles are looked for
    try:
        merge_adapter(adapter, tmp_path / "merged", ROWS[:4], into=None, base=None)
    finally:
        gc.enable()
    assert (len(held), most) == (5, 2)
