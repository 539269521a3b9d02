"""What is trained: model sizes, the text, the rows; made once and given to every peer."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from samples import samples_of, save_samples
from work_order import DPO_BETA, LORA_ALPHA, LORA_RANK, WorkOrder

if TYPE_CHECKING:
    from torch import nn

    from kajiya.config.schema import Config
    from kajiya.flows.feeding import Data
    from kajiya.run.store import Store


@dataclass(frozen=True)
class Size:
    """A Llama."""

    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_size: int
    vocab_size: int
    tied: bool = True
    """Embedding and output head are one."""
    rope_theta: float = 10_000.0
    tokenizer_size: int | None = None
    """Tokens of the tokenizer, where the vocabulary is padded beyond them. The weights of such a size are made tensor by tensor
    (`large_shapes`) and read by every peer, Kajiya too, which builds the others itself."""

    @property
    def is_read(self) -> bool:
        """Whether every peer reads the weights."""
        return self.tokenizer_size is not None


SIZES = {
    "XS": Size(hidden_size=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_size=96, vocab_size=512),
    "S": Size(hidden_size=256, n_layers=6, n_heads=8, n_kv_heads=4, ffn_size=688, vocab_size=8192),
    "M": Size(hidden_size=640, n_layers=10, n_heads=10, n_kv_heads=5, ffn_size=1792, vocab_size=8192),
    "XR": Size(
        hidden_size=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_size=96, vocab_size=640, tied=False, tokenizer_size=512
    ),
    "1B": Size(
        hidden_size=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        ffn_size=8192,
        vocab_size=128_256,
        rope_theta=500_000.0,
        tokenizer_size=32_768,
    ),
    "8B": Size(
        hidden_size=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        ffn_size=14_336,
        vocab_size=128_256,
        tied=False,
        rope_theta=500_000.0,
        tokenizer_size=32_768,
    ),
}
"""XS and XR serve the smoke tests alone (XR is made and read as the large ones are); S has 6M parameters, M 52M. 1B and 8B, for a
GPU, have the dimensions of Llama-3.2-1B and Llama-3.1-8B, without the scaling of their angles for long texts."""

_OF_THE_VOCABULARY = ("vocab_size", "tokenizer_size")
_HERE = Path(__file__).resolve().parent
_RECIPES = {"pretrain": "pretraining.yaml"} | dict.fromkeys(("sft", "lora", "qlora", "dpo"), "tuning.yaml")
_LORA = [
    "adapter.name=lora",
    f"adapter.options.r={LORA_RANK}",
    f"adapter.options.alpha={LORA_ALPHA}",
    "adapter.options.targets=attention",
]
_PAIRS = ["data.source.options.rows=preference", "train.loss.name=dpo", f"train.loss.options.beta={DPO_BETA}"]
_METHODS = {"pretrain": [], "sft": [], "lora": _LORA, "qlora": [*_LORA, "model.quantize=nf4"], "dpo": _PAIRS}
"""What Kajiya's config says for each method."""
_MAX_BYTES = {"sft": 1200, "lora": 1200, "qlora": 1200, "dpo": 800}
"""Of a sample; both sequences of a pair share a row."""
_DPO_PACKAGES = "email"
"""Few pairs, for a reference pass over all of them is a part of what is measured."""


def kajiya_config(order: WorkOrder) -> "Config":
    """Kajiya's config of the order; with the folder of the weights where the size is read and they are made."""
    from kajiya.config.compose import compose

    size = SIZES[order.size]
    is_made = size.is_read and bool(order.model)
    overrides = [
        f"seed={order.seed}",
        f"data.row_tokens={order.tokens}",
        f"tokenizer.vocab_size={size.tokenizer_size or size.vocab_size}",
        "model.n_params=null",
        *(f"model.{name}={value}" for name, value in asdict(size).items() if name not in _OF_THE_VOCABULARY),
        f"model.max_positions={max(order.tokens, 2048)}",
        *([f"model.path={order.model}", f"tokenizer.path={order.model}"] if is_made else []),
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
        *_METHODS[order.method],
    ]
    if order.method in _MAX_BYTES:
        # XS has short tokens.
        max_bytes = order.tokens * 3 // 4 if order.size in ("XS", "XR") else _MAX_BYTES[order.method]
        overrides.append(f"data.source.options.max_bytes={max_bytes}")
    if order.method == "dpo" and order.text is None:
        overrides.append(f"data.source.options.packages={_DPO_PACKAGES}")
    overrides += [f"{name}={value}" for name, value in order.options.items()]
    if order.text is not None:
        overrides.append(f"data.source.options.root={order.text}")
    return compose(str(_HERE / _RECIPES[order.method]), overrides)


def make_workload(order: WorkOrder) -> WorkOrder:
    """Make what the order names with Kajiya's own stages; returns it with the precision settled and the paths filled in.

    The text, the tokenizer and the shards are artifacts of the store; the model and the rows lie in `<store>/benchmarks/`.
    """
    from kajiya.flows.stages import Stages
    from kajiya.flows.train import prepare_data
    from kajiya.run.code import code_revision
    from kajiya.run.files import new_folder
    from kajiya.run.process import quiet_torchao
    from kajiya.run.store import Store
    from kajiya.training.precision import resolve_device, resolve_precision

    quiet_torchao()
    if order.precision == "auto":
        precision = resolve_precision("auto", resolve_device("auto", "train.device"))
        order = replace(order, precision=precision.name)
    store = Store(Path(order.store))
    if SIZES[order.size].is_read:
        order = replace(order, model=str(_made_weights(order, store)))
    config = kajiya_config(order)
    data = prepare_data(config, store, Stages(_tell))
    made_of = {
        "data": {name: artifact.digest for name, artifact in data.parents().items()},
        "order": asdict(replace(order, store="", model="", precision="", compile=False)),
        "code": code_revision("kajiya.data.loader", "kajiya.models.build"),
    }
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(order.store) / "benchmarks" / name
    if not folder.is_dir():
        with new_folder(folder) as fresh:
            _write(order, config, data, fresh)
    facts = json.loads((folder / "facts.json").read_text())
    rows, samples = folder / "rows.npy", folder / "samples.npz"
    return replace(
        order,
        model=order.model or str(folder / "model"),
        rows_file=str(rows) if rows.exists() else "",
        samples_file=str(samples) if samples.exists() else "",
        scratch=str(folder / "scratch"),
        **facts,
    )


def _made_weights(order: WorkOrder, store: "Store") -> Path:
    """The folder with the weights of a size that is read: float32 for pretraining, bf16 else; one for each tokenizer and seed."""
    import torch

    from kajiya.data.tokenizer import load_tokenizer
    from kajiya.flows.stages import Stages
    from kajiya.flows.train import prepare_data
    from kajiya.run.files import new_folder
    from large_shapes import empty_model, write_weights

    config = kajiya_config(order)
    tokenizer = prepare_data(config, store, Stages(_tell)).tokenizer
    dtype = torch.float32 if order.method == "pretrain" else torch.bfloat16
    size = SIZES[order.size]
    made_of = [asdict(size), tokenizer.digest, order.seed, str(dtype), config.model.max_positions]
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    folder = store.root / "benchmarks" / f"weights-{name}"
    if not folder.is_dir():
        loaded = load_tokenizer(tokenizer.path)
        with new_folder(folder) as fresh:
            write_weights(empty_model(config, loaded, size.vocab_size), loaded, dtype, order.seed, fresh)
    return folder


def _write(order: WorkOrder, config: "Config", data: "Data", folder: Path) -> None:
    """The model with its initial weights, and the rows or samples of every step, in the order of Kajiya's loader."""
    import numpy as np

    from kajiya.data.tokenizer import load_tokenizer
    from kajiya.flows.feeding import open_feeding
    from kajiya.models.adapt import transform
    from kajiya.models.build import build_model, vocabulary_of
    from kajiya.models.save import save_model
    from large_shapes import empty_model

    tokenizer = load_tokenizer(data.tokenizer.path)
    if order.model:
        # Its operations are counted, its weights lie where they were made.
        model = empty_model(kajiya_config(replace(order, model="")), tokenizer, SIZES[order.size].vocab_size)
    else:
        model = build_model(config.model, vocabulary_of(tokenizer), config.seed).module
        save_model(model, tokenizer, folder / "model")
    transform(model, config.adapter, "none", config.seed)
    loader = open_feeding(config, data, None).loader(batch=order.rows)
    steps = range(order.steps)
    if order.method == "pretrain":
        batches = [loader.next() for _ in steps]
        rows = [np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1) for batch in batches]
        np.save(folder / "rows.npy", np.concatenate(rows).astype(np.int32))
        mean_length: float = order.tokens
    else:
        samples = [samples_of(loader.next()) for _ in steps]
        save_samples(samples, folder / "samples.npz")
        lengths = [len(sample.ids) for step in samples for sample in step]
        mean_length = sum(lengths) / len(lengths)
    (folder / "scratch").mkdir()
    facts = {"flops_per_token": flops_of(order, model, mean_length)}
    (folder / "facts.json").write_text(json.dumps(facts))


def flops_of(order: WorkOrder, model: "nn.Module", row_tokens: float) -> float:
    """Operations a token of the order's training; of DPO, those of the reference's forward pass too."""
    from kajiya.training.flops import flops_per_token

    each = flops_per_token(model, row_tokens)
    return each * 4 / 3 if order.method == "dpo" else each


def _tell(kind: str, **fields: object) -> None:
    if kind == "stage" and fields["state"] != "begun":
        print(f"{fields['name']}: {fields['text']} ({fields['state']})", file=sys.stderr, flush=True)
