"""Precision and device are resolved in one place, with a reason."""

import pytest
import torch

from kajiya.errors import ConfigError
from kajiya.training.precision import resolve_device, resolve_precision


def test_auto_picks_by_the_hardware_and_says_why() -> None:
    chosen = resolve_precision("auto", torch.device("cpu"))
    assert chosen.name == ("bf16" if torch.cpu._is_amx_tile_supported() else "fp32")
    assert "CPU" in chosen.reason


@pytest.mark.parametrize(
    ("name", "weights", "autocast"),
    [("fp32", torch.float32, None), ("bf16", torch.bfloat16, None), ("bf16-mixed", torch.float32, torch.bfloat16)],
)
def test_each_name(name: str, weights: torch.dtype, autocast: torch.dtype | None) -> None:
    chosen = resolve_precision(name, torch.device("cpu"))
    assert (chosen.weights, chosen.autocast) == (weights, autocast)
    with chosen.context(torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == (autocast is not None)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert resolve_device("cpu", "train.device").type == "cpu"
    with pytest.raises(ConfigError, match=r"train\.device: 'cuda:77' is not on this machine"):
        resolve_device("cuda:77", "train.device")
    with pytest.raises(ConfigError, match="is no device"):
        resolve_device("gpu please", "train.device")
