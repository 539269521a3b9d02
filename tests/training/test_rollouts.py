"""Rollouts: drawn from the weights that are trained, a function of their seeds, and held when a phase is cut in two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import VOCABULARY, NoTokenizer, make_batch
from tests.training.test_fit import make_setup

from kajiya.config.options import GRPOLoss
from kajiya.config.schema import AdapterConfig, LossConfig
from kajiya.data.batch import NO_TARGET, RolloutBatch
from kajiya.data.prompts import Prompt
from kajiya.errors import ConfigError, StoreError
from kajiya.flows.rolling import _reference
from kajiya.models.adapt import adapter_off, transform
from kajiya.models.adapter_files import Base, save_adapter
from kajiya.models.injection import merge
from kajiya.models.load import load_model
from kajiya.models.merged import merged_tensors
from kajiya.models.weights_digest import weights_digest
from kajiya.training.checkpoint import load_checkpoint, save_checkpoint
from kajiya.training.fit import Setup, fit
from kajiya.training.losses import load_loss
from kajiya.training.losses.sequences import token_log_probs
from kajiya.training.policy import Policy
from kajiya.training.rewards import Rewards
from kajiya.training.rollouts import Roller, Rollout, RolloutLoader, own_log_probs, stop_tokens, with_advantages
from kajiya.training.state import TrainState

Make = Callable[..., torch.nn.Module]
CPU = torch.device("cpu")
_ADAPTERS: dict[str, tuple[AdapterConfig, str]] = {
    "full": (AdapterConfig(), "none"),
    "lora": (AdapterConfig("lora", {"r": 4}), "none"),
    "qlora": (AdapterConfig("lora", {"r": 4}), "nf4"),
}


class Letters:
    """A vocabulary whose token n is the character n."""

    eos_token_id = 2
    pad_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(token + 200) for token in ids if token > 2)

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return [self.decode(row, skip_special_tokens=True) for row in rows]

    def __len__(self) -> int:
        return VOCABULARY.size


PROMPTS = [Prompt(tuple(range(3 + n, 6 + 2 * n)), f"prompt {n}", "") for n in range(7)]


def _even(samples: Any) -> list[float]:
    """The share of even characters."""
    return [sum(ord(each) % 2 == 0 for each in sample.answer) / max(1, len(sample.answer)) for sample in samples]


def _roller(model: Any, **options: Any) -> Roller:
    given = GRPOLoss(group_size=4, max_tokens=6, **options)
    own = own_log_probs(model, torch.no_grad, CPU, 64)
    return Roller(
        policy=Policy(model, Letters(), 30, torch.float32),
        rewards=Rewards(("even",), (1.0,), (_even,), (60.0,)),
        options=given,
        vocabulary=Letters(),
        stop_ids=(),
        old=own if given.inner_epochs > 1 else None,
        reference=own if given.beta else None,
    )


def _loader(model: Any, batch: int = 2, step_rows: int = 2, seed: int = 0, **options: Any) -> RolloutLoader:
    prompts: Any = PROMPTS
    return RolloutLoader(prompts, _roller(model, **options), seed=seed, batch=batch, step_rows=step_rows)


def _adapted(make: Make, name: str) -> Any:
    model = make()
    adapter, quantized = _ADAPTERS[name]
    transform(model, adapter, quantized, seed=0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in key:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("name", sorted(_ADAPTERS))
def test_the_engine_draws_from_the_model_that_is_trained(name: str, tiny_model: Make) -> None:
    """Its log-probabilities are the trainer's own, before and after a change of the weights."""
    model = _adapted(tiny_model, name)
    loader = _loader(model)
    for _ in range(2):
        batch = loader.next()
        with torch.no_grad():
            own = token_log_probs(model, batch.rows, 64)
        is_target = batch.rows.targets != NO_TARGET
        assert int(is_target.sum()) == batch.n_targets > 8
        torch.testing.assert_close(batch.sampled[is_target], own[is_target], atol=2e-4, rtol=1e-4)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
    assert loader.roller.policy.version == 2


@pytest.mark.parametrize(
    ("adapter", "quantized"),
    [
        (AdapterConfig("lora", {"r": 4, "rslora": True}), "none"),
        (AdapterConfig("lora", {"r": 4, "train_head": True}), "none"),
        (AdapterConfig("lora", {"r": 4, "init": "pissa"}), "none"),
        (AdapterConfig("dora", {"r": 4}), "none"),
        (AdapterConfig("ia3"), "none"),
        (AdapterConfig("dora", {"r": 4}), "nf4"),
        (AdapterConfig("freeze", {"train": "mlp"}), "none"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_merged_tensors_compute_what_the_model_with_its_adapter_does(
    adapter: AdapterConfig, quantized: str, tiny_model: Make
) -> None:
    model: Any = tiny_model(tied=False)
    transform(model, adapter, quantized, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.05)
    before = {name: each.clone() for name, each in model.state_dict().items() if isinstance(each, torch.Tensor)}
    plain: Any = tiny_model(tied=False, seed=9)
    plain.load_state_dict(merged_tensors(model, torch.float32))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, use_cache=False).logits
        got = plain.eval()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(each, after[name]) for name, each in before.items())
    if quantized == "none" and adapter.name != "freeze":
        merge(model)
        torch.testing.assert_close(
            plain.state_dict()["model.layers.1.mlp.down_proj.weight"],
            model.state_dict()["model.layers.1.mlp.down_proj.weight"],
        )


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_merged_tensors_of_layers_that_keep_weights_the_other_way_round(name: str, tiny_model: Make) -> None:
    """GPT-2's: [in, out]."""
    shape: Any = {"name": "gpt2", "n_kv_heads": None, "tied": False}
    model: Any = tiny_model(**shape)
    transform(model, AdapterConfig(name), "none", seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.05)
    plain: Any = tiny_model(seed=9, **shape)
    plain.load_state_dict(merged_tensors(model, torch.float32))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected, got = (each.eval()(input_ids=ids, use_cache=False).logits for each in (model, plain))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_virtual_tokens_are_refused(tiny_model: Make) -> None:
    model = tiny_model()
    transform(model, AdapterConfig("prompt", {"n_tokens": 2}), "none", seed=0)
    with pytest.raises(ConfigError, match="virtual tokens"):
        merged_tensors(model, torch.float32)


def _same(first: RolloutBatch, second: RolloutBatch) -> bool:
    tables = ("sampled", "advantages", "rewards", "is_cut", "old", "reference")
    pairs = [(first.rows.tokens, second.rows.tokens), (first.rows.targets, second.rows.targets)]
    pairs += [(vars(first)[name], vars(second)[name]) for name in tables]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


def test_answers_are_a_function_of_seed_prompt_and_number(tiny_model: Make) -> None:
    model = tiny_model()
    whole, again = _loader(model, batch=2), _loader(model, batch=2)
    batches = [whole.next() for _ in range(5)]
    again.load_state(json.loads(json.dumps({**again.state(), "row": 6})))
    assert _same(again.next(), batches[3])
    assert not torch.equal(_loader(model, seed=1).next().rows.tokens, batches[0].rows.tokens)
    halves = _loader(model, batch=1, step_rows=2)
    parts = [halves.next(), halves.next()]
    lengths = [int((batches[0].rows.targets[row] != NO_TARGET).sum()) for row in range(8)]
    assert [int((part.rows.targets[row] != NO_TARGET).sum()) for part in parts for row in range(4)] == lengths
    # Seven prompts, two at a time: the second pass meets them again, and draws other answers.
    assert whole.state()["epoch"] == 1
    assert whole.rows_per_epoch == 7


def test_a_group_is_judged_by_itself(tiny_model: Make) -> None:
    batch = _loader(tiny_model()).next()
    rewards = batch.rewards[:, 0].reshape(-1, 4)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch.advantages, expected.flatten(), atol=1e-5, rtol=1e-5)
    plain = _loader(tiny_model(), scale_advantages=False).next()
    torch.testing.assert_close(plain.advantages, (rewards - rewards.mean(1, keepdim=True)).flatten())
    assert batch.counts["examples"] == 2
    assert batch.counts["sequences"] == 8
    alike = [Rollout([1], [0.0], False, "", [0.3]) for _ in range(3)]
    assert [each.advantage for each in with_advantages(alike, True)] == [0, 0, 0]


def test_inner_epochs_come_back_to_the_same_answers_and_survive_a_cut(tiny_model: Make) -> None:
    model: Any = tiny_model()
    loader = _loader(model, batch=1, step_rows=2, inner_epochs=2, beta=0.1)
    first = [loader.next(), loader.next()]
    held = json.loads(json.dumps(loader.state()))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.1)
    second = [loader.next(), loader.next()]
    assert all(_same(a, b) for a, b in zip(first, second, strict=True))
    resumed = _loader(model, batch=1, step_rows=2, inner_epochs=2, beta=0.1)
    resumed.load_state(held)
    assert all(_same(resumed.next(), each) for each in second)
    assert first[0].old is not None
    torch.testing.assert_close(first[0].old, first[0].sampled, atol=2e-4, rtol=1e-4)
    assert _same(resumed.next(), loader.next())
    assert loader.state()["held"] != {}
    with pytest.raises(StoreError, match="inner_epochs"):
        _loader(model, batch=1, step_rows=2).load_state(held)


def _setup(model: Any, **options: Any) -> Setup:
    loss = load_loss(LossConfig("grpo", {"chunk_tokens": 64, **options}))
    return make_setup(model, [], loss=loss, loader=_loader(model, batch=1, step_rows=2, **options), accumulate=2)


@pytest.mark.parametrize("options", [{}, {"inner_epochs": 3, "clip_high": 0.3}], ids=["on-policy", "inner-epochs"])
@pytest.mark.parametrize("name", sorted(_ADAPTERS))
def test_training_goes_on_bit_for_bit(name: str, options: dict[str, Any], tiny_model: Make, tmp_path: Path) -> None:
    """Four steps of which the second or third is in the midst of a phase of three."""
    whole = _setup(_adapted(tiny_model, name), **options)
    fit(whole, TrainState(), [], lambda: False)
    part, half = _setup(_adapted(tiny_model, name), **options), TrainState()
    fit(part, half, [], lambda: half.step == 2)
    folder = save_checkpoint(tmp_path / "checkpoints", half, part.model, part.optimizer, part.loader.state(), "key")
    rest = _setup(_adapted(tiny_model, name), **options)
    torch.manual_seed(99)
    state, position = load_checkpoint(folder, rest.model, rest.optimizer, "key")
    rest.loader.load_state(position)
    fit(rest, state, [], lambda: False)
    for (key, expected), got in zip(
        whole.optimizer.state_tensors().items(), rest.optimizer.state_tensors().values(), strict=True
    ):
        assert torch.equal(expected, got), key


def test_the_reward_rises(tiny_model: Make) -> None:
    model = tiny_model()
    setup = make_setup(
        model,
        [],
        loss=load_loss(LossConfig("grpo")),
        loader=_loader(model, batch=4, step_rows=4),
        steps=30,
        lr=lambda step: 1e-2,
    )
    loader: Any = setup.loader
    before = float(loader.next().rewards[:, 0].mean())
    fit(setup, TrainState(), [], lambda: False)
    assert float(loader.next().rewards[:, 0].mean()) > before + 0.3


def test_the_base_is_the_reference_of_an_adapter(tiny_model: Make) -> None:
    model = _adapted(tiny_model, "lora")
    own = own_log_probs(model, torch.no_grad, CPU, 64)
    rows = _loader(model).next().rows
    with adapter_off(model):
        base = own(rows)
    plain = own_log_probs(tiny_model(), torch.no_grad, CPU, 64)(rows)
    torch.testing.assert_close(base, plain, atol=1e-5, rtol=1e-5)
    assert float((own(rows) - base).abs().max()) > 1e-3


def test_an_answer_ends_with_a_token_that_holds_a_stop_string(tiny_model: Make) -> None:
    stops = stop_tokens(Letters(), [chr(210), chr(215)])
    assert stops == (10, 15)
    model = tiny_model()
    options = GRPOLoss(group_size=16, max_tokens=20, stop=[chr(200 + n) for n in range(40, 60)])
    roller = Roller(
        Policy(model, Letters(), 40, torch.float32), Rewards(("even",), (1.0,), (_even,), (60.0,)), options, Letters(),
        stop_tokens(Letters(), options.stop), None, None,
    )  # fmt: skip
    roller.policy.renew()
    (group,) = roller.roll(PROMPTS[:1], [list(range(16))])
    ended = [each for each in group if not each.is_cut]
    assert len(ended) > 8
    for each in ended:
        assert 40 <= each.tokens[-1] < 60 or each.tokens[-1] in roller.policy.end_ids
        assert not any(240 <= ord(character) < 260 for character in each.text)
        assert len(each.text) == sum(token > 2 for token in each.tokens[:-1])


def test_an_answer_ends_where_it_does_when_served(tiny_model: Make) -> None:
    """At each end that the model's generation config names (Gemma's end of turn beside its end of text), which is no part of it."""
    model: Any = tiny_model()
    ends = list(range(40, 60))
    model.generation_config.eos_token_id = ends
    options = GRPOLoss(group_size=16, max_tokens=20)
    policy = Policy(model, Letters(), 40, torch.float32)
    roller = Roller(policy, Rewards(("even",), (1.0,), (_even,), (60.0,)), options, Letters(), (), None, None)
    policy.renew()
    (group,) = roller.roll(PROMPTS[:1], [list(range(16))])
    ended = [each for each in group if not each.is_cut]
    assert len(ended) > 8
    for each in group:
        assert not {2, *ends} & set(each.tokens[:-1])
        assert each.is_cut != (each.tokens[-1] in {2, *ends})
        assert len(each.text) == sum(token > 2 for token in each.tokens[: None if each.is_cut else -1])


def test_answers_are_drawn_by_experts_with_their_adapter(tiny_model: Make) -> None:
    model: Any = tiny_model(name="mixtral", options={"num_local_experts": 3})
    transform(model, AdapterConfig("lora", {"r": 4, "targets": "experts"}), "none", 0)
    policy = Policy(model, Letters(), 30, torch.float32)
    ids = torch.arange(3, 23)
    for _ in range(2):
        _move(model)
        policy.renew()
        (answer,) = policy.draw([ids.tolist()], [0], 6, ())
        whole = torch.cat([ids, torch.tensor(answer.token_ids)])
        with torch.no_grad():
            expected = model(input_ids=whole[None]).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        found = torch.tensor([each.logprob for each in answer.logprobs])
        own = expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(found, own, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["load", "lora"])
def test_the_reference_of_a_policy_is_the_model_before_training(name: str, tiny_model: Make, tmp_path: Path) -> None:
    """Of an adapter that is gone on with, too: not the bare base."""
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)  # type: ignore[operator]
    model: Any = load_model(base)
    adapter = AdapterConfig("lora", {"r": 4})
    if name == "load":
        transform(model, AdapterConfig("lora", {"r": 4}), "none", 0)
        _move(model)
        save_adapter(model, NoTokenizer(), tmp_path / "a", Base(str(base), weights_digest(base), "none"))
        model, adapter = load_model(base), AdapterConfig("load", {"path": str(tmp_path / "a")})
    transform(model, adapter, "none", 0)
    reference = _reference(model, adapter, torch.no_grad, CPU, GRPOLoss(beta=0.1))
    own = own_log_probs(model, torch.no_grad, CPU, 64)
    rows = make_batch(2, seed=2)
    before = own(rows)
    torch.testing.assert_close(reference(rows), before)
    _move(model)
    after = own(rows)
    assert float((after - before).abs().max()) > 0.05
    torch.testing.assert_close(reference(rows), before)
    assert torch.equal(own(rows), after)


def _move(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)


def test_the_heaviest_batch_has_the_longest_prompt_and_whole_answers(tiny_model: Make) -> None:
    longest = max(len(prompt.ids) for prompt in PROMPTS)

    class Measured(list[Prompt]):
        @property
        def longest(self) -> int:
            return longest

    loader = _loader(tiny_model(), batch=3, beta=0.1)
    given: Any = Measured(PROMPTS)
    loader.prompts = given
    batch = loader.heaviest()
    assert batch.rows.tokens.shape == (3 * 4, -(-(longest + 6 - 1) // 8) * 8)
    assert [int(n) for n in (batch.rows.targets != NO_TARGET).sum(dim=1)] == [6] * 12
    assert batch.reference is not None
    assert loader.state()["row"] == 0
