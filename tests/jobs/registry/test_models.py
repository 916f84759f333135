"""Registered models by address."""

from pathlib import Path

import pytest

from jobs.config.checkpoint_name import is_model_uri
from jobs.registry.models import ModelAddress, fetch_model, model_address, registered_models
from jobs.registry.record import record
from jobs.registry.server import connect, embedded_uri
from pipelines.workflow.errors import UserError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("models:/fot/tiny@champion", ModelAddress("fot.tiny", alias="champion")),
        ("models:/fot.tiny@champion", ModelAddress("fot.tiny", alias="champion")),
        ("models:/fot/tiny/3", ModelAddress("fot.tiny", version="3")),
        ("models:/fot.tiny/12", ModelAddress("fot.tiny", version="12")),
        ("fot/tiny", ModelAddress("fot.tiny")),
        ("tiny-3b.v2@champion", ModelAddress("fot.tiny-3b.v2", alias="champion")),
        ("tiny/3", ModelAddress("fot.tiny", version="3")),
    ],
)
def test_addresses_are_read_with_slash_or_point(text: str, address: ModelAddress) -> None:
    assert model_address(text) == address


@pytest.mark.parametrize("text", ["models:/fot/tiny/latest", "models:/", "models:/fot/a/b/3", "a'b", "tiny@", "/x/y"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no model: write models:/fot/NAME@champion"):
        model_address(text)


def test_a_path_is_no_model_uri() -> None:
    assert is_model_uri("models:/fot/tiny@champion")
    assert not is_model_uri("models/fot")


def test_a_version_is_fetched_once_and_whole(work_dir: Path, make_outcome, tmp_path: Path) -> None:
    uri, into = embedded_uri(work_dir), tmp_path / "fetched"
    record(make_outcome("one"), work_dir)
    record(make_outcome("two"), work_dir)
    second = fetch_model("models:/fot/tiny@candidate", uri, into)
    assert (second / "model.safetensors").read_bytes() == b"weights of two"
    assert (second / "config.json").exists()
    assert second.name.startswith("fot.tiny-2-")
    first = fetch_model("models:/fot.tiny/1", uri, into)
    assert (first / "model.safetensors").read_bytes() == b"weights of one"
    (first / "config.json").write_text("kept")
    assert fetch_model("models:/fot/tiny/1", uri, into) == first
    assert (first / "config.json").read_text() == "kept"
    assert sorted(path.name for path in into.iterdir() if path.is_dir()) == [first.name, second.name]


def test_what_there_is_not_is_named_with_what_there_is(work_dir: Path, make_outcome, tmp_path: Path) -> None:
    uri = embedded_uri(work_dir)
    with pytest.raises(UserError, match="models:/fot/tiny: there is no such model, but none at all"):
        fetch_model("models:/fot/tiny@champion", uri, tmp_path)
    record(make_outcome("one"), work_dir)
    for text, message in {
        "models:/fot/tinny@champion": "models:/fot/tinny: there is no such model, but fot/tiny",
        "models:/fot/tiny@champion": "models:/fot/tiny has no alias champion: there are versions 1, candidate = 1",
        "models:/fot/tiny/2": "models:/fot/tiny has no version 2: there are versions 1, candidate = 1",
        "models:/fot/tiny": "does not say which version",
    }.items():
        with pytest.raises(UserError, match=message):
            fetch_model(text, uri, tmp_path)
    with pytest.raises(UserError, match=r"^MLflow at http://127.0.0.1:9 cannot be used \(Connection refused\)$"):
        fetch_model("models:/fot/tiny/1", "http://me:secret@127.0.0.1:9", tmp_path)


def test_pickled_weights_are_not_fetched(work_dir: Path, make_outcome, tmp_path: Path) -> None:
    made = record(make_outcome("one"), work_dir)
    client = connect(embedded_uri(work_dir))
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"")
    client.log_artifact(made["run_id"], str(pickle), "model")  # past our own check
    with pytest.raises(UserError, match=r"pytorch_model.bin is pickled"):
        fetch_model("models:/fot/tiny/1", embedded_uri(work_dir), tmp_path / "fetched")
    assert not [path for path in (tmp_path / "fetched").iterdir() if path.is_dir()]


def test_more_models_than_mlflow_gives_at_once_are_all_seen(work_dir: Path) -> None:
    client = connect(embedded_uri(work_dir))
    names = [f"fot.m{number:03}" for number in range(101)]
    for name in names:
        client.create_registered_model(name)
    assert sorted(model.name for model in registered_models(client)) == names
