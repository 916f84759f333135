"""`fot registry sync`: tells MLflow what it could not be told before, the trainings before the outcomes they led to."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.registry.outbox import Entry, Outbox, settled
from jobs.registry.record import read_entry, upload
from jobs.registry.server import embedded_uri, locked
from jobs.registry.tracking import RUN, TrainingFacts, upload_training
from pipelines.workflow.credentials import hide_credentials
from pipelines.workflow.errors import UserError


def sync(work_dir: Path, uri: str | None = None, known: Sequence[str] = ()) -> Iterator[str]:
    """Upload the entries of the outbox, to `uri` or where each was to go. Yields a line for each, done or not.

    `known`: addresses with their credentials, which entries are kept without. An entry is removed when MLflow has all
    of it; run again after any interruption this goes on, and doubles nothing. Raises UserError, at the end, where some
    could not be uploaded.
    """
    outbox, left = Outbox(work_dir), []
    whole = {hide_credentials(address): address for address in known}
    for key in [entry["key"] for entry in outbox.entries()]:
        with locked(outbox.lock_of(key), wait=False) as free:
            if not free:
                yield f"{key} still runs: it tells MLflow itself"
            elif (entry := outbox.entry(key)) is not None:  # not done by another process meanwhile
                to = uri or whole.get(entry["uri"], entry["uri"]) or embedded_uri(work_dir)
                try:
                    line = _upload(entry, work_dir, to)
                    outbox.remove(key)
                except UserError as error:
                    line = f"{outbox.file(key).name} stays: {error}"
                    left.append(outbox.file(key).name)
                yield line
    if left:
        raise UserError(f"{len(left)} of the files in {outbox.directory} could not be uploaded: {', '.join(left)}")


def _upload(entry: Entry, work_dir: Path, uri: str) -> str:
    if entry["kind"] == "training":
        output = settled(entry["output"], work_dir)
        Outbox(work_dir).check(output / RUN, entry["key"])
        status = "KILLED" if entry["status"] == "RUNNING" else entry["status"]  # nobody holds its lock
        run_id = upload_training(work_dir, uri, output, status)
        return f"training {TrainingFacts.read(output).name}: run {run_id}, {status.lower()}"
    outcome, conditions = read_entry(entry, work_dir)
    recorded = upload(outcome, work_dir, uri, conditions)
    made = f"run {recorded['run_id']}"
    if recorded["version"] is not None:
        made += f", version {recorded['version']} of models:/fot/{outcome.name}, {recorded['gate']}"
    return f"{outcome.name}: {made}"
