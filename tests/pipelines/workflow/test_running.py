import pytest

from pipelines.workflow.running import run_workflow, workflow_status
from pipelines.workflow.store import Stage, Store


class Line:
    """Three stages, each adding its letter to what the one before wrote. `failing` names one that raises."""

    def __init__(self, failing=None, params=None):
        self.failing, self.ran = failing, []
        params = params or {}
        self.stages = [
            Stage("a", self.adding("a", None), params.get("a", {})),
            Stage("b", self.adding("b", "a"), params.get("b", {}), inputs=("a",)),
            Stage("c", self.adding("c", "b"), params.get("c", {}), inputs=("b",)),
        ]

    def adding(self, letter, before):
        def run(output, inputs):
            self.ran.append(letter)
            if letter == self.failing:
                raise RuntimeError(letter)
            (output / "text").write_text((inputs[before] / "text").read_text() + letter if before else letter)

        return run

    def run(self, store, reported=None):
        return run_workflow(
            self.stages, store, report=(reported if reported is not None else []).append, warn=pytest.fail
        )

    def states(self, store):
        return [state for _, state, _, _ in workflow_status(self.stages, store)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def test_stages_run_in_order_on_each_other_and_are_reported(store):
    line, reported = Line(), []
    outputs = line.run(store, reported)
    assert line.ran == ["a", "b", "c"]
    assert (outputs["c"].path / "text").read_text() == "abc"
    assert [output.stage for output in reported] == ["a", "b", "c"] == list(outputs)


def test_a_second_run_finds_everything(store):
    Line().run(store)
    again, reported = Line(), []
    again.run(store, reported)
    assert again.ran == []
    assert all(output.reused for output in reported)


def test_a_run_goes_on_where_the_last_one_failed(store):
    with pytest.raises(RuntimeError, match="b"):
        Line(failing="b").run(store)
    line = Line()
    assert line.states(store) == ["done", "interrupted", "waiting"]
    line.run(store)
    assert line.ran == ["b", "c"]


def test_only_what_a_change_reaches_is_run_again(store):
    Line().run(store)
    line = Line(params={"b": {"new": True}})
    line.run(store)
    assert line.ran == ["b"]  # the same bytes came out, so c stands


def test_the_status_runs_nothing_and_says_where_outputs_lie(store):
    line = Line()
    assert line.states(store) == ["to do", "waiting", "waiting"]
    assert line.ran == []
    outputs = line.run(store)
    assert line.states(store) == ["done"] * 3
    assert [where for _, _, _, where in workflow_status(line.stages, store)] == [str(o.path) for o in outputs.values()]
