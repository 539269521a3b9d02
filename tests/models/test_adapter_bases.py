"""An adapter belongs to its base: to these weights, in these bits, with this head; anything else is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import VOCABULARY, NoTokenizer, make_batch, make_pairs_of_text

from kajiya.config.schema import AdapterConfig, ModelConfig
from kajiya.errors import StoreError
from kajiya.models import adapter_files
from kajiya.models.adapt import transform
from kajiya.models.adapter_files import load_adapter
from kajiya.models.build import build_model
from kajiya.models.hidden import all_logits
from kajiya.models.injection import merge
from kajiya.models.load import load_model
from kajiya.models.open import model_dtype, open_model
from kajiya.models.origin import Origin, origin_of, set_origin
from kajiya.models.outputs import masked_logits, seq2seq_logits
from kajiya.models.quantized import dequantize, quantize
from kajiya.models.tasks import CAUSAL, Task
from kajiya.models.trained import save_trained

Bases = Callable[..., Path]


def _moved(module: Any, seed: int = 0) -> Any:
    """The module with what is trained of it moved away from its beginning."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def _save(base: Path, folder: Path, quantized: str = "none", task: Task = CAUSAL) -> Any:
    """Train nothing, move an adapter, leave it in `folder` as training does; the module."""
    config = ModelConfig(path=str(base), quantize=quantized)
    module = build_model(config, VOCABULARY, 0, task).module
    transform(module, AdapterConfig("lora", {"r": 4}), quantized, seed=0)
    _moved(module)
    save_trained(config, module, NoTokenizer(), folder, lambda: module)
    return module


def test_beside_weights_of_no_folder_nothing_can_be_compared(base: Bases, tmp_path: Path) -> None:
    _save(base(), tmp_path / "a")
    sizes: Any = {"n_params": None, "hidden_size": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_size": 64}
    anew = build_model(ModelConfig(**sizes, max_positions=64), VOCABULARY, 1).module
    with pytest.raises(StoreError, match="no folder that could be compared"):
        load_adapter(anew, tmp_path / "a")


def test_a_base_from_the_hub_is_compared_too(base: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(base(seed=0), tmp_path / "a")
    asked: list[tuple[str, str | None]] = []

    def fetched(name: str, revision: str | None = None) -> Path:
        asked.append((name, revision))
        return base(seed=1)

    monkeypatch.setattr(adapter_files, "hub_folder", fetched)
    module = load_model(base(seed=1))
    set_origin(module, Origin("owner/name", "v2"))
    with pytest.raises(StoreError, match="belongs to weights of digest"):
        load_adapter(module, tmp_path / "a")
    assert asked == [("owner/name", "v2")]


@pytest.mark.parametrize(("trained", "given"), [("nf4", "none"), ("none", "nf4"), ("nf4", "torchao-int8")])
def test_the_same_weights_in_other_bits_are_refused(trained: str, given: str, base: Bases, tmp_path: Path) -> None:
    _save(base(), tmp_path / "a", trained)
    module = quantize(load_model(base()), given)
    with pytest.raises(StoreError, match=f"trained with model.quantize={trained}.*model.quantize={given}"):
        load_adapter(module, tmp_path / "a")
    with pytest.raises(StoreError, match="kajiya merge"):
        transform(load_model(base()), AdapterConfig("load", {"path": str(tmp_path / "a")}), given, 0)


def test_the_bits_it_was_trained_beside_are_taken_packed_or_as_what_they_stand_for(base: Bases, tmp_path: Path) -> None:
    expected = all_logits(_save(base(), tmp_path / "a", "nf4"), make_batch(1))
    packed = quantize(load_model(base()), "nf4")
    plain = dequantize(quantize(load_model(base()), "nf4"), torch.float32)
    for module in (packed, plain):
        load_adapter(module, tmp_path / "a")
        torch.testing.assert_close(all_logits(module.eval(), make_batch(1)), expected, atol=5e-5, rtol=0)


def test_an_adapter_that_names_no_digest_loads_and_nothing_is_hashed(
    base: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = all_logits(_save(base(), tmp_path / "a"), make_batch(1))
    (tmp_path / "a" / "base.json").unlink()
    monkeypatch.setattr(adapter_files, "weights_digest", lambda folder: pytest.fail("the base was hashed"))
    module = load_model(base())
    load_adapter(module, tmp_path / "a")
    torch.testing.assert_close(all_logits(module.eval(), make_batch(1)), expected)


def test_merged_weights_are_those_of_no_folder_but_of_the_adapters_own(base: Bases, tmp_path: Path) -> None:
    _save(base(), tmp_path / "a")
    module = open_model(tmp_path / "a", torch.float32)
    assert origin_of(module) == Origin(str(base()))
    merge(module)
    assert origin_of(module) is None
    assert origin_of(open_model(tmp_path / "a", torch.float32, is_merged=True)) == Origin(str(tmp_path / "a"))


def test_an_adapter_on_an_adapter_opens_on_both(base: Bases, tmp_path: Path) -> None:
    _save(base(), tmp_path / "a")
    second = _save(tmp_path / "a", tmp_path / "b")
    again = open_model(tmp_path / "b", torch.float32)
    torch.testing.assert_close(all_logits(again, make_batch(1)), all_logits(second, make_batch(1)))
    assert model_dtype(tmp_path / "b") == torch.float32
    with pytest.raises(StoreError, match="belongs to weights of digest"):
        load_adapter(load_model(base()), tmp_path / "b")


def _built(task: Task, folder: Path) -> Path:
    architecture = {"masked": "bert", "seq2seq": "t5"}.get(task.name, "llama")
    module = build_model(ModelConfig(name=architecture, n_params="40k", max_positions=64), VOCABULARY, 0, task).module
    module.save_pretrained(folder)  # type: ignore[operator]
    return folder


def _outputs(module: Any, task: Task) -> torch.Tensor:
    with torch.no_grad():
        if task.name == "seq2seq":
            return seq2seq_logits(module, make_pairs_of_text(2))
        if task.name == "masked":
            return masked_logits(module, replace(make_batch(1), is_causal=False))
        found: torch.Tensor = module(input_ids=make_batch(1).tokens).logits
        return found


@pytest.mark.parametrize(
    "task",
    [Task("classes", ("ham", "spam", "eggs")), Task("score"), Task("seq2seq"), Task("masked")],
    ids=lambda t: t.name,
)
def test_an_adapter_opens_with_the_head_that_it_was_trained_with(task: Task, tmp_path: Path) -> None:
    """Without being told; a classifier's head and its names are in no base of text."""
    beginning = CAUSAL if task.has_new_head else task
    module = _save(_built(beginning, tmp_path / "base"), tmp_path / "a", task=task)
    for is_merged in (False, True):
        again = open_model(tmp_path / "a", torch.float32, is_merged=is_merged)
        assert type(again) is type(module)
        torch.testing.assert_close(_outputs(again, task), _outputs(module, task), atol=5e-5, rtol=0)
    if task.name == "classes":
        assert again.config.id2label == {0: "ham", 1: "spam", 2: "eggs"}
        base = adapter_files.read_base(tmp_path / "a")
        assert base is not None
        assert base.labels == task.labels
        # Of another tool there are the outputs alone.
        (tmp_path / "a" / "base.json").unlink()
        unnamed = open_model(tmp_path / "a", torch.float32)
        assert unnamed.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
        torch.testing.assert_close(_outputs(unnamed, task), _outputs(module, task), atol=5e-5, rtol=0)
