"""TRL's DPOTrainer, as its documentation has it: the pairs of the order, padded, the reference model run in every step.

The trainer tokenizes text; here it is given the ids that its own preparation would have made, so that all learn from the same.
"""

from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from peers.trl_sft import NoteSteps, in_order, places_of, settings_of
from samples import Sample, read_samples
from work_order import DPO_BETA, Record, WorkOrder, read_order


class PreparedDPOTrainer(DPOTrainer):
    """Its data are prepared already."""

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **more: Any) -> Any:
        return dataset


def pairs_of(step: list[Sample]) -> list[dict[str, Any]]:
    """The step's pairs in the columns that the trainer's preparation makes."""
    pairs = []
    for chosen, rejected in zip(step[::2], step[1::2], strict=True):
        n = chosen.prompt_length
        parts = {"prompt_ids": chosen.ids[:n], "chosen_ids": chosen.ids[n:], "rejected_ids": rejected.ids[n:]}
        pairs.append({name: ids.tolist() for name, ids in parts.items()})
    return pairs


def train(order: WorkOrder, record: Record) -> None:
    steps = [pairs_of(step) for step in read_samples(order.samples_file)]
    dataset = Dataset.from_list([pair for step in steps for pair in step])
    model = AutoModelForCausalLM.from_pretrained(order.model)
    initial = float(sum(weight.detach().float().abs().sum() for weight in model.parameters()))
    arguments = DPOConfig(
        **settings_of(order),
        per_device_train_batch_size=max(map(len, steps)),
        beta=DPO_BETA,
        max_length=None,
        precompute_ref_log_probs=order.options.get("precompute") == "on",
    )
    trainer = PreparedDPOTrainer(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(order.model),
        args=arguments,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(order.model),
        callbacks=[NoteSteps(record)],
    )
    counts: list[int] = []

    def note(batch: Any) -> None:
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        half = len(ids) // 2
        # The chosen ones stand in front of the rejected ones; Kajiya's lie pair by pair.
        for number in range(half):
            for row in (number, number + half):
                record.tokens(ids[row][mask[row]].numpy())
        counts.append(int(mask.sum()))

    in_order(trainer, places_of(steps), note)
    trainer.train()
    record.answer(
        initial_weights=initial,
        step_tokens=counts[: order.steps],
        versions={"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        settings={
            "precision": "bf16 autocast" if arguments.bf16 else str(next(model.parameters()).dtype),
            "compiled": str(arguments.torch_compile),
            "reference": "before training" if arguments.precompute_ref_log_probs else "in every step",
            "device": str(arguments.device),
            "threads": torch.get_num_threads(),
            "attention": model.config._attn_implementation,
        },
    )


if __name__ == "__main__":
    noted = Record()
    train(read_order(), noted)
