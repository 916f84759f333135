"""Real ranks: processes with DeepSpeed over gloo. They save, are killed, and go on in other numbers."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import s3fs
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from fot_model import Adapter, FotLlamaConfig, FotLlamaForCausalLM
from jobs.config.training import Training
from jobs.models.shape import Shape
from jobs.train.checkpoint_store import CheckpointStore
from jobs.train.checkpoints import _model_files, cpu_copy
from jobs.train.estimate import checkpoint_bytes
from jobs.train.export import export_adapter, export_checkpoint
from pipelines.tokens.tokenizer import train_tokenizer

CASES = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1, "tied": False},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3-untied": {"stage": 3, "tied": False},
    "zero3-offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "zero0-bfloat16": {"stage": 0, "dtype": "bfloat16"},
    "zero2-bfloat16": {"stage": 2, "dtype": "bfloat16"},
    "zero0-part": {"stage": 0, "part": r"layers.1.self_attn"},
    "zero1-part": {"stage": 1, "part": r"layers.[12]|model.norm"},
    "zero2-part": {"stage": 2, "part": r"layers.1.self_attn"},
    "zero3-part": {"stage": 3, "part": r"layers.1.self_attn"},
    "zero2-part-bfloat16": {"stage": 2, "part": r"embed|layers.1.self_attn", "dtype": "bfloat16"},
}
PARTS = [case for case in CASES if "part" in case]
S3 = "s3://checkpoints/runs/s3"
PRELUDE = (
    f"CASES, S3 = {CASES!r}, {S3!r}"
    + """
import json, os, re, sys, time
from pathlib import Path
import deepspeed, torch
from fot_model import Adapter, FotLlamaConfig, FotLlamaForCausalLM, cross_batch_plan, fingerprint
from fot_model.adapter import settings_of
from jobs.train.checkpoint_store import CheckpointStore
from jobs.train.checkpoints import Checkpoints, Frozen
from jobs.config.training import CheckpointSettings
from pipelines.workflow.errors import UserError

torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
here, rank, world = Path.cwd(), torch.distributed.get_rank(), torch.distributed.get_world_size()
plan = cross_batch_plan([0, 0, 1, 1], [0, 1, 0, 1], [[True, False], [False, True]], [(0, 0), (1, 1)])
ids = torch.randint(0, 40, (9, 2, 4, 8), generator=torch.Generator().manual_seed(1))  # two micro-batches a step
told = {}

def make_model(dtype, tied, seed):
    torch.manual_seed(seed)
    config = FotLlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8, mem_layers=[1], mem_gate=True, initializer_range=0.3,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )
    return FotLlamaForCausalLM(config).to(getattr(torch, dtype)).train()

def keep_rest(model, base, part):
    # train what matches alone; the rest is the base's
    base = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not re.search(part, name):
                parameter.copy_(base[name])
                parameter.requires_grad_(False)

def make_engine(stage, dtype="float32", tied=True, seed=0, part="", **offload):
    model = make_model(dtype, tied, seed)
    keep_rest(model, make_model(dtype, tied, 0), part)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config={
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2 // world, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100, **offload},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"}, "steps_per_print": 2**31,
    })[0]

def train(engine, steps):
    losses = []
    for step in steps:
        total = torch.zeros(())
        for number in range(rank, 2, world):
            loss = engine(ids[step, number], labels=ids[step, number], plan=plan, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / 2
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    return losses

def make_checkpoints(where, identity=None, base_seed=0, **settings):
    case, frozen = CASES.get(str(where).removeprefix("one-"), {}), None
    if "part" in case:
        base = make_model(case.get("dtype", "float32"), True, base_seed)
        path = here / f"base-{case.get('dtype')}"
        if rank == 0 and not path.exists():
            base.save_pretrained(path)
        frozen = Frozen(path, Adapter(fingerprint(base), settings_of(base.config)))
    named = identity or {"case": str(where)}
    return Checkpoints(str(where), named, CheckpointSettings(**settings), here / "tokenizer", frozen)

def write_weights(engine, path):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        if rank == 0:
            torch.save({name: weight.detach().clone() for name, weight in engine.module.state_dict().items()}, path)

def tell(name):
    if rank == 0:
        (here / f"{name}.json").write_text(json.dumps(told))
"""
)
TWO = """
for name, case in CASES.items():
    engine, checkpoints = make_engine(**case), make_checkpoints(name)
    assert checkpoints.restore(engine) is None
    losses = train(engine, range(3))
    checkpoints.save(engine, 3, {"losses": losses})
    losses += train(engine, range(3, 6))
    checkpoints.save(engine, 6, {"losses": losses})
    write_weights(engine, here / f"{name}.pt")
    whole = losses + train(engine, range(6, 9))
    checkpoints.wait()
    back = checkpoints.restore(engine), train(engine, range(6, 9))
    other = make_engine(**case, seed=5)
    anew = make_checkpoints(name).restore(other), train(other, range(6, 9))
    told[name] = {"whole": whole, "back": back, "anew": anew, "timings": checkpoints.timings()}

try:
    make_checkpoints("zero2-part", base_seed=1).restore(make_engine(**CASES["zero2-part"]))
except UserError as error:
    told["other base"] = str(error)

checkpoints = make_checkpoints("damaged")
engine = make_engine(1)
for step in (1, 2, 3):
    train(engine, [step])
    checkpoints.save(engine, step, {})
checkpoints.wait()
path = Path("damaged/step-00000003/zero_pp_rank_1_mp_rank_00_optim_states.pt")
if rank == 0:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
torch.distributed.barrier()
step, _ = checkpoints.restore(make_engine(1))
told["damaged"] = {"step": step, "left": [found.step for found in CheckpointStore("damaged").all() if found.complete]}
try:
    make_checkpoints("damaged", {"case": "another"}).restore(make_engine(1))
except UserError as error:
    told["refused"] = str(error)

checkpoints = make_checkpoints(S3)
engine = make_engine(2)
train(engine, range(3))
checkpoints.save(engine, 3, {})
checkpoints.wait()
after = train(engine, range(3, 6))
other = make_engine(2, seed=5)
assert make_checkpoints(S3).restore(other) == (3, {})
told["s3"] = {"whole": after, "anew": train(other, range(3, 6))}

checkpoints = make_checkpoints("killed")
engine = make_engine(2)
train(engine, range(2))
checkpoints.save(engine, 2, {})
checkpoints.wait()
told["killed"] = train(engine, range(2, 5))
if rank == 1:
    Path("killed/step-00000005").mkdir(exist_ok=True)
    os.mkfifo("killed/step-00000005/zero_pp_rank_1_mp_rank_00_optim_states.pt")  # writing waits for a reader
torch.distributed.barrier()
checkpoints.save(engine, 5, {})
tell("two")
checkpoints.wait()
"""
ONE = """
for name, case in CASES.items():
    engine = make_engine(**case, seed=5)
    told[name] = make_checkpoints(name).restore(engine)[0], train(engine, range(6, 9))
    engine, checkpoints = make_engine(**case), make_checkpoints(f"one-{name}")
    train(engine, range(3))
    checkpoints.save(engine, 3, {})
    checkpoints.wait()
    told[f"one-{name}"] = train(engine, range(3, 6))

engine = make_engine(2, seed=5)
make_checkpoints(S3).restore(engine)
told["s3"] = train(engine, range(3, 6))

checkpoints = make_checkpoints("full")
checkpoints.save(engine, 1, {})
checkpoints.wait()
Path("full/step-00000002").mkdir()
os.symlink("/dev/full", "full/step-00000002/zero_pp_rank_0_mp_rank_00_optim_states.pt")
checkpoints.save(engine, 2, {})
try:
    checkpoints.save(engine, 3, {})
except OSError as error:
    told["full"] = error.errno
tell("one")
"""
AGAIN = """
for name, case in CASES.items():
    engine = make_engine(**case, seed=5)
    make_checkpoints(f"one-{name}").restore(engine)
    told[name] = train(engine, range(3, 6))

engine, checkpoints = make_engine(2, seed=5), make_checkpoints("killed")
step, _ = checkpoints.restore(engine)
left = [found.step for found in CheckpointStore("killed").all()]
losses = train(engine, range(2, 5))
checkpoints.save(engine, 5, {})
checkpoints.wait()
now = [(found.step, found.complete) for found in CheckpointStore("killed").all()]
told["killed"] = {"step": step, "left": left, "losses": losses, "now": now}
tell("again")
"""


class Ranks:
    """Starts scripts, after PRELUDE, on several ranks in one directory; what they print is in rank0.log, ..."""

    def __init__(self, here: Path, environment: dict[str, str]) -> None:
        self.here, self.environment = here, environment
        self.started: list[subprocess.Popen] = []

    def start(self, script: str, world: int) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        ranks = []
        for rank in range(world):
            environment = {**self.environment, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-c", PRELUDE + script]
            with open(self.here / f"rank{rank}.log", "a") as log:
                ranks.append(subprocess.Popen(command, cwd=self.here, env=environment, stdout=log, stderr=log))
        self.started += ranks
        return ranks

    def run(self, script: str, world: int, result: str) -> dict:
        codes = [rank.wait(timeout=300) for rank in self.start(script, world)]
        assert codes == [0] * world, [(self.here / f"rank{rank}.log").read_text()[-3000:] for rank in range(world)]
        return self.told(result)

    def told(self, result: str) -> dict:
        return json.loads((self.here / f"{result}.json").read_text())


@pytest.fixture(scope="module")
def storage(s3_endpoint, s3_environment):
    """The environment of an S3 server with a bucket `checkpoints`."""
    s3fs.S3FileSystem(endpoint_url=s3_endpoint, key="key", secret="secret").mkdir("checkpoints")
    return s3_environment


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, storage):
    here = tmp_path_factory.mktemp("ranks")
    (here / "tokenizer").mkdir()
    (here / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (here / "tokenizer" / "stage.json").write_text("{}")
    environment = {**os.environ, **storage, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = Ranks(here, environment | {"MLFLOW_DISABLE_TELEMETRY": "true", "TMPDIR": str(here)})
    yield ranks
    for process in ranks.started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def two(ranks):
    """What two ranks tell; the last they do is to write a checkpoint that one of them, killed then, does not finish."""
    started = ranks.start(TWO, 2)
    record = ranks.here / "killed" / "step-00000005" / "rank-00000.json"
    while not (record.exists() and (ranks.here / "two.json").exists()):
        assert [rank.poll() for rank in started] == [None, None], (ranks.here / "rank0.log").read_text()[-3000:]
        time.sleep(0.05)
    started[1].kill()
    started[0].kill()
    return ranks.told("two")


@pytest.fixture(scope="module")
def one(ranks, two):
    """What one rank tells that comes after the two."""
    return ranks.run(ONE, 1, "one")


@pytest.fixture(scope="module")
def again(ranks, one):
    """And two ranks after that."""
    return ranks.run(AGAIN, 2, "again")


@pytest.mark.parametrize("case", CASES)
def test_a_restored_training_goes_on_bit_for_bit(two, case):
    told = two[case]
    assert len(set(told["whole"])) == 9
    expected = [[6, {"losses": told["whole"][:6]}], told["whole"][6:]]
    assert told["back"] == expected  # in the same process, as after a bad loss
    assert told["anew"] == expected


@pytest.mark.parametrize("case", CASES)
def test_another_number_of_ranks_goes_on_with_the_same_losses(two, one, again, case):
    tolerance = 1e-3 if "bfloat16" in case else 1e-5
    assert one[case][0] == 6
    assert one[case][1] == pytest.approx(two[case]["whole"][6:], abs=tolerance)
    assert again[case] == pytest.approx(one[f"one-{case}"], abs=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_any_stage_is_exported_bit_for_bit(two, ranks, tmp_path, case):
    export_checkpoint(str(ranks.here / case), tmp_path / "model")
    weights = torch.load(ranks.here / f"{case}.pt")
    for kind in (FotLlamaForCausalLM, LlamaForCausalLM):
        model, info = kind.from_pretrained(tmp_path / "model", output_loading_info=True)
        state = model.state_dict()
        assert not info["missing_keys"]
        assert all(torch.equal(state[name], weights[name]) for name in state)
        assert model.dtype == (torch.bfloat16 if "bfloat16" in case else torch.float32)
    assert FotLlamaForCausalLM.from_pretrained(tmp_path / "model").state_dict().keys() == weights.keys()
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("case", PARTS)
def test_a_checkpoint_of_a_part_holds_nothing_of_the_rest(two, ranks, tmp_path, case):
    export_adapter(str(ranks.here / case), tmp_path / "adapter", "float32")
    adapter = Adapter.load(tmp_path / "adapter")
    weights = torch.load(ranks.here / f"{case}.pt")
    names = [name for name in weights if re.search(CASES[case]["part"], name)]
    assert sorted(adapter.tensors) == sorted(names)
    assert all(torch.equal(adapter.tensors[name].to(weights[name].dtype), weights[name]) for name in names)
    assert adapter.training == {"step": 6}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_as_large_as_the_plan_says(two, ranks, case):
    files = [file for file in (ranks.here / case / "step-00000006").iterdir() if file.suffix == ".pt"]
    shape = Shape.of(json.loads((files[0].parent / "model" / "config.json").read_text()))
    settings = {"zero_stage": CASES[case]["stage"], "dtype": CASES[case].get("dtype", "float32")}
    train = {"patterns": [CASES[case]["part"]]} if case in PARTS else "all"
    objective = {"kind": "memorizing", "context": 8, "mem_layers": [1]}
    training = Training.model_validate({"objective": objective, "steps": 9, "deepspeed": settings, "train": train})
    archives = [zipfile.ZipFile(file).infolist() for file in files]
    tensors = sum(entry.file_size for archive in archives for entry in archive if "/data/" in entry.filename)
    planned = checkpoint_bytes(shape, training)
    assert planned <= tensors < 1.001 * planned  # the optimizer counts its steps, too


def test_a_checkpoint_on_another_base_is_refused(two):
    assert re.fullmatch(
        r"zero2-part: the base of the checkpoint of step 6 was not what is in .*/base-None now \(its fingerprint was "
        r"[0-9a-f]{32}\): bring that base back, or set another checkpoints.path",
        two["other base"],
    )


def test_the_pause_the_writing_and_the_restoring_are_timed(two):
    timings = two["zero2"]["timings"]
    assert set(timings) == {f"checkpoint_{what}_seconds" for what in ("pause", "write", "restore")}
    assert all(seconds > 0 for seconds in timings.values())


def test_a_damaged_checkpoint_is_skipped_with_a_line_and_no_longer_complete(two, ranks):
    assert two["damaged"] == {"step": 2, "left": [2]}
    lines = (ranks.here / "rank0.log").read_text()
    file = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert f"checkpoint step-00000003 is damaged ({file}): the one before is taken\n" in lines


def test_a_checkpoint_of_another_training_is_refused(two):
    assert two["refused"] == (
        'damaged: the checkpoint of step 2 was trained with case "damaged", now it is "another": '
        'set another checkpoints.path, or go back to "damaged"'
    )


def test_a_rank_killed_while_it_writes_leaves_nothing_that_is_seen(two, again):
    assert again["killed"]["step"] == 2
    assert again["killed"]["left"] == [2]
    assert again["killed"]["losses"] == two["killed"]
    assert again["killed"]["now"] == [[2, True], [5, True]]


def test_a_full_disk_is_told_at_the_next_save_and_leaves_nothing_that_is_seen(one, ranks):
    assert one["full"] == 28  # ENOSPC
    assert [(found.step, found.complete) for found in CheckpointStore(str(ranks.here / "full")).all()] == [
        (1, True),
        (2, False),
    ]


def test_checkpoints_on_s3_are_restored_at_any_number_of_ranks_and_exported(two, one, storage, tmp_path, monkeypatch):
    assert two["s3"]["anew"] == two["s3"]["whole"]
    assert one["s3"] == pytest.approx(two["s3"]["whole"], abs=1e-5)
    for name, value in storage.items():
        monkeypatch.setenv(name, value)
    export_checkpoint(f"{S3}/step-00000003", tmp_path / "model", "bfloat16")
    assert FotLlamaForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16


def test_nothing_temporary_is_left(two, one, again, ranks):
    assert not list(ranks.here.glob("checkpoint-*"))


# Copies


def test_a_copy_is_as_large_as_what_is_seen_and_shares_what_was_shared():
    buffer = torch.arange(1000.0)
    view = buffer[10:20]
    state = {"a": view, "b": [view.view(2, 5).t(), (buffer[10:20], 3)], "c": torch.Size([2])}
    made = cpu_copy(state, {})
    assert torch.equal(made["a"], view)
    assert torch.equal(made["b"][0], state["b"][0])
    assert made["a"].untyped_storage().nbytes() == 40
    assert made["b"][1][0] is made["a"]
    assert made["b"][1][1] == 3
    assert made["c"] == torch.Size([2])
    buffer.zero_()
    assert made["a"][1] == 11


def test_a_copy_keeps_what_a_modules_state_knows_and_does_not_change_with_it():
    module = torch.nn.Linear(2, 2)
    settings, scaler = {"list": [1]}, SimpleNamespace(scale=1.0)
    made = cpu_copy({"module": module.state_dict(), "settings": settings, "scaler": scaler}, {})
    assert made["module"]._metadata == module.state_dict()._metadata
    settings["list"].append(2)
    scaler.scale = 2.0
    torch.nn.init.zeros_(module.weight)
    assert made["settings"] == {"list": [1]}
    assert made["scaler"].scale == 1.0
    assert not torch.equal(made["module"]["weight"], module.weight)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_lies_beside_the_weights(tmp_path, place):
    (tmp_path / "tokenizer").mkdir()
    train_tokenizer(["the cat sat on the mat"] * 9, 270, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / place
    if file.suffix == ".json":
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "{{ messages }}"}))
    else:
        file.write_text("{{ messages }}")
    config = FotLlamaConfig(
        vocab_size=270, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    for name, content in _model_files(FotLlamaForCausalLM(config), tmp_path / "tokenizer", None).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == "{{ messages }}"
