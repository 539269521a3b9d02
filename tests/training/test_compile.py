"""What the plan says of compilation and of blocks that were joined."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import VOCABULARY
from torch import nn

from kajiya.config.compose import compose
from kajiya.config.schema import AdapterConfig, ModelConfig, TrainConfig
from kajiya.flows.feeding import has_many_lengths
from kajiya.models.adapt import transform
from kajiya.models.build import build_model
from kajiya.training import compile as compile_module
from kajiya.training.compile import compile_where_it_pays, compiler_problem, takes_whole_blocks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("compile_", "fused", "words"),
    [
        ("off", "no: heads of width 16", "no: set in the config; not joined in C++: heads of width 16"),
        ("off", "yes: 6 blocks", "no: set in the config; joined in C++: 6 blocks"),
        ("auto", "yes: 6 blocks", "no: joined products and C++ operators take its place; joined in C++: 6 blocks"),
    ],
)
def test_both_reasons_are_said(compile_: str, fused: str, words: str) -> None:
    assert compile_where_it_pays(TrainConfig(compile=compile_), nn.Linear(2, 2), CPU, fused) == words


def test_blocks_are_left_whole_for_a_compiler_that_is_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for problem in (None, "no C++ compiler was found"):
        monkeypatch.setattr(compile_module, "compiler_problem", lambda device, problem=problem: problem)
        assert takes_whole_blocks(TrainConfig(compile="on"), nn.Linear(2, 2), CPU) == (problem is None)
        assert not takes_whole_blocks(TrainConfig(compile="auto"), nn.Linear(2, 2), CPU)


@pytest.mark.parametrize("varies", [False, True])
def test_lengths_that_vary_are_compiled_once_for_all(varies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles eight shapes of its own each, and runs what comes then uncompiled."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(compile_module, "compiler_problem", lambda device: None)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: asked.append(settings))
    monkeypatch.setattr(torch.compiler, "reset", lambda: asked.append({"reset": not asked}))
    model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    words = compile_where_it_pays(TrainConfig(compile="on"), model, CPU, "no: x", varies=varies)
    assert words == "yes: 2 blocks" + (", for any length" if varies else "") + "; not joined in C++: x"
    assert asked == [{"reset": True}, *2 * [{"dynamic": None if varies else False}]]


def test_whether_lengths_vary_is_known_from_the_rows() -> None:
    assert not has_many_lengths(compose("stdlib-pretrain"), "text")
    assert not has_many_lengths(compose("stdlib-sft"), "instruction")
    assert has_many_lengths(compose("stdlib-sft", ["data.packing=bucketed"]), "instruction")
    assert has_many_lengths(compose("stdlib-grpo"), "prompt")


def test_a_gpu_is_not_told_of_the_operators() -> None:
    words = compile_where_it_pays(TrainConfig(compile="off"), nn.Linear(2, 2), torch.device("cuda"), "no: for a CPU")
    assert words == "no: set in the config"


@pytest.mark.parametrize("quantized", ["none", "nf4"])
def test_adapters_of_experts_in_four_bits_are_not_compiled(quantized: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "compiler_problem", lambda device: None)
    monkeypatch.setattr(compile_module, "compile_blocks", lambda model, varies: 2)
    sizes: Any = {"n_params": None, "hidden_size": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "ffn_size": 32}
    module = build_model(ModelConfig(name="mixtral", options={"num_local_experts": 2}, **sizes), VOCABULARY, 0).module
    transform(module, AdapterConfig("lora", {"r": 4}), quantized, 0)
    words = compile_where_it_pays(TrainConfig(compile="on"), module, CPU, "no: x")
    assert words.startswith("yes: 2 blocks" if quantized == "none" else "no: PEFT's adapters of experts in 4 bits")


def test_a_short_run_is_not_compiled() -> None:
    train = TrainConfig(compile="auto", steps=10)
    assert compile_where_it_pays(train, nn.Linear(2, 2), CPU, "no: in float64").startswith("no: the run is too short")


_COMPILED_STEP = """
import torch
from tests.training.conftest import make_batch, make_model
from torch._dynamo.utils import counters
from kajiya.models.hidden import last_hidden
from kajiya.training.compile import compile_blocks

model = make_model(n_layers=3)
assert compile_blocks(model) == 3
for seed in (0, 1):
    last_hidden(model, make_batch(2, seed=seed)).sum().backward()
assert not counters["graph_break"], counters["graph_break"]
print(counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_blocks_are_one_graph_and_a_second_process_takes_what_the_first_compiled(tmp_path: Path) -> None:
    if (problem := compiler_problem(CPU)) is not None:
        pytest.skip(problem)
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _COMPILED_STEP],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        counts.append([int(each) for each in done.stdout.split()])
    (first_graphs, first_misses, _), (second_graphs, second_misses, second_hits) = counts
    assert first_graphs == second_graphs == 1  # of three blocks and batches of two cuts
    assert first_misses > 0
    assert second_misses == 0
    assert second_hits >= first_misses
