import json

import pytest

from pipelines.tokens.precheck import _hash, check_records
from pipelines.tokens.tokenize import Encoding, tokenize
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import Progress

GOOD = "".join(json.dumps({"id": n, "text": f"text {n}"}) + "\n" for n in range(20))


@pytest.fixture(scope="module")
def check(local_ray, data_of, units_of):
    def run(path, earlier=None, **options):
        data = data_of(path, **options)
        check_records(units_of(data), data, earlier)

    return run


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"b.jsonl": '[\n{"text": "x"},\n{"text": "y"}\n]\n'}, r"b\.jsonl is one JSON array, .* `jq -c '\.\[\]' ARRAY"),
        ({"b.json": '\ufeff [{"text": "x"}]'}, r"b\.json is one JSON array, not an object a line"),
        ({"b.jsonl": '{"body": "x"}\n'}, r"b\.jsonl, line 1: line has no text in field 'text' \(its fields: 'body'\)"),
        ({"b.jsonl": '{"text": "x", "n": 1, "text": "y"}\n'}, r"b\.jsonl, line 1: line has the field 'text' twice"),
        ({"b.jsonl": '{"id": 1, "id": 2, "text": "y"}\n'}, r"b\.jsonl, line 1: line has the field 'id' twice"),
        ({"b.csv": "text,text\nx,y\n"}, r"b\.csv has 2 columns 'text'"),
        (
            {"b.parquet": b"version https://git-lfs.github.com/spec/v1\n"},
            r"b\.parquet is a git-lfs pointer",
        ),
        ({"b.jsonl": "version https://git-lfs.github.com/spec/v1\n"}, r"b\.jsonl is a git-lfs pointer"),
        ({"b.jsonl": '{"id": 7, "text": "another"}\n'}, r"two documents have the id 's/7' but different text"),
        ({"b.csv": "id,text\n7,another\n"}, r"two documents have the id 's/7' but different text"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_tokenized(tmp_path, write_tree, check, files, message):
    write_tree(tmp_path, {"a.jsonl": GOOD, **files})
    with pytest.raises(UserError, match=message) as caught:
        check(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_right_is_no_error(tmp_path, write_tree, check):
    write_tree(tmp_path, {"a.jsonl": GOOD, "again.jsonl": GOOD, "no-ids.csv": "text\nsame\nsame\n", "a.txt": "text"})
    write_tree(tmp_path, {"inner.jsonl": '{"meta": {"text": 1, "id": 1}, "text": "\\"text\\": \\"id\\"", "id": "x"}\n'})
    check(tmp_path, task_bytes=100)


def test_broken_lines_may_be_tolerated(tmp_path, write_tree, check):
    write_tree(tmp_path, {"a.jsonl": "{bad\n" + GOOD})
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: line is not JSON: mend it, or tolerate"):
        check(tmp_path)
    check(tmp_path, max_bad_documents=1)


def test_hashes_that_meet_are_no_error(tmp_path, write_tree, check, monkeypatch):
    write_tree(tmp_path, {"a.jsonl": GOOD})
    monkeypatch.setattr("pipelines.tokens.precheck._hash", lambda name: _hash(name) % 3)
    monkeypatch.setattr(
        "pipelines.tokens.precheck.run_tasks",
        lambda function, arguments: ((n, function(*each)) for n, each in enumerate(arguments)),
    )
    check(tmp_path)
    write_tree(tmp_path, {"b.jsonl": '{"id": 19, "text": "another"}\n'})
    with pytest.raises(UserError, match="the id 's/19'"):
        check(tmp_path)


def test_what_a_data_set_holds_already_counts(tmp_path, write_tree, check, data_of, units_of, tokenizer_directory):
    write_tree(tmp_path, {"a.jsonl": GOOD})
    data = data_of(tmp_path / "a.jsonl")
    encoding = Encoding(tokenizer_directory, "huggingface", tmp_path / "made")
    assert tokenize(units_of(data), data, encoding, Progress("shards", 1, "B")).documents == 20
    write_tree(tmp_path, {"b.jsonl": '{"id": 7, "text": "text 7"}\n{"id": 21, "text": "more"}\n'})
    check(tmp_path / "b.jsonl", tmp_path / "made")
    write_tree(tmp_path, {"c.jsonl": '{"id": 7, "text": "another"}\n'})
    with pytest.raises(UserError, match="the id 's/7'"):
        check(tmp_path / "c.jsonl", tmp_path / "made")
