"""Who may write where checkpoints lie, and what is done where none can be read: one rank, no engine."""

from pathlib import Path

import pytest
import torch

from jobs.config.training import CheckpointSettings
from jobs.train.checkpoint_store import CheckpointStore, Record, step_name
from jobs.train.checkpoints import Checkpoints
from pipelines.workflow.errors import UserError


@pytest.fixture
def start(tmp_path: Path, monkeypatch):
    """Starts a training's checkpoints anew in the same place, as one rank."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield lambda: Checkpoints(str(tmp_path / "kept"), {"seed": 0}, CheckpointSettings(), tmp_path)
    torch.distributed.destroy_process_group()


def write(place: Path, step: int) -> None:
    """A checkpoint of one rank whose only file is not what its record says."""
    store = CheckpointStore(str(place))
    store.write(step, "mp_rank_00_model_states.pt", lambda stream: stream.write(b"weights"))
    files = {"mp_rank_00_model_states.pt": ["0" * 64, 7]}
    store.write_record(Record(step, 0, 1, files, {"seed": 0}, {}, "float32", 1.0))


class Engine:
    def zero_optimization(self) -> bool:
        return False


def test_where_nothing_can_be_read_whole_nothing_begins_anew(start, tmp_path: Path) -> None:
    place = tmp_path / "kept"
    checkpoints = start()
    assert checkpoints.restore(Engine()) is None
    write(place, 1)
    write(place, 2)
    with pytest.raises(
        UserError, match=rf"{place}: none of the 2 checkpoints can be read whole: bring their files back"
    ):
        checkpoints.restore(Engine())
    assert sorted(path.name for path in place.glob("step-*")) == [step_name(1), step_name(2)]
    for step in (1, 2):
        (place / step_name(step) / "rank-00000.json").write_text('{"step": 1, "ra')
    with pytest.raises(UserError, match="none of the 2 checkpoints can be read whole"):
        checkpoints.restore(Engine())
    for step in (1, 2):
        (place / step_name(step) / "rank-00000.json").unlink()  # what a kill in the middle of writing leaves
    assert checkpoints.restore(Engine()) is None
    assert not list(place.glob("step-*"))


def test_a_later_start_takes_over_and_the_earlier_one_changes_nothing_more(start, tmp_path: Path) -> None:
    place = tmp_path / "kept"
    first = start()
    second = start()
    write(place, 3)
    (place / step_name(3) / "rank-00000.json").unlink()  # the second is writing it
    with pytest.raises(
        UserError, match=rf"checkpoints.path {place} is written to by another start of this training now"
    ):
        first.restore(Engine())
    assert (place / step_name(3)).is_dir()
    (place / "owner").unlink()
    with pytest.raises(UserError, match=rf"checkpoints.path {place} was removed: this one stops"):
        second.restore(Engine())
