"""Real Ray Train workers with real DeepSpeed."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from fot_model import FotLlamaForCausalLM
from jobs.recipe import Recipe
from jobs.train.batches import make_sampler
from jobs.train.launch import last_metrics, read_metrics, train
from jobs.train.loop import batch_loss, build_model, schedule_factor
from jobs.train.spec import CHECKPOINT, METRICS, MODEL, TrainSpec
from pipelines.corpus import list_units
from pipelines.hashing import FileHashes
from pipelines.progress import Progress
from pipelines.sampler import CrossBatchSampler
from pipelines.shards import TokenDataset
from pipelines.tokenize import tokenize
from pipelines.tokenizer import train_tokenizer

STEPS = 60


@pytest.fixture
def spec(local_ray, recipe: dict, tmp_path: Path) -> TrainSpec:
    """FoT training of a small random LLaMA, 60 steps on two workers."""
    recipe["finetune"] |= {"steps": STEPS, "checkpoint_every": 10}
    recipe["finetune"]["optimizer"] |= {"clip": 0.5}
    made = Recipe.model_validate(recipe)
    tokenizer, shards, base, output = (tmp_path / name for name in ("tokenizer", "shards", "base", "output"))
    for directory in (tokenizer, shards, output):
        directory.mkdir()
    text = Path(made.data.sources[0].path).read_text()
    train_tokenizer([text], 300, tokenizer)
    units = list_units(made.data, 0, FileHashes(tmp_path / "hashes.json"))
    with Progress("shards", 1, "B") as progress:
        tokenize(units, made.data, tokenizer, shards, progress)
    assert made.base.pretrain is not None
    spec = TrainSpec(
        name="test",
        training=made.finetune,
        resources=made.resources,
        data=made.data,
        seed=0,
        base=made.base.pretrain.shape,
        dataset=shards,
        tokenizer=tokenizer,
        output=output,
        logs=tmp_path / "logs",
    )
    torch.manual_seed(1)
    build_model(spec).save_pretrained(base)
    return TrainSpec(**{**vars(spec), "base": base})


def losses(output: Path) -> list[float]:
    entries = read_metrics(output / METRICS)
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]


def _sampler(spec: TrainSpec) -> CrossBatchSampler:
    return make_sampler(TokenDataset(spec.dataset), spec.training, spec.data, spec.seed)


def plain_torch_losses(spec: TrainSpec) -> list[float]:
    """The same training written without Ray and DeepSpeed, in one process."""
    model, sampler, training = build_model(spec), _sampler(spec), spec.training
    settings = training.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    curve = []
    for step in range(training.steps):
        optimizer.zero_grad()
        total = 0.0
        for number in range(training.batch.micro_batches):
            batch = sampler.micro_batch(step, number)
            loss = batch_loss(model, batch, training.objective, torch.device("cpu")) / training.batch.micro_batches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        curve.append(total)
    return curve


def test_zero_on_two_workers_equals_plain_torch_and_a_killed_worker_changes_nothing(
    spec: TrainSpec, tmp_path: Path
) -> None:
    train(spec)
    whole = losses(spec.output)
    assert len(whole) == STEPS
    assert whole == pytest.approx(plain_torch_losses(spec), abs=1e-4)
    assert whole[-1] < whole[0]

    killed = TrainSpec(**{**vars(spec), "output": tmp_path / "killed"})
    killed.output.mkdir()
    victims: list[int] = []

    def kill_a_worker_after_a_checkpoint() -> None:
        while ((last := last_metrics(killed.output / METRICS)) is None) or last["step"] < 15:
            time.sleep(0.01)
        workers = [process for process in psutil.process_iter(["cmdline"]) if _is_worker(process)]
        victims.append(workers[-1].pid)
        os.kill(workers[-1].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_a_worker_after_a_checkpoint, daemon=True)
    killer.start()
    train(killed)
    assert victims
    assert losses(killed.output) == whole  # bit for bit
    for name, tensor in load_file(spec.output / MODEL / "model.safetensors").items():
        assert torch.equal(tensor, load_file(killed.output / MODEL / "model.safetensors")[name])

    model = FotLlamaForCausalLM.from_pretrained(spec.output / MODEL)
    assert model.config.mem_layers == [1]
    assert LlamaForCausalLM.from_pretrained(spec.output / MODEL).config.vocab_size == 300
    assert AutoTokenizer.from_pretrained(spec.output / MODEL).eos_token == "</s>"
    assert (spec.output / CHECKPOINT).is_dir()
    train(spec)  # a finished training is not run again
    assert losses(spec.output) == whole


def _is_worker(process: psutil.Process) -> bool:
    return any("ray::RayTrainWorker" in part for part in process.info["cmdline"] or [])


@pytest.mark.parametrize(("zero_stage", "dtype", "tolerance"), [(0, "float32", 1e-4), (1, "bfloat16", 0.1)])
@pytest.mark.slow
def test_other_zero_stages_and_bfloat16_follow_plain_torch(
    spec: TrainSpec, zero_stage: int, dtype: str, tolerance: float
) -> None:
    deepspeed = spec.training.deepspeed.model_copy(update={"zero_stage": zero_stage, "dtype": dtype})
    changed = TrainSpec(**{**vars(spec), "training": spec.training.model_copy(update={"deepspeed": deepspeed})})
    train(changed)
    assert losses(changed.output) == pytest.approx(plain_torch_losses(spec), abs=tolerance)


def test_a_workers_error_reaches_the_driver(spec: TrainSpec) -> None:
    shutil.rmtree(spec.dataset)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        train(spec)
    assert not (spec.output / MODEL).exists()


def test_schedules() -> None:
    from jobs.recipe import Schedule

    constant = Schedule(kind="constant", warmup_steps=4)
    assert [schedule_factor(constant, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = Schedule(kind="cosine", warmup_steps=2)
    curve = [schedule_factor(cosine, step, 100) for step in range(2, 100)]
    assert curve[0] == 1.0
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] == pytest.approx(0.1, abs=1e-3)


def test_a_half_written_line_of_metrics_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    assert last_metrics(path) is None
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n" + '{"step": 2, "lo')
    assert last_metrics(path) == {"step": 1, "loss": 2.0}
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
