"""What is trained: model sizes, the text, the rows; made once and given to every peer."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from work_order import WorkOrder

if TYPE_CHECKING:
    from kajiya.config.schema import Config


@dataclass(frozen=True)
class Size:
    """A Llama with tied embeddings."""

    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_size: int
    vocab_size: int


SIZES = {
    "XS": Size(hidden_size=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_size=96, vocab_size=512),
    "S": Size(hidden_size=256, n_layers=6, n_heads=8, n_kv_heads=4, ffn_size=688, vocab_size=8192),
    "M": Size(hidden_size=640, n_layers=10, n_heads=10, n_kv_heads=5, ffn_size=1792, vocab_size=8192),
}
"""XS serves the smoke test alone; S has 6M parameters, M 52M."""

_RECIPE = Path(__file__).resolve().parent / "pretraining.yaml"


def kajiya_config(order: WorkOrder) -> "Config":
    """Kajiya's config of the order."""
    from kajiya.config.compose import compose

    size = SIZES[order.size]
    overrides = [
        f"seed={order.seed}",
        f"data.row_tokens={order.tokens}",
        f"tokenizer.vocab_size={size.vocab_size}",
        "model.n_params=null",
        *(f"model.{name}={value}" for name, value in asdict(size).items() if name != "vocab_size"),
        f"optim.lr={order.lr}",
        f"optim.clip_norm={order.clip_norm}",
        f"optim.options.beta1={order.beta1}",
        f"optim.options.beta2={order.beta2}",
        f"optim.options.eps={order.eps}",
        "train.minutes=null",
        f"train.steps={order.steps}",
        f"train.micro_batch={order.micro_rows}",
        f"train.accumulate={order.accumulate}",
        f"train.precision={order.precision}",
        f"train.compile={'on' if order.compile else 'off'}",
    ]
    if order.text is not None:
        overrides.append(f"data.source.options.root={order.text}")
    return compose(str(_RECIPE), overrides)


def make_workload(order: WorkOrder) -> WorkOrder:
    """Make what the order names with Kajiya's own stages; returns it with the precision settled and the paths filled in.

    The text, the tokenizer and the shards are artifacts of the store; the model and the rows lie in `<store>/benchmarks/`.
    """
    import numpy as np

    from kajiya.data.loader import Feed, open_loader
    from kajiya.data.tokenizer import load_tokenizer
    from kajiya.flows.stages import Stages
    from kajiya.flows.train import prepare_data
    from kajiya.models.build import build_model, vocabulary_of
    from kajiya.models.save import save_model
    from kajiya.run.code import code_revision
    from kajiya.run.files import new_folder
    from kajiya.run.store import Store
    from kajiya.training.precision import resolve_device, resolve_precision

    if order.precision == "auto":
        precision = resolve_precision("auto", resolve_device("auto", "train.device"))
        order = replace(order, precision=precision.name)
    config = kajiya_config(order)
    data = prepare_data(config, Store(Path(order.store)), Stages(_tell))
    made_of = {
        "shards": data.shards.digest,
        "order": asdict(replace(order, store="")),
        "code": code_revision("kajiya.data.loader", "kajiya.models.build"),
    }
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(order.store) / "benchmarks" / name
    if not folder.is_dir():
        with new_folder(folder) as fresh:
            tokenizer = load_tokenizer(data.tokenizer.path)
            save_model(
                build_model(config.model, vocabulary_of(tokenizer), config.seed).module, tokenizer, fresh / "model"
            )
            loader = open_loader(
                data.shards.path, "train", Feed(order.tokens, isolate=False), batch=order.rows, seed=order.seed
            )
            batches = [loader.next() for _ in range(order.steps)]
            rows = [np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1) for batch in batches]
            np.save(fresh / "rows.npy", np.concatenate(rows).astype(np.int32))
            (fresh / "scratch").mkdir()
    return replace(
        order, model=str(folder / "model"), rows_file=str(folder / "rows.npy"), scratch=str(folder / "scratch")
    )


def _tell(kind: str, **fields: object) -> None:
    if kind == "stage" and fields["state"] != "begun":
        print(f"{fields['name']}: {fields['text']} ({fields['state']})", file=sys.stderr, flush=True)
