"""The Hugging Face Trainer as its documentation has it: fused AdamW, sdpa attention, rows in memory, in the same order."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from work_order import Record, WorkOrder, read_order


class Rows(torch.utils.data.Dataset):
    """The rows in memory, one item each: ids [tokens + 1]."""

    def __init__(self, path: str) -> None:
        self._rows = np.load(path).astype(np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._rows[index]


class NoteSteps(TrainerCallback):
    """Notes each step when its loss is logged, which waits for the device."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any) -> None:
        if logs is not None and "loss" in logs:
            self._record.step(logs["loss"])


def train(order: WorkOrder, record: Record) -> None:
    def collate(rows: list[np.ndarray]) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.stack(rows))
        record.tokens(ids[:, :-1].numpy())
        # `shift_labels`: targets already shifted, so that a row's last token has one too, as in Kajiya.
        return {"input_ids": ids[:, :-1], "labels": ids[:, :-1], "shift_labels": ids[:, 1:].contiguous()}

    model = AutoModelForCausalLM.from_pretrained(order.model)
    initial = float(sum(weight.detach().float().abs().sum() for weight in model.parameters()))
    arguments = TrainingArguments(
        output_dir=str(Path(order.scratch) / "hf_trainer"),
        per_device_train_batch_size=order.micro_rows,
        gradient_accumulation_steps=order.accumulate,
        max_steps=order.steps,
        optim="adamw_torch_fused",
        learning_rate=order.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=order.beta1,
        adam_beta2=order.beta2,
        adam_epsilon=order.eps,
        max_grad_norm=order.clip_norm,
        bf16=order.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        torch_compile=order.compile,
        train_sampling_strategy="sequential",
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=order.seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(order.rows_file),
        data_collator=collate,
        callbacks=[NoteSteps(record)],
    )
    trainer.train()
    record.answer(
        initial_weights=initial,
        versions={"transformers": transformers.__version__, "torch": torch.__version__},
        settings={
            "precision": "bf16 autocast" if arguments.bf16 else str(next(model.parameters()).dtype),
            "compiled": str(arguments.torch_compile),
            "device": str(arguments.device),
            "threads": torch.get_num_threads(),
            "attention": model.config._attn_implementation,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        },
    )


if __name__ == "__main__":
    noted = Record()
    train(read_order(), noted)
