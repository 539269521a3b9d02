"""The comparisons on a GPU, as far as they go without one: shapes, weights, orders, and what a peer says that cannot run."""

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.benchmarks.test_train_throughput import (
    BENCHMARKS,
    arguments_of,
    made_result,
    report_of,
    throughput,  # noqa: F401  (a fixture)
)
from transformers import AutoModelForCausalLM

from kajiya.models import build
from kajiya.models.build import Vocabulary

GPU_PEERS = {"unsloth_full": "unsloth", "unsloth_lora": "unsloth", "torchtitan_pretrain": "torchtitan"}


class _NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """There is none in these tests."""


def _order(**changed: Any) -> Any:
    from work_order import WorkOrder

    order = WorkOrder("XR", "weights", "rows.npy", "store", None, "scratch", 8, 64, 2, 3, "bf16", False, 5)
    return replace(order, **changed)


def _empty(size: str, **changed: Any) -> Any:
    from large_shapes import empty_model
    from workload import SIZES, kajiya_config

    return empty_model(kajiya_config(_order(size=size, model="", **changed)), None, SIZES[size].vocab_size)


@pytest.fixture
def small_vocabulary(throughput: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """As of a tokenizer of 512 tokens."""
    monkeypatch.setattr(build, "vocabulary_of", lambda _tokenizer: Vocabulary(512, 0, 1, 2))


@pytest.mark.usefixtures("small_vocabulary")
@pytest.mark.parametrize(
    ("size", "n_params", "theta"), [("1B", 1_235_814_400, 500_000.0), ("8B", 8_030_261_248, 500_000.0)]
)
def test_the_large_sizes_are_llamas(size: str, n_params: int, theta: float) -> None:
    """Counted without memory for the weights; the numbers are those of Llama-3.2-1B and Llama-3.1-8B."""
    model = _empty(size, tokens=4096)
    assert sum(each.numel() for each in model.parameters()) == n_params
    assert {each.device.type for each in model.parameters()} == {"meta"}
    assert model.config.rope_parameters["rope_theta"] == theta
    assert model.config.max_position_embeddings == 4096


@pytest.mark.usefixtures("small_vocabulary")
@pytest.mark.parametrize("tied", [False, True])
def test_weights_in_several_files_are_read_by_transformers(tied: bool, tmp_path: Path) -> None:
    from large_shapes import write_weights

    model = _empty("XR", options={"model.tied": str(tied).lower()})
    write_weights(model, _NoTokenizer(), torch.bfloat16, 3, tmp_path / "made", shard_bytes=30_000)
    assert len(list((tmp_path / "made").glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) != tied
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert {each.dtype for each in read.parameters()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == 2 * sum(each.numel() for each in read.parameters())
    assert torch.equal(read.model.norm.weight, torch.ones(32, dtype=torch.bfloat16))
    assert float(read.model.embed_tokens.weight.detach().float().std()) == pytest.approx(0.02, rel=0.05)
    write_weights(model, _NoTokenizer(), torch.bfloat16, 3, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, expected in read.state_dict().items():
        assert torch.equal(again.state_dict()[name], expected), name


def test_kajiya_reads_the_weights_that_were_made(throughput: ModuleType) -> None:  # noqa: F811
    from workload import kajiya_config

    config = kajiya_config(_order(model="/weights", method="qlora", tokens=512))
    assert (config.model.path, config.tokenizer.path) == ("/weights", "/weights")
    assert config.model.quantize == "nf4"
    assert config.adapter.options["r"] == 16
    built = kajiya_config(_order(size="S", model="/weights"))
    assert built.model.path is None


@pytest.mark.parametrize("peer", GPU_PEERS)
def test_a_peer_that_cannot_run_says_why(peer: str, tmp_path: Path, throughput: ModuleType) -> None:  # noqa: F811
    from measure import PeerError, parse_peer, run_peer

    method = "lora" if peer == "unsloth_lora" else "pretrain"
    order = _order(method=method, store=str(tmp_path))
    words = r"is not installed in .*benchmarks/peers/\w+\.txt|sees none"
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which it runs")
    with pytest.raises(PeerError, match=words) as caught:
        run_peer(parse_peer(peer), order, python=sys.executable, warmup_steps=1)
    assert "Traceback" not in str(caught.value)
    with pytest.raises(PeerError, match=r"this peer does .*, and the order is dpo"):
        run_peer(parse_peer(peer), replace(order, method="dpo"), python=sys.executable, warmup_steps=1)
    assert (BENCHMARKS / "peers" / f"{GPU_PEERS[peer]}.txt").is_file()


def test_without_a_gpu_an_installed_peer_says_so(throughput: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from peers.on_gpu import require_gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"numpy trains on a CUDA device, and torch .* sees none"):
        require_gpu("numpy")


def test_unsloth_is_told_what_the_order_says(throughput: ModuleType) -> None:  # noqa: F811
    from peers.unsloth_full import loading, micro_batches
    from peers.unsloth_lora import adapting

    told = loading(_order())
    assert (told["model_name"], told["max_seq_length"], told["random_state"]) == ("weights", 64, 5)
    assert (told["full_finetuning"], told["load_in_4bit"], told["use_gradient_checkpointing"]) == (True, False, False)
    told = loading(_order(method="qlora", options={"checkpointing": "unsloth"}))
    assert (told["full_finetuning"], told["load_in_4bit"], told["use_gradient_checkpointing"]) == (
        False,
        True,
        "unsloth",
    )
    assert loading(_order(method="lora"))["load_in_4bit"] is False
    assert micro_batches(_order()) == [[2 * n, 2 * n + 1] for n in range(3 * 8 // 2)]
    adapter = adapting(_order(method="lora"))
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (16, 32, 0.0)


def test_fp8_stands_beside_bf16(throughput: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """One peer with two options: its own tolerance, one peak, and the memory of the GPU."""
    options = throughput.parse(["--peers", "kajiya_train:precision=fp8", "kajiya_train"])
    fp8, bf16 = options.peers
    assert (fp8.name, fp8.options) == ("kajiya_train:precision=fp8", {"precision": "fp8"})
    assert throughput.coarser("bf16", "fp8") == throughput.coarser("fp8", "fp32") == "fp8"
    ours = [made_result(fp8.name, tokens_per_second=150.0, settings={"peak_gpu_bytes": 2**30}, losses=[9.0, 8.0, 7.08])]
    theirs = [made_result(bf16.name, settings={"peak_gpu_bytes": 2**31})]
    comparison = throughput.compare(ours, theirs, "fp8")
    assert comparison.agreement.holds
    assert not throughput.compare(ours, theirs, "bf16").agreement.holds
    assert (comparison.tokens_per_second, comparison.peak_gpu_memory) == (1.5, 0.5)
    results = {fp8.name: ours, bf16.name: theirs}
    throughput.print_table(_order(), options.peers, results, [comparison], throughput.measured_peaks())
    assert "peak memory of tensors on the GPU against kajiya_train: 0.50 x" in capsys.readouterr().out


def test_the_commands_of_the_readme_are_understood(throughput: ModuleType) -> None:  # noqa: F811
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n### GPU\n")[2].partition("\n## ")[0]
    commands = [
        shlex.split(line.replace("\\\n", " "))
        for line in re.findall(r"^python benchmarks/train_throughput\.py (?:.*\\\n)*.*$", section, re.MULTILINE)
    ]
    assert len(commands) == 4
    parsed = [throughput.parse(words[2:]) for words in commands]
    assert [(each.method, each.model) for each in parsed] == [
        ("pretrain", "1B"),
        ("pretrain", "1B"),
        ("lora", "8B"),
        ("qlora", "8B"),
    ]
    assert {peer.script for each in parsed for peer in each.peers} == {*GPU_PEERS, "kajiya_train"}
    for each in parsed:
        named = {pair.partition("=")[0] for pair in each.python}
        assert named == {peer.script for peer in each.peers} & set(GPU_PEERS)


@pytest.mark.slow
def test_a_size_that_is_read_is_the_same_work_in_every_peer(
    tmp_path: Path,
    throughput: ModuleType,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = ["--model", "XR", "--rows", "4", "--steps", "3", "--precision", "fp32"]
    peers = ["--tokens", "32", "--peers", "kajiya_train", "hf_trainer"]
    report = report_of(throughput, tmp_path, *shape, *peers)
    (comparison,) = report["comparisons"]
    assert comparison["agreement"]["same_tokens"]
    assert comparison["agreement"]["same_weights"]
    assert comparison["agreement"]["largest_loss_difference"] < 1e-4
    report = report_of(throughput, tmp_path, *shape, "--tokens", "512", "--method", "qlora")
    (result,) = report["runs"]["kajiya_train"]
    assert len(result["losses"]) == 3
    wrong = [*shape, "--method", "qlora", "--peers", "trl_sft", "--tokens", "512"]
    assert throughput.main(arguments_of(tmp_path, *wrong)) == 1
    assert "this peer does sft and lora, and the order is qlora" in capsys.readouterr().err
