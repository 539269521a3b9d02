"""A tiny random model with a tokenizer trained here, and a real server over it."""

import asyncio
import functools
import json
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from starlette.applications import Starlette

from kajiya.config.schema import ServeConfig
from kajiya.serving.api import create_app
from kajiya.serving.engine import Engine
from kajiya.serving.listen import bind, url_of
from kajiya.serving.loading import load_engine

CONTEXT = 192
NAME = "tiny"
WINDOW = 20
"""Tokens that a token sees in layers with a window: neither whole blocks nor as many as the proof reads."""
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 20, "tie_word_embeddings": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "qwen3": {**_ALTERNATING, "use_sliding_window": True, "head_dim": 16},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gemma": {"head_dim": 32},
    "gemma2": {**_ALTERNATING, **_GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 9.0},
    "gemma3_text": {
        **_ALTERNATING,
        **_GEMMA,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        },
    },
}
"""`model_type` → what makes its layers differ from Llama's."""


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread does for these models; two wait for each other on a machine that runs other things."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of 512 tokens, saved with a byte-level BPE trained on a few stdlib modules."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([(stdlib / name).read_text() for name in ("textwrap.py", "bisect.py")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
            # Large weights: distinct tokens, well apart, in place of one repeated for ever.
            initializer_range=0.6,
        )
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Path]:
    """The folder of a random two-layer model of one of `FAMILIES`, with norms that are not neutral."""
    from transformers import AutoConfig, AutoModelForCausalLM

    @functools.cache
    def make(kind: str) -> Path:
        sizes = {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": None,
            "initializer_range": 0.4,
        }
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | FAMILIES[kind]))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.0 if kind.startswith("gemma") else 1.0, 0.3)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> Any:
    """The same model as plain Transformers loads it, fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


def plain_model(folder: Path) -> Any:
    """The model as plain Transformers computes it, fp32."""
    from transformers import AutoModelForCausalLM

    # Other attention of Transformers does not bound Gemma 2's scores.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def greedy(reference: Any) -> Callable[..., list[int]]:
    """Transformers' own greedy continuation of one prompt."""

    def continue_greedily(prompt: list[int], n_tokens: int, eos: int | None = 0) -> list[int]:
        ids = torch.tensor([prompt])
        found = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
        )
        continued: list[int] = found[0, len(prompt) :].tolist()
        return continued

    return continue_greedily


def is_greedy(model: Any, prompt: list[int], answer: list[int]) -> bool:
    """Whether every token of the answer is the plain model's most probable one behind all tokens before it.

    By induction that makes it the greedy continuation; one forward pass in place of `generate`, which is slow.
    """
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
    best: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    return bool(answer) and best == answer


def open_engine(folder: Path, max_batch: int = 4, max_waiting: int = 64, runner: str = "auto", **more: Any) -> Engine:
    given = {"precision": "fp32", "device": "cpu", "max_batch": max_batch, "max_waiting": max_waiting} | more
    return load_engine(folder, runner=runner, **given)


def slow_down(engine: Engine, seconds: float) -> None:
    """Let each of the engine's steps take so much longer."""
    run = engine.runner.run

    def slow(plan: Any) -> Any:
        time.sleep(seconds)
        return run(plan)

    engine.runner.run = slow  # type: ignore[method-assign]


@pytest.fixture
def engine(model_folder: Path) -> Engine:
    return open_engine(model_folder)


def save_adapter(folder: Path) -> Path:
    """A LoRA adapter of the tiny model, as PEFT saves one, that changes what it says."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    module = "base_model.model.model.layers.1.mlp.down_proj"
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            f"{module}.lora_A.weight": torch.randn(2, 96, generator=generator),
            f"{module}.lora_B.weight": torch.randn(64, 2, generator=generator),
        },
        folder / "adapter_model.safetensors",
    )
    return folder


@contextmanager
def running(app: Starlette) -> Iterator[str]:
    """Serve `app` by uvicorn in a thread, on a free port; the URL."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="session")
def server_url(model_folder: Path, tokenizer: Any) -> Iterator[str]:
    """A server that all tests of the session share."""
    with running(create_app(open_engine(model_folder), tokenizer, NAME, ServeConfig(default_max_tokens=16))) as url:
        yield url


@pytest.fixture(scope="session")
def roomy_url(tmp_path_factory: pytest.TempPathFactory, reference: Any, tokenizer: Any) -> Iterator[str]:
    """A server of a model with room for what is said of tools."""
    folder = tmp_path_factory.mktemp("roomy")
    config = reference.config.__class__(**reference.config.to_dict() | {"max_position_embeddings": 2048})
    torch.manual_seed(1)
    reference.__class__(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with running(create_app(open_engine(folder), tokenizer, NAME, ServeConfig())) as url:
        yield url
