import pytest
from pydantic import ValidationError

from pipelines.config import Data, Source

SOURCE = {"name": "s", "path": "x"}
MADE_UP = {"name": "s", "path": "synthetic:recall"}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"sources": []}, "sources"),
        ({"sources": [{**SOURCE, "typo": 1}]}, "typo"),
        ({"sources": [{"name": "s"}]}, "path"),
        ({"sources": [{**SOURCE, "name": "with space"}]}, "name"),
        ({"sources": [{**SOURCE, "held_out": 1.5}]}, "held_out"),
        ({"sources": [{**SOURCE, "directory": "other"}]}, "directory"),
        ({"sources": [{**SOURCE, "path": "python:stdlb"}]}, "did you mean python:stdlib"),
        ({"sources": [{**SOURCE, "path": "python:packages"}]}, "did you mean python:site-packages"),
        ({"sources": [{**SOURCE, "path": "synthetic:recal"}]}, "did you mean synthetic:recall"),
        ({"sources": [{**SOURCE, "path": "synthetic:recall"}]}, "needs recall.documents"),
        ({"sources": [{**SOURCE, "recall": {"documents": 5}}]}, "recall is of synthetic:recall only"),
        ({"sources": [{**MADE_UP, "recall": {"documents": 0}}]}, "documents"),
        ({"sources": [{**MADE_UP, "recall": {"documents": 5, "characters": 3000}}]}, "characters"),
        ({"sources": [{**MADE_UP, "recall": {"documents": 5, "distance": [0.5, 0.5]}}]}, "is not below the most"),
        ({"sources": [{**MADE_UP, "recall": {"documents": 5, "distance": [0.95, 1]}}]}, "distance"),
        ({"sources": [{**SOURCE, "max_tree_bytes": 0}]}, "max_tree_bytes"),
        ({"task_bytes": 0}, "task_bytes"),
        ({"max_bad_lines": -1}, "max_bad_lines"),
        ({"typo": 1}, "typo"),
    ],
)
def test_a_mistake_in_a_recipe_is_refused_and_located(change, where):
    with pytest.raises(ValidationError, match=where):
        Data(**{"sources": [SOURCE], **change})


def test_a_recipe_part_cannot_be_changed():
    source = Source(**SOURCE)
    with pytest.raises(ValidationError):
        source.path = "y"
