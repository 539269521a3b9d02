"""Is the gain more than what seeds do? The best two and the recipe as it was, over fresh seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kajiya.config.schema import Config
from kajiya.data.progress import OnEvent
from kajiya.evals.seeds import compare_seeds, noise_floor
from kajiya.flows.jobs import TrialEnd, everything_goes_on, execute
from kajiya.flows.launch import launch
from kajiya.flows.tune_plan import StudyPlan, trimmed
from kajiya.flows.tune_results import THE_RECIPE, best_trials, config_of, recipe_of, trial_name
from kajiya.run.folder import Run

if TYPE_CHECKING:
    from optuna import Study


@dataclass(frozen=True)
class Repeat:
    """One configuration with one fresh seed."""

    name: str
    seed: int
    config: Config


def confirm(plan: StudyPlan, study: "Study", hear: OnEvent) -> dict[str, Any]:
    """Run the best two configurations and the recipe's own over `tune.confirm_seeds` fresh seeds each.

    Returns, for the study's manifest: `values` by name, `noise` (standard deviation over seeds of the best), `verdicts` in
    plain words, and what is `chosen`. A repeat that fails is left out and said so.
    """
    ranked = best_trials(study)[:2]
    configs = {trial_name(trial): config_of(plan, trial) for trial in ranked}
    configs[THE_RECIPE] = recipe_of(plan)
    seeds = [plan.base.seed + 1 + i for i in range(plan.base.tune.confirm_seeds)]
    repeats = [
        Repeat(name, seed, replace(trimmed(config), seed=seed)) for name, config in configs.items() for seed in seeds
    ]
    hear("stage", name="confirm", state="begun", seconds=0.0, text="")
    values: dict[str, list[float]] = {name: [] for name in configs}
    failed: list[str] = []
    seconds = 0.0
    sign = -1 if plan.base.tune.objectives[0].startswith("max:") else 1
    for repeat, end in launch(plan.base.tune.launcher, partial(_repeat, plan), repeats, plan.base.tune.parallel):
        seconds += end.seconds
        if end.status == "finished":
            values[repeat.name] += end.figures(plan.metrics, plan.base.tune.value, [sign])
        else:
            failed.append(f"{repeat.name} with seed {repeat.seed}: {end.problem or end.status}")
    verdicts, chosen = _verdicts(values, sign), _choose(values, sign)
    if chosen != next(iter(values)):
        verdicts.append(f"the fresh seeds favour {chosen} over {next(iter(values))}, so best.yaml holds it")
    hear("stage", name="confirm", state="done", seconds=seconds, text="; ".join(verdicts))
    best = next(iter(values.values()))
    noise = noise_floor(best).spread if len(best) > 1 else None
    return {
        "values": values,
        "seeds": seeds,
        "noise": noise,
        "verdicts": verdicts,
        "chosen": chosen,
        "failed": failed,
    }


def recall(run: Run, study: "Study") -> dict[str, Any] | None:
    """What an earlier attempt confirmed, as long as it speaks of the trial that is the best now."""
    found: dict[str, Any] | None = run.manifest().get("confirmed")
    ranked = best_trials(study)
    is_of_the_best = found is not None and ranked and trial_name(ranked[0]) == next(iter(found["values"]))
    return found if is_of_the_best else None


def _repeat(plan: StudyPlan, repeat: Repeat) -> tuple[Repeat, TrialEnd]:
    name = f"confirm-{repeat.name.replace(' ', '-')}-seed-{repeat.seed}"
    job = plan.job(repeat.config, name, {"confirms": repeat.name, "seed": repeat.seed})
    return repeat, execute(job, everything_goes_on)


def _choose(values: Mapping[str, Sequence[float]], sign: int) -> str:
    """What the fresh seeds favour: the search's best, unless another is better beyond their noise."""
    chosen, *others = values
    for name in others:
        if min(len(values[chosen]), len(values[name])) < 2:
            continue
        found = compare_seeds(values[chosen], values[name])
        if found.is_beyond_noise and sign * found.difference < 0:
            chosen = name
    return chosen


def _verdicts(values: Mapping[str, Sequence[float]], sign: int) -> list[str]:
    """The best against each of the others."""
    (first, best), *others = values.items()
    said = []
    for name, rest in others:
        if min(len(best), len(rest)) < 2:
            said.append(f"{first} against {name}: no verdict, fewer than two seeds of each")
            continue
        found = compare_seeds(rest, best)
        size = f"{abs(found.difference):.3g} ± {found.half_width:.2g}"
        words = "better" if sign * found.difference < 0 else "worse"
        if found.is_beyond_noise:
            said.append(
                f"{first} is {words} than {name} by {size}, beyond the noise of seeds (p = {found.p_value:.2g})"
            )
        else:
            said.append(
                f"{first} and {name}: no difference shown beyond the noise of seeds ({size}, p = {found.p_value:.2g})"
            )
    return said
