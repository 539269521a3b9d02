"""Each way of joining models against its formula."""

import math

import pytest
import torch

from kajiya.errors import ConfigError
from kajiya.exporting.mixing import METHODS, Mixing, mix


def _tensors(seed: int, n: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"a": torch.randn(40, 30, generator=generator), "b": torch.randn(7, generator=generator)} for _ in range(n)]


def test_linear_is_the_weighted_mean() -> None:
    one, two, three = _tensors(0)
    made = mix([one, two, three], None, Mixing("linear", (1.0, 2.0, 1.0)))
    for name in one:
        torch.testing.assert_close(made[name], (one[name] + 2 * two[name] + three[name]) / 4)


def test_slerp_keeps_the_length_and_divides_the_angle() -> None:
    one, two = ({name: each / each.norm() for name, each in tensors.items()} for tensors in _tensors(1, 2))
    made = mix([one, two], None, Mixing("slerp", (3.0, 1.0)))
    for name in one:
        assert float(made[name].norm()) == pytest.approx(1.0, abs=1e-5)
        whole, part = (math.acos(float((one[name] * each[name]).sum())) for each in (two, made))
        assert part == pytest.approx(whole / 4, abs=1e-4)
    same = mix([one, one], None, Mixing("slerp", (1.0, 1.0)))
    torch.testing.assert_close(same["a"], one["a"])


def test_ties_on_a_worked_example() -> None:
    base = {"w": torch.zeros(4)}
    one, two, three = (
        {"w": torch.tensor(each)} for each in ([4.0, -3.0, 0.1, 1.0], [2.0, 5.0, 3.0, 0.1], [-1.0, 4.0, 2.0, 0.1])
    )
    made = mix([one, two, three], base, Mixing("ties", (1.0, 1.0, 1.0), density=0.5, scale=2.0))
    # Kept: [4, −3, 0, 0], [0, 5, 3, 0], [0, 4, 2, 0]; signs +, +, +; means over those that agree: 4, 4.5, 2.5, 0.
    torch.testing.assert_close(made["w"], 2 * torch.tensor([4.0, 4.5, 2.5, 0.0]))


def test_dare_keeps_the_mean_difference() -> None:
    base = {"w": torch.zeros(200_000)}
    models = [{"w": torch.full((200_000,), value)} for value in (1.0, 3.0)]
    mixing = Mixing("dare", (1.0, 1.0), density=0.25, seed=3)
    made = mix(models, base, mixing)["w"]
    assert float(made.mean()) == pytest.approx(2.0, rel=0.02)
    assert set(made.unique().tolist()) == {0.0, 2.0, 6.0, 8.0}
    assert torch.equal(made, mix(models, base, mixing)["w"])


@pytest.mark.parametrize("method", METHODS)
def test_one_model_alone_is_itself(method: str) -> None:
    (one,), (base,) = _tensors(2, 1), _tensors(3, 1)
    if method == "slerp":
        with pytest.raises(ConfigError, match="a second"):
            mix([one], base, Mixing(method, (1.0,)))
        return
    made = mix([one], base, Mixing(method, (1.0,), density=1.0))
    torch.testing.assert_close(made["a"], one["a"])


@pytest.mark.parametrize(
    ("mixing", "words"),
    [
        (Mixing("average", (1.0, 1.0)), "is not one of"),
        (Mixing("linear", (1.0,)), "1 weights are given for 2 models"),
        (Mixing("ties", (1.0, 1.0)), "differences to the base"),
        (Mixing("linear", (1.0, -1.0)), "--weights: -1 is no share"),
        (Mixing("slerp", (0.0, 0.0)), "--weights: 0 is no share"),
        (Mixing("linear", (1.0, float("nan"))), "--weights: nan"),
        (Mixing("dare", (1.0, 1.0), density=0.0), "--density: 0 is no share"),
    ],
)
def test_mistakes_are_named(mixing: Mixing, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mix(_tensors(0, 2), None, mixing)
    other = {"a": torch.zeros(40, 31), "b": torch.zeros(7)}
    with pytest.raises(ConfigError, match="'a' is not the same"):
        mix([_tensors(0, 1)[0], other], None, Mixing("linear", (1.0, 1.0)))
