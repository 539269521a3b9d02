"""llama.cpp in process, by llama-cpp-python's bindings of its own batched decoding; a GGUF is made from the folder first.

Prints tokens a second by number of streams, from one JSON order.
"""

import ctypes
import json
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from prompts import prompts, seconds
from safetensors import safe_open

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}


def write_gguf(folder: Path, to: Path, kind: str) -> None:
    """The Llama in `folder` in llama.cpp's format, matrices in `kind`."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(to), "llama")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, folder)
    with safe_open(folder / "model.safetensors", "numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            data = tensors.get_tensor(name).astype(np.float32)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                # llama.cpp rotates neighbouring coordinates, Transformers the two halves.
                n = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
                data = data.reshape(n, 2, data.shape[0] // n // 2, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
            _add(writer, _name(name), data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    control = gguf.TokenType.CONTROL
    writer.add_token_types([control if token == "<|end|>" else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _name(name: str) -> str:
    named = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in named:
        return named[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _add(writer: gguf.GGUFWriter, name: str, data: np.ndarray, kind: str) -> None:
    if data.ndim == 1 or kind == "f32":
        writer.add_tensor(name, data)
        return
    # The tied head is read whole at every token; llama.cpp's own Q4_0 files keep it in more bits.
    type_ = TYPES["q8_0" if kind == "q4_0" and name.startswith("token_embd") else kind]
    writer.add_tensor(name, gguf.quants.quantize(data, type_), raw_dtype=type_)


def main() -> None:
    order = json.loads(sys.argv[1])
    path = Path(order["scratch"]) / f"model-{order['type']}.gguf"
    if not path.exists():
        write_gguf(Path(order["folder"]), path, order["type"])
    silent = llama_cpp.llama_log_callback(lambda *_: None)  # held: the library keeps no reference
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not load {path}")
    found = {}
    for n in order["streams"]:
        found[n] = n * order["new_tokens"] / _seconds(model, prompts(order, n), order)
    print(json.dumps(found))


def _seconds(model: object, given: list[list[int]], order: dict) -> float:
    n, n_vocab = len(given), order["vocab"]
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = n * (order["prompt_tokens"] + order["new_tokens"] + 16)
    settings.n_batch = settings.n_ubatch = 2048
    settings.n_seq_max = n
    settings.n_threads = settings.n_threads_batch = order["threads"]
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(2048, 0, 1)
    begun = seconds(order)

    def put(rows: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")

    def best(i: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, i)
        return int(np.ctypeslib.as_array(logits, (n_vocab,)).argmax())

    tokens = [0] * n
    for first in range(0, n, 16):
        group = range(first, min(n, first + 16))
        rows = [(t, p, s, p == len(given[s]) - 1) for s in group for p, t in enumerate(given[s])]
        put(rows)
        for i, s in enumerate(group):
            tokens[s] = best((i + 1) * order["prompt_tokens"] - 1)
    for step in range(order["new_tokens"] - 1):
        put([(token, order["prompt_tokens"] + step, s, True) for s, token in enumerate(tokens)])
        tokens = [best(i) for i in range(n)]
    taken = seconds(order) - begun
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return taken


if __name__ == "__main__":
    main()
