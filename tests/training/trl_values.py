"""Prints `compared <loss> <ours> <TRL's>` for each loss that TRL has, on the same log-probabilities."""

import sys
import warnings
from types import SimpleNamespace
from typing import Any
from unittest import mock

warnings.simplefilter("ignore")

import torch  # noqa: E402
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.gkd import GKDTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402

from kajiya.config.schema import LossConfig  # noqa: E402
from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch, RolloutBatch  # noqa: E402
from kajiya.training.losses import distill as distilling  # noqa: E402
from kajiya.training.losses import (  # noqa: E402
    feedback,
    load_loss,
    policy,
    preference,
)
from kajiya.training.rollouts import Rollout, with_advantages  # noqa: E402

E, T = 5, 9


class Accelerator:
    """Of one process: what is gathered is what there was."""

    device = torch.device("cpu")

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    gather_for_metrics = gather
    num_processes = 1

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        return value

    def unwrap_model(self, model: Any) -> Any:
        return model


class Metrics(dict[str, Any]):
    """Lists that begin empty."""

    def __missing__(self, key: str) -> list[float]:
        self[key] = []
        return self[key]  # type: ignore[no-any-return]


def _trainer(**fields: Any) -> Any:
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        _metrics={"train": Metrics()},
        _total_train_tokens=0,
        _tp_size=1,
        precompute_ref_logps=True,
        **fields,
    )


def _outputs(log_probs: torch.Tensor) -> Any:
    """What TRL's fused head returns for sequences whose first token is the prompt."""
    rest = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=rest, mean_logits=rest, is_top1=rest.bool())


def _tell(name: str, ours: float, theirs: float) -> None:
    sys.stdout.write(f"compared {name} {ours} {theirs}\n")


def _our(name: str, options: dict[str, Any], module: Any, values: Any, batch: Any) -> float:
    """Our loss with these log-probabilities and lengths of the sequences in place of a model's."""
    with mock.patch.object(module, "sequence_log_probs", return_value=values):
        ((total, unit),) = load_loss(LossConfig(name, options))(None, batch)[0].values()
    return float(total) / batch.counts[unit]


def _batch(n: int, reference: torch.Tensor | None = None, **more: Any) -> ExampleBatch:
    empty = torch.zeros(1, 1, dtype=torch.int64)
    return ExampleBatch(
        Batch(empty, empty, empty, empty, 1), empty, torch.arange(n), torch.arange(E), reference=reference, **more
    )


def main() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(3, T, (2 * E,))
    # TRL puts the chosen sequences first, ours alternate.
    mask = (torch.arange(T) < lengths[:, None]).long()
    mask = torch.cat([torch.zeros(2 * E, 1, dtype=torch.int64), mask], dim=1)
    log_probs = -torch.rand(2 * E, T) * 2 * mask[:, 1:]
    sums = log_probs.sum(dim=1)
    reference = sums + torch.randn(2 * E) * 2
    order = torch.arange(2 * E).reshape(2, E).T.reshape(-1)
    ours = (sums[order], lengths[order].float())
    inputs = {
        "input_ids": torch.ones(2 * E, T + 1, dtype=torch.int64),
        "attention_mask": torch.ones(2 * E, T + 1, dtype=torch.int64),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:E],
        "ref_rejected_logps": reference[E:],
    }
    for kind in ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo"):
        smoothing = 0.1 if kind == "robust" else 0.0
        trainer = _trainer(
            loss_types=[kind], loss_weights=[1.0], beta=0.3, label_smoothing=smoothing, ld_alpha=None,
            f_divergence_type="reverse_kl", use_weighting=False,
        )  # fmt: skip
        theirs = DPOTrainer._compute_loss(trainer, lambda **_: _outputs(log_probs), dict(inputs), False)
        options = {"kind": kind, "beta": 0.3, "label_smoothing": smoothing}
        _tell(f"dpo-{kind}", _our("dpo", options, preference, ours, _batch(2 * E, reference[order])), float(theirs))

    # TRL's DPO smooths no sigmoid; its CPO does, of log-probabilities in the place of log-ratios.
    smoothed = SimpleNamespace(alpha=0.0, loss_type="sigmoid", beta=0.3, label_smoothing=0.1, accelerator=Accelerator())
    ratios = sums - reference
    theirs = CPOTrainer.cpo_loss(smoothed, ratios[:E], ratios[E:])[0].mean()
    options = {"kind": "sigmoid", "beta": 0.3, "label_smoothing": 0.1}
    _tell("dpo-smoothed", _our("dpo", options, preference, ours, _batch(2 * E, reference[order])), float(theirs))

    mean = sums / lengths
    simpo = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=2.5, label_smoothing=0.0, accelerator=Accelerator()
    )
    theirs = CPOTrainer.cpo_loss(simpo, mean[:E], mean[E:])[0].mean()
    _tell("simpo", _our("simpo", {"beta": 2.5, "gamma": 0.7}, preference, ours, _batch(2 * E)), float(theirs))
    odds = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.4, accelerator=Accelerator()), mean[:E], mean[E:])[0]
    theirs = -mean[:E].mean() - odds.mean()
    _tell("orpo", _our("orpo", {"beta": 0.4}, preference, ours, _batch(2 * E)), float(theirs))

    labels = torch.tensor([True, False, True, False, False])
    kl = torch.tensor([1.0, 0.3, -0.2, 0.8, 0.4])
    trainer = _trainer(calculate_KL=True, loss_type="kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    trainer._compute_kl_logps = lambda *_: kl
    given = {
        "input_ids": inputs["input_ids"][:E], "attention_mask": inputs["attention_mask"][:E], "completion_mask": mask[:E],
        "label": labels, "ref_logps": reference[:E], "ref_KL_logps": torch.zeros(E),
    }  # fmt: skip
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: _outputs(log_probs[:E]), given, False)
    options = {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    batch = _batch(E, reference[:E], labels=labels.float(), measured={"kl": float(kl.mean())})
    _tell("kto", _our("kto", options, feedback, (sums[:E], lengths[:E].float()), batch), float(theirs))

    rewards, margins = torch.randn(2 * E, 1), torch.rand(E)
    trainer = _trainer(args=SimpleNamespace(center_rewards_coefficient=0.05))
    outputs = SimpleNamespace(logits=rewards)
    theirs = RewardTrainer.compute_loss(
        trainer, lambda **_: outputs, {"margin": margins, "attention_mask": inputs["attention_mask"]}
    )
    with mock.patch.object(preference, "sequence_logits", return_value=rewards[order]):
        ((total, _),) = load_loss(LossConfig("reward", {"centering": 0.05}))(None, _batch(2 * E, labels=margins))[
            0
        ].values()
    _tell("reward", float(total) / E, float(theirs))

    student, teacher = torch.randn(1, 7, 11), torch.randn(1, 7, 11)
    for divergence, beta, share in (("forward", 0.0, 0.5), ("reverse", 1.0, 0.5), ("jsd", 0.3, 0.3)):
        theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=2.0, reduction="sum")
        log_p, log_q = (torch.log_softmax(each[0] / 2.0, dim=1) for each in (teacher, student))
        _tell(
            f"distill-{divergence}",
            float(distilling._DIVERGENCES[divergence](log_p, log_q, share).sum()),
            float(theirs),
        )
    _policies()


_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "token": ("dapo", {"clip_low": 0.2, "clip_high": 0.28}),
    "sequence": ("grpo", {"beta": 0.3}),
    "constant": ("dr_grpo", {"clip_low": 0.1, "clip_high": 0.1, "beta": 0.05}),
}
"""By our `normalize`: TRL's loss type, and options that are tried with it."""


def _policies() -> None:
    """Values and advantages of GRPO, whose completions are the columns of a row."""
    n, k = 6, 3
    lengths = torch.randint(1, T + 1, (n,))
    mask = torch.arange(T) < lengths[:, None]
    now, old, reference = (-torch.rand(n, T) * 3 * mask for _ in range(3))
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0.5])
    targets = torch.where(mask, 1, NO_TARGET)
    rows = Batch(targets, targets, targets, targets, int(mask.sum()))
    advantages = torch.randn(n)
    batch = RolloutBatch(
        rows, old, advantages, rewards[:, None], (), k, torch.zeros(n, dtype=torch.bool), old=old, reference=reference
    )
    for normalize, (loss_type, options) in _KINDS.items():
        used = {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.0} | options
        trainer = _trainer(
            loss_type=loss_type, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
            importance_sampling_level="token", beta=used["beta"], epsilon_low=used["clip_low"],
            epsilon_high=used["clip_high"], args=SimpleNamespace(
                use_bias_correction_kl=False, delta=None, steps_per_generation=1
            ),
            current_gradient_accumulation_steps=1, max_completion_length=T, _entropy_bonus_enabled=False,
        )  # fmt: skip
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (now, torch.zeros(n, T), None)
        inputs = {
            "prompt_ids": torch.ones(n, 1), "prompt_mask": torch.ones(n, 1), "completion_ids": torch.ones(n, T),
            "completion_mask": mask.long(), "advantages": advantages, "old_per_token_logps": old,
            "ref_per_token_logps": reference, "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
        with mock.patch.object(policy, "token_log_probs", return_value=now):
            loss = load_loss(LossConfig("grpo", {"normalize": normalize, "max_tokens": T, **options}))
            ((total, unit),) = loss(None, batch)[0].values()
        _tell(f"grpo-{normalize}", float(total) / batch.counts[str(unit)], float(theirs))
    for is_scaled in (True, False):
        ours, theirs = _advantages(rewards.tolist(), k, is_scaled), _their_advantages(rewards, k, is_scaled)
        for number in range(n):
            _tell(f"advantages-{is_scaled}-{number}", float(ours[number]), float(theirs[number]))


def _their_advantages(rewards: torch.Tensor, k: int, is_scaled: bool) -> torch.Tensor:
    """Of answers that were drawn already and have earned these rewards."""
    ids = [[1, 2]] * len(rewards)
    trainer = _trainer(
        environment_factories=None, environments=None, tools=None, pad_to_multiple_of=None, mask_truncated_completions=False,
        use_vllm=False, beta=0.0, num_iterations=1, num_generations=k, reward_weights=torch.ones(1), reward_funcs=[None],
        reward_func_names=["given"], multi_objective_aggregation="sum_then_normalize", log_multimodal=False,
        scale_rewards="group" if is_scaled else "none", _tokenizer=SimpleNamespace(pad_token_id=0), _pending_extra_logs={},
        _pending_metrics={}, _logs={"rewards": Metrics(), "extra": Metrics(), "prompt": [], "completion": [], "advantages": []},
        args=SimpleNamespace(
            per_device_train_batch_size=len(rewards), steps_per_generation=1, gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
    )  # fmt: skip
    trainer.model.is_gradient_checkpointing = False
    trainer.accelerator.process_index = 0
    trainer._generate = lambda prompts: (ids, ids, None, ["x"] * len(rewards), None, {}, None, None)
    trainer._calculate_rewards = lambda *_: rewards[:, None]
    found: torch.Tensor = GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "x"} for _ in rewards])[
        "advantages"
    ]
    return found


def _advantages(rewards: list[float], k: int, is_scaled: bool) -> torch.Tensor:
    groups = [rewards[first : first + k] for first in range(0, len(rewards), k)]
    found = [with_advantages([Rollout([1], [0.0], False, "", [r]) for r in group], is_scaled) for group in groups]
    return torch.tensor([each.advantage for group in found for each in group])


main()
