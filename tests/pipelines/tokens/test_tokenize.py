"""Law 1: the same inputs and recipe give the same bytes, whatever the order of tasks and however often they died."""

import gzip
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from pipelines.tokens.minhash import signature
from pipelines.tokens.shards import MANIFEST, Manifest, Shard
from pipelines.tokens.tokenize import Encoding, MadeShard, shard_name, tokenize, tokenize_unit
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import Progress

TEXTS = [f"document {number}: the cat sat on the mat <s> é {'漢字 ' * (number % 7)}" for number in range(40)]
LINES = "\n".join(json.dumps({"text": text, "id": number}) for number, text in enumerate(TEXTS)) + "\n"
FILES = {"lines.jsonl": LINES, "more.jsonl.gz": gzip.compress(b'{"text": "zipped"}\n', mtime=0)} | {
    f"file-{number}.txt": f"a text file, number {number}. " * 20 for number in range(6)
}
GOOD, BAD = json.dumps({"text": "good"}), "{bad"


@pytest.fixture(scope="module")
def run(data_of, units_of, tokenizer_directory, fresh):
    """Tokenize a path into a directory, which is returned with the manifest."""

    def make(path, output=None, **options):
        output = output or fresh()
        data = data_of(path, **options)
        encoding = Encoding(tokenizer_directory, "huggingface", output)
        return output, tokenize(units_of(data), data, encoding, Progress("shards", 1, "B"))

    return make


@pytest.fixture(scope="module")
def run_unit(tokenizer_directory):
    """One task as a process would run it that finds what earlier ones left."""

    def make(units, number, data, output):
        name = shard_name(number, units[number])
        record = (output / name).with_suffix(".record.json")
        known = None
        if record.exists():
            content = json.loads(record.read_text())
            known = MadeShard(Shard(**content["shard"]), None)
        encoding = Encoding(tokenizer_directory, "huggingface", output)
        return tokenize_unit(units[number], name, data.sources[0], encoding, known).shard

    return make


@pytest.fixture(scope="module")
def documents_of():
    """{id: tokens} of a directory of shards."""

    def make(directory):
        return {
            row["document_id"]: row["tokens"]
            for shard in Manifest.read(directory).shards
            for row in pa.ipc.open_file(pa.memory_map(str(directory / shard.file))).read_all().to_pylist()
        }

    return make


@pytest.fixture(scope="module")
def corpus(fresh, write_tree):
    return write_tree(fresh(), FILES)


@pytest.fixture(scope="module")
def whole(local_ray, run, corpus):
    """The corpus tokenized without any trouble."""
    return run(corpus, task_bytes=500)[0]


# Determinism


def test_one_worker_makes_the_same_bytes_as_all(whole, run, corpus, contents):
    class Occupant:
        def here(self):
            return True

    others = int(ray.cluster_resources()["CPU"]) - 1
    occupant = ray.remote(num_cpus=others)(Occupant).remote()
    ray.get(occupant.here.remote())
    again, _ = run(corpus, task_bytes=500)
    ray.kill(occupant)
    assert len(Manifest.read(whole).shards) > 5
    assert contents(again) == contents(whole)


def remove_shard(shard, record):
    shard.unlink()


def remove_record(shard, record):
    record.unlink()


def remove_both(shard, record):
    shard.unlink()
    record.unlink()


def truncate_shard(shard, record):
    os.truncate(shard, shard.stat().st_size // 2)


def flip_a_byte(shard, record):
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def nothing(shard, record):
    pass


DAMAGES = [nothing, remove_shard, remove_record, remove_both, truncate_shard, flip_a_byte]


@settings(max_examples=12)
@given(data=st.data())
def test_tasks_in_any_order_dying_at_any_point_make_the_same_bytes(
    whole, corpus, data_of, units_of, run_unit, fresh, contents, data
):
    recipe = data_of(corpus, task_bytes=500)
    units, output = units_of(recipe), fresh()
    numbers = range(len(units))
    for number in data.draw(st.permutations(numbers)):
        path = output / run_unit(units, number, recipe, output).file
        data.draw(st.sampled_from(DAMAGES))(path, path.with_suffix(".record.json"))
    for number in data.draw(st.permutations(numbers)):
        run_unit(units, number, recipe, output)
    expected = {name: content for name, content in contents(whole).items() if name != MANIFEST}
    assert {name: content for name, content in contents(output).items() if name.endswith(".arrow")} == expected


@pytest.mark.parametrize("damage", DAMAGES)
def test_running_again_goes_on_from_what_is_complete(
    whole, run, corpus, data_of, units_of, run_unit, fresh, contents, damage
):
    recipe = data_of(corpus, task_bytes=500)
    units, output = units_of(recipe), fresh()
    for number in range(0, len(units), 2):
        path = output / run_unit(units, number, recipe, output).file
        if number == 2:
            damage(path, path.with_suffix(".record.json"))
    complete = {path: path.stat().st_mtime_ns for path in output.glob("shard-00000*.arrow")}
    run(corpus, output, task_bytes=500)
    assert contents(output) == contents(whole)
    assert len(complete) == 1
    assert {path: path.stat().st_mtime_ns for path in complete} == complete  # not made again


@pytest.fixture(scope="module")
def big_corpus(fresh, write_tree):
    return write_tree(
        fresh(), {f"{name}.txt": "".join(f"{n * 7919 % 10007} " for n in range(110_000)) for name in "abcd"}
    )


def writer_of(path):
    """The process that has the file open, None if none has."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(path):
                return int(link.parts[2])
        except OSError:  # it has ended, or closed it
            continue
    return None


@pytest.fixture(scope="module")
def survived(local_ray, run, big_corpus, fresh):
    """The output of a run with one of its workers killed in the middle of a shard, and that worker's process id."""
    output, killed = fresh(), []

    def kill_first_writer():
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for path in output.glob(".*.tmp"):
                process = writer_of(path)
                if process is None:
                    continue
                assert process != os.getpid()
                os.kill(process, signal.SIGKILL)
                killed.append(process)
                return
            time.sleep(0.001)

    killer = threading.Thread(target=kill_first_writer)
    killer.start()
    run(big_corpus, output, task_bytes=1_400_000)
    killer.join()
    assert killed
    return output


def test_a_killed_worker_changes_no_byte(survived, run, big_corpus, contents):
    expected = contents(run(big_corpus, task_bytes=1_400_000)[0])
    assert {name: content for name, content in contents(survived).items() if name in expected} == expected


def test_a_killed_worker_leaves_no_file_behind(survived):
    assert {path.name for path in survived.iterdir()} == {MANIFEST, *(s.file for s in Manifest.read(survived).shards)}


def test_documents_of_more_than_a_batch_are_all_written(survived, big_corpus, tokenizer, documents_of):
    (shard, *_) = Manifest.read(survived).shards
    assert pa.ipc.open_file(pa.memory_map(str(survived / shard.file))).num_record_batches > 1
    documents = documents_of(survived)
    assert list(documents) == ["s/a.txt", "s/b.txt", "s/c.txt", "s/d.txt"]
    decoded = tokenizer.tokenizer.decode(documents["s/d.txt"][1:-1])
    assert decoded == (big_corpus / "d.txt").read_text()


# Content


def test_shards_hold_every_document_between_bos_and_eos(whole, corpus, tokenizer, documents_of):
    decoded = {}
    for name, (first, *tokens, last) in documents_of(whole).items():
        assert (first, last) == (tokenizer.bos, tokenizer.eos)
        assert not {first, last} & set(tokens)
        decoded[name] = tokenizer.tokenizer.decode(tokens, skip_special_tokens=False)
    zipped = decoded.keys() - {f"s/{n}" for n in range(40)} - {f"s/file-{n}.txt" for n in range(6)}
    assert [decoded[name] for name in zipped] == ["zipped"]
    assert [decoded[f"s/{number}"] for number in range(40)] == TEXTS
    assert all(decoded[f"s/{name}"] == text for name, text in FILES.items() if name.endswith(".txt"))


def test_a_document_is_found_again_in_its_file(whole, corpus):
    rows = 0
    for shard in Manifest.read(whole).shards:
        for row in pa.ipc.open_file(pa.memory_map(str(whole / shard.file))).read_all().to_pylist():
            content = (corpus / row["file"]).read_bytes()
            piece = (gzip.decompress(content) if row["file"].endswith(".gz") else content)[row["start"] : row["end"]]
            name = row["document_id"].removeprefix("s/")
            if row["file"] == "lines.jsonl":
                assert json.loads(piece)["id"] == int(name)
            elif row["file"].endswith(".txt"):
                assert piece == FILES[name].encode()
            else:
                assert json.loads(piece) == {"text": "zipped"}
            rows += 1
    assert rows == Manifest.read(whole).documents == len(TEXTS) + len(FILES) - 1


def test_the_manifest_counts_documents_and_tokens(whole, documents_of):
    manifest, documents = Manifest.read(whole), documents_of(whole)
    assert (manifest.documents, manifest.tokens) == (len(documents), sum(map(len, documents.values())))
    assert manifest.characters == sum(map(len, TEXTS)) + len("zipped") + sum(
        len(text) for name, text in FILES.items() if name.endswith(".txt")
    )


# What names a data set


def test_the_manifest_hash_does_not_know_where_the_corpus_lies(whole, run, corpus, fresh, contents):
    moved = fresh() / "moved" / "here"
    shutil.copytree(corpus, moved)
    assert contents(run(moved, task_bytes=500)[0]) == contents(whole)


def test_the_manifest_hash_changes_with_a_document(whole, run, corpus, fresh, write_tree):
    changed = fresh() / "changed"
    shutil.copytree(corpus, changed)
    write_tree(changed, {"file-3.txt": FILES["file-3.txt"].replace("3", "three", 1)})
    _, manifest = run(changed, task_bytes=500)
    before = Manifest.read(whole)
    assert manifest.hash != before.hash
    assert len({shard.sha256 for shard in manifest.shards} ^ {shard.sha256 for shard in before.shards}) == 2


def test_the_share_held_out_leaves_the_shards_as_they_are(whole, run, corpus, contents):
    shards = {name: content for name, content in contents(whole).items() if name != MANIFEST}
    other, _ = run(corpus, task_bytes=500, held_out=0.5)
    assert {name: content for name, content in contents(other).items() if name != MANIFEST} == shards


# The user's mistakes


def test_a_bad_line_is_named_by_file_and_number(local_ray, run, fresh, write_tree):
    path = write_tree(fresh(), {"a.jsonl": f"{GOOD}\n\n{BAD}\n"}) / "a.jsonl"
    message = f"{path}, line 3: line is not JSON: mend it, or tolerate up to N such documents with --set data.max_bad"
    with pytest.raises(UserError, match=re.escape(message)):
        run(path)


def test_a_bad_line_deep_in_a_large_file_is_named_by_its_number_too(local_ray, run, fresh, write_tree):
    path = write_tree(fresh(), {"a.jsonl": f"{GOOD}\n" * 5 + f"{BAD}\n"}) / "a.jsonl"
    with pytest.raises(UserError, match=re.escape(f"{path}, line 6: ")):
        run(path, task_bytes=20)


@pytest.mark.parametrize("task_bytes", [20, 10_000])
def test_bad_lines_are_tolerated_up_to_the_limit_and_counted(local_ray, run, fresh, write_tree, task_bytes):
    lines = [GOOD, BAD, json.dumps({"text": 3}), GOOD, json.dumps({"text": " "}), BAD]
    path = write_tree(fresh(), {"a.jsonl": "\n".join(lines)}) / "a.jsonl"
    with pytest.raises(UserError, match="tolerate up to N such documents"):
        run(path, task_bytes=task_bytes, max_bad_documents=2)
    _, manifest = run(path, task_bytes=task_bytes, max_bad_documents=3)
    assert manifest.documents == 2
    assert manifest.dropped == {"line is not JSON": 2, "line has no text in field 'text'": 1, "empty": 1}


def test_a_second_run_with_another_limit_counts_all_bad_lines(local_ray, run, fresh, write_tree):
    path, output = write_tree(fresh(), {"a.jsonl": "\n".join([GOOD, BAD, BAD, BAD])}) / "a.jsonl", fresh()
    for limit in (0, 1, 2):
        with pytest.raises(UserError, match="tolerate up to N such documents"):
            run(path, output, max_bad_documents=limit)
    assert run(path, output, max_bad_documents=3)[1].dropped == {"line is not JSON": 3}


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"a.jsonl": "\n\n"}, "nothing in the files"),
        ({"a.txt": " ", "b.bin": b"\0", "c.jsonl": '{"text": ""}'}, "2 empty"),
    ],
)
def test_a_corpus_without_a_document_is_a_mistake(local_ray, run, fresh, write_tree, files, why):
    with pytest.raises(UserError, match=f"the corpus is empty.*{why}"):
        run(write_tree(fresh(), files))


def test_a_truncated_gz_stops_the_run_and_is_named(local_ray, run, fresh, write_tree):
    content = gzip.compress(LINES.encode())
    root = write_tree(fresh(), {"a.jsonl.gz": content[: len(content) // 2], "b.txt": "fine"})
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
        run(root)


def test_a_file_name_that_is_not_unicode_is_no_obstacle(local_ray, run, fresh):
    root = fresh()
    with open(os.fsencode(root) + b"/caf\xe9.txt", "w") as file:
        file.write("text")
    assert run(root)[1].documents == 1


def test_documents_of_another_length_than_asked_for_are_left_out_and_counted(
    local_ray, run, fresh, write_tree, documents_of, tokenizer
):
    texts = {f"{n}.txt": " ".join(["cat"] * n) for n in range(1, 9)}
    lengths = {f"s/{name}": len(tokenizer.encode_documents([text])[0]) for name, text in texts.items()}
    least, most = sorted(lengths.values())[2], sorted(lengths.values())[5]
    output, manifest = run(write_tree(fresh(), texts), min_tokens=least, max_tokens=most)
    documents = documents_of(output)
    assert {name: len(tokens) for name, tokens in documents.items()} == {
        name: length for name, length in lengths.items() if least <= length <= most
    }
    assert manifest.dropped == {f"shorter than {least} tokens": 2, f"longer than {most} tokens": 2}


def test_a_document_without_a_token_is_left_out_and_counted(
    local_ray, fresh, write_tree, data_of, units_of, tokenizer_directory
):
    directory = fresh()
    shutil.copytree(tokenizer_directory, directory, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace("dog", "")
    tokenizer.save(str(directory / "tokenizer.json"))
    data = data_of(write_tree(fresh(), {"a.txt": "cat", "b.txt": "dog"}))
    encoding = Encoding(directory, "huggingface", fresh())
    manifest = tokenize(units_of(data), data, encoding, Progress("shards", 1, "B"))
    assert (manifest.documents, manifest.dropped) == (1, {"no tokens": 1})


def test_the_signature_is_that_of_the_text(whole):
    for shard in Manifest.read(whole).shards:
        for row in pa.ipc.open_file(pa.memory_map(str(whole / shard.file))).read_all().to_pylist():
            name = row["document_id"].removeprefix("s/")
            text = FILES.get(name) or (TEXTS[int(name)] if name.isdigit() else "zipped")
            assert row["signature"] == signature(text).tolist()


# Growth


def test_a_grown_data_set_keeps_the_parents_shards_and_names_it(
    local_ray, whole, run, corpus, fresh, write_tree, data_of, units_of, tokenizer_directory, documents_of
):
    data = data_of(
        write_tree(fresh(), {"new.txt": "a new text", "0-comes-first.txt": "another new text"}), task_bytes=500
    )
    output = fresh()
    encoding = Encoding(tokenizer_directory, "huggingface", output)
    manifest = tokenize(units_of(data), data, encoding, Progress("shards", 1, "B"), parent=whole)
    parent = Manifest.read(whole)
    assert manifest.shards[: len(parent.shards)] == parent.shards
    assert (manifest.parent, manifest.generations) == (parent.hash, [len(parent.shards), 1])
    assert [*documents_of(output)] == [*documents_of(whole), "s/0-comes-first.txt", "s/new.txt"]
    assert all((output / shard.file).samefile(whole / shard.file) for shard in parent.shards)


def test_a_parents_shards_are_copied_where_they_cannot_be_linked(
    local_ray, whole, fresh, data_of, units_of, tokenizer_directory, write_tree, monkeypatch, contents
):
    def refuse(*_):
        raise OSError("another file system")

    data, output = data_of(write_tree(fresh(), {"new.txt": "a new text"})), fresh()
    monkeypatch.setattr(os, "link", refuse)
    encoding = Encoding(tokenizer_directory, "huggingface", output)
    tokenize(units_of(data), data, encoding, Progress("", 1, "B"), whole)
    made = contents(output)
    assert all(made[name] == content for name, content in contents(whole).items() if name != MANIFEST)
    assert not any((output / shard.file).samefile(whole / shard.file) for shard in Manifest.read(whole).shards)


def test_what_was_made_with_another_tokenizer_is_made_again(
    local_ray, corpus, data_of, units_of, tokenizer_directory, fresh, run_unit, run, contents, whole
):
    data, output = data_of(corpus, task_bytes=500), fresh()
    units = units_of(data)
    shard = output / run_unit(units, 0, data, output).file
    record = shard.with_suffix(".record.json")
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "tokenizer": {**content["tokenizer"], "behaviour": "another"}}))
    before = shard.stat().st_ino
    run(corpus, output, task_bytes=500)
    assert shard.stat().st_ino != before
    assert contents(output) == contents(whole)
