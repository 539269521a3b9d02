"""TensorBoard event files, written without torch: scalars, text samples, hyperparameters, embeddings for the projector."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kajiya.config.options import TensorBoardOptions
from kajiya.errors import MissingExtraError, StoreError
from kajiya.run.events import Event
from kajiya.run.flatten import flatten
from kajiya.run.trackers.embeddings import write_projector
from kajiya.run.trackers.protocol import MODEL_ARTIFACT, RunFacts, histograms_of, metrics_of


class TensorBoardTracker:
    """One event file for each run. After a kill the file is cut back to the last saved position: nothing is doubled."""

    def __init__(self, options: TensorBoardOptions) -> None:
        self.options = options

    def open(self, facts: RunFacts) -> bool:
        """Open the file behind what is known to be in it; raises `MissingExtraError` without the package."""
        try:
            from tensorboard.compat.proto.event_pb2 import Event as Record
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != "tensorboard":
                raise
            raise MissingExtraError("tensorboard", "track", "The tracker tensorboard") from error
        self.facts = facts
        given = self.options.folder
        folder = facts.folder / "tensorboard" if given is None else Path(given).resolve() / facts.run
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{int(facts.created)}.{facts.token}"
        n_known = int(facts.saved["bytes"]) if "bytes" in facts.saved else 0
        goes_on = path.is_file() and 0 < n_known <= path.stat().st_size
        self.folder = folder
        self.file = path.open("r+b" if goes_on else "wb")
        self.file.truncate(n_known if goes_on else 0)
        self.file.seek(0, 2)
        self.writer = RecordWriter(self.file)
        if not goes_on:
            self.writer.write(Record(wall_time=facts.created, file_version="brain.Event:2").SerializeToString())
        return goes_on

    def consume(self, events: Sequence[Event]) -> Mapping[str, Any]:
        """Write the portion and say how long the file is now."""
        for event in events:
            take = _TAKES.get(event["kind"])
            if take is not None:
                take(self, event)
        self.writer.flush()
        return {"bytes": self.file.tell()}

    def close(self, status: str) -> None:
        """Close the file."""
        self.writer.close()

    def _write(self, summary: Any, t: float, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record

        self.writer.write(Record(wall_time=t, step=step, summary=summary).SerializeToString())

    # ---------------------------------------------------------------- one kind of event each

    def _metrics(self, event: Event) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for name, step, value in metrics_of(event):
            self._write(Summary(value=[Summary.Value(tag=name, simple_value=value)]), event["t"], step)

    def _config(self, event: Event) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        flat = {name: value for name, value in flatten(event["config"]).items() if value is not None}
        plain = {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in flat.items()}
        self._write(hparams_pb(plain, trial_id=self.facts.run, start_time_secs=self.facts.created), event["t"], 0)

    def _ended(self, event: Event) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        status = {"finished": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}
        ended = plugin_data_pb2.SessionEndInfo(
            status=status.get(event["status"], api_pb2.STATUS_UNKNOWN), end_time_secs=event["t"]
        )
        described = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=ended))
        value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=described, tensor=metadata.NULL_TENSOR)
        self._write(Summary(value=[value]), event["t"], 0)

    def _artifact(self, event: Event) -> None:
        if event["name"] == MODEL_ARTIFACT and self.options.embeddings:
            try:
                write_projector(self.facts.store / event["path"], self.folder, self.options.embeddings)
            except StoreError as problem:
                self._warning({"t": event["t"], "text": f"No embeddings for the projector: {problem}"})

    def _sample(self, event: Event) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        # Indented by four: TensorBoard renders Markdown, and a sample is shown as it is.
        text = "\n".join("    " + line for line in f"{event['prompt']}{event['text']}".split("\n"))
        self._write(text_pb("samples", text), event["t"], event["step"])

    def _histograms(self, event: Event) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.histogram.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        for name, buckets in histograms_of(event):
            rows = make_tensor_proto(buckets, shape=(len(buckets), 3), dtype="float64")
            metadata = create_summary_metadata(display_name=None, description=None)
            self._write(
                Summary(value=[Summary.Value(tag=name, tensor=rows, metadata=metadata)]), event["t"], event["step"]
            )

    def _warning(self, event: Event) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._write(text_pb("warnings", event["text"]), event["t"], 0)


_TAKES: Mapping[str, Callable[[TensorBoardTracker, Event], None]] = {
    "metrics": TensorBoardTracker._metrics,
    "system": TensorBoardTracker._metrics,
    "config": TensorBoardTracker._config,
    "sample": TensorBoardTracker._sample,
    "artifact": TensorBoardTracker._artifact,
    "ended": TensorBoardTracker._ended,
    "histograms": TensorBoardTracker._histograms,
    "warning": TensorBoardTracker._warning,
}
