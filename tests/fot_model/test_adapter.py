"""Adapters: kept, loaded, put on their base, and on no other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fot_model import Adapter, FotLlamaConfig, FotLlamaForCausalLM, Lora, fingerprint
from fot_model.adapter import settings_of

QUERY = "model.layers.1.self_attn.q_proj"


def make_model(seed: int = 0, **changes: object) -> FotLlamaForCausalLM:
    torch.manual_seed(seed)
    config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 8, "tie_word_embeddings": True}
    return FotLlamaForCausalLM(FotLlamaConfig(**config | {"bos_token_id": 1, "eos_token_id": 2} | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(path)
    return path


@pytest.fixture
def trained() -> FotLlamaForCausalLM:
    """The base with another query projection, a gate, and memory in layer 1."""
    model = make_model(mem_layers=[1], mem_gate=True, local_context=4)
    model.load_state_dict(make_model().state_dict(), strict=False)
    torch.nn.init.normal_(model.model.layers[1].self_attn.q_proj.weight)
    torch.nn.init.normal_(model.model.layers[1].self_attn.mem_gate)
    return model


@pytest.fixture
def adapter(base, trained) -> Adapter:
    names = [f"{QUERY}.weight", "model.layers.1.self_attn.mem_gate"]
    tensors = {name: trained.state_dict()[name].clone() for name in names}
    own = fingerprint(FotLlamaForCausalLM.from_pretrained(base))
    return Adapter(own, settings_of(trained.config), {"steps": 3}, tensors=tensors)


def test_a_base_with_its_adapter_is_what_was_trained(base, trained, adapter, tmp_path):
    adapter.save(tmp_path / "adapter")
    model, info = FotLlamaForCausalLM.from_pretrained(base, adapter=tmp_path / "adapter", output_loading_info=True)
    assert not info["missing_keys"]
    assert (model.config.mem_layers, model.config.mem_gate, model.config.window) == ([1], True, 4)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    ids = torch.arange(20)[None] + 3
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, trained.eval()(ids).logits)


def test_it_is_read_as_it_was_kept(adapter, tmp_path):
    adapter.save(tmp_path)
    found = Adapter.load(tmp_path)
    assert (found.base, found.settings, found.training, found.lora) == (
        adapter.base,
        adapter.settings,
        {"steps": 3},
        None,
    )
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in adapter.tensors.items())
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.json", "adapter.safetensors"}


def test_settings_that_are_given_come_before_the_adapters(base, adapter):
    model = FotLlamaForCausalLM.from_pretrained(base, adapter=adapter, local_context=6, dtype="bfloat16")
    assert (model.config.window, model.dtype) == (6, torch.bfloat16)
    expected = adapter.tensors[f"{QUERY}.weight"].bfloat16()
    assert torch.equal(model.state_dict()[f"{QUERY}.weight"], expected)


def test_an_adapter_is_not_rounded_to_its_bases_number_type(adapter, tmp_path):
    make_model().bfloat16().save_pretrained(tmp_path)
    made = replace(adapter, base=fingerprint(FotLlamaForCausalLM.from_pretrained(tmp_path)))
    model = FotLlamaForCausalLM.from_pretrained(tmp_path, adapter=made, dtype=torch.float32)
    assert torch.equal(model.state_dict()[f"{QUERY}.weight"], adapter.tensors[f"{QUERY}.weight"])
    assert FotLlamaForCausalLM.from_pretrained(tmp_path, adapter=made).dtype == torch.bfloat16


def test_another_base_is_refused(adapter, tmp_path):
    make_model(seed=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^the adapter was trained from another base than {tmp_path}: its base's "):
        FotLlamaForCausalLM.from_pretrained(tmp_path, adapter=adapter)


def test_neither_layout_nor_number_type_nor_memory_is_in_the_fingerprint(base, tmp_path):
    own = fingerprint(FotLlamaForCausalLM.from_pretrained(base))
    model = make_model()
    model.save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert fingerprint(FotLlamaForCausalLM.from_pretrained(tmp_path / "shards", mem_layers=[0], local_context=4)) == own
    half = make_model().bfloat16()
    assert fingerprint(half) != own
    assert fingerprint(half) == fingerprint(half.float())
    wider, info = FotLlamaForCausalLM.from_pretrained(base, mem_layers=[1], mem_gate=True, output_loading_info=True)
    assert fingerprint(wider) != own
    assert fingerprint(wider, info["missing_keys"]) == own


@pytest.mark.parametrize(
    "changes",
    [{"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rms_norm_eps": 1e-5}, {"hidden_act": "gelu"}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_computes_otherwise_has_another_fingerprint(changes):
    assert fingerprint(make_model(**changes)) != fingerprint(make_model())


def test_a_number_that_float32_rounds_is_the_same():
    one, other = (fingerprint(make_model(rms_norm_eps=eps)) for eps in (1e-5, 9.999999747378752e-06))
    assert one == other


def test_a_weight_that_differs_in_one_bit_has_another_fingerprint():
    model = make_model()
    own, weight = fingerprint(model), model.model.norm.weight
    with torch.no_grad():
        weight[3] = torch.nextafter(weight[3], torch.tensor(2.0))
    assert fingerprint(model) != own


def test_pairs_are_added_as_lora_says(base, adapter):
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    tensors = {f"{QUERY}.lora_A.weight": a, f"{QUERY}.lora_B.weight": b}
    lora = Adapter(adapter.base, {"mem_layers": [1]}, lora=Lora(2, 6.0, ("q_proj",)), tensors=tensors)
    weight = FotLlamaForCausalLM.from_pretrained(base, adapter=lora).state_dict()[f"{QUERY}.weight"]
    expected = make_model().state_dict()[f"{QUERY}.weight"] + 3 * b @ a
    assert torch.allclose(weight, expected, atol=1e-6)


def change_json(**changes: object):
    def change(path: Path) -> None:
        said = json.loads((path / "adapter.json").read_text())
        (path / "adapter.json").write_text(json.dumps(said | changes))

    return change


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path / "adapter.safetensors")
    save_file(dict(list(tensors.items())[1:]), path / "adapter.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "adapter.json").unlink(), r"is no adapter: it has no adapter.json$"),
        (lambda path: (path / "adapter.safetensors").unlink(), r"is no adapter: it has no adapter.safetensors$"),
        (lambda path: (path / "adapter.json").write_text("{"), r"is damaged \(JSONDecodeError"),
        (lambda path: (path / "adapter.json").write_text("{}"), r"is damaged \(KeyError: 'format'\)$"),
        (lambda path: (path / "adapter.safetensors").write_bytes(b"no"), r"is damaged \(SafetensorError"),
        (change_json(format=2), r"has format 2, this version reads 1$"),
        (change_json(settings={"trust_remote_code": True}), r"sets trust_remote_code, which is no adapter's to set$"),
        (drop_a_tensor, r"is damaged: adapter.safetensors holds other tensors than adapter.json says$"),
    ],
)
def test_what_is_no_whole_adapter_is_one_line(adapter, tmp_path, damage, message):
    adapter.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Adapter.load(tmp_path)


def test_a_tensor_without_place_is_named(adapter, base):
    made = Adapter(adapter.base, {}, tensors={"model.layers.7.mlp.up_proj.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"^the adapter holds model.layers.7.mlp.up_proj.weight, the model has no "):
        FotLlamaForCausalLM.from_pretrained(base, adapter=made)
