"""Real Ray Train workers with real DeepSpeed."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from fot_model import FotLlamaForCausalLM
from jobs.data.batches import batch_shape, make_sampler
from jobs.recipe import Recipe
from jobs.train.launch import last_metrics, read_metrics, train
from jobs.train.loop import batch_loss, build_model, schedule_factor
from jobs.train.spec import CHECKPOINT, METRICS, MODEL, TrainSpec
from pipelines.dataset import DamagedShardError, TokenDataset
from pipelines.documents import BATCHES, index_documents
from pipelines.hashing import FileHashes
from pipelines.listing import list_entries
from pipelines.loader import rank_batches
from pipelines.packing import pack_dataset
from pipelines.progress import Progress
from pipelines.sampler import CrossBatchSampler
from pipelines.tokenize import Encoding, tokenize
from pipelines.tokenizer import train_tokenizer
from pipelines.units import group_units

STEPS = 60


@pytest.fixture
def spec(local_ray, recipe: dict, tmp_path: Path) -> TrainSpec:
    """FoT training of a small random LLaMA, 60 steps on two workers."""
    recipe["finetune"] |= {"steps": STEPS, "checkpoint_every": 10}
    recipe["finetune"]["optimizer"] |= {"clip": 0.5}
    made = Recipe.model_validate(recipe)
    names = ("tokenizer", "shards", "documents", "groups", "output")
    tokenizer, shards, documents, groups, output = (tmp_path / name for name in names)
    for directory in (tokenizer, shards, documents, groups, output):
        directory.mkdir()
    text = Path(made.data.sources[0].path).read_text()
    train_tokenizer([text], 300, tokenizer)
    entries = list_entries(made.data, 0, FileHashes(tmp_path / "hashes.json"))
    units = group_units(entries, made.data.task_bytes)
    with Progress("shards", 1, "B") as progress:
        tokenize(units, made.data, Encoding(tokenizer, "huggingface", shards), progress)
    index_documents(shards, made.data, documents)
    pack_dataset(shards, documents, ["words"], batch_shape(made.finetune).group_tokens, groups)
    assert made.base.pretrain is not None
    spec = TrainSpec(
        name="test",
        training=made.finetune,
        resources=made.resources,
        data=made.data,
        seed=0,
        base=made.base.pretrain.shape,
        shards=shards,
        documents=documents,
        groups=groups,
        tokenizer=tokenizer,
        output=output,
        logs=tmp_path / "logs",
    )
    torch.manual_seed(1)
    build_model(spec).save_pretrained(tmp_path / "base")
    return TrainSpec(**{**vars(spec), "base": tmp_path / "base"})


def losses(output: Path) -> list[float]:
    entries = read_metrics(output / METRICS)
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]


def _sampler(spec: TrainSpec) -> CrossBatchSampler:
    dataset = TokenDataset(spec.shards, spec.documents)
    return make_sampler(dataset, spec.groups, spec.training, spec.data, spec.seed)


def plain_torch_losses(spec: TrainSpec) -> list[float]:
    """The same training written without Ray and DeepSpeed, in one process."""
    model, sampler, training = build_model(spec), _sampler(spec), spec.training
    settings = training.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    batches = rank_batches(sampler, range(training.steps), rank=0, world=1)
    curve = []
    for _ in range(training.steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(training.batch.micro_batches):
            loss = (
                batch_loss(model, next(batches), training.objective, torch.device("cpu")) / training.batch.micro_batches
            )
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
    shutil.rmtree(spec.shards)
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


@pytest.mark.slow
def test_a_shard_that_is_damaged_stops_the_training_and_is_named(spec: TrainSpec) -> None:
    shard = next(spec.shards.glob("*.arrow"))
    content = shard.read_bytes()
    tokens = pa.ipc.open_file(spec.documents / BATCHES).get_batch(0)["offset"][0].as_py()
    shard.write_bytes(content[:tokens] + bytes([content[tokens] ^ 1]) + content[tokens + 1 :])
    with pytest.raises(DamagedShardError, match=rf"{shard} is corrupt: rebuild it with `fot data repair RECIPE`"):
        train(spec)
    shard.write_bytes(content)
    train(spec)
    assert len(losses(spec.output)) == STEPS
