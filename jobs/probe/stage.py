"""The stage between base and finetune, where the recipe has memory layers chosen (`mem_layers: auto`)."""

from pathlib import Path

from jobs.data.stages import Inputs
from jobs.probe.config import Probe
from jobs.probe.probing import CHOSEN, TASK, probe, text_entries
from jobs.train.config import Auto
from jobs.train.spec import MODEL
from pipelines.hashing import FileHashes, hash_json
from pipelines.store import Stage
from pipelines.tokenizer import load_tokenizer


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
