"""The code in docs/model.md runs as it stands, on a LLaMA made on the spot; the commands of `fot` and `ray` on all
pages are there, and so are the extras that they install."""

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import torch
from ray.scripts.scripts import cli as ray
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.cli.fot import fot
from pipelines.tokens.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_code_of_the_model_page_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llama").mkdir()
    train_tokenizer(["Once upon a time there was a very long book. Who? Where?"], 280, Path("llama"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained("llama")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "model.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names: dict = {}
    for block in blocks:
        exec(compile(block, "model.md", "exec"), names)
    assert 0 <= names["mass"].r_d()[2] <= 1
    assert names["text"].shape[1] == names["book"].shape[1] + 20
    assert len(names["cache"].memory) > 0
    assert LlamaForCausalLM.from_pretrained("fot").config.num_hidden_layers == 3


PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
CLUSTERS = [ROOT / "ray_cluster.yaml", *sorted((ROOT / "clusters").glob("*.yaml"))]  # their remarks show commands, too
PROGRAMS = {"fot": fot, "ray": ray}
BEFORE = r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?"  # variables and place of a program


def shown_commands(page: Path, program: str) -> list[str]:
    """Every `fot ...` line to type, without prompt, remarks, pipes and the marks for what may be left out."""
    lines = page.read_text().replace("\\\n", " ").splitlines()
    prompt = rf"^#?\s*(?:\$ )?{BEFORE}(?={program} )"
    typed = [re.sub(prompt, "", line) for line in lines if re.match(prompt, line)]
    return [re.split(r" #|\s{3,}| \| | > ", line)[0] for line in typed]


def named_commands(page: Path, program: str) -> list[str]:
    """Every `fot ...` in a sentence or a table."""
    return re.findall(rf"`{BEFORE}({program} [^`]+)`", page.read_text())


def command_of(line: str) -> tuple[click.Command, list[str]]:
    command, arguments = (
        PROGRAMS[line.split()[0]],
        shlex.split(re.sub(r"(?<=\s)\[(.*?)\](?=\s|$)", r"\1", line).replace("...", ""))[1:],
    )
    while isinstance(command, click.Group) and arguments:
        name, *arguments = arguments
        found = command.get_command(click.Context(command), name.rstrip(","))
        assert found is not None, line
        command = found
    return command, arguments


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("page", [*PAGES, *CLUSTERS], ids=lambda page: page.name)
def test_every_command_of_the_pages_is_one_that_there_is(page: Path, program: str) -> None:
    shown, named = shown_commands(page, program), named_commands(page, program)
    if program == ("fot" if page.suffix == ".md" else "ray"):
        assert shown or named or page.name in ("model.md", "glossary.md")
    for line in shown:
        command, arguments = command_of(line)
        command.make_context(command.name, arguments)  # refuses what is no option, and what is missing
        assert all((ROOT / word).exists() for word in arguments if word.startswith(("recipes/", "clusters/"))), line
    for line in named:
        command, arguments = command_of(line)
        there = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("-")} <= there, line


@pytest.mark.parametrize("page", [*PAGES, *CLUSTERS], ids=lambda page: page.name)
def test_what_is_installed_with_the_package_is_one_of_its_extras(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"(?:fot|\$W|\.whl\))\[(\w+)\]", page.read_text())) <= set(extras)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(r"\b(?:fot_model|pipelines|jobs|tests|recipes|benchmarks)/[a-z0-9_/]+\.\w+", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []
