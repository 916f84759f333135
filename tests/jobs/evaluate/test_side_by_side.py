from pathlib import Path

import pytest

from jobs.evaluate.losses import Scored, Sums, write_losses
from jobs.evaluate.side_by_side import Measured, side_by_side
from jobs.evaluate.trials import write_trials


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    """The model foretells what the rival does, but 1 nat a window better, and reads twice as far."""
    made = {name: tmp_path / name for name in ("perplexity", "perplexity-full", "passkey", "passkey-full")}
    for directory in made.values():
        directory.mkdir()

    def windows(name: str, less: float, steps: tuple[int, ...]) -> list[Scored]:
        return [
            Scored(name, source, document, 0, step, Sums(20 + document - less, 10, 30))
            for document, source in enumerate("aabb")
            for step in steps
        ]

    write_losses(windows("model", 1, (16, 32)) + windows("model/distracted", 5, (0,)), made["perplexity"])
    write_losses(windows("model", 0, (16,)), made["perplexity-full"])
    hit, miss = {"depth": 0.1, "exact": True, "choice": True}, {"depth": 0.1, "exact": False, "choice": True}
    write_trials({16: [hit, hit], 32: [hit, miss]}, made["passkey"])
    write_trials({16: [miss, miss]}, made["passkey-full"])
    return made


def test_all_readers_stand_in_one_table_with_paired_differences(directories: dict[str, Path], tmp_path: Path) -> None:
    measured = {
        "perplexity": Measured("perplexity", {"model": "model"}),
        "perplexity-full": Measured("perplexity", {"model": "full"}),
        "passkey": Measured("passkey", {"model": "model"}),
        "passkey-full": Measured("passkey", {"model": "full"}),
    }
    result = side_by_side("rivals", measured, directories, "model", tmp_path)
    titles = [table.title for table in result.tables]
    assert titles == [
        f"{what}, {where}"
        for where in ("all sources", "a", "b")
        for what in ("Perplexity", "Nats a token, model less each")
    ] + ["Passkey, exact"]
    perplexity, gaps, *_, passkey = result.tables
    assert list(perplexity.columns) == ["read by", "16", "32"]
    assert [row[0] for row in perplexity.rows] == ["model", "base, full attention"]
    assert perplexity.rows[1][2] is None, "not read so far"
    assert [list(row) for row in gaps.rows] == [["base, full attention", "-0.100 (-0.100 to -0.100)", None]]
    assert [row[:2] for row in passkey.rows] == [
        ["model", "1.00 (0.342 to 1.000)"],
        ["base, full attention", "0.00 (0.000 to 0.658)"],
    ]
    values = {(point.metric, point.step): point.value for point in result.points}
    assert values["nats_less/full/a", 16] == pytest.approx(-0.1)
    assert values["passkey/exact/full", 16] == 0
    assert ("perplexity/model", 16) not in values, "the measurement itself has it"
    assert {"perplexity/full", "perplexity/full/b"} <= {metric for metric, _ in values}
    assert result.plots == ["perplexity-readers.png", "passkey-readers.png"]
    assert all((tmp_path / plot).stat().st_size > 5000 for plot in result.plots)
