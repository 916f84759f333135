import shutil
from pathlib import Path

import pytest

from jobs.registry.models import fetch_model
from jobs.registry.record import record
from jobs.registry.server import database_file, embedded_uri
from jobs.workflow.workspace import WorkDir
from pipelines.workflow.errors import UserError


@pytest.fixture
def work_dir(tmp_path: Path, empty_database: Path) -> Path:
    """A work directory whose name would be another one if it were decoded."""
    directory = tmp_path / "runs %41%2542#c"
    directory.mkdir()
    shutil.copy(empty_database, directory)
    return directory


def test_an_outcome_is_kept_in_a_work_dir_of_any_name_and_nowhere_else(
    make_outcome, work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = embedded_uri(work_dir)
    assert database_file(uri) == work_dir / "mlflow.db"
    assert record(make_outcome(), work_dir)["gate"] is not None
    assert [path.name for path in (work_dir / "mlartifacts").rglob("report.html")] == ["report.html"]
    (tmp_path / "fetched").mkdir()
    model = fetch_model("models:/fot/tiny@candidate", uri, tmp_path / "fetched")
    assert (model / "model.safetensors").read_bytes() == b"weights of one"
    assert {path.name for path in tmp_path.iterdir()} == {work_dir.name, "fetched"}


def test_a_work_dir_that_an_address_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\?b holds a \?, where MLflow's address of it ends: set another one"):
        WorkDir("name", str(tmp_path / "a?b"))
