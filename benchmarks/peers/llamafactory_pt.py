"""LLaMA-Factory's stage `pt` on the order's rows, given as its `tokenized_path`.

Its loss shifts the labels itself, so that the last token of a row is no target (one of 512).
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from llamafactory.train import tuner
from llamafactory.train.pt import workflow
from transformers import TrainerCallback

from work_order import Record, WorkOrder, read_order


class NoteSteps(TrainerCallback):
    """Notes the initial weights, and each step when its loss is logged."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self.initial = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self.initial = float(sum(weight.detach().float().abs().sum() for weight in model.parameters()))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any) -> None:
        if logs is not None and "loss" in logs:
            self._record.step(logs["loss"])


def train(order: WorkOrder, record: Record) -> None:
    folder = Path(order.scratch) / "llamafactory"
    rows = np.load(order.rows_file)[:, :-1].tolist()
    made = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    DatasetDict({"train": made}).save_to_disk(str(folder / "rows"))
    arguments = {
        "stage": "pt",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": order.model,
        "template": "empty",
        "dataset": "rows",
        "tokenized_path": str(folder / "rows"),
        "cutoff_len": order.tokens,
        "disable_shuffling": True,
        "output_dir": str(folder / "out"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": order.micro_rows,
        "gradient_accumulation_steps": order.accumulate,
        "max_steps": order.steps,
        "optim": "adamw_torch_fused",
        "learning_rate": order.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta1": order.beta1,
        "adam_beta2": order.beta2,
        "adam_epsilon": order.eps,
        "max_grad_norm": order.clip_norm,
        "bf16": order.precision == "bf16",
        "torch_compile": order.compile,
        "disable_gradient_checkpointing": True,
        "flash_attn": "sdpa",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": order.seed,
    }
    noted = NoteSteps(record)
    collate = workflow.DataCollatorForLanguageModeling.__call__

    def collate_and_note(self: Any, features: Any, return_tensors: str | None = None) -> Any:
        batch = collate(self, features, return_tensors)
        record.tokens(batch["input_ids"].numpy())
        return batch

    workflow.DataCollatorForLanguageModeling.__call__ = collate_and_note
    workflow.CustomTrainer.save_model = lambda self, *arguments, **more: None
    tuner.run_exp(arguments, callbacks=[noted])
    record.answer(
        initial_weights=noted.initial,
        versions={name: version(name) for name in ("llamafactory", "transformers", "torch")},
        settings={
            "precision": "bf16 autocast" if order.precision == "bf16" else "fp32",
            "compiled": str(order.compile),
            "threads": torch.get_num_threads(),
        },
    )


if __name__ == "__main__":
    answered = Record()
    train(read_order(), answered)
