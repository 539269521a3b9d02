"""What a proof keeps: later starts need nothing of Transformers' models, and are held to the same logits."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kajiya.errors import KajiyaError
from kajiya.models import open as opening
from kajiya.run.store import Store
from kajiya.serving import proven
from kajiya.serving.engine import Engine
from kajiya.serving.native.architecture import Rotary
from kajiya.serving.proven import STAGE, Proofs, find_proven
from kajiya.serving.sequence import SamplingParams

from .conftest import open_engine

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPTS = [[5, 80, 200, 7], [300, 2, 44]]
NOT_NEEDED = {
    *("accelerate", "matplotlib", "mlflow", "optuna", "pandas", "peft", "scipy", "sklearn", "sympy", "torchao"),
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "transformers.generation"),
    *("transformers.modeling_utils", "transformers.models.llama.modeling_llama", "transformers.quantizers"),
}


@pytest.fixture
def proofs(tmp_path: Path) -> Proofs:
    return Proofs(Store(tmp_path / "store"), "a" * 64)


def _answers(engine: Engine) -> list[Any]:
    return [answer.token_ids for answer in engine.generate(PROMPTS, GREEDY)]


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("Transformers' model was opened")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"precision": "bf16"}),
        ("llama", {"quantize": "int8"}),
        ("llama", {"guesses": 3}),
        ("gemma3_text", {"precision": "bf16"}),
        ("phi3", {}),
    ],
    ids=["fp32", "bf16", "int8", "guesses", "gemma3", "phi3"],
)
def test_a_later_start_opens_no_transformers_model_and_answers_alike(
    model_folder: Path,
    family_folder: Callable[[str], Path],
    proofs: Proofs,
    family: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if family != "llama":
        model_folder = family_folder(family)
    first = open_engine(model_folder, proofs=proofs, **settings)
    monkeypatch.setattr(opening, "open_model", _refuse)
    later = open_engine(model_folder, proofs=proofs, **settings)
    assert later.facts == first.facts
    assert later.facts.note.startswith("native")
    assert _answers(later) == _answers(first)
    assert later.score(list(range(3, 90))) == first.score(list(range(3, 90)))
    with pytest.raises(AssertionError, match="was opened"):  # what was kept is what made the difference
        open_engine(model_folder, **settings)


def test_what_is_kept_is_of_these_weights_this_code_and_this_precision(
    model_folder: Path, proofs: Proofs, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_engine(model_folder, proofs=proofs)
    assert find_proven(proofs, "fp32", "fp32") is not None
    assert find_proven(replace(proofs, digest="b" * 64), "fp32", "fp32") is None
    assert find_proven(proofs, "bf16", "bf16") is None
    assert find_proven(proofs, "fp32", "int8") is None
    with monkeypatch.context() as patch:
        patch.setattr(proven, "code_revision", lambda _: "another revision")
        assert find_proven(proofs, "fp32", "fp32") is None
    with monkeypatch.context() as patch:
        patch.setattr(proven, "version", lambda name: "0.1" if name == "transformers" else "1")
        assert find_proven(proofs, "fp32", "fp32") is None
    assert find_proven(proofs, "fp32", "fp32") is not None


def test_a_later_start_is_proven_too(model_folder: Path, proofs: Proofs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that goes wrong after its model was proven is refused: all that is kept is what it is compared with."""
    open_engine(model_folder, proofs=proofs)
    real = Rotary.__call__
    monkeypatch.setattr(Rotary, "__call__", lambda self, x, positions: real(self, x, 2 * positions))
    with pytest.raises(KajiyaError, match="standard deviations"):
        open_engine(model_folder, runner="native", proofs=proofs)


def test_other_weights_under_the_same_digest_are_found_out(
    model_folder: Path, proofs: Proofs, tmp_path: Path, reference: Any
) -> None:
    """They are proven by their own Transformers model then, so that they are served as they are."""
    open_engine(model_folder, proofs=proofs)
    other = shutil.copytree(model_folder, tmp_path / "other")
    torch.manual_seed(5)
    LlamaForCausalLM(reference.config).save_pretrained(other)
    assert _answers(open_engine(other, proofs=proofs)) == _answers(open_engine(other))


def test_weights_that_transformers_renames_are_proven_at_every_start(
    model_folder: Path, proofs: Proofs, reference: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "bare")
    config = LlamaConfig(**reference.config.to_dict() | {"tie_word_embeddings": True})
    torch.manual_seed(2)
    tied = LlamaForCausalLM(config)
    tied.save_pretrained(folder)
    tied.model.save_pretrained(folder)  # under names without the beginning that the whole model gives them
    settings = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(settings))
    engine = open_engine(folder, proofs=proofs)
    assert engine.facts.note.startswith("native")
    assert find_proven(proofs, "fp32", "fp32") is None


def test_a_store_that_cannot_be_written_is_said_and_hinders_nothing(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    engine = open_engine(model_folder, proofs=Proofs(Store(tmp_path / "file"), "a" * 64))
    assert "its proof cannot be kept" in engine.facts.note
    assert _answers(engine) == _answers(open_engine(model_folder))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_angles_are_transformers_own_to_the_bit(rope: dict[str, Any]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    original = {} if rope["rope_type"] in ("default", "linear") else {"original_max_position_embeddings": 64}
    config = LlamaConfig(
        hidden_size=96,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters=rope | original | {"rope_theta": 10_000.0},
    )
    module = LlamaRotaryEmbedding(config)
    ours = Rotary(module.inv_freq.float(), module.attention_scaling)
    positions = torch.arange(256).unsqueeze(0)
    for found, expected in zip(ours(torch.zeros(1), positions), module(torch.zeros(1), positions), strict=True):
        assert torch.equal(found, expected)


_PROGRAM = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    from kajiya.config.schema import ServeConfig
    from kajiya.data.tokenizer import load_tokenizer
    from kajiya.run.store import Store
    from kajiya.serving.api import create_app
    from kajiya.serving.proven import Proofs
    from kajiya.serving.sequence import SamplingParams
    from kajiya.serving.server import open_engine

    folder, store = map(Path, sys.argv[1:])
    cfg = ServeConfig(precision="fp32", device="cpu", max_batch=2)
    engine = open_engine(cfg, folder, Proofs(Store(store), "a" * 64))
    create_app(engine, load_tokenizer(folder), "tiny", cfg)
    answers = engine.generate([[5, 80, 200, 7]], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    print(json.dumps([list(answers[0].token_ids), sorted(sys.modules)]))
    """
)


def test_what_a_later_start_of_the_server_imports(model_folder: Path, proofs: Proofs) -> None:
    engine = open_engine(model_folder, proofs=proofs)
    command = [sys.executable, "-c", _PROGRAM, str(model_folder), str(proofs.store.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer, loaded = json.loads(done.stdout.splitlines()[-1])
    assert answer == list(_answers(engine)[0])
    assert {"torch", "fastapi", "kajiya.serving.native.model"} <= set(loaded)
    assert NOT_NEEDED & set(loaded) == set()


def test_the_proof_is_an_artifact_of_its_own(model_folder: Path, proofs: Proofs) -> None:
    open_engine(model_folder, proofs=proofs)
    kept = [each for each in proofs.store.artifacts() if each.stage == STAGE]
    assert len(kept) == 1
    assert kept[0].facts["architecture"]["model_type"] == "llama"
