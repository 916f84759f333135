import importlib.util
import json
import pickle
import random
import statistics
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from fot_model import FotLlamaForCausalLM
from jobs.config.evaluation import LmEval, MemorySettings
from jobs.evaluate import lm_eval_tasks
from jobs.evaluate.harness import FotLM
from jobs.evaluate.lm_eval_tasks import cells, compare, quiet, task_manager
from jobs.evaluate.subject import Subject, load_model, memory_bytes, read_tokenizer
from pipelines.tokens.tokenizer import train_tokenizer
from pipelines.workflow.errors import UserError

LOCAL = 64
WORDS = ["cat", "dog", "sat", "ran", "the", "mat", "on", "fast"]
OWN = ("choose", "rolling", "spell")


def text(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LLaMAs of random weights; only "model" knows of memory. Their tokenizer puts bos before, for the harness's
    own model."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for seed, who in enumerate(("base", "model")):
        directory = made[who] = root / who
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LOCAL,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
        )
        LlamaForCausalLM(config).save_pretrained(directory)
        train_tokenizer([text(300, 0)], 300, directory)
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.save(str(directory / "tokenizer.json"))
    config = FotLlamaForCausalLM.from_pretrained(root / "model", mem_layers=[1]).config
    config.local_context = LOCAL
    config.save_pretrained(root / "model")
    return made


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of each kind, within a local context, and one that goes beyond it."""
    root = tmp_path_factory.mktemp("tasks")
    rows = [
        {"text": text(12, n), "choices": ["the mat", "fast", "dog sat on"], "gold": n % 3, "long": text(150, n)}
        for n in range(10)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(root / "rows.jsonl")}, "cache_dir": str(root / "cache")},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    choose = {
        "output_type": "multiple_choice",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    spell = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n", " the"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **mean}],
    }
    named = {"choose": choose, "rolling": rolling, "spell": spell, "choose_far": {**choose, "doc_to_text": "{{long}}"}}
    named["draws"] = {**spell, "generation_kwargs": {"until": ["\n"], "do_sample": True}}
    for name, task in named.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    return root


@pytest.fixture
def settings(tasks: Path) -> LmEval:
    return LmEval(tasks=(*OWN, "choose_far"), include=str(tasks))


@pytest.fixture
def subject(models: dict[str, Path]) -> Subject:
    return Subject(models, LOCAL, 0)


@pytest.fixture
def fot(models: dict[str, Path]) -> FotLM:
    return FotLM(models["model"], LOCAL, batch_size=3)


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, n, ("t", n, 1)) for n, each in enumerate(arguments)]


@torch.inference_mode()
def direct(fot: FotLM, context: str, continuation: str) -> tuple[float, bool]:
    """By one call of the model, which reads whatever the length."""
    begin, ids = len(fot.tok_encode(context)), fot.tok_encode(context + continuation)
    logits = fot.model(torch.tensor([ids])).logits[0].log_softmax(-1)[begin - 1 : -1]
    wanted = torch.tensor(ids[begin:])
    return float(logits.gather(1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("words", [[3, 9, 2, 20, 7], [200, 5, 90], [61, 62, 63, 64]])
def test_a_loglikelihood_is_the_sum_of_log_probabilities_within_and_beyond_the_local_context(
    fot: FotLM, words: list[int]
) -> None:
    pairs = [(text(count, count), f" {text(1 + count % 4, n)}") for n, count in enumerate(words)]
    pairs.append((text(4, 0), f" {text(100, 1)}"))  # a continuation of several windows
    expected = [direct(fot, *pair) for pair in pairs]
    found = fot.loglikelihood(asked("loglikelihood", *pairs))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]


@pytest.mark.parametrize("count", [5, 62, 250])
def test_the_greedy_continuation_is_said_to_be_it_and_one_with_another_token_not(fot: FotLM, count: int) -> None:
    ids = [0, *(random.Random(count).choices(range(300), k=count))]
    made = fot.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=1)[0].tolist()
    right = made[len(ids) :]
    wrong = [[*right[:n], (right[n] + 1) % 300, *right[n + 1 :]] for n in (0, 2, 4)]
    found = fot._loglikelihood_tokens([(("", ""), ids, answer) for answer in (right, *wrong)])
    assert [is_greedy for _, is_greedy in found] == [True, False, False, False]


def test_an_input_within_the_local_context_is_read_at_once_whatever_a_checkpoint_says(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """LongLLaMA's configuration leaves fewer tokens local."""
    for file in models["model"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "last_context_length": 8}))
    pair = asked("loglikelihood", (text(30, 1), " the mat"))
    assert FotLM(tmp_path, LOCAL).model.config.last_context_length == 8
    found, expected = (FotLM(path, LOCAL).loglikelihood(pair)[0][0] for path in (tmp_path, models["model"]))
    assert found == pytest.approx(expected, rel=1e-5)


def test_an_empty_context_is_bos(fot: FotLM) -> None:
    assert fot.loglikelihood(asked("loglikelihood", ("", "the cat"))) == [
        (pytest.approx(direct(fot, "", "the cat")[0], rel=1e-5), False)
    ]


@pytest.mark.parametrize("count", [0, 1, 20, 300])
def test_a_rolling_loglikelihood_is_of_every_token_after_bos(fot: FotLM, count: int) -> None:
    (found,) = fot.loglikelihood_rolling(asked("loglikelihood_rolling", (text(count, 5),)))
    assert found == pytest.approx(direct(fot, "", text(count, 5))[0] if count else 0.0, rel=1e-5)


@pytest.mark.parametrize("count", [5, 250])
def test_what_is_generated_is_what_generate_makes_up_to_what_ends_it(fot: FotLM, count: int) -> None:
    prompt = text(count, 9)
    ids = torch.tensor([fot.tok_encode(prompt)])
    made = fot.model.generate(ids, max_new_tokens=80, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    whole = read_tokenizer(Path(fot.model.name_or_path)).tokenizer.decode(made.tolist())
    stop = whole[5:7]
    found = fot.generate_until(
        asked(
            "generate_until",
            (prompt, {"until": [], "max_gen_toks": 80}),
            (prompt, {"until": ["@@", stop], "max_gen_toks": 80}),
        )
    )
    assert found == [whole, whole.split(stop)[0]]


def test_memory_is_read_as_the_settings_say(models: dict[str, Path], fot: FotLM) -> None:
    pair = asked("loglikelihood", (text(200, 1), " the mat"))
    few = FotLM(models["model"], LOCAL, memory=MemorySettings(top_k=2))
    assert abs(few.loglikelihood(pair)[0][0] - fot.loglikelihood(pair)[0][0]) > 1e-3


def test_within_the_local_context_the_base_scores_what_a_plain_llama_does(
    models: dict[str, Path], settings: LmEval
) -> None:
    tokenizer, plain = read_tokenizer(models["base"]), LlamaForCausalLM.from_pretrained(models["base"]).eval()
    ours = FotLM(models["base"], LOCAL, like=models["model"])
    with quiet():
        manager = task_manager(settings, str(models["base"]))
        found = lm_eval.simple_evaluate(model=ours, tasks=["choose"], task_manager=manager, bootstrap_iters=0)
    assert len(found["samples"]["choose"]) == 10
    for sample in found["samples"]["choose"]:
        for (context, continuation), answer in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            past = [tokenizer.bos, *tokenizer.encode(context)]
            ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(context + continuation)]])
            with torch.no_grad():
                log_probabilities = plain(ids).logits[0, :-1].log_softmax(-1)
            each = log_probabilities.gather(1, ids[0, 1:, None])[len(past) - 1 :]
            assert float(answer[0]) == pytest.approx(each.sum().item(), rel=1e-4)


def test_the_harness_finds_the_model_by_its_name(models: dict[str, Path], settings: LmEval) -> None:
    with quiet():
        output = lm_eval.simple_evaluate(
            model="fot",
            model_args={"pretrained": str(models["model"]), "local": LOCAL},
            tasks=["choose"],
            task_manager=task_manager(settings, ""),
            limit=2,
        )
    assert 0 <= output["results"]["choose"]["acc,none"] <= 1


def test_base_and_model_stand_side_by_side(subject: Subject, tasks: Path, tmp_path: Path) -> None:
    settings = LmEval(tasks=("rolling", "choose_far"), include=str(tasks))
    sent = pickle.loads(pickle.dumps(cells(subject, settings)))
    results = json.loads(json.dumps({cell.key: cell.function(*cell.arguments) for cell in sent}))
    result = lm_eval_tasks.summarize(subject, settings, results, tmp_path)
    (table,) = result.tables
    rows = {(task, metric): numbers for task, metric, *numbers in table.rows}
    assert list(rows) == [
        ("rolling", "word_perplexity"),
        ("rolling", "bits_per_byte"),
        ("choose_far", "acc"),
        ("choose_far", "acc_norm"),
    ]
    points = {point.metric: point.value for point in result.points}
    for (task, metric), (base, model, difference, _) in rows.items():
        assert difference == pytest.approx(model - base)
        if metric in ("acc", "word_perplexity"):
            assert (points[f"lm_eval/{task}/base"], points[f"lm_eval/{task}/model"]) == (base, model)
    assert {point.step for point in result.points} == {0}
    assert rows["rolling", "bits_per_byte"][2] != 0
    assert rows["rolling", "bits_per_byte"][3] is None  # no mean of examples, and the harness gives no error

    right = {
        who: [
            max(range(3), key=lambda n: FotLM(path, LOCAL, subject.model).loglikelihood(pairs)[n][0]) == number % 3
            for number in range(10)
            for pairs in [
                asked("loglikelihood", *((text(150, number), f" {end}") for end in ("the mat", "fast", "dog sat on")))
            ]
        ]
        for who, path in subject.models.items()
    }
    differences = [float(m) - float(b) for m, b in zip(right["model"], right["base"], strict=True)]
    expected = [sum(right["base"]) / 10, sum(right["model"]) / 10, statistics.mean(differences)]
    assert rows["choose_far", "acc"] == pytest.approx([*expected, statistics.stdev(differences) / 10**0.5])


def test_the_error_of_a_difference_is_paired_where_examples_are_there() -> None:
    base, model = (
        {"value": sum(values) / 4, "error": 0.3, "examples": values} for values in ([0.0, 1, 1, 0], [1.0, 1, 1, 0])
    )
    assert compare(base, model) == (0.5, 0.75, 0.25, pytest.approx(0.25))
    for one in (base, model):
        one["examples"] = None
    assert compare(base, model)[3] == pytest.approx(0.3 * 2**0.5)
    model["error"] = None
    assert compare(base, model)[2:] == (0.25, None)
    assert compare(None, model) == (None, 0.75, None, None)


def test_rulers_lengths_are_steps(subject: Subject, tmp_path: Path) -> None:
    """Its metrics are named by them, -1 where no prompt was that long."""
    measured = {"4096,none": 0.5, "4096_stderr,none": "N/A", "8192,none": 0.25, "16384,none": -1, "alias": "niah"}
    metrics = lm_eval_tasks._read_metrics(measured, [])
    results = {f"niah-{who}": {"niah": metrics} for who in ("base", "model")}
    result = lm_eval_tasks.summarize(subject, LmEval(tasks=("niah",)), results, tmp_path)
    assert [(point.step, point.value) for point in result.points if point.metric == "lm_eval/niah/model"] == [
        (4096, 0.5),
        (8192, 0.25),
    ]


def test_memory_is_asked_for_what_a_task_feeds(subject: Subject, tasks: Path) -> None:
    near, far = (cells(subject, LmEval(tasks=(task,), include=str(tasks)))[0] for task in ("choose", "choose_far"))
    logits = 300 * LOCAL * (4 * 8 + 8)
    assert near.bytes == near.weights + logits, "nothing leaves the local context"
    longest = int(far.what.split()[-2])
    encode = read_tokenizer(subject.model).encode
    assert longest >= max(len(encode(text(150, number))) for number in range(10)) > LOCAL
    assert far.bytes == near.bytes + memory_bytes(subject.model, MemorySettings(), longest, LOCAL // 2)
    shown = cells(subject, LmEval(tasks=("choose_far",), include=str(tasks), few_shot=2))[0]
    assert int(shown.what.split()[-2]) == 3 * longest


# Bad input.


def refused(subject: Subject, **settings: object) -> str:
    with pytest.raises(UserError) as raised:
        cells(subject, LmEval(**settings))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_asking_for_the_harness_where_it_is_not_installed_says_what_to_install(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused(subject, tasks=("arc_easy",)).endswith("is not installed: pip install 'fot[lm_eval]'")


def test_the_task_is_there_without_the_harness() -> None:
    script = "import sys, jobs.evaluate.lm_eval_tasks as m; print(callable(m.cells), 'lm_eval' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert printed.split() == ["True", "False"]


def test_a_directory_of_tasks_that_is_not_there_is_named(subject: Subject, tmp_path: Path) -> None:
    assert "include: " in refused(subject, tasks=("choose",), include=str(tmp_path / "none"))


def test_a_task_that_draws_its_answers_is_refused(fot: FotLM) -> None:
    with pytest.raises(UserError, match="draws its answers"):
        fot.generate_until(asked("generate_until", ("the", {"until": [], "do_sample": True, "temperature": 1.0})))


def test_what_the_harness_lacks_is_said_in_a_line(subject: Subject, tasks: Path, monkeypatch) -> None:
    """An unknown task, RULER's and LongBench's packages, and data of the hub, without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tasks / "empty")
    asked_for = ("arc_easyy", "arc_easy", "niah_single_1", "longbench_2wikimqa")
    few = [Path(lm_eval.tasks.__file__).parent / name for name in ("arc", "ruler", "longbench")]
    manager = TaskManager(include_path=few, include_defaults=False)  # to index all takes seconds
    monkeypatch.setattr(lm_eval_tasks, "task_manager", lambda *_: manager)
    said = {task: refused(subject, tasks=(task,)) for task in asked_for}
    assert "the harness has no 'arc_easyy': did you mean arc_easy" in said["arc_easyy"]
    lm_eval_tasks.check(LmEval(tasks=("arc_easy", "niah_single_1")))
    with pytest.raises(UserError, match="the harness has no 'arc_easyy'"):
        lm_eval_tasks.check(LmEval(tasks=("arc_easy", "arc_easyy")))
    assert "task arc_easy: its data set allenai/ai2_arc cannot be loaded" in said["arc_easy"]
    assert "HF_HOME" in said["arc_easy"]
    assert "niah_single_1 needs packages that are not installed: " in said["niah_single_1"]
    assert "wonderwords" in said["niah_single_1"]
    assert "jieba" in said["longbench_2wikimqa"]
    listed = set(manager.all_tasks)
    assert {"ruler", "niah_multikey_3", "ruler_vt", "ruler_qa_hotpot", "longbench", "longbench_trec"} <= listed


def test_a_model_is_loaded_with_the_memory_layers_of_another(models: dict[str, Path]) -> None:
    assert load_model(models["base"], models["model"]).config.mem_layers == [1]
