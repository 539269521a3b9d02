"""The engine against Transformers: the same ids as one-at-a-time greedy generation, the same log-probabilities."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kajiya.config.compose import compose
from kajiya.errors import ConfigError, KajiyaError, RequestError
from kajiya.serving.engine import Engine, EngineError
from kajiya.serving.loading import load_engine
from kajiya.serving.rows import Rows
from kajiya.serving.runner import TransformersRunner
from kajiya.serving.sequence import Output, Request, SamplingParams

from .conftest import is_greedy, open_engine

GREEDY = SamplingParams(max_tokens=24, temperature=0)


def _prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 512) for _ in range(length)] for length in lengths]


def _drain(engine: Engine) -> list[Output]:
    outputs = []
    while not engine.is_idle:
        outputs += engine.step()
    return outputs


def _tokens(outputs: list[Output], request_id: str) -> list[int]:
    return [output.token.token for output in outputs if output.id == request_id and output.token]


def test_generate_equals_transformers_one_at_a_time(engine: Engine, greedy: Callable[..., list[int]]) -> None:
    prompts = _prompts([1, 2, 17, 60, 5, 33, 150, 8, 3])
    found = engine.generate(prompts, GREEDY)
    expected = [greedy(prompt, 24) for prompt in prompts]
    assert [one.token_ids for one in found] == expected
    # The model is not one that says the same whatever it is asked.
    assert len({tuple(one.token_ids) for one in found}) == len(prompts)
    assert max(len(set(one.token_ids)) for one in found) > 8
    for one in found:
        assert one.finish_reason == ("stop" if one.token_ids[-1] == 0 else "length")
        assert len(one.logprobs) == len(one.token_ids)


def test_requests_that_join_and_leave_between_steps(engine: Engine, reference: Any) -> None:
    draw = random.Random(1)
    prompts = dict(enumerate(_prompts([draw.randrange(1, 90) for _ in range(14)], seed=2)))
    lengths = {i: draw.randrange(1, 40) for i in prompts}
    outputs: list[Output] = []
    for i, prompt in prompts.items():
        params = SamplingParams(max_tokens=lengths[i], temperature=0, ignore_eos=True)
        engine.add(Request(str(i), tuple(prompt), params))
        for _ in range(draw.randrange(6)):
            outputs += engine.step()
    outputs += _drain(engine)
    for i, prompt in prompts.items():
        answer = _tokens(outputs, str(i))
        assert len(answer) == lengths[i]
        assert is_greedy(reference, prompt, answer), i
    assert engine.scheduler.is_idle


def test_long_prompts_are_read_in_chunks_beside_running_answers(engine: Engine, reference: Any) -> None:
    engine.scheduler.step_tokens = 13
    prompts = _prompts([150, 4, 40, 66, 1], seed=3)
    found = engine.generate(
        prompts, SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, prompt_logprobs=True)
    )
    assert all(is_greedy(reference, prompt, one.token_ids) for prompt, one in zip(prompts, found, strict=True))
    assert [len(one.token_ids) for one in found] == [30] * 5
    assert [len(one.prompt_logprobs or ()) for one in found] == [len(prompt) for prompt in prompts]


def test_texts_longer_than_the_first_positions(tmp_path: Path, model_folder: Path, reference: Any) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    config = reference.config.__class__(**reference.config.to_dict() | {"max_position_embeddings": 1024})
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    engine = load_engine(tmp_path, precision="fp32", device="cpu", max_batch=3, max_waiting=8)
    prompts = _prompts([250, 3, 240], seed=4)
    found = engine.generate(prompts, SamplingParams(max_tokens=300, temperature=0, ignore_eos=True))
    assert [len(one.token_ids) for one in found] == [300] * 3
    assert all(is_greedy(model, prompt, one.token_ids) for prompt, one in zip(prompts, found, strict=True))


def test_logprobs_equal_the_log_softmax_of_transformers(engine: Engine, reference: Any) -> None:
    prompt = _prompts([20], seed=5)[0]
    params = SamplingParams(max_tokens=10, temperature=0.8, seed=3, n_logprobs=5, prompt_logprobs=True, ignore_eos=True)
    found = engine.generate([prompt], params)[0]
    whole = [*prompt, *found.token_ids]
    with torch.no_grad():
        logprobs = reference(torch.tensor([whole])).logits[0].log_softmax(-1)
    assert found.prompt_logprobs is not None
    assert found.prompt_logprobs[0] is None
    scored = [*found.prompt_logprobs[1:], *found.logprobs]
    for place, one in enumerate(scored):
        assert one is not None
        assert one.token == whole[place + 1]
        assert one.logprob == pytest.approx(logprobs[place, one.token].item(), abs=1e-4)
        values, ids = logprobs[place].topk(5)
        assert [token for token, _ in one.top] == ids.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert engine.score(whole) == pytest.approx(
        [logprobs[place, token].item() for place, token in enumerate(whole[1:])], abs=1e-4
    )


def test_max_tokens_zero_reads_the_prompt_and_ends(engine: Engine) -> None:
    prompt = _prompts([20], seed=5)[0]
    found = engine.generate([prompt], SamplingParams(max_tokens=0, prompt_logprobs=True))[0]
    assert found.token_ids == []
    assert found.finish_reason == "length"
    assert found.prompt_logprobs is not None
    scores = [one.logprob for one in found.prompt_logprobs if one is not None]
    assert scores == pytest.approx(engine.score(prompt), abs=1e-4)


def test_embedding_is_the_normalized_mean_of_the_last_hidden_states(engine: Engine, reference: Any) -> None:
    prompt = _prompts([20], seed=6)[0]
    with torch.no_grad():
        hidden = reference.model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
    assert engine.embed(prompt) == pytest.approx((hidden / hidden.norm()).tolist(), abs=1e-5)


def test_a_seed_draws_the_same_tokens_in_any_company(engine: Engine) -> None:
    prompts = _prompts([10, 30, 6, 18, 44], seed=7)
    params = SamplingParams(max_tokens=20, temperature=1.0, top_k=40, top_p=0.95, seed=11, ignore_eos=True)
    alone = engine.generate([prompts[0]], params)[0]
    among = engine.generate(prompts, params)
    assert among[0].token_ids == alone.token_ids
    twins = engine.generate([prompts[0], prompts[0]], params)
    assert twins[0].token_ids != twins[1].token_ids
    assert engine.generate([prompts[0]], params)[0].token_ids == alone.token_ids


def test_cancel_frees_the_row_at_once_and_leaves_the_others_alone(engine: Engine, reference: Any) -> None:
    prompts = _prompts([12, 5, 31, 8, 20], seed=8)
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), params))
    outputs = [output for _ in range(4) for output in engine.step()]
    assert engine.scheduler.n_running == 4
    assert engine.cancel("0")
    assert engine.scheduler.n_running == 3
    assert engine.cancel("2")
    assert not engine.cancel("2")
    outputs += _drain(engine)
    reasons = {output.id: output.finish_reason for output in outputs if output.finish_reason}
    assert reasons == {"0": "cancelled", "1": "length", "2": "cancelled", "3": "length", "4": "length"}
    for i in (1, 3, 4):
        assert is_greedy(reference, prompts[i], _tokens(outputs, str(i)))


def test_requests_that_cannot_be_served_are_refused_and_leave_nothing(engine: Engine) -> None:
    def refuse(prompt: list[int], params: SamplingParams) -> RequestError:
        with pytest.raises(RequestError) as caught:
            engine.add(Request("x", tuple(prompt), params))
        return caught.value

    too_long = refuse([1] * 200, SamplingParams(max_tokens=1))
    assert too_long.code == "context_length_exceeded"
    assert "192" in str(too_long)
    assert "200" in str(too_long)
    assert refuse([1] * 190, SamplingParams(max_tokens=3)).param == "max_tokens"
    assert refuse([], GREEDY).param == "prompt"
    assert "512" in str(refuse([1, 512], GREEDY))
    assert refuse([1, -1], GREEDY).param == "prompt"
    assert refuse([1, 10**30], GREEDY).param == "prompt"
    for name, value in [("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_k", 0)]:
        assert refuse([1], SamplingParams(**{name: value})).param == name
    assert engine.is_idle


def test_a_full_queue_is_refused_with_429(model_folder: Path) -> None:
    engine = load_engine(model_folder, precision="fp32", device="cpu", max_batch=1, max_waiting=2)
    for i in range(3):
        engine.add(Request(str(i), (1, 2), GREEDY))
    with pytest.raises(RequestError) as caught:
        engine.add(Request("one too many", (1, 2), GREEDY))
    assert caught.value.status == 429
    with pytest.raises(RequestError, match="running already"):
        engine.add(Request("1", (1, 2), GREEDY))
    assert {output.id for output in _drain(engine) if output.finish_reason} == {"0", "1", "2"}


def test_a_failing_step_leaves_an_engine_that_works(
    engine: Engine, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = _prompts([7, 9], seed=9)
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), GREEDY))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", lambda plan: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    ended = engine.fail_all("out of luck")
    assert [(output.id, output.finish_reason, output.error) for output in ended] == [
        ("0", "error", "out of luck"),
        ("1", "error", "out of luck"),
    ]
    assert engine.is_idle
    found = engine.generate(prompts, GREEDY)
    assert all(is_greedy(reference, prompt, one.token_ids) for prompt, one in zip(prompts, found, strict=True))


def _poisoned(rows: Rows) -> Rows:
    return Rows(rows.logits * float("nan"), rows.best, [float("nan")] * len(rows.best))


@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_output_that_is_not_finite_fails_its_request_only(
    model_folder: Path, reference: Any, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    engine = open_engine(model_folder, runner=runner)
    prompts = _prompts([7, 9, 11], seed=10)
    real = engine.runner.run

    def run(plan: Any) -> dict[str, Rows]:
        rows = real(plan)
        if "1" in rows:
            rows["1"] = _poisoned(rows["1"])
            if isinstance(engine.runner, TransformersRunner):
                with torch.inference_mode():
                    for tensor in engine.runner.cache._tensors():
                        for block in engine.scheduler.running["1"].blocks:
                            tensor[block * 16 : block * 16 + 16] = float("nan")
        return rows

    monkeypatch.setattr(engine.runner, "run", run)
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=24, temperature=0.0 if i != 1 else 1.0, top_k=5)
        engine.add(Request(str(i), tuple(prompt), params))
    outputs = _drain(engine)
    ended = {output.id: output.finish_reason for output in outputs if output.finish_reason}
    assert ended["1"] == "error"
    for i in (0, 2):
        assert is_greedy(reference, prompts[i], _tokens(outputs, str(i)))
    monkeypatch.undo()
    # The poisoned blocks are clean again for whoever comes next.
    again = _prompts([100, 30, 20, 10], seed=11)
    found = engine.generate(again, GREEDY)
    assert all(is_greedy(reference, prompt, one.token_ids) for prompt, one in zip(again, found, strict=True))


def test_a_request_that_fails_leaves_what_it_shares_to_the_others(
    model_folder: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(model_folder, runner="transformers")
    prefix, *tails = _prompts([48, 1, 1, 1], seed=15)
    first, good, bad = ((*prefix, *tail) for tail in tails)
    engine.generate([[*first]], SamplingParams(max_tokens=1, temperature=0))
    real, n_steps = engine.runner.run, 0

    def run(plan: Any) -> dict[str, Rows]:
        nonlocal n_steps
        rows, n_steps = real(plan), n_steps + 1
        return {name: _poisoned(each) if name == "bad" and n_steps == 4 else each for name, each in rows.items()}

    monkeypatch.setattr(engine.runner, "run", run)
    for name, prompt in (("good", good), ("bad", bad)):
        engine.add(Request(name, prompt, SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)))
    outputs = _drain(engine)
    assert engine.scheduler.n_shared_tokens == 2 * 48
    assert {output.id: output.finish_reason for output in outputs if output.finish_reason} == {
        "good": "length",
        "bad": "error",
    }
    assert is_greedy(reference, [*good], _tokens(outputs, "good"))


@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_numbers_of_a_text_that_are_not_finite_are_an_error(model_folder: Path, reference: Any, runner: str) -> None:
    """Log-probabilities and vectors alike, and neither leaves anything behind for whoever comes next."""
    engine = open_engine(model_folder, runner=runner)
    tensors, name = dict(reference.state_dict()), "model.layers.0.self_attn.v_proj.weight"
    engine.set_weights(tensors | {name: tensors[name] * float("nan")}, 1)
    text = _prompts([40], seed=16)[0]
    with pytest.raises(EngineError, match="not finite"):
        engine.score(text)
    with pytest.raises(RequestError, match="not finite"):
        engine.embed(text)
    engine.set_weights(tensors, 2)
    assert is_greedy(reference, text, engine.generate([text], GREEDY)[0].token_ids)


def test_generate_raises_and_leaves_nothing_when_the_engine_fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", lambda plan: {name: _poisoned(rows) for name, rows in real(plan).items()})
    with pytest.raises(EngineError, match="not finite"):
        engine.generate(_prompts([4, 5]), GREEDY)
    assert engine.is_idle


def test_generate_does_not_step_the_requests_of_others(engine: Engine) -> None:
    engine.add(Request("theirs", (1, 2), GREEDY))
    with pytest.raises(EngineError, match="other requests"):
        engine.generate([[1]], GREEDY)
    assert [output.id for output in engine.step()] == ["theirs"]


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        load_engine(tmp_path, precision="fp32", device="cpu", max_batch=1, max_waiting=1)


def test_weights_that_are_cut_short_are_named(model_folder: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(model_folder, tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*incomplete"):
        open_engine(cut)


@pytest.mark.parametrize("tokens", [2**44, 2**62])
def test_a_cache_for_which_there_is_no_memory_is_named(model_folder: Path, tokens: int) -> None:
    with pytest.raises(ConfigError, match=rf"^serve\.cache_tokens: there is no memory .* of {tokens} tokens"):
        open_engine(model_folder, cache_tokens=tokens)


def test_the_smallest_cache_that_may_be_set_holds_the_proof(model_folder: Path, reference: Any) -> None:
    with pytest.raises(ConfigError, match="at least 32"):
        compose("stdlib-pretrain", ["serve.cache_tokens=31"])
    engine = open_engine(model_folder, cache_tokens=32)
    text = _prompts([12], seed=3)[0]
    assert is_greedy(
        reference, text, engine.generate([text], SamplingParams(max_tokens=20, temperature=0))[0].token_ids
    )


def test_an_unknown_device_is_named(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.device"):
        load_engine(model_folder, precision="fp32", device="abacus", max_batch=1, max_waiting=1)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gpt_neox", "opt", "olmo2", "phi3"])
def test_other_architectures_answer_as_transformers_does(tmp_path: Path, model_folder: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    sizes = {
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    extra = {
        "qwen3": {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48},
        "gpt_neox": {"intermediate_size": 48},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "olmo2": {"num_key_value_heads": 2, "intermediate_size": 48},
        "phi3": {"num_key_value_heads": 2, "intermediate_size": 48},
    }
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(2)
    config = AutoConfig.for_model(kind, **sizes, **extra.get(kind, {}), **tokens)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    engine = load_engine(tmp_path, precision="fp32", device="cpu", max_batch=3, max_waiting=8)
    prompts = _prompts([3, 20, 9, 1], seed=12)
    found = engine.generate(prompts, SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))
    assert [len(one.token_ids) for one in found] == [16] * 4
    assert all(is_greedy(model, prompt, one.token_ids) for prompt, one in zip(prompts, found, strict=True))


@pytest.mark.parametrize(
    ("kind", "extra", "named"),
    [
        ("mamba", {"state_size": 4}, "max_position_embeddings"),
        (
            "starcoder2",
            {"sliding_window": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48},
            "sliding_attention",
        ),
        ("bloom", {"num_attention_heads": 4}, "max_position_embeddings"),
    ],
)
def test_a_model_that_the_engine_cannot_drive_is_refused_and_served_without_a_cache(
    tmp_path: Path, model_folder: Path, kind: str, extra: dict[str, int], named: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    sizes = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **extra)).eval()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    with pytest.raises(KajiyaError, match=named) as caught:
        load_engine(tmp_path, precision="fp32", device="cpu", max_batch=3, max_waiting=8)
    assert "serve.runner=plain" in str(caught.value)
    engine = open_engine(tmp_path, runner="plain")
    prompts = _prompts([3, 30, 9], seed=14)
    found = engine.generate(prompts, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    assert [len(one.token_ids) for one in found] == [8] * 3
    assert all(is_greedy(model, prompt, one.token_ids) for prompt, one in zip(prompts, found, strict=True))


def test_positions_that_depend_on_the_length_are_served_as_far_as_they_do_not(
    tmp_path: Path, model_folder: Path
) -> None:
    """Phi-3's: other frequencies for the whole text, its beginning too, as soon as it is longer than 24 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config

    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    config = Phi3Config(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        original_max_position_embeddings=24,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24, **factors},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.4,
    )
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    engine = open_engine(tmp_path)
    assert engine.context_tokens == 24
    assert "24 tokens at most, of 64 with serve.runner=plain" in engine.facts.note
    short, long = _prompts([9, 40], seed=17)
    with pytest.raises(RequestError, match="context length is 24 tokens"):
        engine.add(Request("long", tuple(long), SamplingParams(max_tokens=1)))
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    plain = open_engine(tmp_path, runner="plain")
    for found, prompts in ((engine, [short]), (plain, [short, long])):
        answers = [one.token_ids for one in found.generate(prompts, params)]
        assert all(_is_plain(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))


def _is_plain(model: Any, prompt: list[int], answer: list[int]) -> bool:
    """Whether each token is the most probable one behind those before it, all of them read anew."""
    return all(is_greedy(model, [*prompt, *answer[:i]], answer[i : i + 1]) for i in range(len(answer)))


@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_bf16_stays_near_the_reference(model_folder: Path, reference: Any, runner: str) -> None:
    """Every token's fp32 logit is within half a standard deviation of the maximum (a random token's is 3 below)."""
    engine = open_engine(model_folder, precision="bf16", runner=runner)
    assert engine.runner.name == runner
    prompts = _prompts([5, 40, 21], seed=13)
    for prompt, one in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        whole = torch.tensor([[*prompt, *one.token_ids]])
        with torch.no_grad():
            logits = reference(whole).logits[0, len(prompt) - 1 : -1]
        spread = logits.std().item()
        chosen = logits.gather(1, torch.tensor(one.token_ids)[:, None]).squeeze(1)
        assert ((logits.amax(-1) - chosen) <= 0.5 * spread).all()
