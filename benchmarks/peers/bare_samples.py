"""A plain loop over samples with the Transformers model: no trainer, no packing, bf16 autocast, fused AdamW.

Options: rows=full (the order's tokens as full rows without borders or masks: what isolation without waste should approach).
"""

from collections.abc import Iterator

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from samples import NO_TARGET, Sample, padded, read_samples
from work_order import LORA_ALPHA, LORA_RANK, Record, WorkOrder, read_order, require_method

Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def full_rows(steps: list[list[Sample]], order: WorkOrder) -> Iterator[Made]:
    """ids, labels and no mask: the samples one behind the other, cut into whole rows."""
    ids = np.concatenate([sample.ids for step in steps for sample in step])
    labels = np.concatenate([sample.labels for step in steps for sample in step])
    each = order.rows * order.tokens
    for step in range(order.steps):
        # The rows are fuller than packed ones, so that the tokens end a little early; they begin again.
        places = np.arange(step * each, (step + 1) * each) % len(ids)
        shape = (order.rows, order.tokens)
        yield torch.from_numpy(ids[places].reshape(shape)), torch.from_numpy(labels[places].reshape(shape)), None


def padded_batches(steps: list[list[Sample]], pad_id: int) -> Iterator[Made]:
    """ids, labels and attention mask: each step's samples, padded to the longest."""
    for step in steps:
        ids, labels, is_token = padded(step, pad_id)
        yield torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(is_token)


def train(order: WorkOrder, record: Record) -> None:
    require_method(order, "sft", "lora")
    torch.manual_seed(order.seed)
    is_full = order.options.get("rows") == "full"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(order.model).to(device)
    initial = float(sum(weight.detach().float().abs().sum() for weight in model.parameters()))
    if order.method == "lora":
        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=names))
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=order.lr, betas=(order.beta1, order.beta2), eps=order.eps, weight_decay=0.0, fused=True
    )
    forward = torch.compile(model, dynamic=True) if order.compile else model
    steps = read_samples(order.samples_file)
    pad_id = AutoTokenizer.from_pretrained(order.model).pad_token_id
    counts = []
    for ids, labels, mask in full_rows(steps, order) if is_full else padded_batches(steps, pad_id):
        for number, row in enumerate(ids):
            record.tokens((row if mask is None else row[mask[number]]).numpy())
        counts.append(ids.numel() if mask is None else int(mask.sum()))
        ids, targets = ids.to(device), labels[:, 1:].to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=order.precision == "bf16"):
            logits = forward(
                input_ids=ids, attention_mask=None if mask is None else mask.to(device), use_cache=False
            ).logits
        loss = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, order.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record.step(loss.item())
    record.answer(
        initial_weights=initial,
        step_tokens=counts,
        own_order="full rows without borders between the samples" if is_full else None,
        versions={"transformers": transformers.__version__, "torch": torch.__version__},
        settings={
            "precision": "bf16 autocast" if order.precision == "bf16" else "fp32",
            "compiled": str(order.compile),
            "device": device,
            "threads": torch.get_num_threads(),
        },
    )


if __name__ == "__main__":
    noted = Record()
    train(read_order(), noted)
