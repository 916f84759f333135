"""Four ranks, real processes over gloo, against one process that holds all rows.

The file is also the script that starts the ranks, once for all cases: each with the rows spread over all four ranks,
then over teams of two.

Shapes: R rows of all ranks, L tokens a context, H query heads.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import permutations, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fot_model import FotLlamaConfig, FotLlamaForCausalLM, attention_mass
from fot_model.gather import gather_rows
from fot_model.plan import cross_batch_plan, pad_plan

WORLD, R, L = 4, 8, 6
TEAMS = {4: [[0, 1, 2, 3]], 2: [[0, 1], [2, 3]]}
DTYPES = [torch.float64, torch.bfloat16, torch.int64]
TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "mem_layers": [0, 2],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
RELATED = torch.eye(4, dtype=torch.bool).tolist()
SEGMENTS = cross_batch_plan([0, 0, 1, 1, 2, 2, 3, 3], [0, 1] * 4, RELATED, [(0, 2), (1, 3)]).tolist()
UNEQUAL = [[], [], [0, 7], [], [], [6, 2, 1, 0], [], []]  # with four ranks the first and the last see nothing
PREVIOUS = [[], [0], [1], [2], [3], [4], [5], [6]]  # of the row before, on another rank or not
DOCUMENTS = torch.tensor([2, 2, 7, 1, 2, 2, 3, 2])[:, None].repeat(1, L)
DOCUMENTS[:2] = torch.tensor([[7, 7, 7, 5, 5, 5], [5, 5, 5, 5, 7, 7]])  # joined


@dataclass(frozen=True)
class Case:
    """What is trained: the objective, changes of the configuration, and who sees whom."""

    objective: Any = "fot"
    plan: list[list[int]] = field(default_factory=lambda: SEGMENTS)
    config: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool | None = None  # True: reentrant
    joined: bool = False


CASES = {
    "fot": Case(),
    "checkpointed": Case(checkpointing=False),
    "checkpointed, reentrant": Case(checkpointing=True),
    "multi-head": Case(config={"num_key_value_heads": 4}),
    "no positions": Case(config={"mem_positionals": False}),
    "yarn": Case(config={"rope_parameters": YARN}),
    "documents joined": Case(plan=PREVIOUS[:4] + UNEQUAL[4:], joined=True),
    "unequal": Case(plan=UNEQUAL),
    "nobody sees": Case(plan=[[]] * R),
    "memorizing": Case("memorizing"),
    "memorizing, gated": Case("memorizing", config={"mem_gate": True}),
    "memorizing, gated, unequal, checkpointed": Case("memorizing", UNEQUAL, {"mem_gate": True}, checkpointing=False),
    "transformer_xl": Case("transformer_xl", PREVIOUS),
}


def trained(case: Case, ranks: ProcessGroup | None, team: int = 0) -> dict[str, Any]:
    """Loss and gradients of this rank's rows, what it communicated, and its rows' attention mass."""
    torch.manual_seed(team)
    model = tiny(**case.config)
    tokens_RL = torch.randint(0, 40, (R, L + 1))
    tokens_RL[4, 3:] = -100
    labels_RL = tokens_RL[:, 1:]
    if case.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing})
    rank, count = (0, 1) if ranks is None else (ranks.rank(), ranks.size())
    own = slice(rank * R // count, (rank + 1) * R // count)
    batch = {"plan": pad_plan(case.plan[own]), "objective": case.objective, "ranks": ranks}
    if case.joined:
        batch["document_ids"] = DOCUMENTS[own]
    of_rows = DOCUMENTS[own].eq(DOCUMENTS[own, :1]).all()
    documents = DOCUMENTS[own, 0] if of_rows else DOCUMENTS[own]
    measured = attention_mass(model, documents) if case.objective != "transformer_xl" else nullcontext()
    with Collectives() as forward, measured as mass:
        logits = model(tokens_RL[own, :-1].clamp(min=0), use_cache=False, **batch).logits
    token_losses = functional.cross_entropy(logits.flatten(0, 1), labels_RL[own].flatten(), reduction="sum")
    loss = token_losses / (labels_RL >= 0).sum()
    with Collectives() as backward:
        loss.backward()
    masses = {} if mass is None else {layer: (of.positive, of.additional) for layer, of in mass.layers.items()}
    return {
        "loss": loss.detach(),
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "mass": masses,
        "forward": forward.called,
        "backward": backward.called,
    }


class Collectives(TorchDispatchMode):
    """Notes the collectives called and what they return: name and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.called.append((func._schema.name.removeprefix("c10d::"), list(args[0].shape)))
        return func(*args, **(kwargs or {}))


def tiny(**changes: Any) -> FotLlamaForCausalLM:
    model = FotLlamaForCausalLM(FotLlamaConfig(**{**TINY, **changes})).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


def sums_of_large_and_small(ranks: ProcessGroup) -> Tensor:
    """Gradients in bfloat16 of what four ranks gathered: the same four numbers, in another order in each column."""
    orders = torch.tensor(list(permutations([256.0, 1.0, 1.0, 0.0])), dtype=torch.bfloat16)
    x = torch.zeros(1, len(orders), dtype=torch.bfloat16, requires_grad=True)
    gather_rows(x, ranks).backward(orders[:, ranks.rank()].expand(ranks.size(), -1))
    return x.grad


def refusals(ranks: ProcessGroup) -> list[str]:
    """Of plans in which the first of a rank's two rows sees itself, a row beyond the last, and its own future."""
    messages, first = [], 2 * ranks.rank()
    for other, documents in ((first, None), (2 * ranks.size(), None), (first + 1, torch.full((2, 3), 9))):
        with pytest.raises(ValueError, match="plan") as refusal:
            tiny()(torch.ones(2, 3).long(), plan=pad_plan([[other], []]), document_ids=documents, ranks=ranks)
        messages.append(str(refusal.value))
    return messages


def run_rank(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{directory}/meeting"
    distributed.init_process_group("gloo", meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    found: dict[Any, Any] = {}
    for size, teams in TEAMS.items():
        groups = [distributed.new_group(team) for team in teams]
        team = rank // size
        for name, case in CASES.items():
            found[name, size] = trained(case, groups[team], team)
    everyone = distributed.group.WORLD
    found["gathered"] = [gather_rows(own_rows(rank, dtype), everyone) for dtype in DTYPES]
    found["sums"], found["refusals"] = sums_of_large_and_small(everyone), refusals(everyone)
    torch.save(found, directory / f"rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def own_rows(rank: int, dtype: torch.dtype) -> Tensor:
    """Neither contiguous nor alike."""
    return (torch.arange(6).view(3, 2) + 10 * rank).to(dtype).T


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank found."""
    directory = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([sys.executable, __file__, str(directory)], env=environment, check=True)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(WORLD)]


@cache
def whole(name: str, team: int) -> dict[str, Any]:
    """What one process finds that holds all rows of a team."""
    return trained(CASES[name], None, team)


everywhere = pytest.mark.parametrize(("name", "size"), list(product(CASES, TEAMS)), ids=str)


@everywhere
def test_loss_and_gradients_of_all_ranks_together_are_those_of_one_process(
    name: str, size: int, found: list[dict[Any, Any]]
) -> None:
    for number, team in enumerate(TEAMS[size]):
        alone, parts = whole(name, number), [found[rank][name, size] for rank in team]
        close(sum(part["loss"] for part in parts), alone["loss"])
        for parameter, gradient in alone["gradients"].items():
            close(sum(part["gradients"][parameter] for part in parts), gradient)
            assert gradient.abs().max() > 1e-4, "nothing was compared"


@everywhere
def test_attention_mass_of_all_ranks_together_is_that_of_one_process(
    name: str, size: int, found: list[dict[Any, Any]]
) -> None:
    for number, team in enumerate(TEAMS[size]):
        alone, parts = whole(name, number)["mass"], [found[rank][name, size]["mass"] for rank in team]
        for layer, masses in alone.items():
            for which, mass_H in enumerate(masses):
                close(sum(torch.as_tensor(part[layer][which]) for part in parts), torch.as_tensor(mass_H))


@everywhere
def test_each_layer_gathers_once_and_only_what_is_differentiated_is_sent_back(
    name: str, size: int, found: list[dict[Any, Any]]
) -> None:
    case = CASES[name]
    Hk, D = case.config.get("num_key_value_heads", TINY["num_key_value_heads"]), 8
    measures = [("_allgather_base_", [R, Hk, L, D]), ("_allgather_base_", [R, L])]
    gathers, returns = ("_allgather_base_", [R, 2, Hk, L, D]), ("_reduce_scatter_base_", [R // size, 2, Hk, L, D])
    layers = 4 if case.objective == "transformer_xl" else 2
    for rank in range(WORLD):
        forward = [gathers] if case.objective == "transformer_xl" else [*measures, gathers]
        backward = [gathers] * (case.checkpointing is not None) + [returns] * (case.objective == "fot")
        assert found[rank][name, size]["forward"] == forward * layers
        assert found[rank][name, size]["backward"] == backward * layers


def test_the_cases_differ_where_rows_see_others() -> None:
    """So that they can tell whether far rows, their documents and their gradients arrive."""
    losses = {name: whole(name, 0)["loss"].item() for name in CASES}
    assert losses["checkpointed"] == losses["fot"] == losses["memorizing"]
    assert len({losses[name] for name in ("fot", "unequal", "nobody sees", "transformer_xl", "no positions")}) == 5
    fot, memorizing = (whole(name, 0)["gradients"] for name in ("fot", "memorizing"))
    assert any((fot[name] - memorizing[name]).abs().max() > 1e-3 for name in fot)
    positive_H, additional_H = whole("fot", 0)["mass"][2]
    assert (positive_H > 1e-3).all()
    assert (positive_H < additional_H - 1e-3).all()


def test_rows_are_gathered_in_the_order_of_the_ranks(found: list[dict[Any, Any]]) -> None:
    for rank, dtype in product(range(WORLD), DTYPES):
        everything = torch.cat([own_rows(each, dtype) for each in range(WORLD)])
        assert found[rank]["gathered"][DTYPES.index(dtype)].equal(everything)


def test_gradients_in_16_bits_are_summed_in_float32(found: list[dict[Any, Any]]) -> None:
    for rank in range(WORLD):
        assert found[rank]["sums"].dtype == torch.bfloat16
        assert found[rank]["sums"].eq(258).all()


def test_a_plan_is_checked_by_the_numbers_that_its_rows_have_over_all_ranks(found: list[dict[Any, Any]]) -> None:
    for rank in range(WORLD):
        row = 2 * rank
        itself, beyond, future = found[rank]["refusals"]
        assert f"row {row} sees itself" in itself
        assert f"row {row} sees row 8, but the batch has rows 0 to 7" in beyond
        assert f"row {row} sees row {row + 1}, the future of its own document 9" in future


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessGroup]:
    """A group of this process only."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_a_group_of_one_rank_changes_nothing(name: str, alone: ProcessGroup) -> None:
    got, without = trained(CASES[name], alone), whole(name, 0)
    for what in ("loss", "gradients", "mass"):
        torch.testing.assert_close(got[what], without[what], rtol=0, atol=0)


def test_ranks_without_a_plan_are_refused(alone: ProcessGroup) -> None:
    with pytest.raises(ValueError, match=r"ranks.* give them with a plan"):
        tiny()(torch.ones(2, 3).long(), ranks=alone)


def test_a_second_derivative_is_refused(alone: ProcessGroup) -> None:
    x = torch.ones(2, requires_grad=True)
    first = torch.autograd.grad(gather_rows(x, alone).pow(2).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


if __name__ == "__main__":
    # Forked from one process that has imported torch.
    ranks = [get_context("fork").Process(target=run_rank, args=(rank, Path(sys.argv[1]))) for rank in range(WORLD)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))
