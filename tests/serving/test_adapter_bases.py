"""Adapters in a server: on their own base alone, kept over a model's sleep, or as a model of their own."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.serving.conftest import NAME, open_engine, running

from kajiya.config.schema import ServeConfig
from kajiya.errors import ConfigError
from kajiya.models import adapter_files
from kajiya.models.adapter_files import Base
from kajiya.models.load import load_model
from kajiya.models.weights_digest import weights_digest
from kajiya.run.files import write_json
from kajiya.serving.api import create_app
from kajiya.serving.hosts import source_of
from kajiya.serving.sequence import SamplingParams

PROMPT = [5, 6, 7, 8]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture
def adapter(tmp_path: Path, model_folder: Path, tokenizer: Any) -> Callable[..., Path]:
    """`adapter(base=None)`: a folder with a LoRA adapter, as PEFT saves it, and the base that it names."""
    from safetensors.torch import save_file

    def make(base: Base | None = None) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir()
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["down_proj"]}
        listed = settings | {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(model_folder)}
        (folder / "adapter_config.json").write_text(json.dumps(listed))
        generator = torch.Generator().manual_seed(0)
        parts = {}
        for layer in (0, 1):
            module = f"base_model.model.model.layers.{layer}.mlp.down_proj"
            parts[f"{module}.lora_A.weight"] = torch.randn(2, 96, generator=generator)
            parts[f"{module}.lora_B.weight"] = torch.randn(64, 2, generator=generator)
        save_file(parts, folder / "adapter_model.safetensors")
        tokenizer.save_pretrained(folder)
        if base is not None:
            write_json(folder / "base.json", vars(base))
        return folder

    return make


@pytest.fixture
def other_model(tmp_path: Path, reference: Any, tokenizer: Any) -> Path:
    """A model of the same shapes with other weights."""
    folder = tmp_path / "other"
    torch.manual_seed(1)
    reference.__class__(reference.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_is_served_on_its_own_base_alone(
    adapter: Callable[..., Path], model_folder: Path, other_model: Path
) -> None:
    folder = adapter(Base(str(model_folder), weights_digest(model_folder), "none"))
    engine = open_engine(model_folder)
    engine.load_adapter("tuned", folder)
    tuned, plain = (engine.generate([PROMPT], GREEDY, name)[0].token_ids for name in ("tuned", None))
    assert tuned != plain
    other = open_engine(other_model)
    with pytest.raises(ConfigError, match="belongs to weights of digest"):
        other.load_adapter("tuned", folder)
    assert other.adapters == {}


def test_an_adapter_of_a_base_in_few_bits_is_refused_on_plain_weights(
    adapter: Callable[..., Path], model_folder: Path
) -> None:
    """By itself it is served: beside what the bits stand for, exactly."""
    folder = adapter(Base(str(model_folder), weights_digest(model_folder), "nf4"))
    with pytest.raises(ConfigError, match=r"model.quantize=nf4[\s\S]*kajiya merge"):
        open_engine(model_folder).load_adapter("tuned", folder)
    assert open_engine(folder).generate([PROMPT], GREEDY)[0].token_ids


def test_an_adapter_of_another_tool_is_served_and_nothing_is_hashed(
    adapter: Callable[..., Path], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_files, "weights_digest", lambda folder: pytest.fail("the base was hashed"))
    engine = open_engine(model_folder)
    engine.load_adapter("tuned", adapter())
    assert engine.generate([PROMPT], GREEDY, "tuned")[0].token_ids


def test_beside_weights_that_were_exchanged_nothing_can_be_compared(
    adapter: Callable[..., Path], model_folder: Path, reference: Any
) -> None:
    engine = open_engine(model_folder)
    engine.set_weights(reference.state_dict(), 1)
    with pytest.raises(ConfigError, match="no folder that could be compared"):
        engine.load_adapter("tuned", adapter(Base(str(model_folder), weights_digest(model_folder), "none")))


def _say(http: httpx.Client, model: str) -> str:
    reply = http.post("completions", json={"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def _cards(http: httpx.Client) -> dict[str, Any]:
    return {card["id"]: card for card in http.get("models").json()["data"]}


def test_an_adapter_outlives_the_sleep_of_its_model(
    adapter: Callable[..., Path], model_folder: Path, tokenizer: Any
) -> None:
    cfg = ServeConfig(allow_loading=True, idle_unload_s=0.2)
    others = {"second": source_of("second", model_folder, open_engine)}
    folder = adapter()
    with (
        running(create_app(open_engine(model_folder), tokenizer, NAME, cfg, others, open_engine)) as url,
        httpx.Client(base_url=f"{url}/v1", timeout=60) as http,
    ):
        asked = {"lora_name": "tuned", "lora_path": str(folder), "model": "second"}
        assert http.post("load_lora_adapter", json=asked).status_code == 200
        first = _say(http, "tuned")
        for _ in range(2):
            for _ in range(200):
                if _cards(http)["second"].get("is_loaded") is False:
                    break
                time.sleep(0.05)
            cards = _cards(http)
            assert cards["second"]["is_loaded"] is cards["tuned"]["is_loaded"] is False
            assert cards["tuned"]["parent"] == "second"
            assert http.post("load_lora_adapter", json=asked | {"model": NAME}).status_code == 409
            assert _say(http, "tuned") == first != _say(http, "second")
        assert http.post("unload_lora_adapter", json={"lora_name": "tuned"}).status_code == 200
        assert "tuned" not in _cards(http)


def test_a_model_that_cannot_be_loaded_is_not_listed(model_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    app = create_app(open_engine(model_folder), tokenizer, NAME, ServeConfig(allow_loading=True), {}, open_engine)
    with running(app) as url, httpx.Client(base_url=f"{url}/v1", timeout=60) as http:
        assert http.post("load_model", json={"name": "new", "folder": str(tmp_path)}).status_code >= 400
        assert list(_cards(http)) == [NAME]
        assert http.post("load_model", json={"name": "new", "folder": str(model_folder)}).status_code == 200
        assert _say(http, "new") == _say(http, NAME)


def test_an_adapter_is_a_model_of_its_own(adapter: Callable[..., Path], model_folder: Path, tokenizer: Any) -> None:
    folder = adapter(Base(str(model_folder), weights_digest(model_folder), "none"))
    engine = open_engine(model_folder)
    engine.load_adapter("beside", folder)
    app = create_app(engine, tokenizer, NAME, ServeConfig(), {"own": source_of("own", folder, open_engine)})
    with running(app) as url, httpx.Client(base_url=f"{url}/v1", timeout=60) as http:
        assert _say(http, "own") == _say(http, "beside") != _say(http, NAME)
    with pytest.raises(ConfigError, match="no folder with a saved model or adapter"):
        source_of("own", folder.parent, open_engine)


_LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], "task_type": "CAUSAL_LM"}


def _saved_by_peft(folder: Path, model_folder: Path, **settings: Any) -> Any:
    """PEFT's model with an adapter of these settings, moved, saved and loaded by PEFT alone."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(3)
    made: Any = get_peft_model(load_model(model_folder), LoraConfig(**_LORA | settings))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    made.save_pretrained(folder)
    # The file has the patterns in an order of its own.
    return PeftModel.from_pretrained(load_model(model_folder), folder).eval()


@pytest.mark.parametrize(
    "pattern",
    [
        {},
        {"q_proj": 32},
        {"^model.layers.0.self_attn.q_proj": 64, r".*\.1\.self_attn\.k_proj": 32},
        {"k_proj": 1, r"layers\.[1-9]\.self_attn\.(q|k)_proj": 64},
    ],
    ids=["none", "a name", "whole paths", "the first that fits"],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_patterns_of_alpha_are_pefts(tmp_path: Path, model_folder: Path, pattern: dict[str, int]) -> None:
    theirs = _saved_by_peft(tmp_path / "theirs", model_folder, alpha_pattern=pattern)
    engine = open_engine(model_folder)
    engine.load_adapter("theirs", tmp_path / "theirs")
    text = [*range(5, 45)]
    with torch.no_grad():
        found = theirs(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
    expected = found.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(engine.score(text, "theirs")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beginning", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_whose_beginning_was_taken_out_of_its_base_is_refused(
    tmp_path: Path, model_folder: Path, beginning: str
) -> None:
    _saved_by_peft(tmp_path / "theirs", model_folder, init_lora_weights=beginning)
    engine = open_engine(model_folder)
    with pytest.raises(ConfigError, match=f"init_lora_weights='{beginning}'.*\\n.*kajiya merge"):
        engine.load_adapter("theirs", tmp_path / "theirs")
    assert engine.adapters == {}
