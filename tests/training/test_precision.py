"""Precision and device are resolved in one place, with a reason."""

import pytest
import torch

from kajiya.errors import ConfigError
from kajiya.training import precision
from kajiya.training.precision import require_tf32, resolve_device, resolve_precision
from kajiya.training.product_rates import ProductRates, measure_product_rates

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"), [(100e9, 250e9, "bf16"), (100e9, 110e9, "fp32"), (284e9, 150e9, "fp32")]
)
def test_auto_takes_bf16_where_it_measures_it_to_be_faster_and_says_the_rates(
    fp32: float, bf16: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16_instructions", lambda: True)
    monkeypatch.setattr(precision, "measure_product_rates", lambda: ProductRates(fp32, bf16))
    picked = resolve_precision("auto", CPU)
    assert picked.name == chosen
    assert f"{bf16 / 1e9:.0f} GFLOP/s in bf16, {fp32 / 1e9:.0f} in fp32" in picked.reason


def test_auto_measures_nothing_on_a_cpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16_instructions", lambda: False)
    monkeypatch.setattr(precision, "measure_product_rates", lambda: pytest.fail("measured"))
    picked = resolve_precision("auto", CPU)
    assert (picked.name, picked.reason) == ("fp32", "this CPU has no bf16 instructions")


def test_the_measurement_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    rates = measure_product_rates.__wrapped__()
    assert rates.fp32 > 1e8
    assert rates.bf16 > 1e6
    assert torch.equal(torch.get_rng_state(), before)


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


def test_tf32_is_refused_where_nothing_has_it() -> None:
    with pytest.raises(ConfigError, match=r"train\.fp32_matmul: tf32 is how a GPU may multiply fp32, and this is cpu"):
        require_tf32("tf32", torch.device("cpu"))
    require_tf32("tf32", torch.device("cuda"))
    require_tf32("ieee", torch.device("cpu"))
