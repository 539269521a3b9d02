"""What a good engineer writes by hand for one shape: a Llama with fused q-k-v and gate-up products and a loop around it.

bf16 weights with float32 masters in a fused AdamW; the step's forward pass compiled where the order says so. Options:
allocator=on (glibc serves all from the heap and gives nothing back), chunks=N (cross-entropy in N chunks, each made again in
the backward pass).

Shape letters: B rows, T tokens, D hidden width, H heads, G key-value heads, Q width of a head, V vocabulary.
"""

import ctypes
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from work_order import Record, WorkOrder, read_order


class Block(nn.Module):
    """One decoder block, its products fused."""

    def __init__(self, sizes: dict) -> None:
        super().__init__()
        width, self.heads, self.groups = (
            sizes["hidden_size"],
            sizes["num_attention_heads"],
            sizes["num_key_value_heads"],
        )
        self.head_width = width // self.heads
        self.eps = sizes["rms_norm_eps"]
        self.qkv = nn.Linear(width, (self.heads + 2 * self.groups) * self.head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * sizes["intermediate_size"], bias=False)
        self.down = nn.Linear(sizes["intermediate_size"], width, bias=False)
        self.norm_1 = nn.Parameter(torch.ones(width))
        self.norm_2 = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: torch.Tensor, cos_TQ: torch.Tensor, sin_TQ: torch.Tensor) -> torch.Tensor:
        shape = (*x_BTD.shape[:2], self.heads + 2 * self.groups, self.head_width)
        h_BTD = functional.rms_norm(x_BTD, self.norm_1.shape, self.norm_1, self.eps)
        all_BHTQ = self.qkv(h_BTD).view(shape).transpose(1, 2)
        q_BHTQ, k_BGTQ, v_BGTQ = all_BHTQ.split([self.heads, self.groups, self.groups], dim=1)
        y_BHTQ = functional.scaled_dot_product_attention(
            rotated(q_BHTQ, cos_TQ, sin_TQ), rotated(k_BGTQ, cos_TQ, sin_TQ), v_BGTQ, is_causal=True, enable_gqa=True
        )
        x_BTD = x_BTD + self.out(y_BHTQ.transpose(1, 2).flatten(2))
        h_BTD = functional.rms_norm(x_BTD, self.norm_2.shape, self.norm_2, self.eps)
        gate, up = self.gate_up(h_BTD).chunk(2, dim=-1)
        return x_BTD + self.down(functional.silu(gate) * up)


def rotated(x: torch.Tensor, cos_TQ: torch.Tensor, sin_TQ: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves turned against each other."""
    left, right = x.chunk(2, dim=-1)
    return x * cos_TQ + torch.cat([-right, left], dim=-1) * sin_TQ


class Model(nn.Module):
    """The decoder with its tied head; the forward pass ends in the summed loss."""

    def __init__(self, sizes: dict, tokens: int, chunks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes["vocab_size"], sizes["hidden_size"])
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes["num_hidden_layers"]))
        self.norm = nn.Parameter(torch.ones(sizes["hidden_size"]))
        self.eps, self.chunks = sizes["rms_norm_eps"], chunks
        width = sizes["hidden_size"] // sizes["num_attention_heads"]
        theta = (sizes.get("rope_parameters") or sizes)["rope_theta"]
        rates = theta ** (-torch.arange(0, width, 2).float() / width)
        angles = torch.outer(torch.arange(tokens).float(), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos, self.sin)
        x_ND = functional.rms_norm(x_BTD, self.norm.shape, self.norm, self.eps).flatten(0, 1)
        targets_N = targets_BT.flatten()
        if self.chunks == 1:
            return self.loss(x_ND, targets_N)
        pairs = zip(x_ND.chunk(self.chunks), targets_N.chunk(self.chunks), strict=True)
        return sum(checkpoint(self.loss, x, targets, use_reentrant=False) for x, targets in pairs)

    def loss(self, x_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        logits_NV = functional.linear(x_ND, self.embedding.weight).float()
        return functional.cross_entropy(logits_NV, targets_N, reduction="sum")


def fused(weights: dict[str, torch.Tensor], n_layers: int) -> dict[str, torch.Tensor]:
    """Transformers' weights under this model's names."""
    made = {"embedding.weight": weights["model.embed_tokens.weight"], "norm": weights["model.norm.weight"]}
    for number in range(n_layers):
        old, new = f"model.layers.{number}", f"blocks.{number}"
        made[f"{new}.qkv.weight"] = torch.cat([weights[f"{old}.self_attn.{n}_proj.weight"] for n in "qkv"])
        made[f"{new}.gate_up.weight"] = torch.cat([weights[f"{old}.mlp.{n}_proj.weight"] for n in ("gate", "up")])
        made[f"{new}.out.weight"] = weights[f"{old}.self_attn.o_proj.weight"]
        made[f"{new}.down.weight"] = weights[f"{old}.mlp.down_proj.weight"]
        made[f"{new}.norm_1"] = weights[f"{old}.input_layernorm.weight"]
        made[f"{new}.norm_2"] = weights[f"{old}.post_attention_layernorm.weight"]
    return made


def keep_large_blocks() -> None:
    """glibc: serve all from the heap, and give nothing back."""
    libc = ctypes.CDLL("libc.so.6")
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    for name, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 256 * 2**20)):
        libc.mallopt(name, value)


def train(order: WorkOrder, record: Record) -> None:
    if order.options.get("allocator") == "on":
        keep_large_blocks()
    torch.manual_seed(order.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[order.precision]
    sizes = json.loads((Path(order.model) / "config.json").read_text())
    model = Model(sizes, order.tokens, int(order.options.get("chunks", "1")))
    model.load_state_dict(fused(load_file(Path(order.model) / "model.safetensors"), sizes["num_hidden_layers"]))
    initial = float(sum(weight.detach().abs().sum() for weight in model.parameters()))
    masters = [weight.detach().clone().to(device) for weight in model.parameters()]
    model.to(device=device, dtype=dtype)
    optimizer = torch.optim.AdamW(
        masters, lr=order.lr, betas=(order.beta1, order.beta2), eps=order.eps, weight_decay=0.0, fused=True
    )
    forward = torch.compile(model) if order.compile else model
    rows = torch.from_numpy(np.load(order.rows_file).astype(np.int64))
    n_targets = order.rows * order.tokens
    for step in rows.split(order.rows):
        total = torch.zeros((), device=device)
        for part in step.split(order.micro_rows):
            ids, targets = part[:, :-1].contiguous().to(device), part[:, 1:].contiguous().to(device)
            record.tokens(part[:, :-1].numpy())
            loss = forward(ids, targets) / n_targets
            loss.backward()
            total += loss.detach()
        for master, weight in zip(masters, model.parameters(), strict=True):
            master.grad = weight.grad.to(master.dtype)
        torch.nn.utils.clip_grad_norm_(masters, order.clip_norm)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, model.parameters(), strict=True):
                weight.copy_(master)
                weight.grad = master.grad = None
        record.step(total.item())
    record.answer(
        initial_weights=initial,
        versions={"torch": torch.__version__},
        settings={
            "precision": "bf16 weights, float32 masters" if order.precision == "bf16" else "fp32",
            "compiled": str(order.compile),
            "allocator": order.options.get("allocator", "off"),
            "chunks": order.options.get("chunks", "1"),
            "device": device,
            "threads": torch.get_num_threads(),
        },
    )


if __name__ == "__main__":
    noted = Record()
    train(read_order(), noted)
