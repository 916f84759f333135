"""The stage between base and finetune, where the recipe has memory layers chosen (`mem_layers: auto`)."""

from pathlib import Path

from jobs.config.probe import Probe
from jobs.config.train_spec import MODEL
from jobs.config.training import Auto
from jobs.probe.probing import CHOSEN, TASK, probe, text_entries
from jobs.workflow.data_stages import Inputs
from pipelines.sources.file_hashes import FileHashes
from pipelines.tokens.tokenizer import load_tokenizer
from pipelines.workflow.hashing import hash_json
from pipelines.workflow.store import Stage


def probe_stage(auto: Auto, hashes: FileHashes, settings: Probe = Probe()) -> Stage:  # noqa: B008 - it is frozen
    """Ranks the base's layers. What later stages depend on is the choice alone."""
    entries = text_entries(settings, hashes)

    def run(output: Path, inputs: Inputs) -> None:
        probe(inputs["base"] / MODEL, load_tokenizer(inputs["tokenizer"]), settings, auto.auto, entries, output)

    params = {
        "settings": settings.model_dump(mode="json"),
        "layers": auto.auto,
        "text": hash_json([e.identity() for e in entries]),
    }
    return Stage(TASK, run, params, inputs=("tokenizer", "base"), content=CHOSEN)
