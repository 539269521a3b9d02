"""What a study has come to: trials by how they ended, the best of them, its config as a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING

from kajiya.config.compose import compose
from kajiya.config.digest import to_plain
from kajiya.config.schema import Config
from kajiya.config.sweep import Value, as_override
from kajiya.flows.report_settings import public_config
from kajiya.flows.tune_plan import StudyPlan

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

THE_RECIPE = "the recipe"
"""What the recipe itself is called beside the trials."""


def finished(study: "Study") -> "list[FrozenTrial]":
    """Trials that came to their end with a figure."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]


def count_trials(study: "Study") -> dict[str, int]:
    """Configurations by how they ended: finished, pruned, failed and why, waiting."""
    trials = study.get_trials(deepcopy=False)
    gone_on = {trial.user_attrs.get("continues") for trial in trials}
    counts: dict[str, int] = {}
    for trial in trials:
        if trial.number in gone_on:
            continue
        status = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}.get(trial.state.name, "not ended")
        status = trial.user_attrs.get("status", status) if status == "failed" else status
        counts[status] = counts.get(status, 0) + 1
    return counts


def best_trials(study: "Study") -> "list[FrozenTrial]":
    """Finished trials, the best first, each configuration once; of several objectives, those that no other beats in all."""
    if not finished(study):
        return []
    if len(study.directions) > 1:
        return study.best_trials
    sign = -1 if study.direction.name == "MAXIMIZE" else 1
    ranked = sorted(finished(study), key=lambda trial: sign * (trial.value or 0.0))
    return list({str(trial.user_attrs["settings"]): trial for trial in reversed(ranked)}.values())[::-1]


def config_of(plan: StudyPlan, trial: "FrozenTrial") -> Config:
    """The config of a trial, with everything that a run of its own shall have."""
    values: dict[str, Value] = trial.user_attrs["settings"]
    chosen = [as_override(key, value) for key, value in values.items()]
    return compose(plan.recipe, [*plan.fixed, *chosen], plan.config_dir)


def recipe_of(plan: StudyPlan) -> Config:
    """The recipe as it was before the search."""
    return compose(plan.recipe, plan.fixed, plan.config_dir)


def trial_name(trial: "FrozenTrial") -> str:
    """What a trial is called beside the recipe."""
    return f"trial {trial.number}"


def write_best(plan: StudyPlan, study: "Study", chosen: str | None = None) -> Path | None:
    """`best.yaml` in the study's folder: the best trial's config as a recipe, or that of what the fresh seeds have `chosen`."""
    ranked = best_trials(study)
    if not ranked:
        return None
    best = ranked[0]
    if chosen == THE_RECIPE:
        config, head = recipe_of(plan), f"# The recipe as it was before study {plan.id}.\n"
    else:
        trial = {trial_name(each): each for each in ranked}[chosen or trial_name(best)]
        values = ", ".join(f"{v:.6g}" for v in trial.values or [])
        config, head = config_of(plan, trial), f"# Trial {trial.number} of study {plan.id}: {values}.\n"
    if chosen not in (None, trial_name(best)):
        head += f"# The fresh seeds favour it over {trial_name(best)}, the best of the search.\n"
    if len(study.directions) > 1:
        head += _write_front(plan, ranked)
    path = plan.folder / "best.yaml"
    path.write_text(head + _recipe_text(config, "best"), encoding="utf-8")
    return path


def _write_front(plan: StudyPlan, front: "list[FrozenTrial]") -> str:
    """`front/trial-N.yaml` of each trial that no other beats in all objectives; what best.yaml is to say of them."""
    folder = plan.folder / "front"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.yaml"):
        old.unlink()
    for trial in front:
        figures = ", ".join(f"{name} {v:.6g}" for name, v in zip(plan.metrics, trial.values or [], strict=True))
        head = f"# Trial {trial.number} of study {plan.id}: {figures}.\n"
        text = head + _recipe_text(config_of(plan, trial), f"trial-{trial.number}")
        (folder / f"trial-{trial.number}.yaml").write_text(text, encoding="utf-8")
    return (
        f"# With several objectives none is the best: it is the earliest of {len(front)} that no other beats in all, which are\n"
        "# in front/.\n"
    )


def _recipe_text(config: Config, suffix: str) -> str:
    import yaml

    plain = to_plain(config)
    del plain["tune"]
    plain["name"] = f"{plain['name']}-{suffix}"
    return str(yaml.safe_dump(public_config(plain), sort_keys=False, allow_unicode=True))
