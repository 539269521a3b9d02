"""LitGPT's `litgpt pretrain` (its model, compiled as it always does, its loss and its loop) on the order's rows, nothing saved.

bf16 is its bf16-true: weights and optimizer state in bf16, no float32 masters.
"""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.loggers.logger import Logger
from litgpt import Config, pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from torch.utils.data import DataLoader

from work_order import Record, WorkOrder, read_order


class Rows(DataModule):
    """The order's rows [tokens + 1], in their order; the recipe also asks for rows to try an evaluation on."""

    def __init__(self, order: WorkOrder, record: Record) -> None:
        self._order = order
        self._record = record
        self._n_to_note = order.steps * order.accumulate
        """The loop asks for one batch more than it trains on."""

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None: ...

    def _loader(self, rows: np.ndarray, note: bool) -> DataLoader:
        def collate(each: list[np.ndarray]) -> torch.Tensor:
            batch = np.stack(each)
            if note and self._n_to_note:
                self._n_to_note -= 1
                self._record.tokens(batch[:, :-1])
            return torch.from_numpy(batch)

        return DataLoader(rows, batch_size=self._order.micro_rows, shuffle=False, collate_fn=collate)

    def train_dataloader(self) -> DataLoader:
        return self._loader(np.load(self._order.rows_file), note=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(np.load(self._order.rows_file)[: self._order.micro_rows], note=False)


class NoteSteps(Logger):
    """The recipe's logger: notes each line that it logs, which is one a step."""

    def __init__(self, record: Record) -> None:
        self._record = record

    name = "record"
    version = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._record.step(float(metrics["loss"]))

    def log_hyperparams(self, *arguments: Any, **more: Any) -> None: ...


def config_of(order: WorkOrder) -> Config:
    """LitGPT's config of the order's model."""
    import json

    sizes = json.loads((Path(order.model) / "config.json").read_text())
    rope = sizes.get("rope_parameters") or sizes
    return Config(
        name=f"Llama-benchmark-{order.size}",
        block_size=order.tokens,
        vocab_size=sizes["vocab_size"],
        padded_vocab_size=sizes["vocab_size"],
        n_layer=sizes["num_hidden_layers"],
        n_head=sizes["num_attention_heads"],
        n_query_groups=sizes["num_key_value_heads"],
        n_embd=sizes["hidden_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=sizes["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        intermediate_size=sizes["intermediate_size"],
        rope_base=int(rope["rope_theta"]),
    )


def initial_weights(order: WorkOrder, config: Config, folder: Path) -> float:
    """Write the order's weights in LitGPT's names into `folder`; returns Σ|w| (the head is the embedding)."""
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from safetensors.torch import load_file

    weights = load_file(Path(order.model) / "model.safetensors")
    total = float(sum(weight.abs().sum() for name, weight in weights.items() if name != "lm_head.weight"))
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    converted: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, converted, weights)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(converted, folder / "lit_model.pth")
    return total


def train(order: WorkOrder, record: Record) -> None:
    config = config_of(order)
    folder = Path(order.scratch) / "litgpt"
    total = initial_weights(order, config, folder / "initial")
    pretrain.choose_logger = lambda *arguments, **more: NoteSteps(record)
    pretrain.save_checkpoint = lambda *arguments, **more: None
    precision = {"bf16": "bf16-true", "fp32": "32-true"}[order.precision]
    pretrain.setup(
        model_name=config.name,
        model_config=config,
        out_dir=folder / "out",
        precision=precision,
        initial_checkpoint_dir=folder / "initial",
        data=Rows(order, record),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=order.rows,
            micro_batch_size=order.micro_rows,
            lr_warmup_steps=0,
            max_tokens=order.steps * order.rows * order.tokens,
            max_seq_length=order.tokens,
            tie_embeddings=True,
            max_norm=order.clip_norm,
            min_lr=order.lr,
        ),
        eval=EvalArgs(interval=order.steps + 1, max_iters=1, initial_validation=False, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {
                "lr": order.lr,
                "betas": [order.beta1, order.beta2],
                "eps": order.eps,
                "weight_decay": 0.0,
            },
        },
        devices=1,
        logger_name="csv",
        seed=order.seed,
    )
    record.answer(
        initial_weights=total,
        versions={name: version(name) for name in ("litgpt", "lightning", "torch")},
        settings={
            "precision": f"{precision}, without float32 masters" if order.precision == "bf16" else precision,
            "compiled": "True",
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
        },
    )


if __name__ == "__main__":
    noted = Record()
    train(read_order(), noted)
