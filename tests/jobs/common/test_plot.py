from pathlib import Path

import pytest
from PIL import Image

from jobs.common.plot import plot_curves, plot_heads, plot_heat_maps, plot_mass, short

CURVES = {"base": {512: 9.1, 2048: 9.2, 16384: 9.6}, "model": {16384: 8.0, 512: 9.0}}


def draw_curves(target: Path, **changed: dict[int, float]) -> None:
    plot_curves({**CURVES, **changed}, "tokens of context", "perplexity", target)


def draw_shares(target: Path, shares: bool = True) -> None:
    plot_curves({"dense": {512: 0.99, 2048: 0.98}}, "tokens", "accuracy", target, shares=shares)


def draw_mass(target: Path, **changed: dict[int, float]) -> None:
    plot_mass({"layer8": {1: 1.0, 64: 0.3, 256: 0.1}, **changed}, target)


def draw_maps(target: Path, last: float | None = None) -> None:
    plot_heat_maps({"exact": [[0.0, 1.0], [0.5, last]]}, [512, 2048], ["0 to 50%", "50 to 100%"], target)


def draw_heads(target: Path, marked: tuple[int, ...] = (1,), best: float = 0.9) -> None:
    plot_heads({"token": [[0.0, best], [0.5, 0.1]], "line": [[0.1, best], [0.5, 0.2]]}, marked, target)


@pytest.mark.parametrize("draw", [draw_curves, draw_shares, draw_mass, draw_maps, draw_heads])
def test_a_plot_is_a_picture_and_the_same_bytes_again(draw, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
        assert "Software" not in picture.info
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "b.png"}


@pytest.mark.parametrize(
    ("draw", "changes"),
    [
        (draw_curves, {"model": {0: 8.0, 512: 9.0}}),
        (draw_shares, {"shares": False}),
        (draw_mass, {"layer8": {1: 1.0, 64: 0.4}}),
        (draw_maps, {"last": 0.9}),
        (draw_heads, {"marked": (0,)}),
        (draw_heads, {"best": 0.2}),
    ],
)
def test_other_values_make_another_picture(draw, changes: dict, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png", **changes)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_lengths_are_written_short() -> None:
    lengths = [0, 64, 512, 1000, 1024, 1536, 2048, 65536, 100_000, 1 << 20, 16 << 20]
    assert [short(tokens) for tokens in lengths] == [
        "0", "64", "512", "1000", "1k", "1.5k", "2k", "64k", "100000", "1M", "16M",
    ]  # fmt: skip
