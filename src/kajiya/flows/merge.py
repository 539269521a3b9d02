"""Merging from a name to an artifact: find the models and the rows, merge, certify; over tolerance nothing is left behind."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kajiya.config.compose import compose, from_plain
from kajiya.config.schema import Config
from kajiya.data.documents import open_documents
from kajiya.data.encode import encode_texts, open_encoder
from kajiya.errors import ConfigError
from kajiya.exporting.merge import merge_adapter, merge_models
from kajiya.exporting.mixing import METHODS, Mixing
from kajiya.flows.targets import Target, find_model, require_text
from kajiya.models.adapter_files import is_adapter
from kajiya.run.code import code_revision
from kajiya.run.files import write_json
from kajiya.run.store import Artifact, Store, open_artifact, produce

_N_ROWS = 16
_ROW_TOKENS = 256
_DEFAULT_RECIPE = "stdlib-pretrain"


@dataclass(frozen=True)
class Joining:
    """How several models are made into one, as it was asked for."""

    method: str = "linear"
    weights: str | None = None
    density: float = 0.2
    scale: float = 1.0
    seed: int = 0


def merge_targets(
    targets: Sequence[str],
    store: Store,
    *,
    into: str | None = None,
    base: str | None = None,
    joining: Joining | None = None,
    recipe: str | None = None,
    config_dir: Path | None = None,
) -> tuple[Artifact, Artifact]:
    """The merged model and its certificate, both artifacts, made or found.

    One target is an adapter, which is added to its base; several are models, which `joining` makes into one. The certificate is
    measured on held-out documents of the first target's own run, or of `recipe`. Raises `ParityError` past the tolerance,
    `ConfigError` for what cannot be merged and for a setting that changes nothing.
    """
    joining = joining or Joining()
    _require_effect(joining, len(targets), base)
    found = [find_model(target, store) for target in targets]
    for each in found if found[1:] else ():
        require_text(each, "merge")
    if len(found) == 1 and not is_adapter(found[0].model.path):
        raise ConfigError("merge", f"{targets[0]} is a whole model already", "Name an adapter, or several models.")
    corpus = _corpus(found[0], store, recipe, config_dir)
    rows = _rows(corpus, found[0].model.path)
    parents = {f"model{number}" if number else "model": each.model for number, each in enumerate(found)}
    origin = None if base is None else find_model(base, store).model
    settings: dict[str, Any] = {
        "into": into,
        "base": None if origin is None else origin.digest,
        "joining": joining if found[1:] else None,
    }

    def make(folder: Path) -> dict[str, Any]:
        paths = [each.model.path for each in found]
        if len(paths) == 1:
            given = None if origin is None else str(origin.path)
            facts = merge_adapter(paths[0], folder, rows, into=into, base=given)
        else:
            start = None if origin is None else origin.path
            facts = merge_models(paths, folder, rows, mixing=_mixing(joining, len(paths)), base=start, into=into)
        return {"merged": [each.model.reference() for each in found], "n_rows": len(rows), "certificate": facts}

    code = code_revision("kajiya.exporting.merge")
    model, _ = produce(store, "model", code=code, config=settings, parents=parents | {"corpus": corpus}, make=make)
    certificate, _ = produce(
        store,
        "certificate",
        code=code,
        config={"of": "merge"},
        parents=parents | {"result": model, "corpus": corpus},
        make=lambda folder: _certify(folder, model),
    )
    return model, certificate


def _certify(folder: Path, model: Artifact) -> dict[str, Any]:
    facts: dict[str, Any] = dict(model.facts["certificate"])
    write_json(folder / "certificate.json", facts)
    return facts


def _mixing(joining: Joining, n_models: int) -> Mixing:
    try:
        weights = tuple(float(each) for each in joining.weights.split(",")) if joining.weights else (1.0,) * n_models
    except ValueError as error:
        raise ConfigError("--weights", f"{joining.weights!r} are not numbers between commas") from error
    return Mixing(joining.method, weights, joining.density, joining.scale, joining.seed)


_READ_BY = {
    "weights": tuple(METHODS),
    "density": ("ties", "dare"),
    "scale": ("ties", "dare"),
    "seed": ("dare",),
}
"""Methods that a setting of `Joining` has an effect in."""


def _require_effect(joining: Joining, n_models: int, base: str | None) -> None:
    """Raise `ConfigError` for a setting that is not at its default and changes nothing."""
    plain = Joining()
    if n_models == 1:
        odd = next((name for name in ("method", *_READ_BY) if getattr(joining, name) != getattr(plain, name)), None)
        if odd is not None:
            raise ConfigError(
                f"--{odd}",
                "changes nothing where one adapter is added to its base",
                "Leave it out, or name several models.",
            )
        return
    if joining.method not in METHODS:
        raise ConfigError("--method", f"{joining.method!r} is not one of {', '.join(METHODS)}")
    odd = next(
        (
            name
            for name, methods in _READ_BY.items()
            if getattr(joining, name) != getattr(plain, name) and joining.method not in methods
        ),
        "base" if base is not None and joining.method in ("linear", "slerp") else None,
    )
    if odd is not None:
        raise ConfigError(f"--{odd}", f"changes nothing for --method {joining.method}", "Leave it out.")


def _corpus(found: Target, store: Store, recipe: str | None, config_dir: Path | None) -> Artifact:
    """The corpus whose held-out documents are compared on."""
    from kajiya.data.corpus import build_corpus

    if recipe is None and found.run is not None:
        manifest = found.run.manifest()
        if "corpus" in manifest["artifacts"]:
            return open_artifact(store.root / manifest["artifacts"]["corpus"]["path"])
        config: Config = from_plain(manifest["config"])
    else:
        config = compose(recipe or _DEFAULT_RECIPE, (), config_dir)
    return build_corpus(config.data, store)[0]


def _rows(corpus: Artifact, model: Path) -> list[list[int]]:
    """The beginnings of held-out documents, spread over all of them, in the model's own tokens."""
    texts = list(open_documents(corpus.path, "heldout").texts())
    chosen = [texts[index * len(texts) // _N_ROWS] for index in range(min(_N_ROWS, len(texts)))]
    encoded = encode_texts(open_encoder(model), [text[: 16 * _ROW_TOKENS] for text in chosen])
    return [row for ids in encoded if len(row := [int(each) for each in ids[:_ROW_TOKENS]]) >= 2]
