"""Rewards: what each gives, their weighted sum, one's own, and what is refused."""

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import VOCABULARY, NoTokenizer
from transformers import PreTrainedTokenizerFast

from kajiya.config.compose import compose
from kajiya.config.rewards import check_rewards, require_readable
from kajiya.errors import ConfigError, TrainingError
from kajiya.training.rewards import Rewards, Sample, load_rewards

CPU = torch.device("cpu")


def _sample(answer: str, completion: str = "", prompt: str = "") -> Sample:
    return Sample(prompt, answer, completion, True)


def _judge(samples: list[Sample], *parts: dict[str, Any]) -> list[tuple[float, ...]]:
    return load_rewards(list(parts), CPU).judge(samples)


def test_exact_match() -> None:
    samples = [_sample(" Paris\n", "paris"), _sample("paris", "paris"), _sample("", "paris")]
    assert [row[0] for row in _judge(samples, {"name": "exact_match"})] == [0, 1, 0]
    loose = {"name": "exact_match", "options": {"ignore_case": True}}
    assert [row[0] for row in _judge(samples, loose)] == [1, 1, 0]
    strict = {"name": "exact_match", "options": {"ignore_case": True, "strip": False}}
    assert [row[0] for row in _judge(samples, strict)] == [0, 1, 0]


def test_regex() -> None:
    samples = [_sample("42", r"\d+"), _sample("42a", r"\d+"), _sample(" 7 ", "x")]
    assert [row[0] for row in _judge(samples, {"name": "regex", "options": {"pattern": r"\d+"}})] == [1, 0, 1]
    assert [row[0] for row in _judge(samples, {"name": "regex"})] == [1, 0, 0]
    with pytest.raises(ConfigError, match="regular expression"):
        _judge(samples, {"name": "regex", "options": {"pattern": "("}})


def test_rewards_read_columns_of_the_row() -> None:
    row = {"right": 42, "pattern": r"\d+", "tests": ["assert x == 42", "assert x > 0"]}
    samples = [Sample("x = ", answer, None, True, row) for answer in ("42", "7")]
    named = [
        {"name": "exact_match", "options": {"column": "right"}},
        {"name": "regex", "options": {"column": "pattern"}},
        {"name": "unit_test", "options": {"program": "{prompt}{answer}\n{row.tests}\n"}},
    ]
    assert [row[1:] for row in _judge(samples, *named)] == [(1, 1, 1), (0, 1, 0)]


def test_a_reward_that_reads_what_the_rows_do_not_hold_is_refused() -> None:
    def check(form: str, *settings: str) -> None:
        require_readable(compose("stdlib-grpo", list(settings)), form)

    program = "train.loss.options.rewards=[{name: unit_test, options: {program: '{answer} {row.tests}'}}]"
    with pytest.raises(
        ConfigError, match=r"rewards\[0\].options: unit_test reads the column 'tests', .*\n.*=\[test, tests\]"
    ):
        check("auto", program, "data.keep=[test]")
    check("prompt", program, "data.keep=[tests]")
    check("instruction")
    with pytest.raises(ConfigError, match="exact_match reads the row's completion, and prompt rows have none"):
        check("prompt")
    check("prompt", "train.loss.options.rewards=[{name: exact_match, options: {column: right}}]", "data.keep=[right]")
    with pytest.raises(ConfigError, match=r"rewards\[0\].options.column: changes nothing beside pattern"):
        check("auto", "train.loss.options.rewards=[{name: regex, options: {pattern: a, column: b}}]", "data.keep=[b]")
    with pytest.raises(ConfigError, match=r"data.keep: keeps columns for rewards, and the loss next_token has none"):
        compose("stdlib-pretrain", ["data.keep=[tests]"])


def test_a_unit_test_runs_in_a_process_with_limits() -> None:
    tests = "assert double(4) == 8"
    head = "def double(x):\n"
    samples = [
        _sample("    return 2 * x", tests, head),
        _sample("    return x + x + 1", tests, head),
        _sample("    while True: pass", tests, head),
        _sample("    return bytearray(10**9)", tests, head),
        _sample("    this is no program", tests, head),
        _sample("    return {'{answer}': 8}['{answer}']", tests, head),
    ]
    part = {"name": "unit_test", "options": {"seconds": 1.5, "memory_mb": 256}}
    assert [row[0] for row in _judge(samples, part)] == [1, 0, 0, 0, 0, 1]


def test_several_are_weighed_and_told_apart() -> None:
    samples = [_sample("ab", "ab"), _sample("abc", "ab")]
    rows = _judge(
        samples,
        {"name": "exact_match", "weight": 2.0},
        {"name": "regex", "weight": -0.5, "options": {"pattern": "a.*"}},
        {"name": "regex", "options": {"pattern": "..."}},
    )
    assert rows == [(1.5, 1, 1, 0), (0.5, 0, 1, 1)]
    rewards = load_rewards([{"name": "regex", "options": {"pattern": "a"}}, {"name": "regex"}], CPU)
    assert rewards.names == ("regex", "regex_1")


def test_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text(
        "def short(samples, most: int = 3):\n    return [float(len(each.answer) <= most) for each in samples]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    samples = [_sample("ab"), _sample("abcd")]
    own = {"name": "own_rewards:short"}
    assert _judge(samples, own) == [(1.0, 1.0), (0.0, 0.0)]
    assert _judge(samples, own | {"options": {"most": 4}}) == [(1.0, 1.0), (1.0, 1.0)]
    with pytest.raises(ConfigError, match=r"rewards\[0\]\.options\.mots.*most"):
        check_rewards([own | {"options": {"mots": 4}}], "train.loss.options.rewards")


def test_a_pattern_that_takes_forever_is_stopped_and_its_row_told() -> None:
    samples = [_sample("aab", prompt="one"), _sample("a" * 40 + "c", prompt="two"), _sample("ab", prompt="three")]
    part = {"name": "regex", "seconds": 1.0, "options": {"pattern": "(a+)+b"}}
    with pytest.raises(TrainingError, match=r"regex has not judged 3 answers within 1 s.*'a{40}c' to the prompt 'two'"):
        _judge(samples, part)
    assert signal.getitimer(signal.ITIMER_REAL)[1] == 0.0, "the limit's own timer, which comes again, is off"
    assert _judge(samples[:1], part) == [(1.0, 1.0)]


def test_ones_own_that_waits_forever_is_stopped_though_it_catches_what_is_raised() -> None:
    def waits(samples: Any) -> list[float]:
        for each in samples:
            while each.answer == "b":
                try:
                    threading.Event().wait(60)
                except Exception:
                    continue
        return [0.0 for _ in samples]

    assert Rewards(("waits",), (1.0,), (waits,), (60.0,)).judge([_sample("a")]) == [(0.0, 0.0)]
    with pytest.raises(TrainingError, match="'b' to the prompt 'p'"):
        Rewards(("waits",), (1.0,), (waits,), (1.0,)).judge([_sample("a"), _sample("b", prompt="p")])
    blind = Rewards(("blind",), (1.0,), (lambda _: threading.Event().wait(60),), (0.2,))  # type: ignore[arg-type,return-value]
    with pytest.raises(TrainingError, match="one of 1 answers, the first to the prompt 'p'"):
        blind.judge([_sample("a", prompt="p")])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "names no reward"),
        ([{"name": "regex", "seconds": 0}], r"\[0\]\.seconds"),
        ([{"name": "exact_mach"}], "exact_match"),
        ([{"weight": 1.0}], r"\[0\]\.name: is required"),
        ([{"name": "regex", "wight": 2}], "weight"),
        ([{"name": "unit_test", "options": {"seconds": 0}}], r"\[0\]\.options\.seconds"),
        (["regex"], "no mapping"),
    ],
)
def test_what_is_wrong_is_named(given: list[Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_rewards(given, "train.loss.options.rewards")


def test_a_reward_gives_a_finite_number_for_each_answer() -> None:
    for function, expected in (
        (lambda samples: [1.0], "gave 1 numbers for 2"),
        (lambda samples: [0.0, float("nan")], "nan"),
    ):
        with pytest.raises(TrainingError, match=expected):
            Rewards(("x",), (1.0,), (function,), (60.0,)).judge([_sample("a"), _sample("b")])  # type: ignore[arg-type]


@pytest.mark.parametrize(("style", "adapter"), [("chat", False), ("plain", False), ("plain", True)])
def test_a_reward_model_judges_what_it_was_trained_to(style: str, adapter: bool, tmp_path: Path) -> None:
    """Each number is the model's own for the rendered text alone, whatever else is judged with it; of an adapter's folder too."""
    from kajiya.config.schema import AdapterConfig, ModelConfig, RenderConfig
    from kajiya.data.render import Renderer
    from kajiya.data.tokenizer import train_bpe
    from kajiya.models.adapt import transform
    from kajiya.models.build import build_model, vocabulary_of
    from kajiya.models.save import save_model
    from kajiya.models.tasks import CAUSAL, Task
    from kajiya.models.trained import save_trained

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(iter(["aa bb\n", "b a b\n"] * 20), 270, 2),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
    )
    vocabulary = vocabulary_of(tokenizer)
    config = ModelConfig(n_params="40k", max_positions=64)
    if adapter:
        save_model(build_model(config, vocabulary, 0, CAUSAL).module, tokenizer, tmp_path / "base")
        config = ModelConfig(path=str(tmp_path / "base"))
    model = build_model(config, vocabulary, 0, Task("score")).module
    torch.nn.init.normal_(model.score.weight, std=0.5)
    if adapter:
        transform(model, AdapterConfig("lora", {"r": 4, "init": "gaussian"}), "none", 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    save_trained(config, model, tokenizer, tmp_path / "reward", lambda: model)
    samples = [_sample(answer, prompt="say") for answer in ("a", "aa bb", "b a b")]
    part = {"name": "model", "options": {"path": str(tmp_path / "reward"), "prompt_style": style, "batch": 2}}
    got = [row[0] for row in _judge(samples, part)]
    renderer = Renderer(tokenizer, RenderConfig(prompt_style=style), "preference")
    for sample, value in zip(samples, got, strict=True):
        row = json.dumps({"prompt": sample.prompt, "chosen": sample.answer, "rejected": "x"})
        ids = torch.from_numpy(renderer.render(row).segments[0].ids)[None]
        with torch.no_grad():
            expected = float(model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(set(got)) == 3


@pytest.mark.parametrize("kind", ["whole", "adapter", "classes"])
def test_a_model_without_a_head_for_a_number_is_no_reward_model(kind: str, tmp_path: Path) -> None:
    """A head that it lacks would be drawn at random, another in each process."""
    from kajiya.config.schema import AdapterConfig, ModelConfig
    from kajiya.models.adapt import transform
    from kajiya.models.build import build_model
    from kajiya.models.save import save_model
    from kajiya.models.tasks import CAUSAL, Task
    from kajiya.models.trained import save_trained

    config = ModelConfig(n_params="40k", max_positions=64)
    task = Task("classes", ("a", "b", "c")) if kind == "classes" else CAUSAL
    save_model(build_model(config, VOCABULARY, 0, task).module, NoTokenizer(), tmp_path / "model")
    if kind == "adapter":
        config = ModelConfig(path=str(tmp_path / "model"))
        model = build_model(config, VOCABULARY, 0, CAUSAL).module
        transform(model, AdapterConfig("lora", {"r": 2}), "none", 0)
        save_trained(config, model, NoTokenizer(), tmp_path / "adapter", lambda: model)
    folder = tmp_path / ("adapter" if kind == "adapter" else "model")
    with pytest.raises(
        ConfigError, match=r"rewards\[…\]\.options\.path: .* is no reward model(?s:.*)train\.loss\.name=reward"
    ) as raised:
        load_rewards([{"name": "model", "options": {"path": str(folder)}}], CPU)
    assert "score.weight" in str(raised.value)
