"""Stages run one by one, so that something can happen between them."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.config.recipe import Recipe
from jobs.config.train_spec import METRICS
from jobs.train.metrics import read_metrics
from jobs.workflow.stages import recipe_stages
from jobs.workflow.workspace import Workspace
from pipelines.batches.dataset import DamagedShardError
from pipelines.tokens.tokenizer import train_tokenizer
from pipelines.workflow.store import Output, Stage


@pytest.fixture
def stages_of(local_ray, recipe: dict, tmp_path: Path):
    """The stages of the tiny recipe on a given checkpoint, by name, with their store."""
    model = tmp_path / "model"
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=16, **shape)).save_pretrained(model)
    train_tokenizer([(tmp_path / "corpus.jsonl").read_text()], 300, model)
    recipe |= {"base": {"checkpoint": str(model)}, "work_dir": str(tmp_path / "runs")}

    def make(**data: object) -> tuple[Workspace, dict[str, Stage]]:
        workspace = Workspace(Recipe.model_validate({**recipe, "data": {**recipe["data"], **data}}))
        return workspace, {stage.name: stage for stage in recipe_stages(workspace)}

    return make


def build(workspace: Workspace, stages: Mapping[str, Stage], last: str) -> dict[str, Output]:
    outputs: dict[str, Output] = {}
    for name, stage in stages.items():
        outputs[name] = workspace.store.build(stage, outputs, lambda message: None)
        if name == last:
            break
    return outputs


@pytest.mark.slow
def test_a_training_repairs_its_data_by_itself_where_the_recipe_says_so(stages_of) -> None:
    workspace, stages = stages_of()
    outputs = build(workspace, stages, "base")
    shard = next(outputs["shards"].path.glob("*.arrow"))
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(DamagedShardError, match=f"{shard} is missing: rebuild it with `fot data repair RECIPE`"):
        workspace.store.build(stages["finetune"], outputs, lambda message: None)
    assert not shard.exists()

    workspace, stages = stages_of(auto_repair=True)
    outputs["finetune"] = workspace.store.build(stages["finetune"], outputs, lambda message: None)
    assert shard.read_bytes() == whole
    assert len(read_metrics(outputs["finetune"].path / METRICS)) == 6
