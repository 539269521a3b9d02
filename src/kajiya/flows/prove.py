"""Proving a run before its first step: the verdict found or made, told, recorded; a failed check stops the work."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kajiya.config.digest import to_plain
from kajiya.config.schema import Config
from kajiya.data.progress import OnEvent
from kajiya.data.shards import open_split
from kajiya.data.tokenizer import load_tokenizer
from kajiya.flows.bases import loss_without_place, without_places
from kajiya.flows.feeding import Data, task_of
from kajiya.flows.own_module import own_names
from kajiya.models.future import without_future_heads
from kajiya.models.open import open_model
from kajiya.models.trained import save_trained
from kajiya.preflight.prove import Verdict, prove, require_proven
from kajiya.preflight.prove_run import check_memory, check_schedule
from kajiya.preflight.subject import Finding, Subject
from kajiya.run.code import code_revision, own_code
from kajiya.run.events import finite
from kajiya.run.files import write_json
from kajiya.run.provenance import package_versions
from kajiya.run.store import Artifact, Store, artifact_key, produce
from kajiya.training.fit import Setup

Rebuild = Callable[[], torch.nn.Module]
_ANEW: Mapping[str, Callable[[Subject], Finding]] = {"schedule": check_schedule, "memory": check_memory}
"""Checks that a kept verdict does not answer."""


def prove_run(
    config: Config,
    setup: Setup,
    data: Data,
    store: Store,
    plan: Mapping[str, Any],
    rebuild: Rebuild,
    hear: OnEvent,
) -> Artifact:
    """The proof of the run that `setup` is about to begin, made or found under its config without seed and length,
    the data, the device and the versions of the libraries.

    The findings go to `hear` as a `proof` event. Raises `ProofError` for checks that fail; a failed proof is not kept.
    `setup` has its schedule, `plan` are the facts of the plan; `rebuild` makes the untrained model again.
    """
    subject = _subject(config, setup, data, plan, rebuild)
    code = code_revision("kajiya.preflight.prove", "kajiya.flows.fitting", "kajiya.flows.prove")
    # What is proven of masks, attention and gradients is proven of these libraries on this kind of device.
    with_what = {
        "precision": setup.precision.name,
        "device": setup.strategy.device.type,
        "libraries": package_versions(),
    }
    section, parents = proof_section(config) | with_what, data.artifacts()
    found = store.find("proof", artifact_key("proof", code, section, parents))
    hear("stage", name="prove", state="begun", seconds=0.0, text="")
    verdict = _with_own_schedule(found, subject) if found is not None else prove(subject)
    facts = finite(verdict_facts(verdict))
    hear("proof", facts=facts)
    require_proven(verdict.failures())
    proof, _ = produce(
        store,
        "proof",
        code=code,
        config=section,
        parents=parents,
        make=lambda folder: _keep(folder, facts),
    )
    n_passed = sum(finding.state == "passed" for finding in verdict.findings)
    text = f"{n_passed} of {len(verdict.findings)} checks passed, the others do not apply or were skipped"
    if n_passed == len(verdict.findings):
        text = f"all {n_passed} checks passed"
    hear("stage", name="prove", state="done" if found is None else "reused", seconds=verdict.seconds, text=text)
    return replace(proof, facts=facts)


def _keep(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    write_json(folder / "proof.json", facts)
    return facts


def verdict_facts(verdict: Verdict) -> dict[str, Any]:
    """The verdict for a manifest."""
    return {"seconds": verdict.seconds, "findings": to_plain(verdict.findings)}


def _with_own_schedule(found: Artifact, subject: Subject) -> Verdict:
    """The verdict that was kept; the schedule, which depends on the length, and the memory of this machine are looked at anew."""
    anew = {name: check for name, check in _ANEW.items() if name not in subject.config.preflight.skip}
    findings = [Finding(**row) for row in found.facts["findings"]]
    findings = [replace(anew[each.name](subject), name=each.name) if each.name in anew else each for each in findings]
    return Verdict(tuple(findings), 0.0)


def _subject(config: Config, setup: Setup, data: Data, plan: Mapping[str, Any], rebuild: Rebuild) -> Subject:
    tokenizer = load_tokenizer(data.tokenizer.path)
    task, n_added = task_of(config, data.corpus), int(data.tokenizer.facts["added_tokens"])

    def reopen(folder: Any) -> Any:
        return open_model(folder, torch.float32, config.model.attention, task=task)

    def save(folder: Path) -> object:
        with without_future_heads(setup.model):
            return save_trained(config.model, setup.model, tokenizer, folder, rebuild, n_added)

    return Subject(
        config=config,
        setup=setup,
        tokenizer=tokenizer,
        corpus=data.corpus,
        shards=open_split(data.shards.path, "train"),
        plan=plan,
        save=save,
        reopen=None if ":" in config.model.name else reopen,
    )


def proof_section(config: Config) -> dict[str, Any]:
    """What the proof depends on: the settings and the user's own code, neither the seed nor the length."""
    train = replace(
        config.train,
        loss=loss_without_place(config.train.loss),
        steps=None,
        epochs=None,
        minutes=None,
        log_every=1,
        eval_every=None,
        save_every=None,
        keep_last=1,
    )
    return {
        "optim": config.optim,
        "schedule": config.schedule,
        "train": train,
        "row_tokens": config.data.row_tokens,
        "isolate": config.data.isolate,
        "preflight": config.preflight,
        "own_code": own_code(own_names(config)),
        **without_places(config),
    }
