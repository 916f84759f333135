"""What users' files can be: one clear line and exit code 2, and nothing of the rest is lost."""

import gzip
import json
import os
from pathlib import Path

import pytest

from pipelines.tokens.shards import Manifest

GOOD = "".join(json.dumps({"id": f"good-{n}", "text": f"a good text, number {n}. " * 30}) + "\n" for n in range(12))


def lines(*more: bytes) -> bytes:
    return GOOD.encode() + b"\n".join(more) + b"\n"


BAD = {
    "an empty corpus": ({"a.jsonl": b"\n\n"}, "the corpus is empty"),
    "no files": ({}, "holds no files"),
    "a truncated gz": ({"a.jsonl.gz": gzip.compress(GOOD.encode())[:-40]}, "a.jsonl.gz cannot be read"),
    "a damaged zst": ({"a.jsonl.zst": b"\x28\xb5\x2f\xfd" + GOOD.encode()}, "a.jsonl.zst cannot be read"),
    "no parquet": ({"a.parquet": b"PAR1" + GOOD.encode()}, "a.parquet"),
    "invalid UTF-8 in a line": ({"a.jsonl": lines(b'{"text": "caf\xe9"}')}, "a.jsonl, line 13: line is not UTF-8"),
    "invalid UTF-8 in a text file": ({"a.jsonl": GOOD, "b.txt": b"caf\xe9"}, "b.txt: not UTF-8"),
    "a broken line": ({"a.jsonl": lines(b'{"text": "cut')}, "a.jsonl, line 13: line is not JSON"),
    "a missing field": ({"a.jsonl": lines(b'{"body": "x"}')}, "line has no text in field 'text' (its fields: 'body')"),
    "NUL bytes in a line": ({"a.jsonl": lines(b'{"text": "a\\u0000b"}')}, "line 13: text holds NUL bytes"),
    "NUL bytes in a text file": ({"a.jsonl": GOOD, "b.md": b"a\0b"}, "b.md: binary (NUL bytes)"),
    "a git-lfs pointer": (
        {"a.jsonl": GOOD, "b.txt": b"version https://git-lfs.github.com/spec/v1\n"},
        "git-lfs",
    ),
    "two documents of one id": (
        {"a.jsonl": lines(b'{"id": "good-3", "text": "another"}')},
        "two documents have the id",
    ),
}


@pytest.fixture
def prepare(fot_here, recipe: dict, write_recipe, tmp_path: Path):
    """`fot data prepare` on a directory of files, with settings."""
    recipe["data"]["sources"] = [{"name": "files", "path": str(tmp_path / "files"), "held_out": 0.0}]
    path = write_recipe(recipe)
    (tmp_path / "files").mkdir()

    def run(files: dict, *overrides: str):
        for name, content in files.items():
            (tmp_path / "files" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        sets = [argument for override in overrides for argument in ("--set", override)]
        return fot_here("data", "prepare", path, *sets)

    return run


def one_line(answer) -> str:
    assert answer.returncode == 2, answer.stdout
    *_, line = answer.stdout.splitlines()
    assert line.startswith("fot: ")
    return line


@pytest.mark.parametrize("what", ["a missing field", "two documents of one id"])
def test_what_can_be_found_before_is_found_before_anything_is_tokenized(prepare, tmp_path: Path, what: str) -> None:
    files, expected = BAD[what]
    if what == "a missing field":
        files = {"a.jsonl": b'{"body": "x"}\n' + files["a.jsonl"]}
    assert expected in one_line(prepare({**files, "0.txt": GOOD}))
    assert not list((tmp_path / "runs" / "store" / "shards").glob("*/*.arrow"))


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_with_exit_code_2(prepare, what: str) -> None:
    files, expected = BAD[what]
    assert expected in one_line(prepare(files))


@pytest.mark.parametrize("what", [what for what, (_, line) in BAD.items() if "line 13" in line or ".txt" in line])
def test_what_is_broken_is_tolerated_up_to_a_limit_and_the_rest_kept(prepare, what: str, tmp_path: Path) -> None:
    files, _ = BAD[what]
    answer = prepare(files, "data.max_bad_documents=1")
    assert answer.returncode == 0, answer.stdout
    (shards,) = (tmp_path / "runs" / "store" / "shards").glob("*/manifest.json")
    manifest = Manifest.read(shards.parent)
    assert manifest.documents == 12
    assert sum(manifest.dropped.values()) == sum(shard.bad for shard in manifest.shards) == 1


def test_a_link_that_leads_out_of_the_source_is_refused(prepare, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("not part of the corpus")
    os.symlink(tmp_path / "secret.txt", tmp_path / "files" / "link.txt")
    line = one_line(prepare({"a.jsonl": GOOD}))
    assert f"link.txt leads to {tmp_path}/secret.txt" in line
    assert "data.sources.0.follow_links" in line
    assert prepare({}, "data.sources.0.follow_links=true").returncode == 0


def test_a_table_without_the_column_is_named(prepare, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"body": ["x"], "title": ["y"]}), tmp_path / "files" / "a.parquet")
    line = one_line(prepare({}))
    assert "a.parquet" in line
    assert "'body', 'title'" in line
    assert "text_field" in line


@pytest.mark.parametrize("missing", ["bos_token", "eos_token"])
def test_a_tokenizer_without_bos_or_eos_is_named(prepare, tmp_path: Path, missing: str) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    del config[missing]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).rename(tmp_path / "own" / name)
    assert f"has no {missing}" in one_line(prepare({"a.jsonl": GOOD}, f"tokenizer.path={tmp_path}/own"))
