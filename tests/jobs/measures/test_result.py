from pathlib import Path

from jobs.measures.result import Point, Result, Table


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = Result(
        task="perplexity",
        settings={"contexts": [1, 2], "mode": "last_window"},
        points=[Point("perplexity/model", 512, 8.25), Point("passkey/length_90", 0, 1024)],
        tables=[Table("a title", ["a", "b"], [["x", 1], [None, 2.5]], "a note"), Table("another", ["c"], [])],
        plots=["a.png", "b.png"],
    )
    result.write(tmp_path)
    assert Result.read(tmp_path) == result
    assert Result.read(tmp_path).points[0].metric == "perplexity/model"
