"""Checks of the run as a whole: the learning rate over its steps, and whether it fits into memory."""

import math
import os
from itertools import pairwise

import torch

from kajiya.config.quantities import format_bytes, format_count
from kajiya.preflight.subject import Finding, Subject, failed, passed
from kajiya.run.usage import resident_memory
from kajiya.training.memory import free_bytes

_MARKS = "▁▂▃▄▅▆▇█"
_DRAWN = 24


def check_schedule(subject: Subject) -> Finding:
    """The learning rate as it will be: rises over the warm-up, reaches its peak, is never negative."""
    setup, config = subject.setup, subject.config
    steps, peak = setup.steps, config.optim.lr
    points = sorted({1 + round(i * (steps - 1) / (_DRAWN - 1)) for i in range(_DRAWN)})
    rates = [setup.lr(step) for step in points]
    drawn = "".join(_MARKS[min(7, max(0, int(8 * rate / peak)))] if math.isfinite(rate) else "?" for rate in rates)
    warmup = round(config.schedule.warmup_fraction * steps)
    tokens, epochs = subject.plan["tokens"], subject.plan["epochs"]
    facts = {"curve": drawn, "steps": steps, "warmup_steps": warmup, "tokens": tokens, "epochs": epochs}
    remedy = f"Look at schedule.name={config.schedule.name} and schedule.warmup_fraction."
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        return failed(f"the learning rate is negative or no number somewhere: {drawn}", remedy, **facts)
    if max(setup.lr(min(steps, max(1, warmup + 1))), *rates) < 0.5 * peak:
        return failed(f"the learning rate never comes near optim.lr={peak:g}: {drawn}", remedy, **facts)
    if warmup >= steps:
        return failed(f"the warm-up takes {warmup} of {steps} steps", remedy, **facts)
    if warmup >= 2:
        rising = [setup.lr(step) for step in sorted({1, max(1, warmup // 2), warmup})]
        if not all(a < b for a, b in pairwise(rising)) or rising[0] > 0.75 * peak:
            return failed(
                f"the learning rate does not rise over the {warmup} steps of warm-up: {drawn}", remedy, **facts
            )
    length = f"{steps:,} in all: {format_count(tokens)} tokens, {epochs:.2f} epochs"
    return passed(f"{drawn}  {warmup} steps of warm-up, then {config.schedule.name}, {length}", **facts)


def check_memory(subject: Subject) -> Finding:
    """Whole steps were measured for the plan, one on the heaviest micro-batch; what they took, of what there is."""
    there = available_bytes(subject.setup.strategy.device)
    peak = subject.plan["peak_bytes"]
    facts = {"peak_bytes": peak, "available_bytes": there}
    if peak > 0.97 * there:
        return failed(
            f"a step takes {format_bytes(peak)} of {format_bytes(there)}, which leaves nothing for evaluation and checkpoints",
            "Lower train.micro_batch (and raise train.accumulate), or set train.gradient_checkpointing=full.",
            **facts,
        )
    return passed(f"the heaviest batch was run: {format_bytes(peak)} of {format_bytes(there)}", **facts)


def available_bytes(device: torch.device) -> int:
    """Memory that this process has and can still have, on the device or on this machine (or what its control group lets it
    have): what others hold is not there. Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = free_bytes()
    return whole if free is None else min(whole, free + resident_memory())
