import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM

from fot_model import Adapter, FotLlamaConfig, FotLlamaForCausalLM, fingerprint
from jobs.cli.fot import fot
from jobs.train.checkpoint_store import CheckpointStore, Record
from jobs.train.export import WEIGHTS, export, export_adapter, export_checkpoint
from jobs.workflow.workspace import WorkDir
from pipelines.tokens.tokenizer import train_tokenizer
from pipelines.workflow.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the cat sat on the mat"] * 20, 270, directory)
    return directory


@pytest.fixture
def save(tmp_path, tokenizer):
    """Write the checkpoint that one rank without ZeRO writes. Returns its model."""

    def write(
        step: int = 1, dtype: str = "float32", ranks=(0,), world: int = 1, says_tied: bool | None = None
    ) -> FotLlamaForCausalLM:
        torch.manual_seed(step)
        config = FotLlamaConfig(
            vocab_size=270, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=8, mem_layers=[1], mem_gate=True, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model = FotLlamaForCausalLM(config).to(getattr(torch, dtype))
        torch.nn.init.normal_(model.model.layers[1].self_attn.mem_gate)
        model.generation_config.max_new_tokens = 7
        store = CheckpointStore(str(tmp_path / "checkpoints"))
        contents = {file.name: file.read_bytes() for file in tokenizer.iterdir()}
        said = {} if says_tied is None else {"tie_word_embeddings": says_tied}
        contents["config.json"] = json.dumps({**model.config.to_dict(), **said}).encode()
        contents["generation_config.json"] = model.generation_config.to_json_string().encode()
        files = {}
        for name, content in contents.items():
            files[f"model/{name}"] = store.write(step, f"model/{name}", lambda stream, c=content: stream.write(c))
        files[WEIGHTS] = store.write(step, WEIGHTS, partial(torch.save, {"module": model.state_dict()}))
        for rank in ranks:
            store.write_record(Record(step, rank, world, {} if rank else files, {}, {}, dtype, 0.0))
        return model

    return write


GATE = "model.layers.1.self_attn.mem_gate"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def part(save, checkpoints, tokenizer, tmp_path):
    """Write a checkpoint of a training in part, and its base with a tokenizer. Returns the model."""
    model = save()
    model.save_pretrained(tmp_path / "base")
    for file in tokenizer.glob("*.json"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    adapter = Adapter(fingerprint(model), {"mem_layers": [1], "mem_gate": True}, {"seed": 0})
    adapter.save(tmp_path / "empty")
    store, record = CheckpointStore(str(checkpoints)), CheckpointStore(str(checkpoints)).all()[0].records[0]
    files = {**record.files}
    for file in (tmp_path / "empty").iterdir():
        name, content = f"model/{file.name}", file.read_bytes()
        files[name] = store.write(1, name, lambda stream, c=content: stream.write(c))
    torch.nn.init.normal_(model.get_parameter(QUERY))
    torch.nn.init.normal_(model.get_parameter(GATE))
    trained = {name: model.state_dict()[name] for name in (QUERY, GATE)}
    files[WEIGHTS] = store.write(1, WEIGHTS, partial(torch.save, {"module": trained}))
    base = {"path": str(tmp_path / "base"), "fingerprint": adapter.base}
    store.write_record(replace(record, files=files, base=base))
    return model


def equal(directory: Path, model: FotLlamaForCausalLM) -> bool:
    state = FotLlamaForCausalLM.from_pretrained(directory).state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_part_is_exported_on_its_base(part, checkpoints, tmp_path):
    export_checkpoint(str(checkpoints), tmp_path / "model")
    assert equal(tmp_path / "model", part)
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "tokenizer.json"} <= names
    assert not {"adapter.json", "adapter.safetensors"} & names


class Ran:
    """What runs a command when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("as_adapter", [True, False])
def test_a_checkpoint_that_holds_code_is_refused_and_does_not_run_it(part, checkpoints, tmp_path, as_adapter):
    store = CheckpointStore(str(checkpoints))
    record = store.all()[0].records[0]
    content = {"module": {QUERY: torch.zeros(1)}, "more": Ran(f"touch {tmp_path}/ran")}
    files = {**record.files, WEIGHTS: store.write(1, WEIGHTS, partial(torch.save, content))}
    store.write_record(replace(record, files=files))
    with pytest.raises(UserError, match=rf"{WEIGHTS} holds \w+\.system, which to load would be to run"):
        export(str(checkpoints), tmp_path / "model", None, as_adapter=as_adapter, base=None)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "model").exists()


def test_a_part_is_exported_as_an_adapter_and_put_on_its_base_again(part, checkpoints, tmp_path):
    export(str(checkpoints), tmp_path / "adapter", None, as_adapter=True, base=None)
    adapter = Adapter.load(tmp_path / "adapter")
    assert {*adapter.tensors} == {QUERY, GATE}
    assert adapter.training == {"seed": 0, "step": 1}
    export(str(tmp_path / "adapter"), tmp_path / "model", None, as_adapter=False, base=tmp_path / "base")
    assert equal(tmp_path / "model", part)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "</s>"
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "checkpoints", "empty", "model"]


def test_a_base_that_is_gone_or_another_is_a_line(part, checkpoints, tmp_path):
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=rf"^the base of the adapter is not in {tmp_path}/base: say where it is \(--base"
    ):
        export_checkpoint(str(checkpoints), tmp_path / "model")
    part.save_pretrained(tmp_path / "base")
    with pytest.raises(
        UserError, match=rf"^the adapter was trained from another base than {tmp_path}/base: its base's "
    ):
        export_checkpoint(str(checkpoints), tmp_path / "model")
    export_checkpoint(str(checkpoints), tmp_path / "model", base=tmp_path / "moved")
    assert equal(tmp_path / "model", part)


def test_what_is_no_adapter_or_has_none_is_a_line(save, part, checkpoints, tmp_path):
    export_adapter(str(checkpoints), tmp_path / "adapter")
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/adapter is an adapter already: with --base CHECKPOINT it becomes"
    ):
        export(str(tmp_path / "adapter"), tmp_path / "model", None, as_adapter=True, base=None)
    save(2)
    with pytest.raises(UserError, match=r"step-00000002: all parameters were trained, which is no adapter: export it"):
        export_adapter(str(checkpoints), tmp_path / "other")


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    return tmp_path / "checkpoints"


def test_the_newest_complete_checkpoint_is_exported_with_its_tokenizer(save, checkpoints, tmp_path):
    save(1)
    model = save(2)
    save(3, world=2)
    export_checkpoint(str(checkpoints), tmp_path / "out" / "model")
    loaded = FotLlamaForCausalLM.from_pretrained(tmp_path / "out" / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert loaded.config.mem_layers == [1]
    assert loaded.config.mem_gate
    assert loaded.generation_config.max_new_tokens == 7
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out" / "model").config.vocab_size == 270
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model").eos_token == "</s>"
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["architectures"] == ["FotLlamaForCausalLM"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model"]


def test_a_step_may_be_named(save, checkpoints, tmp_path):
    model = save(1)
    save(2)
    export_checkpoint(str(checkpoints / "step-00000001"), tmp_path / "model")
    loaded = FotLlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_the_dtype_is_that_of_the_training_unless_another_is_named(save, checkpoints, tmp_path, trained, dtype):
    model = save(dtype=trained)
    export_checkpoint(str(checkpoints), tmp_path / "model", dtype)
    expected = getattr(torch, dtype or trained)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            assert torch.equal(file.get_tensor(name), model.state_dict()[name].to(expected))
            assert file.get_tensor(name).dtype == expected
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == (dtype or trained)


def test_no_checkpoint_is_a_line(save, checkpoints, tmp_path):
    with pytest.raises(UserError, match=rf"^{checkpoints} holds no checkpoint: give a step-… directory"):
        export_checkpoint(str(checkpoints), tmp_path / "model")
    save(1)
    with pytest.raises(UserError, match=rf"^{checkpoints} holds no checkpoint step-00000002: "):
        export_checkpoint(str(checkpoints / "step-00000002"), tmp_path / "model")


def test_an_incomplete_checkpoint_is_a_line(save, checkpoints, tmp_path):
    save(1)
    save(2, ranks=(0, 2), world=3)
    with pytest.raises(UserError, match=rf"^{checkpoints}: step-00000002 is incomplete \(nothing of rank 1\): "):
        export_checkpoint(str(checkpoints / "step-00000002"), tmp_path / "model")


@pytest.mark.parametrize("name", [WEIGHTS, "model/config.json"])
def test_a_damaged_checkpoint_is_a_line_and_leaves_nothing(save, checkpoints, tmp_path, name):
    save()
    file = checkpoints / "step-00000001" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{checkpoints}: step-00000001/{name} is damaged or missing: "):
        export_checkpoint(str(checkpoints), tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["checkpoints"]


def test_an_existing_target_is_not_touched(save, checkpoints, tmp_path):
    save()
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=rf"^{tmp_path}/model exists: remove it, or export to another directory"):
        export_checkpoint(str(checkpoints), tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


def test_an_unknown_dtype_is_a_line(checkpoints, tmp_path):
    with pytest.raises(UserError, match=r"^'int8' is no dtype to export: choose one of float32, bfloat16, float16"):
        export_checkpoint(str(checkpoints), tmp_path / "model", "int8")


def test_an_adapter_is_put_on_a_base_that_is_no_directory(write_gguf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf")
    base = FotLlamaForCausalLM.from_pretrained(WorkDir("test", "runs").find_model("tiny.gguf"), mem_layers=[1])
    name = "model.layers.1.self_attn.q_proj.weight"
    adapter = Adapter(fingerprint(base), {"mem_layers": [1]}, tensors={name: torch.ones_like(base.get_parameter(name))})
    adapter.save(tmp_path / "adapter")
    fot(["export", "adapter", "model", "--base", "tiny.gguf"], standalone_mode=False)
    made = FotLlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert made.config.mem_layers == [1]
    assert torch.equal(made.get_parameter(name), adapter.tensors[name])
    assert torch.equal(made.model.embed_tokens.weight, base.model.embed_tokens.weight)


def test_an_output_layer_of_its_own_is_exported_whatever_the_configuration_says(save, checkpoints, tmp_path):
    model = save(says_tied=True)
    export_checkpoint(str(checkpoints), tmp_path / "model")
    assert equal(tmp_path / "model", model)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)


def test_an_output_layer_that_a_part_trained_is_exported(part, save, checkpoints, tmp_path):
    model = save(says_tied=True)
    store = CheckpointStore(str(checkpoints))
    record, own = store.all()[0].records[0], torch.randn(270, 16)
    model.save_pretrained(tmp_path / "other")
    adapter = Adapter(fingerprint(model), {"mem_layers": [1], "mem_gate": True})
    adapter.save(tmp_path / "none")
    files = {**record.files}
    for file in (tmp_path / "none").iterdir():
        files[f"model/{file.name}"] = store.write(
            1, f"model/{file.name}", lambda stream, f=file: stream.write(f.read_bytes())
        )
    files[WEIGHTS] = store.write(1, WEIGHTS, partial(torch.save, {"module": {"lm_head.weight": own}}))
    base = {"path": str(tmp_path / "other"), "fingerprint": adapter.base}
    store.write_record(replace(record, files=files, base=base))
    export_checkpoint(str(checkpoints), tmp_path / "model")
    exported = FotLlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(exported.lm_head.weight, own)
    assert torch.equal(exported.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_what_was_written_is_compared_with_what_was_trained(save, checkpoints, tmp_path, monkeypatch):
    save()
    whole = FotLlamaForCausalLM.save_pretrained

    def wrong(model, *arguments, **how):
        with torch.no_grad():
            model.get_parameter(QUERY)[3, 3] += 1e-2
        whole(model, *arguments, **how)

    monkeypatch.setattr(FotLlamaForCausalLM, "save_pretrained", wrong)
    with pytest.raises(AssertionError, match="is not what was trained"):
        export_checkpoint(str(checkpoints), tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["checkpoints"]
