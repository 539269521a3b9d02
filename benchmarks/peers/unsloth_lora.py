"""Unsloth: LoRA, and QLoRA on its 4-bit base, of the order's samples, by `FastLanguageModel` and the TRL trainer that it patches.

Unpacked, each step's samples are those of the order, one batch, which Unsloth may run without padding (its own choice). Options:
packing=on (its own packing, to the row's tokens), checkpointing=unsloth (off unless said).
"""

from typing import Any

from peers.on_gpu import require_gpu
from peers.unsloth_full import checkpointing, loading
from samples import read_samples
from work_order import LORA_ALPHA, LORA_RANK, Record, WorkOrder, read_order, require_method


def adapting(order: WorkOrder) -> dict[str, Any]:
    """Arguments of `FastLanguageModel.get_peft_model`: the adapter of every peer."""
    return {
        "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "use_gradient_checkpointing": checkpointing(order),
        "random_state": order.seed,
        "max_seq_length": order.tokens,
    }


def train(order: WorkOrder, record: Record) -> None:
    require_method(order, "lora", "qlora")
    require_gpu("unsloth")
    # First, or it cannot patch the others.
    import unsloth

    # isort: split
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from peers.trl_sft import NoteSteps, in_order, places_of, places_of_packed, settings_of

    is_packed = order.options.get("packing") == "on"
    steps = read_samples(order.samples_file)
    samples = [sample for step in steps for sample in step]
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(**loading(order), dtype=torch.bfloat16)
    # Of weights in 4 bits there is no sum to compare; those that stay whole are the same ones in every peer.
    initial = float(sum(each.detach().float().abs().sum() for each in model.parameters() if each.is_floating_point()))
    model = unsloth.FastLanguageModel.get_peft_model(model, **adapting(order))
    arguments = SFTConfig(
        **settings_of(order),
        per_device_train_batch_size=order.rows if is_packed else max(map(len, steps)),
        packing=is_packed,
        max_length=order.tokens,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": each.ids, "labels": each.labels} for each in samples]),
        processing_class=tokenizer,
        callbacks=[NoteSteps(record)],
    )
    counts: list[int] = []

    def note(batch: Any) -> None:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        for number, row in enumerate(ids):
            record.tokens((row if mask is None else row[mask[number].bool()]).numpy())
        counts.append(int(ids.numel() if mask is None else mask.sum()))

    in_order(trainer, places_of_packed(len(trainer.train_dataset), order) if is_packed else places_of(steps), note)
    trainer.train()
    record.answer(
        initial_weights=initial,
        step_tokens=counts[: order.steps],
        own_order="it packs the same samples itself" if is_packed else None,
        versions={
            "unsloth": unsloth.__version__,
            "trl": trl.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        settings={
            "precision": "bf16",
            "base": "nf4, double quantization" if order.method == "qlora" else "bf16",
            # It says there whether it did as it was asked.
            "packing": str(trainer.args.packing),
            "padding_free": str(trainer.args.padding_free),
            "checkpointing": str(checkpointing(order)),
            "device": str(arguments.device),
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        },
    )


if __name__ == "__main__":
    noted = Record()
    train(read_order(), noted)
