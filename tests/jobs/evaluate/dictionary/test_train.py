"""Training on the dictionary task: it learns, and a kill changes nothing.

Shapes: R rows, L tokens.
"""

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fot_model import FotLlamaForCausalLM
from jobs.config.dictionary import DictionaryOptimizer, DictionaryShape, Phase
from jobs.evaluate.dictionary.task import training_batch
from jobs.evaluate.dictionary.train import batch_loss, build_model, like_training, plan_of, schedule, train_seed
from jobs.train.metrics import read_metrics
from jobs.train.optimizer import make_optimizer
from pipelines.workflow.errors import UserError

WORKER = """
import sys
from pathlib import Path
from jobs.config.dictionary import DictionaryRecipe
from jobs.evaluate.dictionary.train import train_seed
train_seed(DictionaryRecipe.model_validate_json(sys.argv[1]), 1, Path(sys.argv[2]))
"""


def weights(output: Path) -> bytes:
    return (output / "model" / "model.safetensors").read_bytes()


def losses(output: Path) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(output / "metrics.jsonl")]


def test_a_killed_training_goes_on_to_the_same_bits(make_recipe, tmp_path: Path) -> None:
    recipe = make_recipe(
        phases=[{"steps": 70, "records": 3, "documents": 4}, {"steps": 10, "records": 6, "documents": 4, "d": 4}]
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    process = subprocess.Popen([sys.executable, "-c", WORKER, recipe.model_dump_json(), str(killed)])
    deadline = time.monotonic() + 120
    while len(read_metrics(killed / "metrics.jsonl")) < 23:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(killed / "checkpoint.pt", weights_only=True)["done"]
    assert 20 <= done < 80
    assert not (killed / "model").exists()
    train_seed(recipe, 1, killed)
    train_seed(recipe, 1, whole)
    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == 80
    assert weights(killed) == weights(whole)
    assert [path.name for path in sorted(killed.iterdir())] == ["metrics.jsonl", "model"]
    cpu = [line["cpu_seconds"] for line in read_metrics(killed / "metrics.jsonl")]
    assert cpu == sorted(cpu), "CPU time counts on"


def test_a_finished_training_is_left_alone(make_recipe, tmp_path: Path) -> None:
    train_seed(make_recipe(), 0, tmp_path)
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns, losses(tmp_path)
    train_seed(make_recipe(), 0, tmp_path)
    assert ((tmp_path / "model" / "model.safetensors").stat().st_mtime_ns, losses(tmp_path)) == before


def test_a_checkpoint_of_another_training_is_refused(make_recipe, tmp_path: Path) -> None:
    recipe, other = make_recipe(), make_recipe(optimizer={"learning_rate": 1e-4})
    train_seed(recipe, 0, tmp_path / "model_there")
    for changed, seed in ((other, 0), (recipe, 1)):
        output = tmp_path / f"{changed.training.optimizer.learning_rate}-{seed}"
        output.mkdir()
        torch.save({"training": "0"}, output / "checkpoint.pt")
        with pytest.raises(
            UserError, match=r"checkpoint\.pt is of another training \(other settings or seed\): remove"
        ):
            train_seed(changed, seed, output)


def test_seeds_make_other_models(make_recipe, tmp_path: Path) -> None:
    shape = make_recipe().model
    one, same, other = (build_model(shape, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_the_model_that_is_saved_is_the_one_that_was_trained(make_recipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    train_seed(recipe, 0, tmp_path)
    model = FotLlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert (model.config.mem_layers, model.config.mem_positionals, model.config.mem_qk_norm) == ([1], False, True)
    assert model.config.window == 256
    temperature = model.model.layers[1].self_attn.mem_temperature.mean().item()
    assert temperature == pytest.approx(read_metrics(tmp_path / "metrics.jsonl")[-1]["temperature"])


def test_it_learns_to_look_up_the_only_record() -> None:
    model = build_model(DictionaryShape(hidden_size=64, intermediate_size=96, head_dim=32), 0).train()
    optimizer = make_optimizer(model, like_training(DictionaryOptimizer(learning_rate=3e-3)))
    phase, accuracies = Phase(steps=200, records=1, documents=32), [0.0]
    while accuracies[-1] < 0.9 and len(accuracies) <= phase.steps:
        loss, accuracy = batch_loss(model, phase, 0, len(accuracies) - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracies.append(accuracy.item())
    assert accuracies[-1] >= 0.9, "nothing but memory holds the answer"


def test_the_loss_is_that_of_the_questions_value_tokens(make_recipe) -> None:
    recipe = make_recipe()
    phase = recipe.training.phases[1]
    model = build_model(recipe.model, 0)
    loss, accuracy = batch_loss(model, phase, 5, 8)
    tokens, _ = training_batch(5, 8, 4, 2, 6, 3)  # step 8 takes the first of two numbers of symbols
    rows = torch.from_numpy(tokens)
    logits = model(rows, plan=torch.tensor([[-1] * 3] * 4 + [[0, 1, 2], [1, 2, 3]])).logits
    wrong, right = [], 0
    for row in (4, 5):
        for question in range(6):
            for place in range(10 * question + 6, 10 * question + 10):
                wrong.append(functional.cross_entropy(logits[row, place - 1], rows[row, place]))
                right += int(logits[row, place - 1].argmax() == rows[row, place])
    torch.testing.assert_close(loss, torch.stack(wrong).mean())
    assert accuracy.item() == pytest.approx(right / 48)


def test_questions_see_their_own_document_and_the_next_ones() -> None:
    assert plan_of(4, 4, 1).tolist() == [[-1]] * 4 + [[0], [1], [2], [3]]
    assert plan_of(4, 2, 3).tolist() == [[-1] * 3] * 4 + [[0, 1, 2], [1, 2, 3]]
    assert plan_of(3, 3, 3).tolist()[3:] == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


def test_learning_rates_follow_the_phases(make_recipe) -> None:
    steps = list(schedule(make_recipe().training.phases))
    assert [step for step, _, _ in steps] == list(range(12))
    assert [phase.records for _, phase, _ in steps] == [3] * 6 + [6] * 6
    assert [rate for _, _, rate in steps] == pytest.approx([1.0] * 6 + [1 - 0.8 * place / 6 for place in range(6)])


def test_temperatures_have_a_rate_of_their_own_and_no_decay(make_recipe) -> None:
    recipe = make_recipe(optimizer={"learning_rate": 1e-3, "temperature_learning_rate": 0.5, "weight_decay": 0.1})
    settings = like_training(recipe.training.optimizer)
    rest, temperatures = make_optimizer(build_model(recipe.model, 0), settings).param_groups
    assert [parameter.shape for parameter in temperatures["params"]] == [torch.Size([2])]
    assert (temperatures["lr"], temperatures["weight_decay"]) == (0.5, 0.0)
    assert (rest["lr"], rest["weight_decay"]) == (1e-3, 0.1)


def test_the_first_steps_warm_up(make_recipe, tmp_path: Path) -> None:
    train_seed(make_recipe(optimizer={"learning_rate": 1e-3, "warmup_steps": 4}), 0, tmp_path)
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates[:6] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_a_phase_holds_temperatures_and_the_next_lets_them_go(make_recipe, tmp_path: Path) -> None:
    held = {"steps": 3, "records": 3, "documents": 4, "temperature": 20.0}
    recipe = make_recipe(phases=[held, {"steps": 3, "records": 3, "documents": 4}])
    train_seed(recipe, 0, tmp_path)
    at = [line["temperature"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert at[:3] == [20.0] * 3
    assert all(one != other for one, other in itertools.pairwise(at[2:]))
