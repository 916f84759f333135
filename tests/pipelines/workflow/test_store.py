import errno
import fcntl
import json
import os
import signal
import time

import pytest

from pipelines.workflow.errors import UserError
from pipelines.workflow.store import LONG, RECORD, Stage, Store, link

# A stage that writes one complete file and half of another, then waits for a line.
SLOW_STAGE = """
import sys
from pathlib import Path
from pipelines.workflow.files import complete_or_invisible, write_atomically
from pipelines.workflow.store import Stage, Store

def run(output, inputs):
    write_atomically(output / "first.txt", b"first")
    with complete_or_invisible(output / "second.txt") as temporary:
        temporary.write_text("half")
        print("ready", flush=True)
        sys.stdin.readline()
        temporary.write_text("second")

Store(Path("store")).build(Stage("slow", run, {}), {}, print)
"""


class Maker:
    """A stage's function that counts its runs."""

    def __init__(self, **files):
        self.files, self.runs = files or {"out.txt": "content"}, 0

    def __call__(self, output, inputs):
        self.runs += 1
        for name, content in self.files.items():
            path = output / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)


def no_warning(message):
    pytest.fail(f"unexpected warning: {message}")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def build(store, run, *, warn=no_warning, outputs=None, name="stage", params=None, **options):
    return store.build(Stage(name, run, params or {}, **options), outputs or {}, warn)


# Renamed


def test_a_renamed_stage_finds_its_old_outputs_and_those_that_were_made_of_them(store):
    maker, reader = Maker(), Maker()
    old = build(store, maker, name="documents")
    made = build(store, reader, name="reader", inputs=("documents",), outputs={"documents": old})
    index = build(store, maker, name="index", formerly="documents")
    again = build(store, reader, name="reader", inputs=("index",), outputs={"index": index})
    assert (index.path, again.path) == (old.path, made.path)
    assert (maker.runs, reader.runs) == (1, 1)
    new = build(store, maker, name="index", formerly="documents", params={"more": 1})
    assert new.path.parent.name == "index"
    assert build(store, maker, name="index", formerly="documents", params={"more": 1}).reused
    read = build(store, reader, name="reader", inputs=("index",), outputs={"index": store.read(new.path)})
    assert read.key == build(store, reader, name="reader", inputs=("documents",), outputs={"documents": new}).key


# Once and again


def test_a_finished_stage_is_not_run_again(store):
    run = Maker()
    first, second = build(store, run), build(store, run)
    assert run.runs == 1
    assert (first.reused, second.reused) == (False, True)
    assert first.path == second.path
    assert (first.path / "out.txt").read_text() == "content"
    assert (first.hash, first.key, first.seconds) == (second.hash, second.key, second.seconds)


@pytest.mark.parametrize("change", [{"params": {"a": 2}}, {"version": 2}, {"name": "other"}])
def test_a_change_of_what_makes_the_output_runs_the_stage_again(store, change):
    run = Maker()
    before = build(store, run, params={"a": 1})
    after = build(store, run, **{"params": {"a": 1}, **change})
    assert run.runs == 2
    assert after.path != before.path
    assert build(store, run, params={"a": 1}).reused


def test_a_stage_follows_the_content_of_its_inputs(store):
    run = Maker(out="downstream")

    def downstream(content, params):
        upstream = build(store, Maker(data=content), name="up", params=params)
        return build(store, run, name="down", inputs=("up",), outputs={"up": upstream})

    first = downstream("a", {"way": 1})
    assert downstream("a", {"way": 2}).reused  # made another way, but the same bytes
    assert downstream("b", {"way": 3}).path != first.path
    assert run.runs == 2


def test_a_stage_reads_the_directories_of_its_inputs(store):
    upstream = build(store, Maker(data="from above"), name="up")

    def copy(output, inputs):
        (output / "copy").write_text((inputs["up"] / "data").read_text())

    output = build(store, copy, name="down", inputs=("up",), outputs={"up": upstream})
    assert (output.path / "copy").read_text() == "from above"


# Damage


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, 3)


@pytest.mark.parametrize("file", ["a.txt", "deep/b.txt"])
@pytest.mark.parametrize("damage", [flip_a_byte, truncate, os.unlink])
def test_a_damaged_output_is_made_again_with_a_warning(store, file, damage):
    run, warnings = Maker(**{"a.txt": "content a", "deep__b.txt": "content b"}), []
    output = build(store, run)
    damage(output.path / file)
    again = build(store, run, warn=warnings.append)
    assert run.runs == 2
    assert not again.reused
    assert (again.path, again.hash) == (output.path, output.hash)
    assert (again.path / "a.txt").read_text() + (again.path / "deep/b.txt").read_text() == "content acontent b"
    assert len(warnings) == 1
    assert str(output.path / file) in warnings[0]
    aside = output.path.with_name(f"{output.key}.damaged-1")
    assert f"stays as {aside.name}" in warnings[0]
    assert (aside / RECORD).exists()
    assert build(store, run).reused
    damage(output.path / file)
    build(store, run, warn=warnings.append)
    assert aside.with_name(f"{output.key}.damaged-2").exists()


def took(output, seconds):
    """Have a finished output say that it took so long."""
    record = json.loads((output.path / RECORD).read_text())
    (output.path / RECORD).write_text(json.dumps(record | {"seconds": seconds}))


@pytest.fixture
def trained(store):
    """An output that took long, of which `model/` is what later stages read."""
    run = Maker(**{"model__weights": "weights", "metrics.jsonl": "a line"})
    output = build(store, run, content="model/")
    took(output, LONG + 1)
    return run, output


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, os.unlink])
def test_what_no_later_stage_reads_costs_no_training(store, trained, damage):
    run, output = trained
    damage(output.path / "metrics.jsonl")
    warnings = []
    again = build(store, run, content="model/", warn=warnings.append)
    assert again.reused
    assert run.runs == 1
    assert len(warnings) == 1
    assert "metrics.jsonl is" in warnings[0]
    assert "it is left so" in warnings[0]


@pytest.mark.parametrize("file", ["model/weights", RECORD])
@pytest.mark.parametrize("damage", [flip_a_byte, truncate, os.unlink])
def test_what_took_long_is_made_again_only_where_that_is_asked_for_and_never_deleted(store, trained, file, damage):
    run, output = trained
    kept = {path.name: path.read_bytes() for path in output.path.rglob("*") if path.is_file()}
    damage(output.path / file)
    there = {path.name: path.read_bytes() for path in output.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"is (corrupt|missing).*bring the file back, or have it made again.*--rebuild"):
        build(store, run, content="model/")
    assert {path.name: path.read_bytes() for path in output.path.rglob("*") if path.is_file()} == there
    again = build(Store(store.root, rebuild=True), run, content="model/", warn=[].append)
    assert run.runs == 2
    assert (again.path, again.hash) == (output.path, output.hash)
    aside = output.path.with_name(f"{output.key}.damaged-1")
    assert {path.name: path.read_bytes() for path in aside.rglob("*") if path.is_file()} == there
    assert len(there) >= len(kept) - 1


def test_a_rebuild_that_fails_leaves_what_is_there(store, trained):
    _, output = trained
    truncate(output.path / "model/weights")

    def fail(directory, inputs):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        build(Store(store.root, rebuild=True), fail, content="model/", warn=[].append)
    assert (output.path / "model/weights").read_text() == "wei"
    assert not list(output.path.parent.glob("*.damaged-*"))


@pytest.mark.parametrize("links", [True, False])
def test_a_stage_that_mends_finds_what_is_whole_and_its_readers_keep_what_they_opened(store, monkeypatch, links):
    seen = []
    if not links:

        def refuse(source, target):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)

    def mend(output, inputs):
        seen.append(sorted(path.name for path in output.iterdir() if path.name != ".seconds"))
        for name in ("a", "b"):
            if not (output / name).exists():
                (output / name).write_text(f"content {name}")

    output = build(store, mend, mends=True)
    took(output, LONG + 1)
    with open(output.path / "b") as reader:
        truncate(output.path / "a")
        again = build(store, mend, mends=True, warn=[].append)
        assert reader.read() == "content b"
    assert seen == [[], ["b"]]
    assert again.hash == output.hash


def test_a_record_of_an_older_format_is_understood_and_one_of_a_later_refused(store):
    output = build(store, Maker())
    record = json.loads((output.path / RECORD).read_text())
    older = {name: value for name, value in record.items() if name not in ("format", "known_as")}
    (output.path / RECORD).write_text(json.dumps(older))
    assert build(store, Maker()).reused
    (output.path / RECORD).write_text(json.dumps(record | {"format": record["format"] + 1}))
    with pytest.raises(UserError, match="was made by a later version of fot"):
        build(store, Maker())
    assert list(store.finished("stage")) == []  # where any will do, it is passed over
    assert (output.path / "out.txt").read_text() == "content"


def test_a_link_goes_on_being_right_when_the_store_is_moved_and_is_mended_when_it_leads_nowhere(store, tmp_path):
    outside, runs = tmp_path / "outside", []
    outside.mkdir()
    upstream = build(store, Maker(), name="up")

    def links(output, inputs):
        runs.append(output)
        link(inputs["up"], output / "inside")
        link(outside, output / "outside")

    made = build(store, links, name="down", inputs=("up",), outputs={"up": upstream})
    moved = tmp_path / "elsewhere"
    os.rename(store.root, moved)
    store = Store(moved)
    upstream = build(store, Maker(), name="up")
    found = build(store, links, name="down", inputs=("up",), outputs={"up": upstream})
    assert found.reused
    assert found.key == made.key
    assert (found.path / "inside" / "out.txt").read_text() == "content"
    assert (found.path / "outside").resolve() == outside
    os.rename(outside, tmp_path / "gone")
    warnings = []
    outside.with_name("new").mkdir()
    outside = outside.with_name("new")
    again = build(store, links, name="down", inputs=("up",), outputs={"up": upstream}, warn=warnings.append)
    assert len(runs) == 2
    assert (again.path / "outside").resolve() == outside
    assert "a link to" in warnings[0]
    assert "which is not there" in warnings[0]


# Interruption


def test_an_exception_leaves_the_partial_directory_and_no_output(store):
    def fail(output, inputs):
        (output / "half").write_text("done so far")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        build(store, fail)
    assert {path.suffix for path in (store.root / "stage").iterdir()} == {".partial", ".lock"}

    def go_on(output, inputs):
        (output / "whole").write_text((output / "half").read_text() + ", and the rest")

    output = build(store, go_on)
    assert (output.path / "whole").read_text() == "done so far, and the rest"
    assert {path.name for path in output.path.iterdir()} == {"half", "whole", RECORD}


def test_the_seconds_of_interrupted_runs_are_counted(store):
    def slow(output, inputs):
        time.sleep(0.1)
        if not (output / "second").exists():
            (output / "second").touch()
            raise RuntimeError

    stage = Stage("stage", slow, {})
    with pytest.raises(RuntimeError):
        store.build(stage, {}, no_warning)
    assert 0.1 <= store.find(stage, {})[1] < 0.2 + 1
    assert 0.2 <= store.build(stage, {}, no_warning).seconds < 0.2 + 2


def test_a_killed_process_leaves_nothing_that_is_trusted_and_all_that_is_complete(tmp_path, store, python):
    process = python(SLOW_STAGE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()

    found = []

    def run(output, inputs):
        found.extend(sorted(path.name for path in output.iterdir()))
        (output / "second.txt").write_text("second")

    stage = Stage("slow", run, {})
    state, _, path = store.find(stage, {})
    assert state == "interrupted"
    assert sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) == ["first.txt"]
    output = store.build(stage, {}, no_warning)
    assert found == ["first.txt"]  # the half-written file is gone
    assert (output.path / "first.txt").read_text() == "first"
    assert (output.path / "second.txt").read_text() == "second"
    assert sorted(output.files) == ["first.txt", "second.txt"]


def test_a_process_killed_just_before_the_end_changes_nothing(store):
    run = Maker()
    output = build(store, run)
    os.rename(output.path, output.path.with_name(f"{output.key}.partial"))  # all is written, but not yet renamed
    again = build(store, run)
    assert (again.hash, again.files) == (output.hash, output.files)
    assert build(store, run).reused


# Two processes


def test_a_stage_being_built_by_another_process_is_refused(tmp_path, store, python):
    process = python(SLOW_STAGE)
    assert process.stdout.readline() == "ready\n"
    run = Maker()
    stage = Stage("slow", run, {})
    with pytest.raises(UserError, match=r"stage slow is being built by another process in .*store"):
        store.build(stage, {}, no_warning)
    assert store.find(stage, {})[0] == "running"
    assert build(store, run, name="other").stage == "other"  # another stage is not
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.wait(timeout=60) == 0
    assert store.find(stage, {})[0] == "done"
    assert store.build(stage, {}, no_warning).reused
    assert run.runs == 1


def test_the_lock_is_let_go_when_a_stage_fails(store):
    def fail(output, inputs):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        build(store, fail)
    (lock,) = (store.root / "stage").glob("*.lock")
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# States


def test_states_of_a_stage(store):
    upstream, downstream = Stage("up", Maker(), {}), Stage("down", Maker(), {}, inputs=("up",))
    assert store.find(upstream, {}) == ("to do", 0.0, None)
    assert store.find(downstream, {}) == ("waiting", 0.0, None)
    output = store.build(upstream, {}, no_warning)
    assert store.find(upstream, {}) == ("done", output.seconds, output.path)
    assert store.find(downstream, {"up": output}) == ("to do", 0.0, None)
    assert upstream.run.runs == 1
    assert downstream.run.runs == 0


def test_the_record_tells_how_the_output_was_made(store):
    upstream = build(store, Maker(), name="up")
    output = build(store, Maker(), outputs={"up": upstream}, inputs=("up",), params={"a": [1]}, version=3)
    record = json.loads((output.path / RECORD).read_text())
    assert (record["stage"], record["params"], record["version"]) == ("stage", {"a": [1]}, 3)
    assert record["inputs"] == {"up": upstream.key}
    assert store.read(output.path) == output
