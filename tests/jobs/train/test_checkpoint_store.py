import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import s3fs
from hypothesis import given
from hypothesis import strategies as st

from jobs.train.checkpoint_store import (
    HOUR,
    Checkpoint,
    CheckpointStore,
    Record,
    check_identity,
    difference,
    split_step,
    step_name,
    superseded,
)
from pipelines.workflow.errors import UserError

RECORD = Record(step=1, rank=0, world=1, files={}, identity={}, state={}, dtype="float32", time=0.0)
VALUES = st.recursive(
    st.none() | st.integers(0, 3) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3),
    max_leaves=8,
)
IDENTITIES = st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES, max_size=3)


def checkpoint(step: int, ranks=(0,), world: int = 1, time: float = 0.0) -> Checkpoint:
    return Checkpoint(step, tuple(replace(RECORD, step=step, rank=rank, world=world, time=time) for rank in ranks))


def save(store: CheckpointStore, step: int, world: int = 1, ranks=None, identity=None, content: bytes = b"x") -> None:
    """What the ranks write, each one file."""
    for rank in range(world) if ranks is None else ranks:
        files = {f"{rank}.pt": store.write(step, f"{rank}.pt", lambda stream: stream.write(content))}
        store.write_record(Record(step, rank, world, files, identity or {}, {"rank": rank}, "float32", float(step)))


@pytest.fixture(scope="module")
def bucket(s3_endpoint, s3_environment):
    """An S3 server with an empty bucket, and another program's view of it."""
    other = s3fs.S3FileSystem(endpoint_url=s3_endpoint, key="key", secret="secret", use_listings_cache=False)
    other.mkdir("bucket")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment.items():
            patch.setenv(name, value)
        yield other


@pytest.fixture(params=["path", "file", "s3"])
def where(request, tmp_path):
    """A place for checkpoints that is not there yet."""
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return f"s3://bucket/{tmp_path.name}/checkpoints"
    return ("file://" if request.param == "file" else "") + str(tmp_path / "checkpoints")


# What is complete, and what is kept


@given(st.sets(st.integers(0, 5), min_size=1))
def test_a_checkpoint_is_complete_when_every_rank_has_its_record(ranks):
    for world in range(max(ranks) + 1, 7):
        found = checkpoint(1, sorted(ranks), world)
        assert set(found.missing) == set(range(world)) - ranks
        assert found.complete == (len(ranks) == world)


def test_without_any_record_nothing_is_complete():
    assert not checkpoint(1, []).complete


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_records_of_trainings_of_different_size_never_make_a_checkpoint(one, other, data):
    records = checkpoint(1, range(one), one).records + checkpoint(1, range(other), other).records
    chosen = data.draw(st.sets(st.sampled_from(range(len(records))), min_size=1))
    found = Checkpoint(1, tuple(records[number] for number in sorted(chosen)))
    if len({record.world for record in found.records}) > 1:
        assert not found.complete


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 10)), max_size=8),
    st.integers(0, 4),
    st.none() | st.floats(0, 10),
)
def test_the_newest_the_young_and_the_incomplete_are_kept(drawn, keep, keep_hours):
    """`drawn`: whether it is complete and its age in hours, of checkpoints 0, 1, ..."""
    now = 20 * HOUR
    found = [
        checkpoint(step, [0] if complete else [], time=now - age * HOUR) for step, (complete, age) in enumerate(drawn)
    ]
    removed = {checkpoint.step for checkpoint in superseded(found, keep, keep_hours, now)}
    complete = [step for step, (is_complete, _) in enumerate(drawn) if is_complete]
    newest = complete[-max(1, keep) :]
    for step, (is_complete, age) in enumerate(drawn):
        young = keep_hours is not None and age < keep_hours - 1e-9
        old = keep_hours is None or age > keep_hours + 1e-9
        if not is_complete or step in newest or young:
            assert step not in removed
        elif old:
            assert step in removed


# Identities


@given(IDENTITIES, IDENTITIES)
def test_identities_differ_exactly_where_a_key_says_so(theirs, ours):
    found = difference(theirs, ours)
    if found is None:
        assert _without_none(theirs) == _without_none(ours)
        return
    key, their_value, our_value = found
    assert their_value != our_value
    for identity, value in ((theirs, their_value), (ours, our_value)):
        at = identity
        for name in key.split("."):
            at = at.get(name) if isinstance(at, dict) else None
        assert at == value


def _without_none(value):
    """Without keys that say None, which is what a missing one says."""
    if not isinstance(value, dict):
        return value
    return {key: _without_none(item) for key, item in value.items() if item is not None}


def test_a_checkpoint_of_another_training_is_named_with_the_first_differing_key(where):
    identity = {"recipe": {"steps": 5, "betas": (0.9, 0.95)}, "manifest": "abc"}
    check_identity(where, identity)
    store = CheckpointStore(where)
    save(store, 1, identity={"recipe": {"steps": 7}})
    save(store, 2, identity=identity)
    save(store, 3, world=2, ranks=[1], identity={"another": 1})
    check_identity(where, identity)
    with pytest.raises(UserError) as caught:
        check_identity(where, {**identity, "recipe": {**identity["recipe"], "steps": 6}})
    assert str(caught.value) == (
        f"{where}: the checkpoint of step 2 was trained with recipe.steps 5, now it is 6: set another "
        f"checkpoints.path, or go back to 5"
    )
    with pytest.raises(UserError, match=r"trained with seed nothing, now it is 1: "):
        check_identity(where, {**identity, "seed": 1})
    with pytest.raises(UserError) as caught:
        check_identity(where, {**identity, "manifest": "def"})
    assert str(caught.value) == (
        f"{where}: the data set has changed since the checkpoint of step 2 (manifest abc then, def now): set another "
        f"checkpoints.path, or go back to the data of the checkpoint"
    )


# Files


def test_what_is_written_is_found_again(where):
    store = CheckpointStore(where)
    assert store.all() == []
    save(store, 100, world=2)
    save(store, 20, world=2, ranks=[1])
    found = store.all()
    assert [(checkpoint.step, checkpoint.missing) for checkpoint in found] == [(20, [0]), (100, [])]
    assert [record.state for record in found[1].records] == [{"rank": 0}, {"rank": 1}]
    assert found[1].time == 100.0
    assert list(found[1].files) == ["0.pt", "1.pt"]
    assert store.damaged(100, found[1].files) is None


def test_other_files_and_half_a_record_are_no_checkpoint(where, tmp_path):
    store = CheckpointStore(where)
    store.write(1, "rank-00000.json", lambda stream: stream.write(b'{"step": 1, "rank"'))
    store.write(2, "rank-00000.json", lambda stream: stream.write(b"[]"))
    store.write(3, "rank-00000.json.tmp", lambda stream: stream.write(b"{}"))
    store.write(4, "../latest", lambda stream: stream.write(b"4"))
    assert [checkpoint.step for checkpoint in store.all() if checkpoint.complete] == []


@pytest.mark.parametrize("change", ["a bit", "one more", "one less", "nothing left"])
def test_a_damaged_file_is_named(where, change):
    store = CheckpointStore(where)
    save(store, 1, world=2, content=b"0123")
    files = store.all()[0].files
    damaged = {"a bit": b"0133", "one more": b"01234", "one less": b"012", "nothing left": None}[change]
    if damaged is None:
        store._fs.delete_file(f"{store._root}/step-00000001/1.pt")
    else:
        store.write(1, "1.pt", lambda stream: stream.write(damaged))
    assert store.damaged(1, files) == "1.pt"
    assert store.damaged(1, {"0.pt": files["0.pt"]}) is None


def test_files_are_copied_while_they_are_checked(where, tmp_path):
    store = CheckpointStore(where)
    made = {"a.pt": b"a" * 3_000_000, "model/config.json": b"{}"}
    files = {name: store.write(1, name, lambda stream, name=name: stream.write(made[name])) for name in made}
    assert store.damaged(1, files, tmp_path / "copy") is None
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in made} == made


class Interrupted:
    """A file system that is killed when it begins to remove a directory."""

    def __init__(self, real) -> None:
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)

    def delete_dir(self, path):
        raise KeyboardInterrupt


def test_what_is_left_of_an_interrupted_removal_is_not_complete(where):
    store = CheckpointStore(where)
    for step in (1, 2):
        save(store, step, world=2)
    found = store.all()
    store.remove(found[0])
    assert [checkpoint.step for checkpoint in store.all()] == [2]

    interrupted = CheckpointStore(where)
    interrupted._fs = Interrupted(interrupted._fs)
    with pytest.raises(KeyboardInterrupt):
        interrupted.remove(found[1])
    assert store.damaged(2, found[1].files) is None
    assert [(checkpoint.step, checkpoint.complete) for checkpoint in store.all()] == [(2, False)]
    store.remove(store.all()[0])
    assert store.all() == []


def test_a_step_written_again_is_not_complete_before_its_end(where):
    store = CheckpointStore(where)
    save(store, 1)
    store.drop_record(store.all()[0].records[0])
    store.drop_record(RECORD)
    assert [checkpoint.complete for checkpoint in store.all()] == [False]


def test_what_torch_says_of_a_full_disk_is_the_systems_error(tmp_path):
    store = CheckpointStore(str(tmp_path))
    (tmp_path / step_name(1)).mkdir()
    os.symlink("/dev/full", tmp_path / step_name(1) / "a.pt")

    def write_as_torch_does(stream):
        try:
            stream.write(b"a" * 1_000_000)
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(OSError, match="No space left on device"):
        store.write(1, "a.pt", write_as_torch_does)


# Places


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("s3://b/run/step-00000100", ("s3://b/run", 100)),
        ("s3://b/run/step-00000100/?scheme=http", ("s3://b/run?scheme=http", 100)),
        ("s3://b/run?scheme=http", ("s3://b/run?scheme=http", None)),
        ("/a/step-1/step-00000002/", ("/a/step-1", 2)),
        ("/a/step-123456789", ("/a", 123456789)),
        ("/a/steps", ("/a/steps", None)),
    ],
)
def test_a_path_may_name_a_step(where, expected):
    assert split_step(where) == expected


def test_a_relative_path_may_name_a_step(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert split_step("step-00000003") == (str(tmp_path), 3)


def test_a_place_that_cannot_be_opened_is_named(bucket, tmp_path):
    with pytest.raises(UserError, match=r"^checkpoints\.path nope://bucket/x cannot be opened: give a path or a URI"):
        check_identity("nope://bucket/x", {})
    with pytest.raises(UserError, match=r"^checkpoints\.path s3://no-such/x cannot be written to \("):
        check_identity("s3://no-such/x", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^checkpoints\.path {tmp_path}/file cannot be written to \("):
        check_identity(str(tmp_path / "file"), {})


def test_credentials_in_a_uri_are_not_repeated(bucket):
    with pytest.raises(UserError) as caught:
        check_identity("s3://key:secret@no-such/x?region=us-east-1", {})
    assert "s3://no-such/x cannot" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_record_is_plain_json(tmp_path):
    save(CheckpointStore(str(tmp_path)), 1)
    record = json.loads(Path(tmp_path / "step-00000001" / "rank-00000.json").read_text())
    assert record["files"]["0.pt"][1] == 1
