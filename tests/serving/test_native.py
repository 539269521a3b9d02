"""The C++ decoder against torch: products, bit-equality in any company, precisions, adapters of many in one batch."""

import copy
import ctypes
import random
import threading
import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kajiya.errors import ConfigError
from kajiya.serving.adapters import LoraAdapter, LowRank
from kajiya.serving.engine import Engine, EngineError
from kajiya.serving.loading import EngineOptions, engine_of
from kajiya.serving.native import layout
from kajiya.serving.native.architecture import NotNativeError, architecture_of, cache_bytes
from kajiya.serving.native.build import load_library
from kajiya.serving.native.memory import Arena
from kajiya.serving.proof import rounded_activations, rounded_weights
from kajiya.serving.sequence import Output, Request, SamplingParams, TokenLogprob

from .conftest import FAMILIES, WINDOW, is_greedy, open_engine, plain_model

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


def _prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 512) for _ in range(length)] for length in lengths]


def _product(
    kind: str, weights_NK: torch.Tensor, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    library = load_library()
    n_out, n_in = weights_NK.shape
    number = layout.KINDS[kind]
    packed = torch.empty(library.kajiya_packed_bytes(number, n_out, n_in), dtype=torch.uint8)
    scales = torch.empty(-(-n_out // 32) * -(-n_in // 32) * 32, dtype=torch.int16)
    library.kajiya_pack(weights_NK.data_ptr(), number, n_out, n_in, packed.data_ptr(), scales.data_ptr(), 1)
    linear = layout.Linear(
        kind=number,
        n_out=n_out,
        n_in=n_in,
        weights=packed.data_ptr(),
        scales=scales.data_ptr(),
        bias=bias_N.data_ptr() if bias_N is not None else None,
    )
    y_TN = torch.full((len(x_TK), n_out), torch.nan)
    library.kajiya_product(ctypes.byref(linear), x_TK.data_ptr(), len(x_TK), y_TN.data_ptr(), 2)
    return y_TN


@pytest.mark.parametrize(("kind", "bound"), [("fp32", 1e-6), ("bf16", 3e-3), ("int8", 1e-2), ("int4", 0.12)])
@pytest.mark.parametrize(("n_out", "n_in"), [(32, 64), (33, 40), (96, 31), (7, 257)])
def test_products_are_those_of_torch_within_their_precision(kind: str, bound: float, n_out: int, n_in: int) -> None:
    generator = torch.Generator().manual_seed(n_out)
    weights = torch.randn(n_out, n_in, generator=generator)
    x = torch.randn(61, n_in, generator=generator)
    bias = torch.randn(n_out, generator=generator)
    exact = (x.double() @ weights.double().T + bias).float()
    found = _product(kind, weights, x, bias)
    assert ((found - exact).norm() / exact.norm()).item() < bound
    # Each token's product is the same, to the bit, alone and with any number of others.
    for n in (1, 2, 5, 12, 13, 29, 48, 49):
        assert torch.equal(_product(kind, weights, x[:n].clone(), bias), found[:n])


def test_pages_that_are_had_at_hand_keep_what_is_in_them() -> None:
    arena = Arena()
    size = 3 << 20
    address = arena.take(size)
    ctypes.memset(address, 7, size)
    arena.populate([(address, size)])
    for thread in [one for one in threading.enumerate() if one.name == "kajiya-pages"]:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert ctypes.string_at(address, size) == bytes([7]) * size


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_that_the_integers_hold_exactly_are_kept(kind: str) -> None:
    """Multiples of a power of two come back as they are, but for the rounding of activations, which here are such too."""
    limit = 127 if kind == "int8" else 7
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-limit, limit + 1, (40, 64), generator=generator).float()
    weights[:, ::32] = -8.0 if kind == "int4" else 127.0
    x = torch.randint(-127, 128, (3, 64), generator=generator).float()
    x[:, ::32] = 127.0
    assert torch.equal(_product(kind, weights, x), x @ weights.T)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("n_out", "n_in"), [(40, 64), (7, 257)])
def test_products_of_integers_are_those_that_the_proof_reckons_with(kind: str, n_out: int, n_in: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(n_out, n_in, generator=generator)
    weights[0] = 0.0
    weights[1, 3], weights[1, 5] = 9.0, -9.0  # of two that are largest in size, the first counts
    weights[2, 3], weights[2, 5] = -9.0, 9.0
    x = torch.randn(6, n_in, generator=generator)
    x[0] = 0.0
    expected = rounded_activations(x).double() @ rounded_weights(weights, kind).double().T
    assert torch.allclose(_product(kind, weights, x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("place", [0, 5, 16, 31, 45])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_product_with_what_is_not_finite_is_not_finite(kind: str, place: int, value: float) -> None:
    generator = torch.Generator().manual_seed(2)
    weights, x = torch.randn(40, 64, generator=generator), torch.randn(3, 64, generator=generator)
    x[1, place] = value
    found = _product(kind, weights, x)
    assert not found[1].isfinite().any()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
def test_what_is_not_finite_is_seen_through_a_cache_of_eight_bits(
    model_folder: Path, reference: Any, part: str
) -> None:
    engine = open_engine(model_folder, cache_precision="int8")
    name = f"model.layers.1.self_attn.{part}.weight"
    broken = reference.state_dict()[name].clone()
    broken[3] = torch.nan
    engine.set_weights(reference.state_dict() | {name: broken}, version=1)
    with pytest.raises(EngineError, match="not finite"):
        engine.generate(_prompts([20]), GREEDY)
    engine.set_weights(reference.state_dict(), version=2)
    assert len(engine.generate(_prompts([20]), GREEDY)[0].token_ids) == GREEDY.max_tokens


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"precision": "bf16"}),
        ("llama", {"quantize": "int8"}),
        ("llama", {"quantize": "int4"}),
        ("llama", {"cache_precision": "int8"}),
        ("mistral", {"precision": "bf16"}),
        ("phi3", {"precision": "bf16"}),
        ("gemma", {"quantize": "int8"}),
        ("gemma2", {"precision": "bf16"}),
        ("gemma3_text", {}),
        ("gemma3_text", {"precision": "bf16"}),
        ("gemma3_text", {"quantize": "int8", "cache_precision": "int8"}),
    ],
)
def test_an_answer_is_the_same_to_the_bit_in_any_company(
    model_folder: Path, family_folder: Callable[[str], Path], family: str, settings: dict[str, str]
) -> None:
    """Alone, in a batch, in small chunks, over a shared prefix, with guesses, after a preemption: the same log-probabilities."""
    if family != "llama":
        model_folder = family_folder(family)
    shared = _prompts([50], seed=1)[0]
    prompts = [[*shared, *one] for one in _prompts([1, 30, 7, 64], seed=2)] + _prompts([5, 90], seed=3)

    def answers(engine: Engine, prompts: list[list[int]]) -> list[list[tuple[int, float]]]:
        found = engine.generate(prompts, GREEDY)
        return [[(one.token, one.logprob) for one in each.logprobs] for each in found]

    alone = [answers(open_engine(model_folder, **settings), [prompt])[0] for prompt in prompts]
    batched = open_engine(model_folder, max_batch=8, **settings)
    assert answers(batched, prompts) == alone
    # Once more, the prompts now being in the cache.
    assert answers(batched, prompts) == alone
    assert batched.scheduler.n_shared_tokens > sum(map(len, prompts)) * 0.8
    small = open_engine(model_folder, max_batch=8, **settings)
    small.scheduler.step_tokens = 7
    assert answers(small, prompts) == alone
    guessing = open_engine(model_folder, max_batch=8, guesses=5, **settings)
    assert answers(guessing, prompts) == alone
    tight = open_engine(model_folder, max_batch=8, cache_tokens=160, **settings)
    assert answers(tight, prompts) == alone
    assert tight.scheduler.n_preemptions > 0
    assert tight.scheduler.pool.n_free == tight.scheduler.pool.n_blocks


@pytest.mark.parametrize("head_width", [24, 64, 80])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_heads_of_any_width_attend_as_transformers_does(head_width: int, precision: str, bound: float) -> None:
    """Log-probabilities of a text are those of the plain model in fp32, whatever lies in the cache behind it."""
    torch.manual_seed(head_width)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=head_width,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config).eval()
    ids = [token % 256 for token in _prompts([77])[0]]
    with torch.inference_mode():
        logits_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logits_TV[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    options = EngineOptions(precision=precision, device="cpu", max_batch=2)
    given = model if precision == "fp32" else copy.deepcopy(model).bfloat16()
    engine = engine_of(given, frozenset(), options, "native")
    found = engine.score(ids)
    assert (torch.tensor(found) - expected).abs().max().item() < bound
    if head_width % 16 == 0:  # else there are zeros between the heads that are read, and that nothing else writes to
        again = engine_of(given, frozenset(), options, "native")
        native = again.runner.native  # type: ignore[attr-defined]
        size = again.runner.n_blocks * cache_bytes(config, precision) // (2 * config.num_hidden_layers)
        for layer in native.layers:
            ctypes.memset(layer.cache.keys, 0xFF, size)  # NaN everywhere
            ctypes.memset(layer.cache.values, 0xFF, size)
        assert again.score(ids) == found


@pytest.mark.parametrize("runner", ["native", "transformers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_says_what_transformers_does(
    family_folder: Callable[[str], Path], family: str, runner: str
) -> None:
    """In small chunks and one by one, texts longer than the windows among them: the plain model's log-probabilities in fp32."""
    model = plain_model(family_folder(family))
    engine = open_engine(family_folder(family), runner=runner)
    assert engine.runner.name == runner
    engine.scheduler.step_tokens = 25
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, prompt_logprobs=True)
    prompts = _prompts([3, 70, 130, WINDOW], seed=11)
    for prompt, one in zip(prompts, engine.generate(prompts, params), strict=True):
        whole = [*prompt, *one.token_ids]
        assert is_greedy(model, prompt, one.token_ids)
        # Scaled embeddings that are the head too say the same token for ever.
        assert model.config.tie_word_embeddings or len(set(one.token_ids)) > 4
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([whole]), use_cache=False).logits[0, :-1].log_softmax(-1)
        expected = logprobs_TV.gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
        assert one.prompt_logprobs is not None
        found = [each.logprob for each in [*one.prompt_logprobs[1:], *one.logprobs] if each is not None]
        assert torch.allclose(torch.tensor(found), expected, atol=2e-4)
        with torch.no_grad():
            hidden_D = model.model(torch.tensor([whole])).last_hidden_state[0].mean(0)
        assert engine.embed(whole) == pytest.approx((hidden_D / hidden_D.norm()).tolist(), abs=1e-4)


@pytest.mark.parametrize(("family", "precision"), [("gemma3_text", "bf16"), ("gemma2", "bf16"), ("phi3", "int8")])
def test_each_family_stays_near_transformers_in_fewer_bits(
    family_folder: Callable[[str], Path], family: str, precision: str
) -> None:
    settings = {"precision": "bf16"} if precision == "bf16" else {"quantize": precision}
    engine = open_engine(family_folder(family), runner="native", **settings)
    prompt = _prompts([130], seed=12)[0]
    with torch.no_grad():
        logprobs_TV = plain_model(family_folder(family))(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    exact = logprobs_TV.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    error = (torch.tensor(engine.score(prompt)) - exact).square().mean().sqrt() / exact.std()
    assert 0 < error.item() < 0.25


def test_a_step_for_which_there_is_no_memory_is_an_error_and_the_next_one_answers(
    model_folder: Path, reference: Any
) -> None:
    engine = open_engine(model_folder, runner="native")
    tokens, starts = array("i", [1]), array("i", [0, 1])
    adapters = (ctypes.c_void_p * 1)()
    # Scores of 2^18 threads over 2^27 positions: more bytes than addresses.
    positions = array("i", [2**27 - 1])
    step = layout.Step(
        n_tokens=1,
        n_sequences=1,
        n_threads=2**18,
        tokens=tokens.buffer_info()[0],
        positions=positions.buffer_info()[0],
        starts=starts.buffer_info()[0],
        adapters=ctypes.addressof(adapters),
    )
    prompt = _prompts([30])[0]
    before = engine.generate([prompt], GREEDY)[0].token_ids
    assert is_greedy(reference, prompt, before)
    with pytest.raises(MemoryError, match="no memory is left for a step of 1 tokens"):
        engine.runner.native.step(step)  # type: ignore[attr-defined]
    assert engine.generate([prompt], GREEDY)[0].token_ids == before


def test_guesses_are_confirmed_and_change_nothing(model_folder: Path, reference: Any) -> None:
    engine = open_engine(model_folder, guesses=6)
    # A text that repeats itself, so that looking it up is right at times.
    pattern = _prompts([9], seed=4)[0]
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    prompt = pattern * 6
    answer = engine.generate([prompt], params)[0].token_ids
    assert len(answer) == 60
    assert is_greedy(reference, prompt, answer)
    assert engine.n_drafted > 0
    for temperature in (0.0, 1.0):
        drawn = SamplingParams(max_tokens=40, temperature=temperature, seed=3, top_k=3)
        plain = open_engine(model_folder).generate([prompt, pattern], drawn)
        guessed = open_engine(model_folder, guesses=6).generate([prompt, pattern], drawn)
        assert [one.token_ids for one in guessed] == [one.token_ids for one in plain]
        assert [one.finish_reason for one in guessed] == [one.finish_reason for one in plain]


@pytest.mark.parametrize(("settings", "bound"), [({"quantize": "int8"}, 0.25), ({"cache_precision": "int8"}, 0.1)])
def test_eight_bits_stay_near_the_reference(
    model_folder: Path, reference: Any, settings: dict[str, str], bound: float
) -> None:
    """Log-probabilities are off by a part of their spread; a wrong scale makes it 1, and these sharp weights are hard."""
    engine = open_engine(model_folder, **settings)
    for prompt in _prompts([60, 130], seed=5):
        with torch.no_grad():
            logprobs = reference(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        exact = logprobs.gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)
        error = (torch.tensor(engine.score(prompt)) - exact).square().mean().sqrt() / exact.std()
        assert 0 < error.item() < bound


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_new_weights_take_hold_and_forget_what_was_cached(
    model_folder: Path, family_folder: Callable[[str], Path], family: str
) -> None:
    folder = model_folder if family == "llama" else family_folder(family)
    reference = plain_model(folder)
    engine = open_engine(folder)
    prompt = _prompts([60], seed=6)[0]
    assert is_greedy(reference, prompt, engine.generate([prompt], GREEDY)[0].token_ids)
    changed = copy.deepcopy(reference)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    # One request is under way: what it says from now on is of the new weights.
    engine.add(Request("running", tuple(prompt), GREEDY))
    begun = [output.token.token for _ in range(5) for output in engine.step() if output.token]
    engine.set_weights(changed.state_dict(), version=1)
    rest = []
    while not engine.is_idle:
        rest += [output.token.token for output in engine.step() if output.token]
    assert len(begun) + len(rest) == GREEDY.max_tokens
    assert is_greedy(changed, [*prompt, *begun], rest)
    assert is_greedy(changed, prompt, engine.generate([prompt], GREEDY)[0].token_ids)
    assert not is_greedy(reference, prompt, engine.generate([prompt], GREEDY)[0].token_ids)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"quantize": "int8"}, "serve.quantize"),
        ({"cache_precision": "int8"}, "serve.cache_precision"),
        ({"cache_precision": "bf16"}, "serve.cache_precision"),
    ],
)
def test_what_only_the_native_decoder_can_do_is_refused_elsewhere(
    tmp_path: Path, model_folder: Path, settings: dict[str, str], field: str
) -> None:
    with pytest.raises(ConfigError, match="gpt2 is not among") as caught:
        open_engine(_gpt2(tmp_path, model_folder), **settings)
    assert caught.value.field == field
    for runner in ("transformers", "plain"):
        with pytest.raises(ConfigError, match=f"needs the native decoder; the runner {runner}") as caught:
            open_engine(model_folder, runner=runner, **settings)
        assert caught.value.field == field
        open_engine(model_folder, runner=runner, cache_precision="fp32")


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("gemma3_text", {"hidden_activation": "gelu"}, "its activation is gelu"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "see those behind them"),
        ("gemma2", {"layer_types": ["full_attention", "chunked_attention"]}, "layers of kind chunked_attention"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("olmo2", {}, "olmo2 is not among llama, mistral"),
    ],
)
def test_what_the_native_decoder_does_not_compute_is_refused_with_the_reason(
    kind: str, more: dict[str, Any], why: str
) -> None:
    config = AutoConfig.for_model(kind, num_hidden_layers=2, **more)
    with pytest.raises(NotNativeError, match=why):
        architecture_of(config, torch.float32)


def _gpt2(folder: Path, tokenizer_folder: Path) -> Path:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- adapters


@contextmanager
def _peft_quiet() -> Iterator[None]:
    """PEFT asks the model by a name that Transformers is about to drop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@pytest.fixture(scope="module")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> list[Path]:
    """Three adapters as PEFT saves them: of several ranks, scales and modules."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    kinds: list[dict[str, Any]] = [
        {"r": 4, "target_modules": "all-linear"},
        {"r": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"r": 2, "target_modules": ["down_proj", "k_proj"], "lora_alpha": 32},
    ]
    folders = []
    for number, kind in enumerate(kinds):
        torch.manual_seed(20 + number)
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        with _peft_quiet():
            tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **kind))
        folders.append(tmp_path_factory.mktemp(f"adapter-{number}"))
        tuned.save_pretrained(folders[-1])
    return folders


@pytest.mark.parametrize("runner", ["native", "transformers", "plain"])
def test_adapters_mixed_in_one_batch_answer_as_peft_does(
    model_folder: Path, reference: Any, adapter_folders: list[Path], runner: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    engine = open_engine(model_folder, max_batch=8, runner=runner)
    for number, folder in enumerate(adapter_folders):
        engine.load_adapter(f"a{number}", folder)
    # The same prompts for all, so that a prefix shared by mistake would show.
    prompts = _prompts([40, 9], seed=7)
    names = [None, "a0", "a1", "a2"]
    found: dict[str, list[int]] = {}
    for name in names:
        for i, prompt in enumerate(prompts):
            engine.add(Request(f"{name} {i}", tuple(prompt), GREEDY, name))
    while not engine.is_idle:
        for output in engine.step():
            if output.token:
                found.setdefault(output.id, []).append(output.token.token)
    models = [reference]
    for folder in adapter_folders:
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        with _peft_quiet():
            models.append(PeftModel.from_pretrained(base, folder).eval())
    for name, model in zip(names, models, strict=True):
        for i, prompt in enumerate(prompts):
            answer = found[f"{name} {i}"]
            assert len(answer) == 24
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer, name
    assert len({tuple(answer) for answer in found.values()}) == len(found)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"quantize": "int8"}])
def test_an_answer_is_the_same_to_the_bit_beside_adapters(
    model_folder: Path, adapter_folders: list[Path], settings: dict[str, str]
) -> None:
    """With an adapter in the step, a layer's products and what follows them are computed apart, and together without."""
    engine = open_engine(model_folder, max_batch=4, **settings)
    engine.load_adapter("one", adapter_folders[0])
    prompt = _prompts([70], seed=9)[0]

    def answer(beside: list[str]) -> list[TokenLogprob]:
        for name in beside:
            engine.add(Request(f"beside {name}", tuple(_prompts([31])[0]), GREEDY, name))
        engine.add(Request("plain", tuple(prompt), GREEDY))
        found = []
        while not engine.is_idle:
            found += [output.token for output in engine.step() if output.id == "plain" and output.token]
        engine.scheduler.pool.forget_all()
        return found

    alone = answer([])
    assert len(alone) == GREEDY.max_tokens
    assert answer(["one"]) == alone


@pytest.mark.parametrize("weights", [{"precision": "fp32"}, {"precision": "bf16"}, {"quantize": "int8"}])
def test_an_adapter_answers_the_same_to_the_bit_alone_and_beside_others(
    model_folder: Path, adapter_folders: list[Path], weights: dict[str, str]
) -> None:
    """Several sequences of each adapter, prompts of many tokens among single ones: portions of every size."""
    engine = open_engine(model_folder, max_batch=16, runner="native", **weights)
    for number, folder in enumerate(adapter_folders):
        engine.load_adapter(f"a{number}", folder)
    prompts = _prompts([40, 9, 3, 21, 1], seed=9)
    names = [None, "a0", "a1", "a2"]
    found: dict[str, list[tuple[int, float]]] = {}
    for number, prompt in enumerate(prompts):
        for name in names[: 4 if number < 3 else 2]:
            engine.add(Request(f"{name} {number}", tuple(prompt), GREEDY, name))
        for _ in range(2):  # those of the next prompt come later
            _take(engine.step(), found)
    while not engine.is_idle:
        _take(engine.step(), found)
    assert len(found) == 16
    for key, said in found.items():
        name, number = key.split()
        (alone,) = engine.generate([prompts[int(number)]], GREEDY, None if name == "None" else name)
        assert [(one.token, one.logprob) for one in alone.logprobs] == said, key


@pytest.mark.parametrize(
    ("kind", "n_tokens"), [("llama", 2), ("llama", 3), ("llama", 6), ("phi3", 3), ("gemma3_text", 3)]
)
def test_low_rank_parts_of_any_size_add_up_to_merged_weights(kind: str, n_tokens: int) -> None:
    torch.manual_seed(n_tokens)
    config = AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=40,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=64,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    merged = copy.deepcopy(model)
    parts = {}
    for number, name in enumerate(module.removesuffix(".weight") for module in model.state_dict() if "_proj" in module):
        if number % 5 != 3:  # some modules have none
            weight = merged.get_submodule(name).weight
            rank = 1 + number % 9
            a, b = torch.randn(rank, weight.shape[1]) / 10, torch.randn(weight.shape[0], rank) / 10
            parts[name] = LowRank(a, b, 0.5)
            weight.data += 0.5 * b @ a
    assert {part.a.shape[0] for part in parts.values()} >= {1, 3, 5, 8}
    engine = engine_of(copy.deepcopy(model), frozenset(), EngineOptions(precision="fp32", device="cpu"), "native")
    engine.load_adapter("odd", Path("odd"), LoraAdapter(Path("odd"), parts))
    ids = [token % 64 for token in _prompts([n_tokens])[0]]
    found = torch.tensor(engine.score(ids, "odd"))
    for one, is_near in ((merged, True), (model, False)):
        with torch.inference_mode():
            logprobs_TV = one(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert ((found - expected).abs().max() < 1e-5) == is_near


def _take(outputs: list[Output], found: dict[str, list[tuple[int, float]]]) -> None:
    for output in outputs:
        if output.token is not None:
            found.setdefault(output.id, []).append((output.token.token, output.token.logprob))


def test_adapters_in_bf16_are_near_those_in_fp32(model_folder: Path, adapter_folders: list[Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    engine = open_engine(model_folder, runner="native", precision="bf16")
    prompt = _prompts([40], seed=10)[0]
    for number, folder in enumerate(adapter_folders):
        engine.load_adapter(f"a{number}", folder)
        (answer,) = engine.generate([prompt], GREEDY, f"a{number}")
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        with _peft_quiet():
            tuned = PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad():
            logits_TV = tuned(input_ids=torch.tensor([prompt + answer.token_ids])).logits[0, len(prompt) - 1 : -1]
        chosen = logits_TV.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert ((logits_TV.amax(-1) - chosen) / logits_TV.std(-1)).max() < 0.5


def test_adapters_come_and_go(model_folder: Path, adapter_folders: list[Path]) -> None:
    from kajiya.errors import ConfigError, RequestError

    engine = open_engine(model_folder)
    prompt = _prompts([40], seed=8)[0]
    engine.load_adapter("one", adapter_folders[0])
    first = engine.generate([prompt], GREEDY, adapter="one")[0].token_ids
    with pytest.raises(RequestError, match="loaded already"):
        engine.load_adapter("one", adapter_folders[1])
    engine.add(Request("using", tuple(prompt), GREEDY, "one"))
    with pytest.raises(RequestError, match="1 requests use"):
        engine.unload_adapter("one")
    engine.cancel("using")
    engine.step()
    engine.unload_adapter("one")
    with pytest.raises(RequestError, match="no adapter"):
        engine.generate([prompt], GREEDY, adapter="one")
    # Another one under the same name: nothing of the first one's cache is found.
    engine.load_adapter("one", adapter_folders[2])
    second = engine.generate([prompt], GREEDY, adapter="one")[0].token_ids
    fresh = open_engine(model_folder)
    fresh.load_adapter("x", adapter_folders[2])
    assert second == fresh.generate([prompt], GREEDY, adapter="x")[0].token_ids != first
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        engine.load_adapter("two", model_folder)


def test_an_adapter_of_another_model_is_refused(
    tmp_path: Path, model_folder: Path, adapter_folders: list[Path]
) -> None:
    from kajiya.errors import ConfigError

    engine = open_engine(_gpt2(tmp_path, model_folder))
    with pytest.raises(ConfigError, match="no such module"):
        engine.load_adapter("one", adapter_folders[0])
