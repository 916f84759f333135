"""Every ZeRO stage, number type and way to save memory against the same training in plain torch, one process."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from fot_model import Adapter, FotLlamaForCausalLM
from jobs.config.train_spec import ADAPTER, METRICS, MODEL, TrainSpec
from jobs.train.launch import train
from jobs.train.metrics import read_metrics
from pipelines.workflow.errors import UserError

CLOSE = 1e-4  # float32, over 60 steps
BFLOAT16 = 0.1
MEASURED = {"every": 20, "contexts": [1, 2], "windows": 5}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"zero_stage": 0}, CLOSE),
        ({"zero_stage": 1}, CLOSE),
        ({"zero_stage": 3}, CLOSE),
        ({"zero_stage": 1, "offload_optimizer": True}, CLOSE),
        ({"zero_stage": 2, "offload_optimizer": True, "activation_checkpointing": True}, CLOSE),
        ({"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}, CLOSE),
        ({"zero_stage": 3, "activation_checkpointing": True}, CLOSE),
        ({"zero_stage": 0, "activation_checkpointing": True}, CLOSE),
        ({"zero_stage": 0, "dtype": "bfloat16"}, BFLOAT16),
        ({"zero_stage": 1, "dtype": "bfloat16"}, BFLOAT16),
        ({"zero_stage": 2, "dtype": "bfloat16"}, BFLOAT16),
        ({"zero_stage": 3, "dtype": "bfloat16"}, BFLOAT16),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_a_zero_training_has_the_losses_of_plain_torch_and_exports_a_llama(
    changed, losses, plain_torch_losses, settings: dict, tolerance: float
) -> None:
    training = {"deepspeed": settings, "measure": MEASURED, "checkpoints": {"every": 25}}
    spec = changed("zero", training)
    train(spec)
    whole = losses(spec.output)
    assert len(whole) == 60
    assert whole == pytest.approx(plain_torch_losses(changed("plain")), abs=tolerance)
    assert all(entry["gradient_norm"] > 0 for entry in read_metrics(spec.output / METRICS))
    measured = [entry for entry in read_metrics(spec.output / METRICS) if "perplexity/1x" in entry]
    assert [entry["step"] for entry in measured] == [20, 40, 60]
    assert 0 < measured[-1]["attention_mass/layer1"] <= measured[-1]["attention_mass/layer1_best_head"] <= 1
    assert measured[-1]["perplexity/2x"] > 1
    tuned = FotLlamaForCausalLM.from_pretrained(spec.output / MODEL)
    assert tuned.config.mem_layers == [1]
    assert LlamaForCausalLM.from_pretrained(spec.output / MODEL).config.vocab_size == 300


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"zero_stage": 0}, {"train": "memory_attention"}),
        ({"zero_stage": 1}, {"train": "memory_and_above"}),
        ({"zero_stage": 2, "activation_checkpointing": True}, {"train": "memory_attention"}),
        ({"zero_stage": 3}, {"train": {"patterns": ["embed", "mlp"]}}),
        ({"zero_stage": 3, "activation_checkpointing": True}, {"train": "memory_and_above"}),
        ({"zero_stage": 0}, {"train": "memory_attention", "lora": {"rank": 2}}),
        ({"zero_stage": 2}, {"lora": {"rank": 3, "alpha": 1.0, "targets": ["q_proj", "down_proj"]}}),
        ({"zero_stage": 3}, {"train": "memory_attention", "lora": {"rank": 2}}),
    ],
    ids=str,
)
def test_a_part_trains_as_in_plain_torch_and_becomes_an_adapter(
    changed, losses, plain_torch_losses, tmp_path, settings: dict, part: dict
) -> None:
    settings = {"deepspeed": settings, "checkpoints": {"every": 25}, **part}
    spec = changed("zero", settings)
    train(spec)
    whole = losses(spec.output)
    assert whole == pytest.approx(plain_torch_losses(changed("plain", settings)), abs=CLOSE)
    assert whole[-1] < whole[0]
    base, tuned = load_file(spec.base / "model.safetensors"), load_file(spec.output / MODEL / "model.safetensors")
    adapter = Adapter.load(spec.output / ADAPTER)
    changed_names = {name for name in tuned if not torch.equal(tuned[name], base[name])}
    assert changed_names == {*adapter.whole_names(merged=True)}
    merged = FotLlamaForCausalLM.from_pretrained(spec.base, adapter=spec.output / ADAPTER)
    state = merged.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tuned.items())
    assert merged.config.mem_layers == [1]


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_micro_batches_spread_over_ranks_are_the_same_training(
    changed, losses, plain_torch_losses, zero_stage: int
) -> None:
    settings = {"objective": {"kind": "fot", "context": 16, "d": 2, "contexts": 2, "mem_layers": [1]}}
    settings |= {"deepspeed": {"zero_stage": zero_stage}, "measure": MEASURED}
    spec = changed("spread", settings, {"workers": 2, "ranks_per_micro_batch": 2})
    train(spec)
    assert losses(spec.output) == pytest.approx(plain_torch_losses(changed("plain", settings)), abs=CLOSE)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_training_goes_on_with_another_number_of_workers(changed, losses, zero_stage: int) -> None:
    rates = {"groups": [{"pattern": "norm", "learning_rate": 1e-2, "weight_decay": 0}]}  # DeepSpeed mixes them up
    settings = {"deepspeed": {"zero_stage": zero_stage}, "checkpoints": {"every": 30}, "optimizer": rates}
    whole = changed("whole", settings)
    train(whole)
    first = changed("first", {**settings, "steps": 30})
    train(first)
    spec = changed("second", settings, {"workers": 1})
    (first.output / METRICS).rename(spec.output / METRICS)
    train(replace(spec, checkpoints=first.checkpoints))
    assert losses(spec.output)[:30] == losses(whole.output)[:30]
    assert losses(spec.output) == pytest.approx(losses(whole.output), abs=CLOSE)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "memorizing", "context": 16, "contexts": 2, "mem_layers": [1]},
        {"kind": "memorizing", "context": 16, "contexts": 2, "mem_layers": [1], "gate": False},
        {"kind": "transformer_xl", "context": 16, "contexts": 2},
        {"kind": "fot", "context": 16, "contexts": 2, "mem_layers": [1], "d": {"of": [1, 2]}},
    ],
    ids=["memorizing", "memorizing without gate", "transformer_xl", "fot with d drawn"],
)
def test_every_objective_trains(changed, losses, plain_torch_losses, objective: dict) -> None:
    settings = {"objective": objective, "optimizer": {"groups": [{"pattern": "norm", "weight_decay": 0}]}}
    spec = changed("zero", {**settings, "measure": MEASURED})
    train(spec)
    whole = losses(spec.output)
    assert whole == pytest.approx(plain_torch_losses(changed("plain", settings)), abs=CLOSE)
    assert whole[-1] < whole[0]
    model = FotLlamaForCausalLM.from_pretrained(spec.output / MODEL)
    gated = objective["kind"] == "memorizing" and objective.get("gate", True)
    assert model.config.mem_gate == gated
    gates = [name for name in load_file(spec.output / MODEL / "model.safetensors") if "gate" in name.split(".")[-1]]
    assert bool(gates) == gated


def test_float16_on_a_machine_that_lacks_it_is_a_users_error(changed) -> None:
    import deepspeed

    if deepspeed.get_accelerator().is_fp16_supported():
        pytest.skip("this machine trains with float16")
    spec: TrainSpec = changed("half", {"deepspeed": {"dtype": "float16"}})
    with pytest.raises(UserError, match=r"deepspeed.dtype float16: this cpu cannot train with it: set bfloat16"):
        train(spec)
