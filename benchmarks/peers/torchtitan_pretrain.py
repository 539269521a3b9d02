"""torchtitan's trainer in one process: its Llama 3, chunked loss, fused AdamW, float32 parameters read in bf16, CUDA graphs.

Its loader is replaced by the order's rows, its checkpointer reads the order's model, and nothing is saved. Options:
attention=varlen or flex_flash (flex unless said), checkpointing=selective (off unless said), graphs=off.
"""

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from peers.on_gpu import require_gpu
from work_order import Record, WorkOrder, read_order, require_method


def model_spec(order: WorkOrder) -> Any:
    """The order's model in torchtitan's words, from the config.json beside its weights."""
    from torchtitan.components.quantization import Float8LinearConverter
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm

    sizes = json.loads((Path(order.model) / "config.json").read_text(encoding="utf-8"))
    width, n_words, n_heads = sizes["hidden_size"], sizes["vocab_size"], sizes["num_attention_heads"]
    rope = ComplexRoPE.Config(
        dim=width // n_heads, max_seq_len=order.tokens, theta=sizes["rope_parameters"]["rope_theta"]
    )
    # What the weights begin as does not matter: they are read.
    model = llama3.Llama3Model.Config(
        dim=width,
        vocab_size=n_words,
        enable_weight_tying=sizes["tie_word_embeddings"],
        tok_embeddings=Embedding.Config(num_embeddings=n_words, embedding_dim=width, param_init=llama3._EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=width, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(in_features=width, out_features=n_words, param_init=llama3._output_linear_init(width)),
        layers=llama3._build_llama3_layers(
            n_layers=sizes["num_hidden_layers"],
            dim=width,
            n_heads=n_heads,
            n_kv_heads=sizes["num_key_value_heads"],
            hidden_dim=sizes["intermediate_size"],
            rope=rope,
            attn_backend=order.options.get("attention", "flex"),
        ),
    )
    for _, norm, _, _ in model.traverse(RMSNorm.Config):
        norm.eps = sizes["rms_norm_eps"]
    if order.precision == "fp8":
        model = (
            Float8LinearConverter.Config(filter_fqns=["lm_head"], model_compile_enabled=order.compile)
            .build()
            .convert(model)
        )
    spec = llama3.model_registry("debugmodel")
    spec.flavor, spec.model = order.size, model
    return spec


def loader_of(order: WorkOrder, record: Record) -> Any:
    """The config of a loader that gives out the order's rows, one micro-batch at a time."""
    import torch
    from torchtitan.components.dataloader import BaseDataLoader

    class Rows(BaseDataLoader):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config: Any, *, local_batch_size: int, **_: Any) -> None:
            self._rows = torch.from_numpy(np.load(config.dataset_path).astype(np.int64))
            self._at_once = local_batch_size

        def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
            places = torch.arange(self._rows.shape[1] - 1).expand(self._at_once, -1)
            for rows in self._rows.split(self._at_once):
                record.tokens(rows[:, :-1].numpy())
                yield {"input": rows[:, :-1].contiguous(), "positions": places.contiguous()}, rows[:, 1:].contiguous()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            pass

    return Rows.Config(dataset_path=order.rows_file)


def trainer_config(order: WorkOrder, record: Record) -> Any:
    """torchtitan's config of the order."""
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.config import CompileConfig, TrainingConfig
    from torchtitan.distributed.activation_checkpoint import SelectiveAC
    from torchtitan.trainer import Trainer

    spec = model_spec(order)
    loss = CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size)
    is_varlen = order.options.get("attention") == "varlen"
    return Trainer.Config(
        model_spec=spec,
        hf_assets_path=order.model,
        dump_folder=str(Path(order.scratch) / "torchtitan"),
        loss=ChunkedLossWrapper.Config(loss_fn=loss),
        optimizer=default_adamw(lr=order.lr, betas=(order.beta1, order.beta2), eps=order.eps, weight_decay=0.0),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0),
        training=TrainingConfig(
            local_batch_size=order.micro_rows,
            global_batch_size=order.rows,
            seq_len=order.tokens,
            max_norm=order.clip_norm,
            steps=order.steps,
            dtype="float32",
            mixed_precision_param="float32" if order.precision == "fp32" else "bfloat16",
            # It turns them off for this attention itself, in its own configs.
            disable_cuda_graphs=is_varlen or order.options.get("graphs") == "off",
        ),
        dataloader=loader_of(order, record),
        metrics=MetricsProcessor.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(
            enable=True, load_only=True, initial_load_path=order.model, initial_load_in_hf=True
        ),
        activation_checkpoint=SelectiveAC.Config() if order.options.get("checkpointing") == "selective" else None,
        compile=CompileConfig(enable=order.compile),
    )


def one_process() -> None:
    """Say in the environment, as torchrun does, that this process is the only one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def noting(trainer: Any, record: Record) -> list[float]:
    """Have each step noted when it is logged; what is returned holds Σ|w| once the weights are read."""
    from torch.distributed.tensor import DTensor

    load, log = trainer.checkpointer.load, trainer.metrics_processor.log
    initial: list[float] = []

    def loaded(step: int = -1) -> bool:
        is_found = load(step)
        weights = (weight.detach() for part in trainer.model_parts for weight in part.parameters())
        whole = (weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights)
        initial.append(float(sum(weight.float().abs().sum() for weight in whole)))
        return is_found

    def logged(step: int, global_avg_loss: float, *rest: Any, **more: Any) -> None:
        log(step, global_avg_loss, *rest, **more)
        record.step(global_avg_loss)

    trainer.checkpointer.load, trainer.metrics_processor.log = loaded, logged
    return initial


def train(order: WorkOrder, record: Record) -> None:
    require_method(order, "pretrain")
    require_gpu("torchtitan")
    one_process()
    import torch

    config = trainer_config(order, record)
    trainer = config.build()
    try:
        initial = noting(trainer, record)
        trainer.train()
    finally:
        trainer.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    record.answer(
        initial_weights=initial[0],
        versions={name: version(name) for name in ("torchtitan", "torch")},
        settings={
            "precision": f"{order.precision}, float32 parameters",
            "compiled": str(config.compile.enable),
            "attention": order.options.get("attention", "flex"),
            "cuda_graphs": str(not config.training.disable_cuda_graphs),
            "checkpointing": order.options.get("checkpointing", "off"),
            "device": str(trainer.device),
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        },
    )


if __name__ == "__main__":
    noted = Record()
    train(read_order(), noted)
