"""torchtune's recipe `full_finetune_single_device` with the config beside this file: its model, loss, optimizer and loop.

Its data set is replaced by the order's rows, its checkpointer reads the order's model, and nothing is saved at the end. The recipe
shifts the labels itself, so that the last token of a row is no target (one of 512).
"""

import sys
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torchtune.training.metric_logging import MetricLoggerInterface

from work_order import Record, WorkOrder, read_order


def recipe_of_torchtune() -> Any:
    """The recipe's class; torchtune ships its recipes as files, not as a package."""
    (site,) = find_spec("torchtune").submodule_search_locations
    path = Path(site).parent / "recipes" / "full_finetune_single_device.py"
    spec = spec_from_file_location("full_finetune_single_device", path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.FullFinetuneRecipeSingleDevice


CONFIG = Path(__file__).with_name("torchtune_full.yaml")
RECORD = Record()


class Rows(torch.utils.data.Dataset):
    """The order's rows: tokens and labels, not shifted."""

    def __init__(self, tokenizer: Any, path: str) -> None:
        self._rows = np.load(path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self._rows[index, :-1].tolist()
        return {"tokens": ids, "labels": ids}


class Tokenizer:
    """What the recipe asks of one: the rows are tokens already."""

    pad_id = 0


class NoteSteps(MetricLoggerInterface):
    """The recipe's logger: notes each step."""

    def log(self, name: str, data: Any, step: int) -> None: ...

    def log_config(self, config: Any) -> None: ...

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        RECORD.step(float(payload["loss"]))

    def close(self) -> None: ...


class Recipe(recipe_of_torchtune()):
    """The recipe, which notes its batches and saves nothing."""

    def _loss_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        RECORD.tokens(batch["tokens"].cpu().numpy())
        return super()._loss_step(batch)

    def save_checkpoint(self, epoch: int) -> None: ...


def train(order: WorkOrder) -> None:
    sizes = OmegaConf.load(Path(order.model) / "config.json")
    rope = sizes.get("rope_parameters") or sizes
    own = {
        "output_dir": str(Path(order.scratch) / "torchtune"),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": order.precision,
        "compile": order.compile,
        "seed": order.seed,
        "batch_size": order.micro_rows,
        "gradient_accumulation_steps": order.accumulate,
        "max_steps_per_epoch": order.steps,
        "clip_grad_norm": order.clip_norm,
        "dataset": {"path": order.rows_file},
        "checkpointer": {"checkpoint_dir": order.model},
        "optimizer": {"lr": order.lr, "betas": [order.beta1, order.beta2], "eps": order.eps},
        "model": {
            "vocab_size": sizes.vocab_size,
            "num_layers": sizes.num_hidden_layers,
            "num_heads": sizes.num_attention_heads,
            "num_kv_heads": sizes.num_key_value_heads,
            "embed_dim": sizes.hidden_size,
            "max_seq_len": order.tokens,
            "intermediate_dim": sizes.intermediate_size,
            "norm_eps": sizes.rms_norm_eps,
            "rope_base": int(rope.rope_theta),
        },
    }
    config = OmegaConf.merge(OmegaConf.load(CONFIG), own)
    recipe = Recipe(cfg=config)
    recipe.setup(cfg=config)
    initial = float(sum(weight.detach().float().abs().sum() for weight in recipe._model.parameters()))
    recipe.train()
    RECORD.answer(
        initial_weights=initial,
        versions={name: version(name) for name in ("torchtune", "torchao", "torch")},
        settings={
            "precision": f"{config.dtype}, without float32 masters" if config.dtype == "bf16" else config.dtype,
            "compiled": str(config.compile),
            "loss": str(config.loss._component_),
            "device": str(config.device),
            "threads": torch.get_num_threads(),
        },
    )


if __name__ == "__main__":
    # The config names this file's classes by their module, whose record is the one that counts.
    from peers import torchtune_full

    torchtune_full.train(read_order())
