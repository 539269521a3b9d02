"""What the plan says of compilation and of blocks that were joined."""

import pytest
import torch
from torch import nn

from kajiya.config.schema import TrainConfig
from kajiya.training import compile as compile_module
from kajiya.training.compile import compile_where_it_pays

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


def test_a_gpu_is_told_of_the_losss_kernel_and_not_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "triton_problem", lambda: None)
    words = compile_where_it_pays(TrainConfig(compile="off"), nn.Linear(2, 2), torch.device("cuda"), "no: for a CPU")
    assert words == "no: set in the config; the loss's softmax by Triton"


def test_a_short_run_is_not_compiled() -> None:
    train = TrainConfig(compile="auto", steps=10)
    assert compile_where_it_pays(train, nn.Linear(2, 2), CPU, "no: in float64").startswith("no: the run is too short")
