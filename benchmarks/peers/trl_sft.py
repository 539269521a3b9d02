"""TRL's SFTTrainer, as its documentation has it, full or with LoRA. Options: packing=on (its own packing, to the row's tokens).

Unpacked, each step's samples are those of the order, one padded batch: only the sampler is replaced. Packed, the trainer packs
the same samples in its own order.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from samples import read_samples
from work_order import LORA_ALPHA, LORA_RANK, Record, WorkOrder, read_order, require_method


class NoteSteps(TrainerCallback):
    """Notes each step when its loss is logged."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any) -> None:
        if logs is not None and "loss" in logs:
            self._record.step(logs["loss"])


def settings_of(order: WorkOrder) -> dict[str, Any]:
    """What the trainers of both methods are told alike."""
    return {
        "output_dir": str(Path(order.scratch) / "trl"),
        "gradient_accumulation_steps": 1,
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
        "use_cpu": not torch.cuda.is_available(),
        "torch_compile": order.compile,
        # TRL turns it on by itself.
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": order.seed,
    }


def lora_of(order: WorkOrder) -> LoraConfig | None:
    """The adapter of the order."""
    if order.method != "lora":
        return None
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=names, task_type="CAUSAL_LM")


def in_order(trainer: Any, places: list[list[int]], note: Any) -> None:
    """Make the trainer's batches those of the order, and have each noted."""
    collate = trainer.data_collator

    def collate_and_note(examples: list[Any]) -> Any:
        batch = collate(examples)
        note(batch)
        return batch

    trainer.get_train_dataloader = lambda: DataLoader(
        trainer.train_dataset, batch_sampler=places, collate_fn=collate_and_note
    )


def places_of(steps: list[list[Any]]) -> list[list[int]]:
    """Numbers of each step's items."""
    numbers = iter(range(sum(map(len, steps))))
    return [[next(numbers) for _ in step] for step in steps]


def places_of_packed(n: int, order: WorkOrder) -> list[list[int]]:
    """Numbers of each step's rows, of `n` that the trainer packed by itself.

    The last steps may find no row left where it packed tighter than the order's rows: it begins again.
    """
    rows = [list(range(first, min(n, first + order.rows))) for first in range(0, n, order.rows)]
    return [rows[step % len(rows)] for step in range(order.steps)]


def train(order: WorkOrder, record: Record) -> None:
    require_method(order, "sft", "lora")
    is_packed = order.options.get("packing") == "on"
    steps = read_samples(order.samples_file)
    samples = [sample for step in steps for sample in step]
    dataset = Dataset.from_list([{"input_ids": sample.ids, "labels": sample.labels} for sample in samples])
    model = AutoModelForCausalLM.from_pretrained(order.model)
    initial = float(sum(weight.detach().float().abs().sum() for weight in model.parameters()))
    arguments = SFTConfig(
        **settings_of(order),
        # Without packing, a step's samples are one batch.
        per_device_train_batch_size=order.rows if is_packed else max(map(len, steps)),
        train_sampling_strategy="sequential",
        packing=is_packed,
        max_length=order.tokens,
    )
    tokenizer = AutoTokenizer.from_pretrained(order.model)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[NoteSteps(record)],
        peft_config=lora_of(order),
    )
    counts: list[int] = []

    def note(batch: Any) -> None:
        ids = batch["input_ids"]
        for row, mask in zip(ids, batch.get("attention_mask", torch.ones_like(ids)), strict=True):
            record.tokens(row[mask.bool()].numpy())
        counts.append(int(batch.get("attention_mask", torch.ones_like(ids)).sum()))

    in_order(trainer, places_of_packed(len(trainer.train_dataset), order) if is_packed else places_of(steps), note)
    trainer.train()
    record.answer(
        initial_weights=initial,
        step_tokens=counts[: order.steps],
        own_order="it packs the same samples itself" if is_packed else None,
        versions={"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        settings={
            "precision": "bf16 autocast" if arguments.bf16 else str(next(model.parameters()).dtype),
            "compiled": str(arguments.torch_compile),
            "packing": str(is_packed),
            "device": str(arguments.device),
            "threads": torch.get_num_threads(),
            "attention": model.config._attn_implementation,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        },
    )


if __name__ == "__main__":
    noted = Record()
    train(read_order(), noted)
