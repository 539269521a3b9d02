"""Weights & Biases: configuration, metrics, samples and artifacts, offline in the run folder unless asked to send."""

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kajiya.config.options import WandbOptions
from kajiya.errors import MissingExtraError
from kajiya.run.events import Event
from kajiya.run.files import list_files, read_json
from kajiya.run.trackers.protocol import RunFacts, histograms_of, metrics_of

_SAMPLES = "samples"
_SMALL_BYTES = 16 * 2**20
"""An artifact up to this size is taken along; of a larger one, its manifest."""
_KINDS = {"model": "model", "corpus": "dataset", "shards": "dataset"}
"""W&B's words for what an artifact is; anything else is called by its own name."""


class WandbTracker:
    """One W&B run for each Kajiya run, in one or more folders below `wandb/` with the same id.

    W&B writes behind its caller's back, so a kill loses rows that it had accepted. A follower that comes after
    therefore reads what is on the disk and logs the rest of the whole event log.
    """

    def __init__(self, options: WandbOptions) -> None:
        self.options = options

    def open(self, facts: RunFacts) -> bool:
        """Begin a (further) part of the run; raises `MissingExtraError` without the package."""
        try:
            import wandb
        except ModuleNotFoundError as error:
            if error.name != "wandb":
                raise
            raise MissingExtraError("wandb", "wandb", "The tracker wandb") from error
        self.facts = facts
        self.run: Any = None
        if facts.is_complete and (self.options.online or parts_of(facts.folder, facts.token)):
            return True
        self.written = {(name, step) for name, step, _ in read_history(facts.folder, facts.token)}
        self.samples: list[tuple[int, str, str]] = []
        self.last_step = 0
        self.run = wandb.init(
            project=self.options.project,
            entity=self.options.entity,
            id=facts.token,
            name=facts.run,
            group=facts.name,
            mode="online" if self.options.online else "offline",
            # Offline, W&B cannot ask its server for the earlier part, and `wandb sync` joins the parts by their id.
            resume="allow" if self.options.online else None,
            dir=str(facts.folder),
            settings=wandb.Settings(
                silent=True,
                reinit="create_new",  # a study's run is open while its trials are delivered
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                x_transaction_log_flush_interval=1.0,
                x_sync_dir_suffix=str(len(parts_of(facts.folder, facts.token))),
            ),
        )
        return False

    def consume(self, events: Sequence[Event]) -> Mapping[str, Any]:
        """Log what is not on the disk yet; values of one step make one row."""
        for event in events:
            take = _TAKES.get(event["kind"])
            if take is not None:
                take(self, event)
        return {"id": self.run.id}

    def close(self, status: str) -> None:
        """Log the table of samples and end the run."""
        import wandb

        if self.run is None:
            return
        if self.samples and (_SAMPLES, self.last_step) not in self.written:
            table = wandb.Table(columns=["step", "prompt", "text"], data=[list(row) for row in self.samples])
            self.run.log({_SAMPLES: table}, step=self.last_step)
        self.run.finish(exit_code=0 if status == "finished" else 1)

    # ---------------------------------------------------------------- one kind of event each

    def _metrics(self, event: Event) -> None:
        new = [item for item in metrics_of(event) if item[:2] not in self.written]
        self.last_step = max(self.last_step, int(event["step"]))
        if new:
            self.run.log({name: value for name, _, value in new} | {"_timestamp": event["t"]}, step=int(event["step"]))

    def _histograms(self, event: Event) -> None:
        import numpy as np
        import wandb

        drawn = {}
        for name, bins in histograms_of(event):
            if (name, int(event["step"])) not in self.written:
                edges = np.array([left for left, _, _ in bins] + [bins[-1][1]])
                drawn[name] = wandb.Histogram(np_histogram=(np.array([count for _, _, count in bins]), edges))
        self.last_step = max(self.last_step, int(event["step"]))
        if drawn:
            self.run.log(drawn | {"_timestamp": event["t"]}, step=int(event["step"]))

    def _config(self, event: Event) -> None:
        self.run.config.update(event["config"], allow_val_change=True)

    def _derived(self, event: Event) -> None:
        self.run.config.update({"derived": event["values"]}, allow_val_change=True)

    def _artifact(self, event: Event) -> None:
        """Named by its content, so that one that is delivered twice is the same version of it."""
        import wandb

        folder = self.facts.store / event["path"]
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            self.run.summary[f"missing/{event['name']}"] = event["path"]
            return
        name = re.sub(r"[^\w.-]", "-", f"{self.facts.name}-{event['name']}")
        kind: str = _KINDS[event["name"]] if event["name"] in _KINDS else event["name"]
        described = {"digest": event["digest"], "run": self.facts.run, "path": event["path"]}
        made = wandb.Artifact(name, type=kind, metadata=described | {"parents": read_json(manifest)["parents"]})
        if sum(path.stat().st_size for path in list_files(folder)) <= _SMALL_BYTES:
            made.add_dir(str(folder))
        else:
            made.add_file(str(manifest))
        self.run.log_artifact(made)

    def _sample(self, event: Event) -> None:
        self.samples.append((int(event["step"]), event["prompt"], event["text"]))
        self.last_step = max(self.last_step, int(event["step"]))


_TAKES: Mapping[str, Callable[[WandbTracker, Event], None]] = {
    "metrics": WandbTracker._metrics,
    "system": WandbTracker._metrics,
    "config": WandbTracker._config,
    "derived": WandbTracker._derived,
    "sample": WandbTracker._sample,
    "artifact": WandbTracker._artifact,
    "histograms": WandbTracker._histograms,
}

# ---------------------------------------------------------------- what is on the disk


def parts_of(run_folder: Path, run_id: str) -> list[Path]:
    """W&B's transaction logs of that id, oldest first."""
    return sorted((run_folder / "wandb").glob(f"*run-*/run-{run_id}.wandb"))


def read_history(run_folder: Path, run_id: str) -> Iterator[tuple[str, int, Any]]:
    """Name, step and value of everything logged under that id and present on the disk.

    A value of several fields, such as a table, comes field by field, each as `{field: content}`.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at run time by protobuf

    for path in parts_of(run_folder, run_id):
        for data in read_records(path):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") != "history":
                continue
            for item in record.history.item:
                name, *fields = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                if not name.startswith("_"):
                    yield name, record.history.step.num, {".".join(fields): value} if fields else value


_BLOCK = 32768
_FIRST, _FULL, _LAST = 2, 1, 4


def read_records(path: Path) -> Iterator[bytes]:
    """Records of a W&B transaction log, which is a LevelDB log behind a header of 7 bytes; a torn end is left out."""
    data = path.read_bytes()
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + 7 : at + 7 + length]
        if len(chunk) < length or kind == 0:
            return
        at += 7 + length
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        if kind in (_FULL, _LAST):
            yield parts
