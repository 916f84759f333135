"""`fot registry sync`: tells MLflow what it could not be told before, the trainings before the outcomes they led to."""

from collections.abc import Iterator
from pathlib import Path

from jobs.registry.outbox import Entry, Outbox, settled
from jobs.registry.record import read_entry, upload
from jobs.registry.server import embedded_uri, locked
from jobs.tracking import TrainingFacts, upload_training


def sync(work_dir: Path, uri: str | None = None) -> Iterator[str]:
    """Upload the entries of the outbox, to `uri` or where each was to go. Yields a line for each as it is done.

    An entry is removed when MLflow has all of it; run again after any interruption this goes on, and doubles nothing.
    Raises TrackingDownError.
    """
    outbox = Outbox(work_dir)
    for entry in sorted(outbox.entries(), key=lambda entry: entry["kind"] != "training"):
        to = uri or entry["uri"] or embedded_uri(work_dir)
        with locked(outbox.lock_of(entry["key"]), wait=False) as free:
            if not free:
                yield f"{entry['key']} still runs: it tells MLflow itself"
                continue
            yield _upload(entry, work_dir, to)
            outbox.remove(entry["key"])


def _upload(entry: Entry, work_dir: Path, uri: str) -> str:
    if entry["kind"] == "training":
        output = settled(entry["output"], work_dir)
        status = "KILLED" if entry["status"] == "RUNNING" else entry["status"]  # nobody holds its lock
        run_id = upload_training(work_dir, uri, output, status)
        return f"training {TrainingFacts.read(output).name}: run {run_id}, {status.lower()}"
    outcome, conditions = read_entry(entry, work_dir)
    recorded = upload(outcome, work_dir, uri, conditions)
    made = f"run {recorded['run_id']}"
    if recorded["version"] is not None:
        made += f", version {recorded['version']} of models:/fot/{outcome.name}, {recorded['gate']}"
    return f"{outcome.name}: {made}"
