"""What can go wrong silently, checked on the real model, the real first batches and the real settings before a step is spent."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kajiya.config.validate import CHECKS
from kajiya.errors import ProofError, StoreError, TrainingError
from kajiya.preflight.portion import Kept
from kajiya.preflight.prove_disjoint import check_disjoint
from kajiya.preflight.prove_isolation import check_isolation
from kajiya.preflight.prove_rows import check_targets
from kajiya.preflight.prove_run import check_memory, check_schedule
from kajiya.preflight.prove_saving import check_reload, check_trainable
from kajiya.preflight.prove_start import check_start
from kajiya.preflight.prove_steps import check_accumulation, check_learning
from kajiya.preflight.subject import SKIPPED_BY_HAND, Finding, Subject, failed, skipped
from kajiya.training.probe import undone

_FUNCTIONS: Mapping[str, Callable[[Subject], Finding]] = {
    "targets": check_targets,
    "isolation": check_isolation,
    "accumulation": check_accumulation,
    "trainable": check_trainable,
    "reload": check_reload,
    "start": check_start,
    "learning": check_learning,
    "schedule": check_schedule,
    "memory": check_memory,
    "disjoint": check_disjoint,
}

_STEPPING = ("trainable", "reload", "learning")
"""Checks that change weights, which are put back from a copy."""


@dataclass(frozen=True)
class Verdict:
    """What all checks found, in their order, and the seconds that they took."""

    findings: tuple[Finding, ...]
    seconds: float

    def failures(self) -> list[Finding]:
        """Checks that do not hold."""
        return [finding for finding in self.findings if finding.state == "failed"]


def prove(subject: Subject) -> Verdict:
    """Run every check that `preflight.skip` does not name; weights, generators and loader are left bit-identical."""
    began = time.perf_counter()
    loader = subject.setup.loader
    position = loader.state()
    kept: Any = Kept(loader)
    subject = replace(subject, setup=replace(subject.setup, loader=kept))
    findings = []
    try:
        for name in CHECKS:
            if name in subject.config.preflight.skip:
                found = skipped(SKIPPED_BY_HAND)
            else:
                with undone(subject.setup, has_steps=name in _STEPPING):
                    found = _checked(_FUNCTIONS[name], subject)
            findings.append(replace(found, name=name))
    finally:
        loader.load_state(position)
    return Verdict(tuple(findings), time.perf_counter() - began)


def _checked(check: Callable[[Subject], Finding], subject: Subject) -> Finding:
    """The check's finding; a step that could not be taken, or a save that does not open again, is one."""
    try:
        return check(subject)
    except (TrainingError, StoreError) as problem:
        first, _, rest = str(problem).partition("\n")
        return failed(first, rest or "See what the other checks say.")


def require_proven(verdict_failures: Sequence[Finding]) -> None:
    """Raise `ProofError` that names each failed check, what is wrong and the remedy."""
    if not verdict_failures:
        return
    lines = [f"{each.name}: {each.text}\n{each.remedy}" for each in verdict_failures]
    names = ", ".join(each.name for each in verdict_failures)
    raise ProofError("\n".join(lines) + f"\nNo step was spent. preflight.skip=[{names}] goes on all the same.")
