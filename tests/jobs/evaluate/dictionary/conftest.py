import os
from collections.abc import Callable

import pytest

from jobs.config.dictionary import DictionaryRecipe

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture
def make_recipe() -> Callable[..., DictionaryRecipe]:
    """A recipe that trains in a second."""

    def make(**training: object) -> DictionaryRecipe:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16}
        phases = [
            {"steps": 6, "records": 3, "documents": 4},
            {"steps": 6, "records": 6, "documents": 4, "asking": 2, "d": 3, "symbols": [3, 60], "rate": [1.0, 0.2]},
        ]
        return DictionaryRecipe.model_validate(
            {
                "kind": "dictionary",
                "name": "tiny",
                "model": shape,
                "training": {"phases": phases, "checkpoint_every": 5, **training},
                "evaluation": {"tokens": [256, 1024], "windows": 5, "batch": 3, "top_k": 7},
            }
        )

    return make
