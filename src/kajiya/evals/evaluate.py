"""The evaluation stage: bits per byte and perplexity on the held-out documents, baselines, samples."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.config.digest import digest
from kajiya.config.schema import EvalConfig
from kajiya.data.documents import Documents, open_documents
from kajiya.data.encode import encode_texts, open_encoder
from kajiya.data.tokenizer import load_tokenizer, start_id
from kajiya.evals.baselines import BASELINES, PRIMING_BYTES
from kajiya.evals.fingerprint import Fingerprint, heldout_digest
from kajiya.evals.results import write_text_rows
from kajiya.evals.samples import sample_completions, unseen_functions
from kajiya.evals.scoring import score_documents
from kajiya.models.adapter_files import is_adapter, is_mergeable
from kajiya.models.open import model_dtype
from kajiya.run.code import code_revision
from kajiya.run.files import write_json
from kajiya.run.store import Artifact, Store, produce

_ENCODED_TOGETHER = 64
"""Documents that are tokenized at once."""


def evaluate_model(
    config: EvalConfig,
    model: Artifact,
    corpus: Artifact,
    store: Store,
    *,
    context_tokens: int,
    seed: int,
    module: Any = None,
) -> tuple[Artifact, bool]:
    """The evaluation of `model` on the held-out documents of `corpus`, and whether it was there already.

    `module` is the model in memory, for one that Transformers cannot load; `None` loads it from the artifact.
    Files: `evaluation.json` (the figures), `documents.jsonl` (nats and bytes of each document), the same as `rows.parquet`,
    and `samples.json`.
    """
    context = config.context_tokens or context_tokens

    fingerprint = Fingerprint(
        data=heldout_digest(corpus),
        template=digest({"context_tokens": context, "stride_fraction": config.stride_fraction}),
        code=digest({}),
        engine="torch",
        dtype=str(model_dtype(model.path) if module is None else next(module.parameters()).dtype).removeprefix(
            "torch."
        ),
        sampling="none",
        model=model.digest,
    )

    def make(folder: Path) -> dict[str, Any]:
        documents = open_documents(corpus.path, "heldout")
        figures = _evaluate(folder, config, model, store, documents, context, seed, module)
        assert figures["dtype"] == fingerprint.dtype
        return figures | {"fingerprint": asdict(fingerprint)}

    return produce(
        store,
        "evaluation",
        code=code_revision("kajiya.evals.evaluate"),
        config={"eval": config, "context_tokens": context, "seed": seed, "fingerprint": asdict(fingerprint)},
        parents={"model": model, "corpus": corpus},
        make=make,
    )


def measure_baselines(names: tuple[str, ...], corpus: Artifact, store: Store) -> tuple[Artifact, bool]:
    """Bits per byte of the held-out bytes under each compressor; `baselines.json` holds them by name."""

    def make(folder: Path) -> dict[str, Any]:
        train, heldout = (open_documents(corpus.path, split).raw for split in ("train", "heldout"))
        figures = {}
        for name in names:
            started = time.perf_counter()
            figures[name] = {
                "bits_per_byte": BASELINES[name](train, heldout),
                "seconds": time.perf_counter() - started,
                "n_bytes": len(heldout),
                "n_training_bytes": len(train),
                "n_primed_bytes": min(len(train), PRIMING_BYTES) if name == "xz-primed" else 0,
            }
        write_json(folder / "baselines.json", figures)
        return {"baselines": figures}

    code = code_revision("kajiya.evals.baselines")
    return produce(store, "baselines", code=code, config=list(names), parents={"corpus": corpus}, make=make)


def _evaluate(
    folder: Path,
    config: EvalConfig,
    model: Artifact,
    store: Store,
    documents: Documents,
    context: int,
    seed: int,
    module: Any,
) -> dict[str, Any]:
    started = time.perf_counter()
    model_folder = model.path
    figures = _score(config, module or _load(model_folder), model_folder, documents, context, folder)
    figures["seconds"] = time.perf_counter() - started
    write_json(folder / "evaluation.json", figures)
    samples: list[dict[str, str]] = []
    note = None
    if config.samples and module is not None:
        note = "no samples: the engine serves models that Transformers can load, and this module is the user's own"
    elif config.samples and is_adapter(model_folder) and not is_mergeable(model_folder):
        note = "no samples: the engine does not know virtual tokens (prefix and prompt tuning)"
    elif config.samples:
        from kajiya.serving.loading import load_engine
        from kajiya.serving.proven import Proofs

        functions = unseen_functions(documents, config.samples)
        # Kept, so that whoever serves the model next need not wait for the proof.
        proofs = Proofs(store, model.digest)
        n = len(functions) or 1
        engine = load_engine(model_folder, precision="auto", device="auto", max_batch=n, max_waiting=64, proofs=proofs)
        samples = sample_completions(
            engine,
            model_folder,
            functions,
            max_tokens=config.sample_tokens,
            temperature=config.temperature,
            seed=seed,
        )
    write_json(folder / "samples.json", samples)
    return figures | {"n_samples": len(samples), "note": note}


def _encoded(
    model_folder: Path, documents: Documents, ends: tuple[int, int], counts: list[int]
) -> Iterator[np.ndarray]:
    """The ids of each document between its start and end token, encoded a few at a time; `counts` gains its targets."""
    encoder = open_encoder(model_folder)
    texts = iter(documents.texts())
    while portion := list(islice(texts, _ENCODED_TOGETHER)):
        for ids in encode_texts(encoder, portion):
            counts.append(len(ids) + 1)
            yield np.concatenate([ends[:1], ids, ends[1:]])


def _load(folder: Path) -> Any:
    from kajiya.models.open import model_dtype, open_model
    from kajiya.serving.loading import pick_device

    return open_model(folder, model_dtype(folder)).to(pick_device("auto"))


def _score(
    config: EvalConfig, model: Any, model_folder: Path, documents: Documents, context: int, folder: Path
) -> dict[str, Any]:
    tokenizer = load_tokenizer(model_folder)
    n_bytes = np.diff(documents.offsets).astype(np.float64)
    counts: list[int] = []
    device = next(model.parameters()).device
    nats = score_documents(
        model,
        _encoded(model_folder, documents, (start_id(tokenizer), tokenizer.eos_token_id), counts),
        context_tokens=context,
        stride=max(1, round(context * config.stride_fraction)),
        batch=config.batch,
        device=device,
    )
    return write_text_rows(folder, documents.names, nats, n_bytes, np.array(counts, dtype=np.float64)) | {
        "n_unscored_bytes": 0,
        "context_tokens": context,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
