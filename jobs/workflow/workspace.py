"""A work_dir: its store and logs, and running stages in it with what a person sees of that."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from rich.markup import escape

from jobs.config.checkpoint_name import is_model_uri
from jobs.config.recipe import Recipe
from jobs.config.train_spec import MODEL, Start
from jobs.models.checkpoint_source import checkpoint_stage, locate
from jobs.registry.models import fetch_model
from pipelines.sources.file_hashes import FileHashes
from pipelines.workflow.cluster import ray_cluster
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import console, quiet, say
from pipelines.workflow.running import Around, as_it_is, run_workflow
from pipelines.workflow.store import Output, Stage, Store
from pipelines.workflow.visible import visible

MODELS = "models"  # of work_dir: registered models that were fetched


class WorkDir:
    """The directories of a work_dir, by absolute path: workers have working directories of their own. `name`: of what
    is run in it; `log`: the file for what libraries print, named so if nothing else is said; `rebuild`: what took long
    is made anew where it is damaged.

    Raises UserError for a path that cannot be part of an address.
    """

    def __init__(self, name: str, work_dir: str, log: Path | None = None, rebuild: bool = False) -> None:
        self.name = name
        self.directory = Path(work_dir).resolve()
        if "?" in str(self.directory):
            raise UserError(f"work_dir {self.directory} holds a ?, where MLflow's address of it ends: set another one")
        self.store = Store(self.directory / "store", rebuild)
        self.logs = self.directory / "logs"
        self.log = log or self.logs / f"{name}.log"

    @contextmanager
    def hashes(self) -> Iterator[FileHashes]:
        """Content hashes of input files, remembered from run to run."""
        hashes = FileHashes(self.directory / "file-hashes.json")
        try:
            yield hashes
        finally:
            hashes.save()

    @contextmanager
    def with_ray(self) -> Iterator[None]:
        """Ray for the block; what libraries print goes to a log. Raises UserError where work_dir cannot be made."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"work_dir {self.directory} cannot be made ({error.strerror}): set another one") from None
        with quiet(self.log), ray_cluster():
            yield

    def run(
        self, make_stages: Callable[[], Sequence[Stage]], around: Around = as_it_is
    ) -> tuple[dict[str, Output], float]:
        """Build the stages that are not built yet. Returns all outputs by stage name, and the seconds it took."""
        began = time.monotonic()
        stages = make_stages()
        log = escape(visible(str(self.log)))
        console.print(f"[bold]{self.name}[/bold]: {len(stages)} stages; library output goes to {log}")
        outputs = run_workflow(stages, self.store, report=_report, warn=say, around=around)
        return outputs, time.monotonic() - began

    def find_model(self, checkpoint: str, revision: str | None = None, uri: str | None = None) -> Path:
        """The Hugging Face directory of a checkpoint, however it is written (jobs/models/checkpoint_source.py):
        fetched, downloaded or converted into this work_dir once, if it is none. `uri`: of the registry's MLflow, if not
        that of the work_dir. Raises UserError, one line, for what is not there or no checkpoint."""
        if is_model_uri(checkpoint):
            from jobs.registry.server import tracking_uri

            return fetch_model(checkpoint, uri or tracking_uri(self.directory), self.directory / MODELS)
        located = locate(checkpoint, revision)
        if located.kind == "directory":
            return located.path
        with self.hashes() as hashes:
            stage = checkpoint_stage(located, hashes)
        assert stage is not None, "only a directory is used as it lies there"
        return self.store.build(stage, {}, say).path / MODEL


class Workspace(WorkDir):
    """A recipe's. A base that is a registered model is fetched into it, and the recipe then names that directory."""

    def __init__(self, recipe: Recipe, log: Path | None = None, rebuild: bool = False) -> None:
        super().__init__(recipe.name, recipe.work_dir, log, rebuild)
        checkpoint = recipe.base.checkpoint
        if checkpoint is not None and is_model_uri(checkpoint):
            from jobs.registry.server import tracking_uri

            uri = tracking_uri(self.directory, recipe.registry.tracking_uri)
            here = str(self.find_model(checkpoint, uri=uri))
            recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update={"checkpoint": here})})
        self.recipe = recipe

    @cached_property
    def start(self) -> Start | None:
        """Where the fine-tuning goes on from, in a recipe that continues. Raises UserError as `find_start` does."""
        if self.recipe.continues is None:
            return None
        from jobs.workflow.start import find_start

        return find_start(self.recipe, self.recipe.continues, self.directory, self.store)


def _report(output: Output) -> None:
    how = "found" if output.reused else f"done in {duration(output.seconds)}"
    console.print(f"{output.stage:>15} [green]{how}[/green] {escape(visible(str(output.path)))}", soft_wrap=True)


def duration(seconds: float) -> str:
    """75.2 -> '1:15'."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
