"""What the plain model said at a proof, kept: the next start is proven against it, without Transformers' code for the model.

Every start reads the probe with the decoder and compares (`proof.compare`). What is kept is what it is compared with, and what
the decoder must know of the model.

Shape letters: T tokens, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kajiya.run.code import code_revision
from kajiya.run.store import Artifact, Store, artifact_key, produce
from kajiya.run.tensor_headers import read_header
from kajiya.serving.native.architecture import Architecture, NotNativeError, Rotary, architecture_of
from kajiya.serving.proof import plain_logits

STAGE = "engine"
_FILE = "plain.safetensors"
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Proofs:
    """Where the proofs of a model are kept."""

    store: Store
    digest: str
    """Of the model's files, as an artifact's."""


@dataclass(frozen=True)
class Reference:
    """A model as the decoder is held to it."""

    architecture: Architecture
    rotaries: Mapping[str, Rotary]
    """By their names in `architecture.rotations`."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of all weights, as the Transformers model names them."""
    plain: torch.Tensor
    """What the plain model says to the probe, fp32 [T, V]."""


@dataclass(frozen=True)
class Proven:
    """A reference that was kept, and the tokens that end an answer."""

    reference: Reference
    eos_ids: frozenset[int]


def reference_of(model: Any, weights: str) -> Reference:
    """The reference of a Transformers model whose products have `weights` fp32, bf16, int8 or int4. Raises `NotNativeError`."""
    if model.config.get_text_config() is not model.config:
        raise NotNativeError(f"{model.config.model_type} has further models around that of its text")
    architecture = architecture_of(model.config, model.dtype)
    return Reference(
        architecture=architecture,
        rotaries=_rotaries(model.model.rotary_emb, architecture),
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        plain=plain_logits(model, weights),
    )


def _rotaries(module: Any, architecture: Architecture) -> dict[str, Rotary]:
    return {
        name: Rotary(getattr(module, f"{name}inv_freq").float(), float(getattr(module, f"{name}attention_scaling")))
        for name in dict.fromkeys(architecture.rotations)
    }


def find_proven(proofs: Proofs, precision: str, weights: str) -> Proven | None:
    """What was kept of the model in weights of that precision, packed in that form; `None`: nothing was, or of other code."""
    from safetensors.torch import load_file

    config = _section(proofs, precision, weights)
    found = proofs.store.find(STAGE, artifact_key(STAGE, _code(), config, {}))
    if found is None:
        return None
    facts, tensors = found.facts, load_file(found.path / _FILE)
    reference = Reference(
        architecture=Architecture(**facts["architecture"]),
        rotaries={name: Rotary(tensors[f"{name}frequencies"], scale) for name, scale in facts["rotary_scales"].items()},
        shapes={name: tuple(shape) for name, shape in facts["shapes"].items()},
        plain=tensors["plain"],
    )
    return Proven(reference, frozenset(facts["eos_ids"]))


def keep_proven(proofs: Proofs, precision: str, weights: str, proven: Proven) -> Artifact:
    """Keep it for the next start."""
    from safetensors.torch import save_file

    reference = proven.reference

    def make(folder: Path) -> dict[str, Any]:
        frequencies = {f"{name}frequencies": rotary.frequencies for name, rotary in reference.rotaries.items()}
        tensors = {"plain": reference.plain, **frequencies}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _FILE)
        return {
            "architecture": asdict(reference.architecture),
            "rotary_scales": {name: rotary.scale for name, rotary in reference.rotaries.items()},
            "shapes": {name: list(shape) for name, shape in reference.shapes.items()},
            "eos_ids": sorted(proven.eos_ids),
        }

    config = _section(proofs, precision, weights)
    return produce(proofs.store, STAGE, code=_code(), config=config, parents={}, make=make)[0]


def stored_tensors(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The folder's weights by name, in `dtype`."""
    from safetensors.torch import load_file

    return {
        name: tensor.to(dtype)
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def is_stored_plainly(folder: Path, reference: Reference) -> bool:
    """Whether the folder's weights have the names and shapes of the model's: Transformers changes neither when it loads them.

    A head that is tied to the embedding need not be stored.
    """
    stored = {
        name: tuple(entry["shape"])
        for path in folder.glob("*.safetensors")
        for name, entry in read_header(path)[1].items()
    }
    wanted = dict(reference.shapes)
    if reference.architecture.tie_word_embeddings and "lm_head.weight" not in stored:
        wanted.pop("lm_head.weight", None)
    return stored == wanted


def _section(proofs: Proofs, precision: str, weights: str) -> dict[str, Any]:
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"model": proofs.digest, "precision": precision, "weights": weights, "libraries": libraries}


def _code() -> str:
    return code_revision("kajiya.serving.loading")
