"""`kajiya replay`: a run once more from its manifest, in a store of its own, and whether it came out the same."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from kajiya.config.compose import from_plain
from kajiya.config.schema import Config
from kajiya.data.progress import OnEvent, silent
from kajiya.errors import StoreError
from kajiya.flows.train import Scope, train
from kajiya.run.folder import Run, list_runs
from kajiya.run.hashing import hash_file
from kajiya.run.inspect import run_diff
from kajiya.run.provenance import usable_cores
from kajiya.run.store import Store, open_artifact
from kajiya.training.portions import AUTO

_TOLERANCE = 1e-4
"""Largest relative difference of held-out bits per byte that counts as within tolerance."""


@dataclass(frozen=True)
class Replayed:
    """What a replay came to."""

    run: str
    folder: str
    """The store that the replay lies in."""
    verdict: str
    """bit-identical (weights and figures), within tolerance, or different."""
    weights: str
    """How the weights compare, in words."""
    metrics: dict[str, list[float | None]] = field(default_factory=dict)
    """Final figures of the run and of its replay."""
    differs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Data, code and environment that are not what they were; of several attempts, what each had."""


def replay(run: Run, on_event: OnEvent = silent) -> Replayed:
    """Run again from the recorded config and derived values, the data made anew, and compare.

    The replay lies in `<store>/replays/<run>`, where it can be looked at; an interrupted one goes on, and behind a finished one
    comes a further one in `<run>-2`. Raises `StoreError` for a run that is not finished.
    """
    manifest = run.manifest()
    if "model" not in manifest["artifacts"]:
        raise StoreError(f"{run.id} has no finished model to compare with.")
    store = _store_of_replay(run)
    scope = Scope(is_evaluated="evaluation" in manifest["artifacts"], threads=_threads(manifest))
    command = ["kajiya", "replay", run.id]
    again = train(_settled(manifest), store, command=command, on_event=on_event, scope=scope)
    if again.model is None:
        raise KeyboardInterrupt
    first = open_artifact(run.store.root / manifest["artifacts"]["model"]["path"])
    difference = run_diff(run, again.run)
    metrics = {
        name: [pair["first"], pair["second"]]
        for name, pair in difference.metrics.items()
        if name.startswith(("test/", "eval/", "task/", "train/nll"))
    }
    is_identical, weights = _compare_weights(first.path, again.model.path)
    verdict = _verdict(is_identical, metrics)
    if is_identical and verdict != "bit-identical":
        weights += ", but the figures differ: it was not evaluated in the same way"
    if not metrics:
        weights += "; there is no figure to compare"
    data = {name: pair for name, pair in difference.artifacts.items() if name in ("corpus", "tokenizer", "shards")}
    environment = {name: pair for name, pair in difference.environment.items() if name != "working_directory"}
    differs = {"data": data, "code": difference.code, "environment": environment}
    return Replayed(
        again.run.id,
        str(store.root),
        verdict,
        weights,
        metrics,
        {name: found for name, found in differs.items() if found},
    )


def _store_of_replay(run: Run) -> Store:
    """A folder without a finished replay, whose artifacts would be found and nothing be made again."""
    for number in count(1):
        store = Store(run.store.root / "replays" / (run.id if number == 1 else f"{run.id}-{number}"))
        if all(each.manifest()["status"] != "finished" for each in list_runs(store)):
            return store
    raise AssertionError("there is always a further number")


def _threads(manifest: dict[str, Any]) -> int | None:
    """As many threads as the run had, whose number decides the order of sums, but no more than there are cores."""
    process = manifest["provenance"].get("process")
    return None if process is None else min(process["threads"], usable_cores())


def _settled(manifest: dict[str, Any]) -> Config:
    """The recorded config with every derived length set, so that a slower machine does not train for fewer steps."""
    config, derived = from_plain(manifest["config"]), manifest["derived"]
    settled = replace(
        config.train,
        steps=derived["train.steps"],
        minutes=None,
        epochs=None,
        eval_every=derived["train.eval_every"],
        save_every=derived["train.save_every"],
        precision=derived["train.precision"],
        micro_batch=derived["train.micro_batch"] if config.train.micro_batch == AUTO else config.train.micro_batch,
    )
    return replace(config, train=settled, track=replace(config.track, trackers=()))


def _verdict(is_identical: bool, metrics: Mapping[str, Sequence[Any]]) -> str:
    if is_identical and all(first == second for first, second in metrics.values()):
        return "bit-identical"
    # Where no figure was compared, nothing shows that the two are near each other.
    is_near = bool(metrics) and all(_relative(*pair) <= _TOLERANCE for pair in metrics.values())
    return "within tolerance" if is_near else "different"


def _compare_weights(first: Path, second: Path) -> tuple[bool, str]:
    names, others = (sorted(path.name for path in folder.glob("*.safetensors")) for folder in (first, second))
    if not names:
        return False, f"there are no weights to compare: {first} holds no safetensors"
    if names != others:
        return False, f"only one of the two models has {', '.join(sorted(set(names) ^ set(others)))}"
    if all(hash_file(first / name) == hash_file(second / name) for name in names):
        return True, "every weight has the same bits"
    return _largest_gap(first, second, names)


def _largest_gap(first: Path, second: Path, names: Sequence[str]) -> tuple[bool, str]:
    from safetensors import safe_open

    largest, where = 0.0, ""
    for name in names:
        with safe_open(first / name, "pt") as a, safe_open(second / name, "pt") as b:
            if set(a.keys()) != set(b.keys()):
                return False, "the two models have different tensors"
            for key in a.keys():  # noqa: SIM118  # a safetensors file is no mapping
                one, other = a.get_tensor(key).float(), b.get_tensor(key).float()
                if one.shape != other.shape:
                    return False, f"{key} has another shape"
                gap = float((one - other).abs().max()) if one.numel() else 0.0
                largest, where = max((largest, where), (math.inf if math.isnan(gap) else gap, key))
    if largest == 0:
        return False, "no weight differs, though the files do"
    return False, f"the largest difference of a weight is {largest:.3g} ({where})"


def _relative(first: Any, second: Any) -> float:
    """The difference as a share of the first; the log has `nan` as text, which equals itself."""
    if first == second:
        return 0.0
    if first is None or second is None:
        return math.inf
    apart = abs(float(first) - float(second)) / max(abs(float(first)), 1e-12)
    return apart if math.isfinite(apart) else math.inf
