"""Merging from a name to an artifact: find the models and the rows, merge, certify; over tolerance nothing is left behind."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.config.compose import compose, from_plain
from kajiya.config.schema import Config
from kajiya.data.documents import open_documents
from kajiya.data.examples import Example, Segment
from kajiya.data.render import open_renderer
from kajiya.errors import ConfigError, DataError
from kajiya.exporting.evidence import Row, halved
from kajiya.exporting.merge import merge_adapter, merge_models
from kajiya.exporting.mixing import METHODS, Mixing
from kajiya.flows.feeding import rendering_of
from kajiya.flows.report_facts import MERGED
from kajiya.flows.targets import DEFAULT_RECIPE, Target, find_model, require_text
from kajiya.models.adapter_files import is_adapter
from kajiya.models.tokenizer_of import tokenizer_folder
from kajiya.run.code import code_revision
from kajiya.run.files import write_json
from kajiya.run.store import Artifact, Store, open_artifact, produce

_N_ROWS = 16
_ROW_TOKENS = 512
_TEXT_TOKENS = 256
"""Of plain text, every beginning is as good as a longer one; a rendered row has its answer at its end."""


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
    measured on held-out rows of the first target's own run, or of `recipe`, rendered as they are for training. Raises
    `ParityError` past the tolerance, `ConfigError` for what cannot be merged and for a setting that changes nothing.
    """
    joining = joining or Joining()
    _require_effect(joining, len(targets), base)
    found = [find_model(target, store) for target in targets]
    for each in found if found[1:] else ():
        require_text(each, "merge")
    if len(found) == 1 and not is_adapter(found[0].model.path):
        raise ConfigError("merge", f"{targets[0]} is a whole model already", "Name an adapter, or several models.")
    config, corpus = _corpus(found[0], store, recipe, config_dir)
    tokenizer = replace(found[0].model, path=tokenizer_folder(found[0].model.path))
    rendering = rendering_of(config, corpus, tokenizer)
    rows = held_rows(config, corpus, tokenizer)
    parents = {f"model{number}" if number else "model": each.model for number, each in enumerate(found)}
    origin = None if base is None else find_model(base, store).model
    settings: dict[str, Any] = {
        "into": into,
        "base": None if origin is None else origin.digest,
        "joining": joining if found[1:] else None,
        "rows": None if rendering is None else [rendering.key, config.data.row_tokens, config.data.on_unreadable],
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

    code = code_revision("kajiya.exporting.merge", "kajiya.flows.merge")
    model, _ = produce(store, "model", code=code, config=settings, parents=parents | {"corpus": corpus}, make=make)
    certificate, _ = produce(
        store,
        "certificate",
        code=code,
        config={"of": "merge"},
        parents=parents | {"result": model, "corpus": corpus},
        make=lambda folder: _certify(folder, model),
    )
    if len(found) == 1 and found[0].run is not None:
        found[0].run.record_artifact(f"{MERGED}{certificate.facts['dtype']}", certificate)
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


def _corpus(found: Target, store: Store, recipe: str | None, config_dir: Path | None) -> tuple[Config, Artifact]:
    """The corpus whose held-out rows are compared on, and the config that says how they are rendered."""
    from kajiya.data.corpus import build_corpus

    if recipe is None and found.run is not None:
        manifest = found.run.manifest()
        config: Config = from_plain(manifest["config"])
        if "corpus" in manifest["artifacts"]:
            return config, open_artifact(store.root / manifest["artifacts"]["corpus"]["path"])
    else:
        config = compose(recipe or DEFAULT_RECIPE, (), config_dir)
    return config, build_corpus(config.data, store)[0]


def held_rows(config: Config, corpus: Artifact, tokenizer: Artifact) -> list[Row]:
    """Held-out rows, spread over all of them, as training reads them: rendered, in the model's own tokens.

    Raises `DataError` where a row cannot be rendered, unless `data.on_unreadable` drops such, and where none can.
    """
    documents = open_documents(corpus.path, "heldout")
    rendering = rendering_of(config, corpus, tokenizer)
    render = open_renderer(tokenizer.path, config.data.render, "text") if rendering is None else rendering.open()
    longest = None if rendering else 32 * _TEXT_TOKENS
    places = dict.fromkeys(index * len(documents) // _N_ROWS for index in range(_N_ROWS))
    chosen = ((documents.names[place], documents.text(place)[:longest]) for place in places)
    rows = []
    for number, rendered in enumerate(render(chosen)):
        if isinstance(rendered, Example):
            rows.append(_row(rendered.segments, number, corpus.facts["format"], config.data.row_tokens))
        elif config.data.on_unreadable != "drop":
            raise DataError(f"{rendered}\nSet data.on_unreadable=drop to leave such rows out.")
    rows = [row for row in rows if len(row.ids) >= 2]
    if not rows:
        raise DataError("No held-out row can be rendered with the model's tokenizer.\nName another recipe: --data.")
    return rows


def _row(segments: Sequence[Segment], number: int, form: str, row_tokens: int) -> Row:
    """Of a pair, its input is given; of several sequences (chosen and rejected) the rows take turns."""
    limit = min(_ROW_TOKENS, row_tokens)
    if form == "seq2seq":
        given, answer = (tuple(part.ids.tolist())[: limit // 2] for part in segments)
        return Row(given + answer, len(given))
    segment = segments[number % len(segments)]
    ids, trained = tuple(segment.ids.tolist()), np.flatnonzero(segment.weights[1:] > 0)
    if form == "text" or not len(trained):
        return halved(ids[: min(limit, _TEXT_TOKENS)])
    return Row(ids, int(trained[0]) + 1).cut(limit)
