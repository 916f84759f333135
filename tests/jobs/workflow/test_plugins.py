"""A reader, an objective and an evaluation of somebody else's, those of docs/plugins.md as they stand there: found by
their entry points, used in a run, and told of in one line where something is wrong."""

import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.cli.commands.evaluate import chosen
from jobs.config.evaluation import Evaluation
from jobs.config.settings import validated
from jobs.config.training import Training
from jobs.measures.result import Result
from jobs.train.objective import plan_of
from jobs.workflow.evaluation_stages import evaluation_stages
from pipelines.config import Data, Source
from pipelines.sources.corpus import Document, Dropped
from pipelines.sources.file_hashes import FileHashes
from pipelines.sources.listing import list_entries
from pipelines.sources.readers import describe, read_unit
from pipelines.sources.units import group_units
from pipelines.tokens.shards import Manifest
from pipelines.tokens.tokenizer import train_tokenizer
from pipelines.workflow.errors import UserError
from pipelines.workflow.plugins import find_plugins

PAGE = (Path(__file__).parents[3] / "docs" / "plugins.md").read_text()
POINTS = tomllib.loads(re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0])["project"]["entry-points"]
Install = Callable[..., Path]


def mailbox(messages: int, words: int = 60) -> str:
    parts = [
        f"From me@home\nMessage-ID: <{n}@home>\nSubject: s\n\n{' '.join(f'word{n}{m % 7}' for m in range(words))}\n"
        for n in range(messages)
    ]
    return "\n".join(parts)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a distribution where Python and those it starts find it; by default the page's."""
    directory = tmp_path / "site"

    def add(name: str = "fot-extras", version: str = "1.0", points: dict = POINTS) -> Path:
        info = directory / f"{name.replace('-', '_')}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in of.items()) for group, of in points.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        find_plugins.cache_clear()
        return directory

    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        file = directory / block.splitlines()[0].removeprefix("# ")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block)
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(directory), *os.environ.get("PYTHONPATH", "").split(":")]))
    yield add
    find_plugins.cache_clear()


def read(tmp_path: Path, path: Path) -> tuple[list[str], list[Document | Dropped]]:
    """What names the content of a path's files, and what is read from them."""
    source = Source(name="s", path=str(path))
    entries = list_entries(Data(sources=(source,)), 0, FileHashes(tmp_path / "hashes.json"))
    units = group_units(entries, 1000)
    return [file.content for entry in entries for file in entry.files], [
        each for unit in units for each in read_unit(unit, source)
    ]


def test_a_run_reads_trains_and_measures_with_plugins(
    install: Install, fot, recipe: dict, write_recipe, tmp_path: Path
) -> None:
    install()
    model = tmp_path / "llama"
    model.mkdir()
    train_tokenizer([mailbox(30)], 300, model)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, bos_token_id=0, eos_token_id=1, **shape)).save_pretrained(model)
    (tmp_path / "inbox.mbox").write_text(mailbox(40))
    recipe["data"]["sources"] = [{"name": "mail", "path": str(tmp_path / "inbox.mbox"), "held_out": 0.2}]
    recipe["base"] = {"checkpoint": str(model)}
    recipe["finetune"] |= {"objective": {"kind": "stride", "context": 16, "stride": 1, "mem_layers": [1]}, "steps": 2}
    recipe["evaluation"] = {"perplexity": None, "passkey": None, "copying": {"lengths": [1, 4]}}
    recipe["resources"] = {"workers": 1}
    path = write_recipe(recipe)

    mistaken = fot("run", path, "--set=evaluation.copyng={}")
    assert mistaken.returncode == 2, mistaken.stdout
    assert "did you mean evaluation.copying?" in mistaken.stdout
    assert len(mistaken.stdout.strip().splitlines()) == 1

    answer = fot("run", path)
    assert answer.returncode == 0, answer.stdout
    made = {file.parent.parent.name: file.parent for file in (tmp_path / "runs/store").glob("*/*/stage.json")}
    manifest = Manifest.read(made["shards"])
    assert (manifest.documents, manifest.libraries["fot-extras"]) == (40, "1.0")
    assert json.loads((made["finetune"] / "stage.json").read_text())["params"]["training"]["plugin"] == "fot-extras 1.0"
    assert json.loads((made["finetune"] / "model" / "config.json").read_text())["mem_layers"] == [1]
    assert {(point.metric, point.step) for point in Result.read(made["copying"]).points} == {
        ("copying/model", 16),
        ("copying/model", 64),
    }


def test_a_file_of_a_plugin_is_read_as_its_records_and_named_with_its_version(install: Install, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "inbox.mbox").write_text(mailbox(3) + "\nFrom me@home\nMessage-ID: <none>\n\n\n")
    (tmp_path / "a" / "b" / "README").write_text("about")
    (as_text,), (document,) = read(tmp_path, tmp_path / "a" / "b" / "inbox.mbox")
    install()
    (content,), found = read(tmp_path, tmp_path / "a")
    assert document.id == "s/inbox.mbox"
    assert content == f"fot-extras 1.0/{as_text}"
    assert [each.id for each in found[:-1]] == ["s/<0@home>", "s/<1@home>", "s/<2@home>"]
    assert found[-1].reason == "empty"
    install(version="2.0")
    assert read(tmp_path, tmp_path / "a")[0] == [f"fot-extras 2.0/{as_text}"]


def test_what_a_reader_does_wrong_is_told_with_the_file(install: Install, tmp_path: Path) -> None:
    (site := install(points={"fot.readers": {"odd": "odd:read", "none": "odd:no_text"}}))
    (site / "odd.py").write_text(
        "def read(stream):\n    yield None, stream.read().decode()\n    raise KeyError('x')\n"
        "def no_text(stream):\n    yield 'a', None\n"
    )
    (tmp_path / "f.odd").write_text("text")
    (tmp_path / "f.none").write_text("text")
    with pytest.raises(
        UserError, match=r"f\.odd cannot be read by fot\.readers odd of fot-extras 1\.0 \(KeyError: 'x'\)"
    ):
        read(tmp_path, tmp_path / "f.odd")
    _, (dropped,) = read(tmp_path, tmp_path / "f.none")
    assert dropped.bad
    assert describe(dropped).endswith("f.none, record 0: record has no text (its reader gave NoneType)")


def test_an_evaluation_is_chosen_like_ours_and_keeps_their_keys(install: Install, tmp_path: Path) -> None:
    before = chosen(["passkey"], []).model_dump(mode="json")
    install()
    evaluation = chosen(["copying"], ["copying.lengths=[3]"])
    assert list(evaluation.tasks) == ["copying"]
    assert Evaluation.model_validate(evaluation.model_dump(mode="json")) == evaluation
    assert chosen(["passkey"], []).model_dump(mode="json") == before
    (stage,) = evaluation_stages(evaluation, {"model": "m"}, 16, 0, FileHashes(tmp_path / "hashes.json"))
    assert (stage.inputs, stage.params["plugin"]) == (("m",), "fot-extras 1.0")
    assert stage.params["settings"] == {"lengths": [3]}


@pytest.mark.parametrize(
    ("tasks", "setting", "message"),
    [
        (["copyin"], [], "--task copyin is unknown: did you mean copying?"),
        (["copying"], ["copying.length=[3]"], "unknown key copying.length: did you mean copying.lengths?"),
        (["copying"], ["copying.lengths=[0]"], "copying.lengths.0 = 0: input should be greater than 0"),
        (["passkey"], ["copying.lengths=[3]"], "copying is not asked for"),
    ],
)
def test_mistakes_in_an_evaluation(install: Install, tasks: list[str], setting: list[str], message: str) -> None:
    install()
    with pytest.raises(UserError, match=re.escape(message)):
        chosen(tasks, setting)


def trained(**objective: object) -> Training:
    return validated(Training, {"objective": {"context": 16, "contexts": 4, **objective}, "steps": 1}, "t")


def test_an_objective_says_who_sees_whom(install: Install) -> None:
    install()
    training = trained(kind="stride", stride=2)
    rows = SimpleNamespace(group=[0, 0, 0, 0], segment=[0, 1, 2, 3], related=[[True]])
    assert plan_of(training.objective, rows, 0, 0).tolist() == [[-1], [-1], [0], [1]]
    assert training.model_dump(mode="json")["objective"]["stride"] == 2
    assert Training.model_validate(training.model_dump(mode="json")) == training


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"kind": "strid"},
            "objective.kind strid is unknown: give one of fot, memorizing, standard, transformer_xl, s",
        ),
        ({"kind": "stride", "strides": 3}, "unknown key objective.strides: did you mean objective.stride?"),
        ({"kind": "stride", "stride": 0}, "objective.stride = 0: input should be greater than 0"),
        ({"kind": "fot", "stride": 3}, "unknown key objective.stride: remove it"),
    ],
)
def test_mistakes_in_an_objective(install: Install, objective: dict, message: str) -> None:
    install()
    with pytest.raises(UserError, match=re.escape(message)):
        trained(**objective)


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        ([[1], [-1], [-1]], "row 0 sees row 1, the future of its own document"),
        ([[-1], [2], [-1]], "row 1 sees row 2, whose group is related"),
        ([[-1], [-1], [7]], "row 2 sees row 7, but the batch has rows 0 to 2"),
    ],
)
def test_a_plan_that_shows_too_much_is_refused(
    install: Install, seen: list[list[int]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    objective = trained(kind="stride").objective
    monkeypatch.setattr(type(objective), "plan", lambda *_: torch.tensor(seen))
    rows = SimpleNamespace(group=[0, 0, 1], segment=[0, 1, 0], related=[[True, True], [True, True]])
    with pytest.raises(UserError, match=message):
        plan_of(objective, rows, 0, 0)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"fot.evaluations": {"passkey": "fot_extras.copying"}}, "has a name that fot itself uses"),
        ({"fot.evaluations": {"shards": "fot_extras.copying"}}, "has a name that fot itself uses"),
        ({"fot.evaluations": {"Copying": "fot_extras.copying"}}, "not of small letters"),
        ({"fot.evaluations": {"copying": "fot_extras.nowhere"}}, "cannot be loaded (ModuleNotFoundError: No module"),
        ({"fot.evaluations": {"copying": "fot_extras.stride"}}, "has no Settings"),
    ],
)
def test_a_plugin_that_is_none_is_named(install: Install, points: dict, message: str) -> None:
    install(points=points)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        chosen(["copying"], [])
    assert re.match(r"fot\.evaluations \w+ of fot-extras 1\.0 .*: mend it or uninstall it$", str(caught.value))


def test_two_of_one_name_are_refused(install: Install) -> None:
    install()
    install(name="others", points={"fot.objectives": {"stride": "fot_extras.stride:Stride"}})
    with pytest.raises(UserError, match=r"stride of others 1\.0 has the name of one of fot-extras 1\.0"):
        trained(kind="stride")


def test_an_objective_of_another_kind_than_its_name_is_refused(install: Install) -> None:
    install(points={"fot.objectives": {"steps": "fot_extras.stride:Stride", "module": "fot_extras.stride"}})
    with pytest.raises(UserError, match="has a kind other than its name"):
        trained(kind="steps")
    with pytest.raises(UserError, match=r"derives from jobs\.config\.training\.OwnObjective"):
        trained(kind="module")
