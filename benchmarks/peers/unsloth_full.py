"""Unsloth: full fine-tuning of the order's model on its rows, by its `FastLanguageModel` and the trainer of TRL that it patches.

Weights in bf16 and no float32 masters, as it does by itself; option masters=on asks it for float32 weights. Options besides:
checkpointing=unsloth (its own, which it recommends for long rows; off unless said). The labels are shifted inside, so that the
last token of a row is no target (one of 4,096).
"""

from typing import Any

import numpy as np

from peers.on_gpu import require_gpu
from work_order import Record, WorkOrder, read_order, require_method


def loading(order: WorkOrder) -> dict[str, Any]:
    """Arguments of `FastLanguageModel.from_pretrained` that all methods share."""
    return {
        "model_name": order.model,
        "max_seq_length": order.tokens,
        "load_in_4bit": order.method == "qlora",
        "full_finetuning": order.method == "pretrain",
        "use_gradient_checkpointing": checkpointing(order),
        "random_state": order.seed,
    }


def checkpointing(order: WorkOrder) -> str | bool:
    """Whether activations are made again, in Unsloth's words."""
    return "unsloth" if order.options.get("checkpointing") == "unsloth" else False


def micro_batches(order: WorkOrder) -> list[list[int]]:
    """Numbers of the rows that pass through the model at once."""
    n = order.rows * order.steps
    return [list(range(first, first + order.micro_rows)) for first in range(0, n, order.micro_rows)]


def train(order: WorkOrder, record: Record) -> None:
    require_method(order, "pretrain")
    require_gpu("unsloth")
    # First, or it cannot patch the others.
    import unsloth

    # isort: split
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from peers.trl_sft import NoteSteps, in_order, settings_of

    has_masters = order.options.get("masters") == "on"
    masters = {"float32_mixed_precision": True} if has_masters else {}
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(**loading(order), **masters, dtype=torch.bfloat16)
    initial = float(sum(weight.detach().float().abs().sum() for weight in model.parameters()))
    rows = np.load(order.rows_file)[:, :-1].tolist()
    arguments = SFTConfig(
        **settings_of(order)
        | {
            "per_device_train_batch_size": order.micro_rows,
            "gradient_accumulation_steps": order.accumulate,
            "max_length": order.tokens,
            "packing": False,
            # All rows are full.
            "padding_free": False,
        }
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=tokenizer,
        callbacks=[NoteSteps(record)],
    )
    in_order(trainer, micro_batches(order), lambda batch: record.tokens(batch["input_ids"].numpy()))
    trainer.train()
    record.answer(
        initial_weights=initial,
        versions={
            "unsloth": unsloth.__version__,
            "trl": trl.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        settings={
            "precision": f"bf16, {'float32 weights' if has_masters else 'without float32 masters'}",
            "compiled": "by Unsloth",
            "checkpointing": str(checkpointing(order)),
            "device": str(arguments.device),
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        },
    )


if __name__ == "__main__":
    noted = Record()
    train(read_order(), noted)
