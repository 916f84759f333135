"""`fot data ...` as a person uses it, on a corpus that grows and files that break."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pipelines.tokens.shards import Manifest

STORE = Path("runs") / "store"


@pytest.fixture
def data_recipe(recipe: dict, tmp_path: Path, write_recipe) -> Path:
    """Two sources with weights: lines, and text files in a directory to which more can be added."""
    (tmp_path / "notes").mkdir()
    for number in range(6):
        (tmp_path / "notes" / f"{number}.txt").write_text(
            f"note number {number}: the cat sat on the mat. " * (20 + number)
        )
    recipe["data"]["sources"] = [
        {**recipe["data"]["sources"][0], "weight": 3},
        {"name": "notes", "path": str(tmp_path / "notes"), "weight": 1, "held_out": 0.0},
    ]
    recipe["data"]["task_bytes"] = 4000
    return write_recipe(recipe)


def shards(tmp_path: Path) -> list[Path]:
    """The data sets there are, oldest first."""
    found = (tmp_path / STORE / "shards").glob("*/stage.json")
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime)]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_ids_hold_is_shown_and_does_nothing_to_the_terminal(
    fot_here, recipe: dict, write_recipe, tmp_path: Path
) -> None:
    ids = [f"\x1b]0;title\x07\x1b[31mid {number}\nnext line" for number in range(20)]
    made = [json.dumps({"id": name, "text": f"{name[-12]} the cat sat on the mat. " * 30}) for name in ids]
    (tmp_path / "text.jsonl").write_text("\n".join(made))
    recipe["data"]["sources"] = [{"name": "a", "path": str(tmp_path / "text.jsonl"), "held_out": 0.2}]
    path = write_recipe(recipe)
    assert fot_here("data", "prepare", path).returncode == 0
    for answer in (fot_here("data", "inspect", path), fot_here("data", "show", path, "--step", 0)):
        assert answer.returncode == 0, answer.stdout
        assert re.search(r"a/\\x1b\]0;title\\x07\\x1b\[31mid \d+\\nnext line", answer.stdout)
        assert not set("\x1b\x07") & set(answer.stdout)


def test_data_is_made_looked_at_broken_mended_and_grown(fot_here, data_recipe: Path, tmp_path: Path) -> None:
    nothing = fot_here("data", "show", data_recipe, "--step", 0)
    assert nothing.returncode == 2
    assert "there is no data set of this recipe" in nothing.stdout.splitlines()[-1]

    made = fot_here("data", "prepare", data_recipe)
    assert made.returncode == 0, made.stdout
    (first,) = shards(tmp_path)
    manifest = Manifest.read(first)
    assert made.stdout.splitlines()[-1] == f"manifest {manifest.hash} in {first}"
    assert not (tmp_path / STORE / "base").exists()
    assert re.search(r"30 documents, .* tokens, .* characters a token", made.stdout)
    assert re.search(r"words: .*100\.0% of|words: .*9\d\.\d% of", made.stdout)

    seen = fot_here("data", "inspect", data_recipe)
    assert seen.returncode == 0, seen.stdout
    lines = seen.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["words", "24"], ["notes", "6"]]
    assert "document lengths in tokens" in lines
    assert "finetune: 6 steps of 128 tokens, in groups of 2 x 16" in lines
    assert any(re.match(r"  contexts 0 to \d: (words/d|notes/)", line) for line in lines)
    assert any(line.startswith("     1 PL") for line in lines)

    step = fot_here("data", "show", data_recipe, "--step", 3)
    assert step.returncode == 0
    assert step.stdout.startswith("step 3: 4 groups of 2 x 16 tokens; words ")
    assert re.search(
        r"row 3 \(group 1, segment 1\): \S+\n    positive: row 2, \S+\n    negative: row 0, \S+", step.stdout
    )
    assert fot_here("data", "show", data_recipe, "--step", 3).stdout == step.stdout
    assert (
        "the recipe trains base and finetune"
        in fot_here("data", "show", data_recipe, "--step", 3, "--training", "x").stdout
    )

    whole = fot_here("data", "verify", data_recipe)
    assert whole.returncode == 0
    assert f"{len(manifest.shards)} shards with 30 documents" in whole.stdout
    before = contents(tmp_path / STORE)
    broken, gone = (first / manifest.shards[n].file for n in (0, 1))
    broken.write_bytes(broken.read_bytes()[:-9] + b"otherwise")
    gone.unlink()
    index = next((tmp_path / STORE / "index").glob("*/documents.arrow"))
    index.write_bytes(index.read_bytes()[:-1])
    damaged = fot_here("data", "verify", data_recipe)
    assert damaged.returncode == 2
    assert f"{broken} is corrupt" in damaged.stdout
    assert f"{gone} is missing" in damaged.stdout
    assert f"{index} is corrupt" in damaged.stdout
    assert "3 damaged or missing: mend it with `fot data repair" in damaged.stdout.splitlines()[-1]
    unreadable = fot_here("data", "inspect", data_recipe)
    assert unreadable.returncode == 2
    assert f"{index} is damaged" in unreadable.stdout
    mended = fot_here("data", "repair", data_recipe)
    assert mended.returncode == 0, mended.stdout
    assert mended.stdout.count("made again") == 3
    shutil.rmtree(index.parent)
    missing = fot_here("data", "verify", data_recipe)
    assert missing.returncode == 2
    assert "index does not have what this recipe needs" in missing.stdout
    assert fot_here("data", "repair", data_recipe).returncode == 0
    found = contents(tmp_path / STORE)
    after = {name: content for name, content in found.items() if ".damaged-" not in name}
    assert any(name.startswith("index/") for name in found.keys() - after.keys()), "what was damaged is kept"
    assert {n for n, c in after.items() if before[n] != c} <= {n for n in before if n.endswith(("stage.json", ".lock"))}

    (tmp_path / "notes" / "00-new.txt").write_text("a new note, with new words. " * 40)
    old = fot_here("data", "verify", data_recipe)
    assert old.returncode == 0
    assert "1 new files are not in the data set yet" in old.stdout
    gone.unlink()  # what grows is mended first
    grown = fot_here("data", "prepare", data_recipe)
    assert grown.returncode == 0, grown.stdout
    assert "(1 new)" in grown.stdout
    assert "tokenizer found" in re.sub(r"\s+", " ", grown.stdout)
    larger = Manifest.read(shards(tmp_path)[-1])
    assert larger.shards[:-1] == manifest.shards
    assert (larger.parent, larger.generations) == (manifest.hash, [len(manifest.shards), 1])
    again = fot_here("data", "prepare", data_recipe)
    assert again.stdout.splitlines()[-1] == grown.stdout.splitlines()[-1]
    assert all(f"{stage} found" in again.stdout for stage in ("shards", "index", "finetune-groups"))


def test_a_damaged_manifest_is_named_and_the_data_set_made_again(fot_here, data_recipe: Path, tmp_path: Path) -> None:
    made = fot_here("data", "prepare", data_recipe)
    (directory,) = shards(tmp_path)
    before = contents(directory)
    for damaged in (b"", before["manifest.json"].replace(b"shard-00001", b"shard-00009", 1)):
        (directory / "manifest.json").write_bytes(damaged)
        seen = fot_here("data", "verify", data_recipe)
        assert seen.returncode == 2
        assert f"{directory} has no whole manifest.json" in seen.stdout.replace("\n", "")
        again = fot_here("data", "prepare", data_recipe)
        assert again.stdout.splitlines()[-1] == made.stdout.splitlines()[-1]
        assert {name: content for name, content in contents(directory).items() if name != "stage.json"} == {
            name: content for name, content in before.items() if name != "stage.json"
        }


def test_settings_that_a_training_cannot_have_are_refused_also_when_the_groups_are_there(
    fot_here, data_recipe: Path
) -> None:
    assert fot_here("data", "prepare", data_recipe).returncode == 0
    refused = fot_here("data", "prepare", data_recipe, "--set", "data.sources.1.max_epochs=0.001")
    assert refused.returncode == 2
    assert "data.sources.1.max_epochs is 0.001" in refused.stdout.splitlines()[-1]
    too_large = ["--set", "finetune.batch.groups=1000", "--set", "finetune.batch.micro_batches=2"]
    assert "a micro-batch takes 1000" in fot_here("data", "prepare", data_recipe, *too_large).stdout.splitlines()[-1]


def test_what_is_not_finished_or_of_another_format_is_passed_over(fot_here, data_recipe: Path, tmp_path: Path) -> None:
    made = fot_here("data", "prepare", data_recipe)
    (directory,) = shards(tmp_path)
    shutil.copytree(directory, directory.with_name("0123.partial"))
    other = directory.with_name("0123")
    shutil.copytree(directory, other)
    (other / "manifest.json").write_text('{"format": 1, "shards": []}')
    seen = fot_here("data", "verify", data_recipe)
    assert seen.returncode == 0, seen.stdout
    assert f"{other} has no whole manifest.json" in seen.stdout
    assert fot_here("data", "prepare", data_recipe).stdout.splitlines()[-1] == made.stdout.splitlines()[-1]


def test_what_another_data_set_was_made_with_is_said(fot_here, data_recipe: Path, tmp_path: Path) -> None:
    assert fot_here("data", "prepare", data_recipe).returncode == 0
    (directory,) = shards(tmp_path)
    seen = fot_here("data", "verify", data_recipe, "--set", "data.sources.1.min_tokens=7")
    assert seen.returncode == 2
    line = seen.stdout.splitlines()[-1]
    assert "there is no data set of this recipe" in line
    assert f"{directory} was made with, which was another data.sources: 1.min_tokens was 1, is 7" in line


def test_files_beside_the_tokenizer_do_not_matter(fot_here, data_recipe: Path, tmp_path: Path) -> None:
    made = fot_here("data", "prepare", data_recipe)
    own = shutil.copytree(next((tmp_path / STORE / "tokenizer").glob("*/tokenizer.json")).parent, tmp_path / "own")
    sets = ["--set", f"tokenizer.path={own}"]
    first = fot_here("data", "prepare", data_recipe, *sets)
    assert made.returncode == first.returncode == 0
    (own / "README.md").write_text("about it")
    assert fot_here("data", "prepare", data_recipe, *sets).stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert len(list((tmp_path / STORE / "tokenizer").glob("*/stage.json"))) == 2  # learned here, and brought in
    assert len(shards(tmp_path)) == 1  # and so they are the same


def test_a_changed_file_begins_a_new_data_set(fot_here, data_recipe: Path, tmp_path: Path) -> None:
    assert fot_here("data", "prepare", data_recipe).returncode == 0
    (tmp_path / "notes" / "3.txt").write_text("all new. " * 50)
    assert fot_here("data", "prepare", data_recipe).returncode == 0
    manifests = [Manifest.read(directory) for directory in shards(tmp_path)]
    assert len(manifests) == 2
    assert manifests[0].hash != manifests[1].hash
    assert [manifest.parent for manifest in manifests] == [None, None]
    shutil.rmtree(tmp_path / "notes")
    assert "does not exist" in fot_here("data", "prepare", data_recipe).stdout.splitlines()[-1]


def test_what_the_data_cannot_give_is_one_line(fot_here, data_recipe: Path, tmp_path: Path) -> None:
    def line(*overrides: str) -> str:
        sets = [argument for override in overrides for argument in ("--set", override)]
        answer = fot_here("data", "prepare", data_recipe, *sets)
        assert answer.returncode == 2, answer.stdout
        assert "Traceback" not in answer.stdout
        return answer.stdout.splitlines()[-1]

    assert "read source 'notes'" in line("data.sources.1.max_epochs=0.01")
    assert "data.sources.1.max_epochs is 0.01" in line("data.sources.1.max_epochs=0.01")
    assert "source 'notes' has a weight but not the 16 training tokens" in line("data.sources.1.held_out=1.0")
    assert "'notes' has no weight, others do" in line("data.sources.1.weight=null")
    twice = json.dumps({"id": "d0", "text": "other text under an id that is taken"})
    with open(tmp_path / "corpus.jsonl", "a") as corpus:
        corpus.write(twice + "\n")
    assert "two documents have the id 'words/d0' but different text" in line()


def test_a_faster_backend_is_used_where_it_makes_the_same_tokens(fot_here, data_recipe: Path, tmp_path: Path) -> None:
    assert fot_here("data", "prepare", data_recipe).returncode == 0
    fast = fot_here("data", "prepare", data_recipe, "--set", "tokenizer.backend=gigatoken")
    assert fast.returncode == 0, fast.stdout
    plain, faster = (Manifest.read(directory) for directory in shards(tmp_path))
    assert [manifest.tokenizer["backend"] for manifest in (plain, faster)] == ["huggingface", "gigatoken"]
    assert faster.shards == plain.shards
    verified = fot_here("data", "verify", data_recipe, "--set", "tokenizer.backend=gigatoken")
    assert faster.hash[:16] in verified.stdout


def test_a_faster_backend_that_cannot_do_it_is_passed_over_with_a_word(
    fot_here, data_recipe: Path, tmp_path: Path
) -> None:
    words = {word: number for number, word in enumerate(["<s>", "</s>", "?", "the", "cat"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "own").mkdir()
    tokenizer.save(str(tmp_path / "own" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "?"}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(config))
    sets = ["--set", "tokenizer.backend=gigatoken", "--set", f"tokenizer.path={tmp_path}/own"]
    made = fot_here("data", "prepare", data_recipe, *sets)
    assert made.returncode == 0, made.stdout
    assert "going on with Hugging Face tokenizers" in made.stdout.replace("\n", " ")
    (directory,) = shards(tmp_path)
    assert Manifest.read(directory).tokenizer["backend"] == "huggingface"


def test_installed_packages_and_made_up_documents_are_a_corpus(
    fot_here, recipe: dict, write_recipe, tmp_path: Path, monkeypatch
) -> None:
    site = tmp_path / "site-packages"
    for number in range(8):
        package = f"package{number}"
        (site / package).mkdir(parents=True)
        (site / package / "code.py").write_text("".join(f"def f{line}(x): return {number}\n" for line in range(60)))
        metadata = site / f"{package}-1.{number}.dist-info"
        metadata.mkdir()
        (metadata / "RECORD").write_text(f"{package}/code.py,,\n")
        licence = "MIT" if number else "BSD-3-Clause"
        (metadata / "METADATA").write_text(f"Name: {package}\nVersion: 1.{number}\nLicense-Expression: {licence}\n")
    (site / "package0-1.0.dist-info" / "code.py").write_text("nobody's")
    monkeypatch.setattr("pipelines.sources.listing.site_packages", lambda: (str(site), str(site)))
    recipe["data"]["sources"] = [
        {"name": "packages", "path": "python:site-packages", "held_out": 0.0},
        {"name": "recall", "path": "synthetic:recall", "recall": {"documents": 4, "characters": 4000}, "held_out": 0.0},
    ]
    path = write_recipe(recipe)
    made = fot_here("data", "prepare", path)
    assert made.returncode == 0, made.stdout
    (directory,) = shards(tmp_path)
    manifest = Manifest.read(directory)
    assert manifest.documents == 12
    assert manifest.licences == {
        "BSD-3-Clause": ["package0-1.0"],
        "MIT": [f"package{number}-1.{number}" for number in range(1, 8)],
    }
    seen = fot_here("data", "inspect", path)
    assert seen.returncode == 0, seen.stdout
    lines = seen.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["packages", "recall"]
    assert lines[2].startswith("recall (synthetic)")
    assert "     1  BSD-3-Clause: package0-1.0" in lines
    assert re.search(r"(packages/package\d-1\.\d|synthetic/recall-4000_0\.25_1\.0_0_00000\d), tokens", seen.stdout)

    (directory / manifest.shards[-1].file).write_bytes(b"broken")
    assert fot_here("data", "repair", path).returncode == 0
    assert fot_here("data", "verify", path).returncode == 0

    recipe["data"]["sources"][1]["recall"]["documents"] = 6
    grown = fot_here("data", "prepare", write_recipe(recipe))
    assert grown.returncode == 0, grown.stdout
    assert Manifest.read(shards(tmp_path)[-1]).parent == manifest.hash
