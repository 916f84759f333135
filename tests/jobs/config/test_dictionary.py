"""The dictionary recipe: what it refuses, and the one that ships."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from jobs.config.dictionary import DictionaryRecipe
from jobs.evaluate.dictionary.task import context_tokens

SHIPPED = Path(__file__).parents[3] / "recipes" / "dictionary.yaml"
PHASE = {"steps": 2, "records": 3, "documents": 4}


def recipe(**changes: object) -> DictionaryRecipe:
    return DictionaryRecipe.model_validate(
        {"kind": "dictionary", "name": "tiny", "training": {"phases": [PHASE]}, **changes}
    )


def test_the_shipped_recipe_is_one_and_asks_up_to_sixteen_million() -> None:
    shipped = DictionaryRecipe.model_validate(yaml.safe_load(SHIPPED.read_text()))
    assert shipped.seeds == (0, 1, 2)
    assert shipped.evaluation.tokens == (2**14, 2**16, 2**18, 2**20, 2**22, 2**24)
    records = [phase.records for phase in shipped.training.phases]
    assert records == sorted(records), "a curriculum"
    assert (records[0], records[-1]) == (3, 25)
    assert context_tokens(records[-1]) == 256


def test_sizes_come_in_order_and_once() -> None:
    assert recipe(evaluation={"tokens": [512, 256, 512]}).evaluation.tokens == (256, 512)


def test_all_documents_ask_unless_it_says_how_many() -> None:
    assert recipe().training.phases[0].askers == 4
    assert recipe(training={"phases": [{**PHASE, "asking": 1}]}).training.phases[0].askers == 1


def phase(**changes: object) -> dict:
    return {"training": {"phases": [{**PHASE, **changes}]}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (phase(d=5), "d is 5, a batch holds 4 documents: raise documents"),
        (phase(asking=5), "asking is 5, a batch holds 4 documents: lower asking"),
        (phase(symbols=[60, 1]), "4 documents of 3 records need 12 keys, 1 symbols make 1: raise symbols"),
        (phase(records=26), "less than or equal to 25"),
        (phase(rate=[1, 1.5]), "less than or equal to 1"),
        ({"training": {"phases": []}}, "at least 1 item"),
        ({"model": {"mem_layers": [2]}}, r"mem_layers \[2\]: the model has 2 layers, 0 to 1"),
        ({"model": {"num_key_value_heads": 3}}, "num_attention_heads must be a multiple"),
        ({"model": {"head_dim": 3}}, r"model.head_dim \(3\) must be even"),
        ({"evaluation": {"tokens": [300]}}, "300 tokens are no whole contexts: give multiples of 256"),
        ({"evaluation": {"tokens": [2**28]}}, "need more keys than there are: give at most 132710400"),
        ({"work_dir": "s3://bucket/runs"}, "work_dir s3://bucket/runs is a URL: give a directory"),
        ({"kind": "run"}, "dictionary"),
        ({"steps": 3}, "Extra inputs"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(**changes)


def test_it_imports_nothing_heavy() -> None:
    code = "import sys, jobs.config.dictionary; print([m for m in ('torch', 'ray', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
