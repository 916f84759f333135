"""Memory files of models that are wrapped, offloaded, or spread over two ranks (real processes over gloo).

The file is also the script that starts the ranks, once for all.

Shapes: B batch, L tokens.
"""

import copy
import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from fot_model import FotCache, FotLlamaConfig, FotLlamaForCausalLM
from fot_model.cache_file import sampled_fingerprint

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "local_context": 8,
    "mem_layers": [1],
    "initializer_range": 0.2,
}
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "gate": {"mem_gate": True}, "norm": {"mem_qk_norm": True}}
WORLD = 2


def focused(**changes: Any) -> FotLlamaForCausalLM:
    torch.manual_seed(0)
    model = FotLlamaForCausalLM(FotLlamaConfig(**{**TINY, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("mem_gate", "mem_temperature")):
            parameter.data += torch.arange(4)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fresh(model: Any) -> FotCache:
    cache = FotCache(model.config)
    model(tokens(2, 22), past_key_values=cache)
    return cache


@torch.no_grad()
def goes_on(model: Any, cache: FotCache) -> Tensor:
    return model(tokens(2, 9, seed=1), past_key_values=cache).logits


def assert_same(got: Any, wanted: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def test_compiled_or_in_a_wrapper_it_is_the_same_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.config = module, module.config

    for changes in ({}, {"tie_word_embeddings": True}):
        model: Any = focused(**changes)
        assert (
            sampled_fingerprint(Wrapper(model))
            == sampled_fingerprint(torch.compile(model))
            == sampled_fingerprint(model)
        )


def test_an_adapter_counts_where_it_is_on_merged_or_not() -> None:
    from peft import LoraConfig, get_peft_model

    base = sampled_fingerprint(focused())
    settings = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    model = get_peft_model(focused(), settings).eval()
    on = sampled_fingerprint(model)
    assert on != base
    with model.disable_adapter():
        assert sampled_fingerprint(model) == base
    model.merge_adapter()
    assert sampled_fingerprint(model) == on
    model.unmerge_adapter()
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is FotLlamaForCausalLM
    assert sampled_fingerprint(merged) == on


def test_what_is_read_with_an_adapter_is_refused_without_it_and_read_on_where_it_is_merged(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(focused(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    cache = fresh(model)
    cache.save(tmp_path / "book", model)
    with model.disable_adapter(), pytest.raises(ValueError, match="another model"):
        FotCache.load(tmp_path / "book", model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_same(goes_on(merged, FotCache.load(tmp_path / "book", merged)), goes_on(model, cache))


def test_a_model_offloaded_to_disk_has_the_same_fingerprint_and_reads_on(tmp_path: Path) -> None:
    from accelerate import disk_offload

    model = focused()
    whole = sampled_fingerprint(model)
    cache = fresh(model)
    cache.save(tmp_path / "book", model)
    wanted = goes_on(model, cache)
    disk_offload(model, str(tmp_path / "offloaded"), execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in model.parameters())
    assert sampled_fingerprint(model) == whole
    assert_same(goes_on(model, FotCache.load(tmp_path / "book", model)), wanted)
    fresh(model).save(tmp_path / "again", model)
    assert_same(goes_on(model, FotCache.load(tmp_path / "again", model)), wanted)


class Quantized(Tensor):
    """As torchao's kinds of tensors: of its own type, with a way back."""

    @staticmethod
    def __new__(cls, whole: Tensor) -> "Quantized":
        return Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype)

    def __init__(self, whole: Tensor) -> None:
        self.numbers = (whole * 64).round()

    def dequantize(self) -> Tensor:
        return self.numbers / 64

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a quantized tensor")


def test_quantized_weights_are_told_apart_by_what_they_stand_for() -> None:
    names = set()
    for change in (0.0, 0.5):
        model = focused()
        up = model.model.layers[0].mlp.up_proj
        up.weight = nn.Parameter(Quantized(up.weight.data + change), requires_grad=False)
        names.add(sampled_fingerprint(model))
        up.weight = nn.Parameter(up.weight.dequantize())
        names.add(sampled_fingerprint(model))
    assert len(names) == 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The directory, and what each of two ranks found."""
    directory = tmp_path_factory.mktemp("ranks")
    for name, changes in KINDS.items():
        model = focused(**changes)
        model.save_pretrained(directory / name)
        fresh(model).save(directory / f"{name}.whole", model)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(directory)], env=environment, check=True)
    return directory, [torch.load(directory / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("how", ["tensor parallel", "FSDP"])
def test_sharded_models_read_save_and_load_memory_as_a_whole_one_does(
    how: str, name: str, ranks: tuple[Path, list[dict[str, Any]]]
) -> None:
    directory, found = ranks
    model = focused(**KINDS[name])
    wanted = goes_on(model, fresh(model))
    for rank in range(WORLD):
        for where in ("went on", "from its file", "from the whole model's file"):
            assert_same(found[rank][how, name, where], wanted)
    assert_same(goes_on(model, FotCache.load(directory / f"{name}.{how}", model)), wanted)


def run_rank(rank: int, directory: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    store = distributed.FileStore(str(directory / "store"), WORLD)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found: dict[Any, Tensor] = {}
    mesh = init_device_mesh("cpu", (WORLD,))
    for name, changes in KINDS.items():
        for how in ("tensor parallel", "FSDP"):
            if how == "FSDP":
                model: Any = focused(**changes)
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
                path = directory / f"{name}.{how}"
                own = path if rank == 0 else path.with_suffix(f".{rank}")  # each rank its own rows
            else:
                model = FotLlamaForCausalLM.from_pretrained(directory / name, tp_plan="auto", tp_size=WORLD).eval()
                own = directory / f"{name}.{how}"
            cache = fresh(model)
            cache.save(own, model)
            found[how, name, "went on"] = goes_on(model, cache)
            found[how, name, "from its file"] = goes_on(model, FotCache.load(own, model))
            found[how, name, "from the whole model's file"] = goes_on(
                model, FotCache.load(directory / f"{name}.whole", model)
            )
    torch.save(found, directory / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    processes = [get_context("fork").Process(target=run_rank, args=(rank, Path(sys.argv[1]))) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
