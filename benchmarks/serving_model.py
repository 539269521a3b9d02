"""The model that the serving benchmarks share, its prompts, and the running of peers in processes of their own."""

import json
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_hidden_layers": 10,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""A Llama of 52M parameters."""
QWEN3_SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""Qwen3-0.6B, its context cut."""
GEMMA3_SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""Eight layers of Gemma 3 270M, all but the sixth with a window, over 8,192 tokens: 50M parameters."""
SHAPES = {
    "llama-52m": ("llama", SHAPE),
    "qwen3-0.6b": ("qwen3", QWEN3_SHAPE),
    "gemma3-50m": ("gemma3_text", GEMMA3_SHAPE),
}
"""Name → architecture and sizes."""


def make_model(folder: Path, shape: str = "llama-52m") -> None:
    """A model of random weights with a byte-level tokenizer and a plain chat template, saved."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|end|>", *alphabet, *(f"{a}{b}" for a in alphabet for b in alphabet)][: SHAPE["vocab_size"]]
    merges = [(word[0], word[1]) for word in words if len(word) == 2]
    bpe = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    kind, sizes = SHAPES[shape]
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(kind, **sizes, **tokens, initializer_range=0.05)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def make_adapters(model: Path, to: Path, n: int) -> list[Path]:
    """LoRA adapters of rank 8 on all seven matrices of each layer, random, saved as PEFT saves them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    folders = []
    for number in range(n):
        torch.manual_seed(number)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(to / f"adapter-{number}")
        folders.append(to / f"adapter-{number}")
    return folders


def run_peer(script: str, order: dict, python: str) -> dict:
    """The last line of JSON that a script of `peers/` prints for an order."""
    environment = os.environ | {"OMP_NUM_THREADS": str(order["threads"]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, str(HERE / "peers" / f"{script}.py"), json.dumps(order)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise SystemExit(f"{script} failed with {order}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
