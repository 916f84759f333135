"""`fot probe`: any LLaMA's layers, ranked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.config.probe import Probe
from jobs.config.settings import validated
from jobs.evaluate.subject import read_tokenizer
from jobs.measures.result import Result
from jobs.measures.tables import print_results
from jobs.models.base import check_vocabulary, look_at_checkpoint
from jobs.probe.probing import PICTURE, RANKING, TASK, probe, read_chosen, text_entries
from jobs.workflow.data_stages import Inputs, directory_files
from jobs.workflow.workspace import WorkDir
from pipelines.workflow.hashing import hash_json
from pipelines.workflow.progress import say
from pipelines.workflow.store import Stage


@dataclass(frozen=True)
class ProbeRequest:
    """What the command line says. `layers`: how many memory layers are to be chosen; `settings`: of the probe, None for
    its defaults."""

    model: str
    layers: int | None
    settings: dict[str, Any]
    work_dir: str


def probe_model(request: ProbeRequest) -> None:
    """Measure and print. Raises UserError for what is no LLaMA, and for whatever `probe` cannot do."""
    given = {name: value for name, value in request.settings.items() if value is not None}
    settings = validated(Probe, given, "fot probe")
    work = WorkDir(TASK, request.work_dir)
    model = work.find_model(request.model)
    look_at_checkpoint(model)
    tokenizer = read_tokenizer(model)
    check_vocabulary(model, tokenizer)

    def stages() -> list[Stage]:
        with work.hashes() as hashes:
            entries = text_entries(settings, hashes)
            params = {
                "files": directory_files(model, hashes),
                "settings": settings.model_dump(mode="json"),
                "layers": request.layers,
                "text": hash_json([entry.identity() for entry in entries]),
            }

        def run(output: Path, inputs: Inputs) -> None:
            probe(model, tokenizer, settings, request.layers, entries, output)

        return [Stage(TASK, run, params)]

    with work.with_ray():
        outputs, _ = work.run(stages)
    where = outputs[TASK].path
    print_results([(Result.read(where), where)])
    say(f"  picture  {where / PICTURE}")
    say(f"  ranking  {where / RANKING}")
    say(f"  recipe   finetune.objective.mem_layers: {read_chosen(where)}, or auto")
