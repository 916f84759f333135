"""Steps whose loss is no number: the training stops at them, or goes back and on without them."""

import json
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from fot_model import FotLlamaConfig, FotLlamaForCausalLM
from jobs.config.train_spec import METRICS, TrainSpec
from jobs.train.bad_loss import SKIPPED, BadLossError
from jobs.train.batches import make_sampler
from jobs.train.launch import train
from jobs.train.metrics import read_metrics
from pipelines.batches.dataset import TokenDataset

SKIP = {"steps": 30, "checkpoints": {"every": 6}, "bad_loss": {"action": "skip"}}


@pytest.fixture
def poisoned(spec: TrainSpec, changed, tmp_path):
    """(training, steps): a base that gives no number for one token, which one or two steps hold."""
    made = changed("poisoned", SKIP)
    dataset = TokenDataset(made.shards, made.documents)
    sampler = make_sampler(dataset, made.groups, made.training, made.data, made.seed)
    steps = defaultdict(set)
    for step in range(made.training.steps):
        for number in range(made.training.batch.micro_batches):
            for token in set(sampler.micro_batch(step, number).input_ids.flatten().tolist()):
                steps[token].add(step)
    token = next(token for token, where in sorted(steps.items()) if len(where) <= 2 and max(where) > 7)
    tied = FotLlamaForCausalLM.from_pretrained(spec.base)
    config = FotLlamaConfig(**{**tied.config.to_dict(), "tie_word_embeddings": False})
    model = FotLlamaForCausalLM(config)
    model.load_state_dict(tied.state_dict())
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    model.save_pretrained(tmp_path / "poisoned-base")
    return replace(made, base=tmp_path / "poisoned-base"), steps[token]


@pytest.mark.timeout(900)
def test_steps_without_a_number_are_left_out_and_the_others_are_as_if_they_had_never_been(
    poisoned, plain_torch_losses
) -> None:
    spec, bad = poisoned
    train(spec)
    entries = read_metrics(spec.output / METRICS)
    assert [entry["step"] for entry in entries] == [step + 1 for step in range(30) if step not in bad]
    assert entries[-1]["skipped_steps"] == len(bad)
    assert json.loads((spec.output / SKIPPED).read_text()) == {str(step): "its loss is nan" for step in bad}
    expected = plain_torch_losses(spec, without=bad)
    assert [entry["loss"] for entry in entries] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_a_training_that_is_to_stop(poisoned) -> None:
    spec, bad = poisoned
    stopping = spec.training.model_copy(
        update={"bad_loss": spec.training.bad_loss.model_copy(update={"action": "stop"})}
    )
    with pytest.raises(BadLossError, match=rf"step {min(bad) + 1}: its loss is nan: lower optimizer.learning_rate"):
        train(replace(spec, training=stopping))
    assert len(read_metrics(spec.output / METRICS)) == min(bad)
