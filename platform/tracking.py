"""Runs, artefacts and registered models on MLflow: the only file that talks to it.

Artefacts that lie in a folder or in object storage are read and written by our own Store, with the settings' keys and
within the run's own folder; only those that an MLflow server keeps behind its own address (`mlflow-artifacts:`) go
through MLflow. A registered model is plain files: no flavour and no pickle.

A server's credentials come from MLflow's own variables (`MLFLOW_TRACKING_USERNAME`, `MLFLOW_TRACKING_PASSWORD`,
`MLFLOW_TRACKING_TOKEN`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genescale.platform.address import Place, join, parse, shown, within
from genescale.platform.artefacts import Artefacts, ServerArtefacts, StoredArtefacts, scratch_folder
from genescale.platform.bundle import Bundle
from genescale.platform.bundle_cache import cached_bundle, stored_bundle
from genescale.platform.database import database_address, opened_by_one
from genescale.platform.errors import (
    TrackingError,
)
from genescale.platform.liveness import is_gone, process_label
from genescale.platform.memory_tracker import MemoryTracker as MemoryTracker
from genescale.platform.registry import SERVED, Registry
from genescale.platform.runs import (
    DIGEST_TAG,
    MODEL_SCHEME,
    MetricRow,
    ended_as,
    flat,
    refused,
)
from genescale.platform.runs import ModelSummary as ModelSummary
from genescale.platform.runs import ModelVersion as ModelVersion
from genescale.platform.runs import Run as Run
from genescale.platform.runs import Tracker as Tracker
from genescale.platform.settings import Settings, StorageSettings, TrackingSettings

PROCESS_TAG, PARENT_TAG = "genescale.process", "mlflow.parentRunId"
# What MLflow takes in one request.
METRICS_AT_ONCE, PARAMS_AT_ONCE, TAGS_AT_ONCE = 1000, 100, 100
# Everything MLflow would otherwise print, send home or retry for minutes; a variable that is already set stays.
ENVIRONMENT = {
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
CHATTY = ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent")


def open_tracker(settings: Settings) -> MlflowTracker:
    """The tracker these settings name; a SQLite database is made when it is not there."""
    return MlflowTracker(settings.tracking, settings.storage)


def fetch_bundle(reference: str, settings: Settings, cache: Path) -> Bundle:
    """The verified bundle behind a registered model, an `s3://` folder or a local folder.

    Remote ones are kept in `cache` and fetched once. An alias is resolved at each call: who needs a fixed version
    resolves first and fetches its `reference`. Raises IntegrityError when the bundle is not the registered one.
    """
    if not reference.startswith(MODEL_SCHEME):
        return stored_bundle(reference, settings.storage, cache)
    tracker = open_tracker(settings)
    version = tracker.resolve(reference)
    if not version.digest:
        raise TrackingError(
            f"has no tag {DIGEST_TAG}, so nothing says what its files should be.",
            where=version.reference,
            fix="Register the model with Genescale.",
        )
    return cached_bundle(tracker.artefacts_of(version), cache, digest=version.digest)


class MlflowRun:
    """A run in MLflow; made by `MlflowTracker.run`."""

    def __init__(self, tracker: MlflowTracker, run_id: str, artefacts: Artefacts) -> None:
        self.id = run_id
        self.artefacts = artefacts
        self._client, self._errors = tracker.client, tracker.errors

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Record measurements of one step."""
        self.log_metric_rows([(step, metrics)])

    def log_metric_rows(self, rows: Sequence[MetricRow], *, time_ms: int | None = None) -> None:
        """Record measurements of many steps, a thousand values in one request."""
        from mlflow.entities import Metric

        made_ms = int(time.time() * 1000) if time_ms is None else time_ms
        values = [Metric(name, float(value), made_ms, step) for step, row in rows for name, value in row.items()]
        with self._errors():
            for start in range(0, len(values), METRICS_AT_ONCE):
                self._client.log_batch(self.id, metrics=values[start : start + METRICS_AT_ONCE])

    def newest_steps(self) -> dict[str, int]:
        """The newest recorded step of each measurement."""
        with self._errors():
            names = self._client.get_run(self.id).data.metrics
            history = {name: self._client.get_metric_history(self.id, name) for name in names}
        return {name: max(point.step for point in points) for name, points in history.items() if points}

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings; TrackingError when one of them already has another value."""
        from mlflow.entities import Param

        values = [Param(name, value) for name, value in flat(params).items()]
        with self._errors():
            for start in range(0, len(values), PARAMS_AT_ONCE):
                self._client.log_batch(self.id, params=values[start : start + PARAMS_AT_ONCE])

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set labels."""
        from mlflow.entities import RunTag

        values = [RunTag(name, str(value)) for name, value in tags.items()]
        with self._errors():
            for start in range(0, len(values), TAGS_AT_ONCE):
                self._client.log_batch(self.id, tags=values[start : start + TAGS_AT_ONCE])

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a file among the run's artefacts."""
        self.artefacts.put_file(path, folder)

    def log_folder(self, path: Path, folder: str = "") -> None:
        """Keep a copy of everything in a folder among the run's artefacts."""
        self.artefacts.put_folder(path, folder)

    def log_text(self, text: str, name: str) -> None:
        """Keep a text among the run's artefacts."""
        folder, _, last = name.rpartition("/")
        with scratch_folder() as scratch:
            path = Path(join(str(scratch), last))
            path.write_text(text, encoding="utf-8")
            self.log_file(path, folder)


class MlflowTracker(Registry):
    """Runs and registered models in one MLflow; usable from several threads, with no global active run.

    With SQLite, artefacts lie below `tracking.artifact_root`; a server chooses its own place. Raises TrackingError.
    """

    def __init__(self, tracking: TrackingSettings, storage: StorageSettings | None = None) -> None:
        self._settings, self._storage = tracking, storage or StorageSettings()
        self._served = tracking.uri.startswith(("http://", "https://"))
        self._root = parse(tracking.artifact_root)
        self._lock = threading.Lock()
        self._experiment_id = ""
        self._uri = tracking.uri if self._served else database_address(tracking.uri)
        self.client = self._connect()

    @contextmanager
    def run(
        self,
        name: str,
        *,
        params: Mapping[str, Any] = {},
        tags: Mapping[str, Any] = {},
        parent: str | None = None,
        resume: str = "",
    ) -> Iterator[MlflowRun]:
        """A run for the length of the block: FINISHED, KILLED by an interrupt, or FAILED by any other exception.

        resume: id of a run to go on with; when it is gone, a new one is made.
        """
        labels = {PROCESS_TAG: process_label(), **({PARENT_TAG: parent} if parent else {})}
        with self.errors():
            info = self._reopened(resume, labels) if resume else None
            info = info or self.client.create_run(self._experiment(), run_name=name, tags=labels).info
        try:
            run = MlflowRun(self, info.run_id, self.run_artefacts(info))
            run.log_params(params)
            run.set_tags(tags)
            yield run
        except BaseException as error:
            try:
                self._end(info.run_id, ended_as(error))
            except TrackingError as second:
                # What stopped the run matters more than that MLflow could not be told.
                error.add_note(f"The run {info.run_id} could not be closed either: {second}")
            raise
        self._end(info.run_id, "FINISHED")

    def children(self, run_id: str) -> dict[str, str]:
        """Ids of the runs below this one, by name; of several with one name the oldest."""
        found: dict[str, str] = {}
        with self.errors():
            experiment, page = self.client.get_run(run_id).info.experiment_id, None
            below, order = f"tags.`{PARENT_TAG}` = '{run_id}'", ["attributes.start_time DESC"]
            while True:
                runs = self.client.search_runs([experiment], below, max_results=1000, order_by=order, page_token=page)
                found |= {run.info.run_name: run.info.run_id for run in runs}
                page = runs.token
                if not page:
                    return found

    def left_open(self, tag: str, value: str) -> str:
        """Id of the newest open run with this tag whose process, on this machine, is gone; empty without any."""
        with self.errors():
            wanted = f"attributes.status = 'RUNNING' AND tags.`{tag}` = '{value}'"
            order = ["attributes.start_time DESC"]
            running = self.client.search_runs([self._experiment()], wanted, max_results=100, order_by=order)
        return next((run.info.run_id for run in running if is_gone(run.data.tags.get(PROCESS_TAG, ""))), "")

    def close_dangling(self, experiment: str | None = None) -> int:
        """Mark the experiment's runs whose process, on this machine, is gone as KILLED; returns how many."""
        with self.errors():
            found = self.client.get_experiment_by_name(experiment or self._settings.experiment)
            if found is None:
                return 0
            running = self.client.search_runs([found.experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
        gone = [run for run in running if is_gone(run.data.tags.get(PROCESS_TAG, ""))]
        for run in gone:
            self._end(run.info.run_id, "KILLED")
        return len(gone)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn MLflow's exceptions within the block into TrackingError."""
        from mlflow.exceptions import MlflowException
        from requests import RequestException

        try:
            yield
        except (MlflowException, RequestException) as error:
            raise self._explain(error) from error

    def _connect(self) -> Any:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        with warnings.catch_warnings():
            # MLflow's own use of SQLAlchemy and pydantic; none of it is ours to change.
            warnings.simplefilter("ignore")
            from mlflow import MlflowClient

            try:
                with opened_by_one(self._settings.uri):
                    return MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
            except Exception as error:
                raise self._explain(error) from error

    def _explain(self, error: Exception) -> TrackingError:
        return refused(str(error), where=shown(self._uri))

    def _experiment(self) -> str:
        name = self._settings.experiment
        with self._lock:
            if not self._experiment_id:
                found = self.client.get_experiment_by_name(name) or self._new_experiment(name)
                if found.lifecycle_stage != "active":
                    raise TrackingError(
                        f"the experiment '{name}' was deleted.",
                        where=shown(self._uri),
                        fix="Restore it in MLflow, or set tracking.experiment to another name.",
                    )
                self._experiment_id = found.experiment_id
            return self._experiment_id

    def _new_experiment(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        location = None
        if not self._served:
            location = self._root.uri if self._root.bucket else self._root.path.as_uri()
        try:
            return self.client.get_experiment(self.client.create_experiment(name, artifact_location=location))
        except MlflowException:
            # Another process may have made it at the same moment.
            found = self.client.get_experiment_by_name(name)
            if found is None:
                raise
            return found

    def ensure_model(self, name: str) -> None:
        """Make the registered model, unless it is there."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _reopened(self, run_id: str, labels: Mapping[str, str]) -> Any:
        """The run, open again; None when it is gone."""
        from mlflow.exceptions import MlflowException

        try:
            info = self.client.get_run(run_id).info
            if info.lifecycle_stage != "active":
                return None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        # The process first: a run that is open and whose process is gone is closed by anyone who looks.
        for name, value in labels.items():
            self.client.set_tag(run_id, name, value)
        self.client.update_run(run_id, status="RUNNING")
        return info

    def run_info(self, run_id: str) -> Any:
        """What MLflow knows of a run."""
        with self.errors():
            return self.client.get_run(run_id).info

    def _end(self, run_id: str, status: str) -> None:
        with self.errors():
            self.client.set_terminated(run_id, status)

    def run_artefacts(self, info: Any, folder: str = "") -> Artefacts:
        """The files of a run, or of one of its folders."""
        if info.artifact_uri.startswith(SERVED):
            return ServerArtefacts(self.client, info.run_id, folder, self.errors)
        root = self.checked_root(parse(info.artifact_uri))
        confined = dataclasses.replace(self._storage, allowed_roots=(root.uri,))
        return StoredArtefacts(confined, join(root.uri, folder) if folder else root.uri)

    def checked_root(self, root: Place) -> Place:
        """The place of a run's artefacts, if it is where this tracker's artefacts may be.

        A database, or a server we do not run, could name any path of this machine; so local ones are held to
        `tracking.artifact_root`. Object storage behind a server is guarded by the keys and their allowed roots.
        """
        allowed = [parse(prefix) for prefix in self._storage.allowed_roots]
        if within(root, [self._root]) or (self._served and root.bucket and (not allowed or within(root, allowed))):
            return root
        raise TrackingError(
            f"the run's artefacts lie outside the tracked root {self._root.uri}.",
            where=root.uri,
            fix="Set tracking.artifact_root to where they are, or tracking.experiment to a new name.",
        )
