"""`fot probe` and `mem_layers: auto` on a model whose retrieval head was written by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from jobs.config.probe import Probe
from jobs.config.settings import validated
from jobs.evaluate.cells import Cell
from jobs.evaluate.subject import read_tokenizer
from jobs.measures.result import Result
from jobs.probe import probing
from jobs.probe.probing import CHOSEN, PICTURE, RANKING, make_prompts, probe, read_chosen, text_entries
from pipelines.sources.file_hashes import FileHashes
from pipelines.workflow.errors import UserError

LAYER, HEAD = 2, 3  # as the fixture has it


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A text in which words recur."""
    directory = tmp_path / "library"
    directory.mkdir()
    for file in range(3):
        blocks = []
        for block in range(9):
            lines = [f"word_{file}{block}{n * 7919 % 401}_of_many = {n}" for n in range(4)]
            blocks += [*lines, *["and then nothing came of it at all"] * 9, *lines]
        (directory / f"{file}.txt").write_text("\n".join(blocks))
    return directory


def only(directory: Path) -> Path:
    (found,) = (path for path in directory.glob("*") if path.is_dir())
    return found


@pytest.fixture
def without_ray(monkeypatch) -> None:
    """Cells run in this process."""

    def run_cells(name: str, cells: list[Cell], output: Path) -> dict:
        with torch.inference_mode():
            return {cell.key: json.loads(json.dumps(cell.function(*cell.arguments))) for cell in cells}

    monkeypatch.setattr(probing, "run_cells", run_cells)


def test_the_head_that_copies_is_found(without_ray, retrieving: Path, library: Path, tmp_path: Path) -> None:
    settings = Probe(prompts=2, causal=1, text=str(library))
    entries, output = text_entries(settings, FileHashes(tmp_path / "hashes.json")), tmp_path / "output"
    output.mkdir()
    probe(retrieving, read_tokenizer(retrieving), settings, None, entries, output)
    found = json.loads((output / RANKING).read_text())
    best, second = found["layers"][:2]
    assert (best["number"], best["head"]) == (LAYER, HEAD)
    assert best["score"] - best["spread"] > 10 * second["score"]
    assert set(best["by_kind"]) == {"facts", "text"}
    assert read_chosen(output) == [LAYER]
    for name in ("without", "alone"):
        worth = found["causal"][name]
        assert worth[LAYER] > 1.0
        assert worth[LAYER] == pytest.approx(found["causal"]["none"][0] - found["causal"]["all"][0], rel=1e-4)
        assert max(abs(worth[layer]) for layer in range(len(worth)) if layer != LAYER) < 1e-4
    with Image.open(output / PICTURE) as picture:
        assert picture.format == "PNG"
    (table,) = Result.read(output).tables
    assert table.rows[0][:2] == [f"{LAYER} *", HEAD]
    probe(retrieving, read_tokenizer(retrieving), settings, 2, entries, output)
    assert read_chosen(output) == [0, LAYER], "of layers that are alike the lowest"


def test_a_probe_is_printed_and_found_again(fot_here, retrieving: Path, library: Path) -> None:
    asked = ["probe", retrieving, "--prompts", 1, "--data", library]
    answer = fot_here(*asked)
    assert answer.returncode == 0, answer.stdout
    for shown in (f"mem_layers: [{LAYER}]", "Layers that retrieve", PICTURE, RANKING):
        assert shown in answer.stdout
    assert "found" in fot_here(*asked).stdout, "the same is not measured again"


def test_what_cannot_be_probed_is_one_line(fot_here, retrieving: Path, library: Path, tmp_path: Path) -> None:
    def refused(words: str, *asked: object) -> None:
        answer = fot_here("probe", *asked)
        assert answer.returncode == 2
        (line,) = (line for line in answer.stdout.splitlines() if line.startswith("fot: "))
        assert words in line

    other = tmp_path / "other"
    shutil.copytree(retrieving, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    refused("is no LLaMA: its config.json says model_type 'gpt2'", other)
    refused("is no directory: give a Hugging Face LLaMA directory, a .gguf file", tmp_path / "nothing")
    refused("there is no package nobody_has_it", "package:nobody_has_it/model.gguf")
    (other / "config.json").write_text(json.dumps(config))
    (other / "tokenizer.json").unlink()
    refused("no tokenizer in", other)
    refused("--tokens 1025: the model in", retrieving, "--tokens", 1025)
    refused("prompts of 200 tokens are too short", retrieving, "--tokens", 200)
    refused("5 memory layers are to be chosen: the model in", retrieving, "--layers", 5)
    refused("causal (3) is more than prompts (2)", retrieving, "--prompts", 2, "--causal", 3)
    refused("no text of 1024 tokens was found", retrieving, "--data", write(tmp_path / "short.txt", "a few words"))
    refused("nowhere", retrieving, "--data", tmp_path / "nowhere")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_standard_library_has_prompts_enough(retrieving: Path, tmp_path: Path) -> None:
    settings = Probe(prompts=3)
    entries = text_entries(settings, FileHashes(tmp_path / "hashes.json"))
    made = make_prompts(read_tokenizer(retrieving), settings, 256, 1024, entries)
    assert {kind: len(prompts) for kind, prompts in made.items()} == {"facts": 3, "text": 3}
    assert made == make_prompts(read_tokenizer(retrieving), settings, 256, 1024, entries)
    assert len({tuple(prompt.ids) for prompts in made.values() for prompt in prompts}) == 6


def test_windows_follow_the_models_context() -> None:
    assert (Probe().window(8192), Probe().length(8192)) == (512, 2048)
    assert (Probe().window(1024), Probe().length(1024)) == (256, 1024)
    assert (Probe(local=100).length(8192), Probe(local=100).length(300)) == (400, 300)
    with pytest.raises(UserError, match="unknown key"):
        validated(Probe, {"promtps": 3}, "fot probe")


def test_another_models_tokenizer_is_refused(retrieving: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    config = json.loads((retrieving / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(UserError, match=r"the tokenizer has 280 tokens, the model in .* only 100"):
        probe(small, read_tokenizer(retrieving), Probe(), None, [], tmp_path)


@pytest.mark.slow
def test_a_recipe_trains_the_layers_that_a_probe_chose(
    fot_here, recipe: dict, write_recipe, retrieving: Path, tmp_path: Path, work_dir: Path
) -> None:
    recipe["base"] = {"checkpoint": str(retrieving)}
    recipe["tokenizer"] = {}
    recipe["finetune"]["objective"]["mem_layers"] = "auto"
    recipe["finetune"]["steps"] = 2
    recipe["evaluation"] = {"perplexity": {"contexts": [1, 2], "windows": 4}, "passkey": None}
    path = write_recipe(recipe)
    answer = fot_here("run", path)
    assert answer.returncode == 0, answer.stdout
    assert "Layers that retrieve" in answer.stdout
    store = tmp_path / "runs" / "store"
    chosen = json.loads((only(store / "probe") / CHOSEN).read_text())
    trained = only(store / "finetune")
    assert chosen == {"mem_layers": [LAYER]}
    assert json.loads((trained / "model" / "config.json").read_text())["mem_layers"] == [LAYER]
    assert json.loads((trained / "training.json").read_text())["params"]["mem_layers"] == str(LAYER)
    assert "Layers that retrieve" in (only(store / "report") / "report.html").read_text()
    shown = fot_here("registry", "list").stdout
    assert "tiny" in shown
    # The same layer, named: another key, the same training.
    recipe["finetune"]["objective"]["mem_layers"] = [LAYER]
    assert fot_here("run", write_recipe(recipe)).returncode == 0
    other = next(path for path in (store / "finetune").glob("*") if path.is_dir() and path != trained)
    assert (other / "model" / "model.safetensors").read_bytes() == (
        trained / "model" / "model.safetensors"
    ).read_bytes()
    # Going on with it keeps its layers, without another probe.
    recipe["finetune"]["objective"]["mem_layers"] = "auto"
    source = Path(recipe["data"]["sources"][0]["path"])
    source.write_text(source.read_text() + json.dumps({"id": "new", "text": "abcde fghab " * 400}) + "\n")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({**recipe, "continues": {"model": "models:/fot/tiny/1"}}))
    answer = fot_here("run", tmp_path / "again.yaml")
    assert answer.returncode == 0, answer.stdout
    assert "Layers that retrieve" not in answer.stdout
