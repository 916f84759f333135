"""Runs the stages of a workflow one after the other through the store."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from pipelines.workflow.store import Output, Stage, State, Store

Around = Callable[[str, Callable[[], Output]], Output]


def as_it_is(stage: str, build: Callable[[], Output]) -> Output:
    """Builds the stage, and nothing else."""
    return build()


def run_workflow(
    stages: Sequence[Stage],
    store: Store,
    *,
    report: Callable[[Output], None],
    warn: Callable[[str], None],
    around: Around = as_it_is,
) -> dict[str, Output]:
    """Build every stage in order; `report` is told of each as it is done, and `around(name, build)` builds it, for who
    wants to see each begin and end. Returns the outputs by stage name."""
    outputs: dict[str, Output] = {}
    for stage in stages:
        outputs[stage.name] = around(stage.name, partial(store.build, stage, outputs, warn))
        report(outputs[stage.name])
    return outputs


def workflow_status(stages: Sequence[Stage], store: Store) -> Iterator[tuple[Stage, State, float, str]]:
    """(stage, state, seconds, path or "") of every stage, without running anything."""
    outputs: dict[str, Output] = {}
    for stage in stages:
        state, seconds, path = store.find(stage, outputs)
        if path is not None and (output := store.read(path)) is not None:
            outputs[stage.name] = output
        yield stage, state, seconds, str(path or "")


def finished_outputs(stages: Sequence[Stage], store: Store) -> dict[str, Output]:
    """The outputs of those stages that are done, without verifying them."""
    outputs: dict[str, Output] = {}
    for stage in stages:
        state, _, path = store.find(stage, outputs)
        if state == "done" and path is not None and (output := store.read(path)) is not None:
            outputs[stage.name] = output
    return outputs
