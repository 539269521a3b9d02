"""MLflow: parameters, batched metrics, data sets, samples, artifacts, the registry; on SQLite in the store by default."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kajiya.config.options import MLflowOptions
from kajiya.errors import MissingExtraError, StoreError
from kajiya.run.events import Event
from kajiya.run.files import list_files
from kajiya.run.flatten import flatten
from kajiya.run.trackers.mlflow_records import dataset_inputs, lineage_tags, run_tags
from kajiya.run.trackers.protocol import DATA_ARTIFACT, MODEL_ARTIFACT, RunFacts, metrics_of

_TOKEN_TAG = "kajiya.token"
_BEGUN_TAG = "kajiya.begun"
_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_MAX_METRICS = 1000
_MAX_PARAMS = 100
_MAX_VALUE = 6000
_MAX_TAG = 5000
_MAX_NAME = 250
_SMALL_BYTES = 16 * 2**20
"""An artifact up to this size is copied into MLflow; of a larger one, its manifest."""


class MLflowTracker:
    """One MLflow run for each Kajiya run, found again by a tag.

    Metrics delivered twice (same name, step, time and value) are one in MLflow's database; the other records are
    written by name. So a killed follower loses and doubles nothing.
    """

    def __init__(self, options: MLflowOptions) -> None:
        self.options = options

    def open(self, facts: RunFacts) -> bool:
        """Find or create the run; raises `MissingExtraError` without the package."""
        try:
            import mlflow
        except ModuleNotFoundError as error:
            if error.name != "mlflow":
                raise
            raise MissingExtraError("mlflow", "track", "The tracker mlflow") from error
        self.facts = facts
        self.uri = self.options.uri or default_uri(facts.store)
        self.client = mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        self.ended = float(facts.saved["ended"]) if "ended" in facts.saved else time.time()
        experiment = self._experiment()
        found = self.client.search_runs([experiment], f"tags.`{_TOKEN_TAG}` = '{facts.token}'", max_results=1)
        if found:
            self.run_id = found[0].info.run_id
            self.params = dict(found[0].data.params)
            self.client.update_run(self.run_id, status="RUNNING")
            self._nest(experiment)
            return True
        tags = {_TOKEN_TAG: facts.token, "kajiya.run": facts.run, "kajiya.folder": str(facts.folder)}
        tags |= run_tags(facts.folder, self.options.tags)
        created = self.client.create_run(
            experiment, start_time=_milliseconds(facts.created), tags=tags, run_name=facts.run
        )
        self.run_id = created.info.run_id
        self.params = {}
        self._nest(experiment)
        return False

    def consume(self, events: Sequence[Event]) -> Mapping[str, Any]:
        """Log the portion: metrics in batches of 1000, the rest one by one."""
        from mlflow.entities import Metric

        metrics = [
            Metric(_name(name), value, _milliseconds(event["t"]), step)
            for event in events
            if event["kind"] in ("metrics", "system")
            for name, step, value in metrics_of(event)
        ]
        for begin in range(0, len(metrics), _MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=metrics[begin : begin + _MAX_METRICS])
        for event in events:
            self.ended = event["t"]
            take = _TAKES.get(event["kind"])
            if take is not None:
                take(self, event)
        uri = self.uri if self.options.uri is None else "as configured"
        return {"run_id": self.run_id, "uri": uri, "ended": self.ended}

    def close(self, status: str) -> None:
        """Set the run's status and end time."""
        self.client.set_terminated(self.run_id, _STATUS[status], _milliseconds(self.ended))

    def _nest(self, experiment: str) -> None:
        """Put a trial's run below its study's, where that is known; studies are delivered before their trials."""
        if self.facts.study is None:
            return
        self.client.set_tag(self.run_id, "kajiya.study", self.facts.study)
        found = self.client.search_runs([experiment], f"tags.`kajiya.run` = '{self.facts.study}'", max_results=1)
        if found:
            self.client.set_tag(self.run_id, "mlflow.parentRunId", found[0].info.run_id)

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.options.experiment
        location = None if self.options.uri else artifact_root(self.facts.store)
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self.client.create_experiment(name, artifact_location=location))
            except MlflowException:
                experiment = self.client.get_experiment_by_name(name)  # another run was faster
                if experiment is None:
                    raise
        if experiment.lifecycle_stage == "deleted":
            raise StoreError(
                f"The MLflow experiment {name!r} was deleted.\n"
                "Restore it, or set another with track.options.mlflow.experiment."
            )
        return str(experiment.experiment_id)

    # ---------------------------------------------------------------- one kind of event each

    def _config(self, event: Event) -> None:
        text = yaml.safe_dump(event["config"], sort_keys=False, allow_unicode=True)
        self.client.log_text(self.run_id, text, "config.yaml")
        self._log_params(flatten(event["config"]))

    def _derived(self, event: Event) -> None:
        self._log_params({f"derived.{name}": value for name, value in flatten(event["values"]).items()})

    def _log_params(self, values: Mapping[str, Any]) -> None:
        """Parameters cannot change in MLflow: a later, different value becomes a tag `changed.<name>`."""
        from mlflow.entities import Param, RunTag

        texts = {_name(name): "null" if value is None else str(value) for name, value in values.items()}
        short = {name: text[:_MAX_VALUE] for name, text in texts.items()}
        new = [Param(name, text) for name, text in short.items() if name not in self.params]
        tags = [
            RunTag(f"changed.{name}"[:_MAX_NAME], text[:_MAX_TAG])
            for name, text in short.items()
            if name in self.params and self.params[name] != text
        ]
        n_cut = sum(len(text) > _MAX_VALUE for text in texts.values())
        if n_cut:
            tags.append(RunTag("kajiya.cut_parameters", f"{n_cut} too long for MLflow; whole in config.yaml"))
        for begin in range(0, len(new), _MAX_PARAMS):
            self.client.log_batch(self.run_id, params=new[begin : begin + _MAX_PARAMS])
        if tags:
            self.client.log_batch(self.run_id, tags=tags)
        self.params |= {param.key: param.value for param in new}

    def _stage(self, event: Event) -> None:
        if event["state"] != "begun":
            text = f"{event['state']} in {event['seconds']:.1f} s" if event.get("seconds") else event["state"]
            self.client.set_tag(self.run_id, _name(f"stage.{event['name']}"), text)

    def _sample(self, event: Event) -> None:
        from kajiya.config.digest import digest

        # Named by its content, so that a sample that is delivered twice is one file.
        name = f"samples/step-{event['step']:08d}-{digest([event['prompt'], event['text']])[:6]}.txt"
        self.client.log_text(self.run_id, f"{event['prompt']}\n----\n{event['text']}\n", name)

    def _histograms(self, event: Event) -> None:
        # MLflow draws no histograms: a file of each step, name by name, that its page shows.
        self.client.log_dict(self.run_id, event["values"], f"histograms/step-{event['step']:08d}.json")

    def _artifact(self, event: Event) -> None:
        folder = self.facts.store / event["path"]
        if not folder.is_dir():
            self.client.set_tag(self.run_id, _name(f"missing.{event['name']}"), str(event["path"]))
            return
        if event["name"] == DATA_ARTIFACT:
            self.client.log_inputs(self.run_id, dataset_inputs(folder, event["digest"]))
        place = f"artifacts/{event['name']}"
        is_small = sum(path.stat().st_size for path in list_files(folder)) <= _SMALL_BYTES
        if is_small:
            self.client.log_artifacts(self.run_id, str(folder), place)
        elif (folder / "manifest.json").is_file():
            self.client.log_artifact(self.run_id, str(folder / "manifest.json"), place)
        if event["name"] != MODEL_ARTIFACT or not self.options.register:
            return
        if self.facts.study is None:
            self._register(event, folder, place, is_small)
        else:
            self.client.set_tag(self.run_id, "kajiya.not_registered", f"the model of a trial of {self.facts.study}")

    def _report(self, event: Event) -> None:
        path = Path(event["path"])
        if path.is_file():
            self.client.log_artifact(self.run_id, str(path), "report")

    def _register(self, event: Event, folder: Path, place: str, is_copied: bool) -> None:
        """A model version that points at the artifact in the store, or, on a server, at the copy uploaded to it."""
        from mlflow.exceptions import MlflowException

        source = folder.as_uri()
        if self.uri.startswith("http"):
            if not is_copied:
                self.client.log_artifacts(self.run_id, str(folder), place)
            source = f"{self.client.get_run(self.run_id).info.artifact_uri}/{place}"
        model = re.sub(r"[/:]", "-", self.facts.name)
        try:
            self.client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for known in self.client.search_model_versions(f"name = '{model}'"):
            if known.run_id == self.run_id and known.tags.get("kajiya.digest") == event["digest"]:
                version = known
                break
        else:
            tags = {"kajiya.digest": event["digest"], "kajiya.run": self.facts.run} | lineage_tags(folder)
            tags[_BEGUN_TAG] = str(_milliseconds(self.facts.created))
            version = self.client.create_model_version(model, source, run_id=self.run_id, tags=tags)
        holders = self.client.get_registered_model(model).aliases
        for alias in self.options.aliases:
            holder = self.client.get_model_version(model, holders[alias]) if alias in holders else None
            # An old run that is delivered late does not take an alias from a newer one.
            if holder is None or _begun(holder) <= _milliseconds(self.facts.created):
                self.client.set_registered_model_alias(model, alias, version.version)

    def _warning(self, event: Event) -> None:
        self.client.set_tag(self.run_id, f"warning.{_milliseconds(event['t'])}", event["text"][:_MAX_TAG])

    def _ended(self, event: Event) -> None:
        if event.get("error"):
            self.client.set_tag(self.run_id, "error", str(event["error"])[:_MAX_TAG])


_TAKES: Mapping[str, Callable[[MLflowTracker, Event], None]] = {
    "config": MLflowTracker._config,
    "derived": MLflowTracker._derived,
    "stage": MLflowTracker._stage,
    "sample": MLflowTracker._sample,
    "histograms": MLflowTracker._histograms,
    "artifact": MLflowTracker._artifact,
    "report": MLflowTracker._report,
    "warning": MLflowTracker._warning,
    "ended": MLflowTracker._ended,
}
"""Metrics are taken together; checkpoints and attempts are the event log's own."""


def default_uri(store: Path) -> str:
    """Address of the SQLite database in the store."""
    return f"sqlite:///{store / 'mlflow.db'}"


def artifact_root(store: Path) -> str:
    """Where MLflow's copies of small artifacts lie when its database is the store's."""
    return (store / "mlflow-artifacts").as_uri()


def _name(name: str) -> str:
    """A name that MLflow takes: letters, digits and `_-. :/`, at most 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:_MAX_NAME]


def _begun(version: Any) -> int:
    """When the run of a model version was begun, ms; of one that says nothing of it, when it was registered."""
    return int(version.tags.get(_BEGUN_TAG, version.creation_timestamp))


def _milliseconds(t: float) -> int:
    return round(t * 1000)
