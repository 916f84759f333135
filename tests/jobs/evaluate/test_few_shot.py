import gzip
import itertools
import json
import random
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from fot_model import FotLlamaConfig, FotLlamaForCausalLM
from jobs.config.evaluation import FewShot, MemorySettings
from jobs.evaluate import asking, trec, webquestions
from jobs.evaluate.asking import SharedPrompt
from jobs.evaluate.few_shot import Demonstrations, ask_draw, make_draws, mean_and_half_width
from jobs.evaluate.questions import Example, read_examples
from jobs.evaluate.subject import Subject, new_cache, read_into
from jobs.evaluate.tasks import evaluate
from jobs.measures.result import Point, Result
from pipelines.tokens.tokenizer import load_tokenizer, train_tokenizer
from pipelines.workflow.errors import UserError

LOCAL = 96
CLASSES = ["city", "dist", "date"]
NAMES = ("question",), ("fine", "fine_label", "label-fine")


def make_questions(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    words = ["how far", "what town", "which year", "is it", "to", "from", "of"]
    return [
        {"question": " ".join(draw.choices(words, k=draw.randint(1, 5))) + " ?", "fine": draw.choice(CLASSES)}
        for _ in range(count)
    ]


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """120 questions to show, 30 to ask."""
    return {
        part: str(write_lines(tmp_path / f"{part}.jsonl", make_questions(count, count)))
        for part, count in (("train", 120), ("test", 30))
    }


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [f"Question: {one['question']}\nType: {one['fine']}\n\n" for one in make_questions(200, 0)]
    train_tokenizer(texts, 330, directory)
    return directory


@pytest.fixture(scope="module")
def model(tokenizer_directory: Path) -> Path:
    """Random weights, with strong attention to memory."""
    torch.manual_seed(0)
    config = FotLlamaConfig(
        vocab_size=330,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LOCAL,
        mem_layers=[1],
        initializer_range=0.5,
    )
    FotLlamaForCausalLM(config).save_pretrained(tokenizer_directory)
    return tokenizer_directory


@pytest.fixture
def says_city(tokenizer_directory: Path, tmp_path: Path) -> Path:
    """A model whose next token depends on the last alone: after a question always " city" and an empty line."""
    directory = tmp_path / "says_city"
    tokenizer = load_tokenizer(tokenizer_directory)
    size = tokenizer.vocab_size
    config = FotLlamaConfig(
        vocab_size=size,
        hidden_size=-(-size // 4) * 4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LOCAL,
        mem_layers=[0],
    )
    model = FotLlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, config.hidden_size))
        model.lm_head.weight.zero_()
        for last, following in itertools.pairwise(tokenizer.encode("Type: city\n\n")):
            model.lm_head.weight[following, last] = 1.0
    model.save_pretrained(directory)
    for file in tokenizer_directory.glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def subject_of(model: Path, seed: int = 0, **memory: object) -> Subject:
    return Subject({"model": model}, LOCAL, seed, MemorySettings(**memory))


# Reading questions.


def written(path: Path, records: list[dict]) -> Path:
    """The records in the format that the name says."""
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if ".parquet" in path.name:
        pq.write_table(pa.Table.from_pylist(records), path.with_suffix(".tmp"))
        lines = path.with_suffix(".tmp").read_bytes()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(lines))
    return path


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz", "q.jsonl.zst", "q.parquet", "q.parquet.gz"])
def test_questions_are_the_same_from_every_format(tmp_path: Path, name: str) -> None:
    records = make_questions(5, 1)
    path = written(tmp_path / name, records)
    expected = [Example(record["question"], (record["fine"],)) for record in records]
    assert read_examples(str(path), "x", *NAMES) == expected


def test_questions_are_read_from_a_url() -> None:
    with fsspec.open("memory://questions/q.jsonl", "wb") as file:
        file.write(b'{"question": "who ?", "answers": ["a", "b"]}\n')
    found = read_examples("memory://questions/q.jsonl", "x", ("question",), ("answers",))
    assert found == [Example("who ?", ("a", "b"))]


def test_the_hubs_integers_become_the_names_of_classes(tmp_path: Path) -> None:
    features = {"info": {"features": {"fine_label": {"names": ["ABBR:abb", "ABBR:exp"], "_type": "ClassLabel"}}}}
    table = pa.Table.from_pylist([{"text": "what ?", "fine_label": 1}, {"text": "why ?", "fine_label": 0}])
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "q.parquet")
    found = read_examples(str(tmp_path / "q.parquet"), "x", trec.TREC.questions, trec.TREC.answers)
    assert found == [Example("what ?", ("ABBR:exp",)), Example("why ?", ("ABBR:abb",))]


@pytest.mark.parametrize("label", [-1, 2])
def test_an_integer_that_names_no_class_is_a_users_error(tmp_path: Path, label: int) -> None:
    features = {"info": {"features": {"fine_label": {"names": ["ABBR:abb", "ABBR:exp"], "_type": "ClassLabel"}}}}
    table = pa.Table.from_pylist([{"text": "what ?", "fine_label": 1}, {"text": "why ?", "fine_label": label}])
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "q.parquet")
    with pytest.raises(UserError, match=f"q.parquet, row 1: fine_label {label} names no class"):
        read_examples(str(tmp_path / "q.parquet"), "x", trec.TREC.questions, trec.TREC.answers)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"q.jsonl does not exist: set evaluation.trec.train"),
        (b"", r"q.jsonl holds no questions: check evaluation.trec.train"),
        (b'{"question": "a"}\n', r"q.jsonl, line 1: there is no 'fine' or 'fine_label' .* its columns are 'question'"),
        (b'{"fine": "a"}\n', r"line 1: there is no 'question'"),
        (b'{"question": "a", "fine": "b"}\nnonsense\n', r"q.jsonl, line 2: it is no JSON object"),
        (b'{"question": " ", "fine": "b"}\n', r"line 1: the question or its answer is empty"),
        (b"\xff\n", r"q.jsonl cannot be read"),
    ],
)
def test_questions_that_cannot_be_used_are_a_users_error_of_one_line(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as raised:
        read_examples(str(path), "evaluation.trec.train", *NAMES)
    assert "\n" not in str(raised.value)


def test_the_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    url = "hf://datasets/nobody/nothing/train.parquet"
    with pytest.raises(UserError, match=rf"{url}: the storage does not answer") as raised:
        read_examples(url, "evaluation.trec.train", *NAMES)
    assert "\n" not in str(raised.value)


# Draws.


def test_a_longer_prompt_is_the_shorter_one_with_more_demonstrations_as_many_as_fit(
    model: Path, data: dict[str, str]
) -> None:
    lengths = (1, 3, 5)
    every = make_draws(trec.TREC, subject_of(model), FewShot(**data, lengths=(*lengths, 100), draws=2))
    for draw, all_of_it in zip(
        make_draws(trec.TREC, subject_of(model), FewShot(**data, lengths=lengths, draws=2)), every, strict=True
    ):
        assert list(draw.fits) == list(lengths)
        assert draw.demonstrations == all_of_it.demonstrations[: draw.fits[5]]
        assert all_of_it.fits[100] == 120
        for length, count in draw.fits.items():
            tokens = [1 + sum(map(len, all_of_it.demonstrations[:n])) for n in (count, count + 1)]
            assert tokens[0] + draw.longest <= length * LOCAL < tokens[1] + draw.longest


def test_draws_follow_the_seed_and_differ(model: Path, data: dict[str, str]) -> None:
    settings = FewShot(**data, draws=3, questions=10)
    first, again = (make_draws(trec.TREC, subject_of(model), settings) for _ in range(2))
    assert first == again
    other = make_draws(trec.TREC, subject_of(model, seed=1), settings)
    drawn = [(str(draw.demonstrations), str(draw.questions)) for draw in (*first, *other)]
    assert len({demonstrations for demonstrations, _ in drawn}) == len({questions for _, questions in drawn}) == 6


def test_a_length_without_a_demonstration_says_how_many_tokens_one_needs(model: Path, data: dict[str, str]) -> None:
    with pytest.raises(
        UserError, match=r"take \d+ tokens, the local context holds 8: it cannot be asked of this model"
    ):
        trec.cells(Subject({"model": model}, 8, 0), FewShot(**data))
    subject = Subject({"model": model}, 20, 0)
    with pytest.raises(UserError, match=r"trec.lengths: 1 x 20 tokens hold no demonstration: .* let lengths begin at"):
        trec.cells(subject, FewShot(**data))
    with pytest.raises(UserError) as raised:
        trec.cells(subject, FewShot(**data, draws=1))
    enough = int(str(raised.value).split()[-1])
    assert trec.cells(subject, FewShot(**data, lengths=(enough,), draws=1))
    with pytest.raises(UserError):
        trec.cells(subject, FewShot(**data, lengths=(enough - 1,), draws=1))


def test_answers_that_are_no_classes_cannot_be_chosen_among(model: Path, data: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"evaluation.webquestions.choice: its answers are no classes"):
        webquestions.cells(subject_of(model), FewShot(**data, choice=True))


def test_questions_are_checked_without_a_model(data: dict[str, str]) -> None:
    trec.check(FewShot(**data, choice=True))
    with pytest.raises(UserError, match=r"evaluation.webquestions.choice: its answers are no classes"):
        webquestions.check(FewShot(**data, choice=True))
    with pytest.raises(UserError, match=r"there is no 'answers'"):
        webquestions.check(FewShot(**data))
    with pytest.raises(UserError, match=r"none.jsonl does not exist: set evaluation.trec.test"):
        trec.check(FewShot(train=data["train"], test="none.jsonl"))


# Asking.


@torch.inference_mode()
def alone(
    model: FotLlamaForCausalLM, memory: MemorySettings, ids: list[int], question: list[int], room: int
) -> list[int]:
    """The greedy answer to one question whose prompt is read for it alone, all of its last window at every step."""
    begin = len(ids) // LOCAL * LOCAL
    made: list[int] = []
    while len(made) < room:
        cache = new_cache(model, memory)
        read_into(model, cache, torch.tensor([ids[:begin]]), LOCAL)
        window = torch.tensor([[*ids[begin:], *question, *made]])
        made.append(int(model(window, past_key_values=cache).logits[0, -1].argmax()))
    return made


@torch.inference_mode()
def log_probability(
    model: FotLlamaForCausalLM, memory: MemorySettings, ids: list[int], question: list[int], answer: list[int]
) -> float:
    begin = len(ids) // LOCAL * LOCAL
    cache = new_cache(model, memory)
    read_into(model, cache, torch.tensor([ids[:begin]]), LOCAL)
    logits = model(torch.tensor([[*ids[begin:], *question, *answer]]), past_key_values=cache).logits[0]
    chosen = logits.log_softmax(-1)[-len(answer) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
    return float(chosen.sum())


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("tokens", [20, 2 * LOCAL, 3 * LOCAL + 31])
@pytest.mark.parametrize("top_k", [None, 5])
def test_questions_asked_together_are_answered_as_alone(model: Path, rows: int, tokens: int, top_k: int | None) -> None:
    draw, memory = random.Random(tokens), MemorySettings(top_k=top_k)
    network = FotLlamaForCausalLM.from_pretrained(model).eval()
    ids = [draw.randrange(330) for _ in range(tokens)]
    questions = [[draw.randrange(330) for _ in range(length)] for length in (3, 11, 1, 7)]
    candidates = [[draw.randrange(330) for _ in range(length)] for length in (1, 4, 2, 2, 6)]
    with torch.inference_mode():
        cache, begin = new_cache(network, memory), tokens // LOCAL * LOCAL
        read_into(network, cache, torch.tensor([ids[:begin]]), LOCAL)
        prompt = SharedPrompt(network, cache.memory, ids[begin:], rows, LOCAL)
        for _ in range(2):  # nothing is left of what was asked before
            answers = prompt.answer(questions, 5, lambda answer: False)
            found = prompt.log_probabilities(questions[1], candidates)
    assert answers == [alone(network, memory, ids, question, 5) for question in questions]
    assert len(set(map(tuple, answers))) > 1
    expected = [log_probability(network, memory, ids, questions[1], candidate) for candidate in candidates]
    assert found == pytest.approx(expected, rel=1e-4)
    held = cache.memory.state_dict().values()
    assert all(tensor.shape[0] == 1 and tensor.shape[2] == begin for tensor in held)


def test_memory_is_read_on_from_length_to_length_as_if_each_were_read_alone(
    model: Path, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all demonstrations fit, and those left over leave no room for the question."""
    seen: list[tuple[dict[str, torch.Tensor], list[int]]] = []

    class Noted(SharedPrompt):
        def __init__(self, network, memory, ids, rows, local) -> None:
            seen.append(({name: held.clone() for name, held in memory.state_dict().items()}, list(ids)))
            super().__init__(network, memory, ids, rows, local)

    monkeypatch.setattr(asking, "SharedPrompt", Noted)

    def ask(local: int, draw: Demonstrations) -> dict:
        with torch.inference_mode():
            return ask_draw(trec.TREC, Subject({"model": model}, local, 0), draw, 8, True)

    def draw_at(local: int, *lengths: int) -> Demonstrations:
        settings = FewShot(**data, lengths=lengths, draws=1, questions=6)
        return make_draws(trec.TREC, Subject({"model": model}, local, 0), settings)[0]

    def split(draw: Demonstrations, length: int, local: int) -> tuple[int, int]:
        """All tokens before the question, and how many of them are in memory."""
        tokens = 1 + sum(map(len, draw.demonstrations[: draw.fits[length]]))
        return tokens, tokens if tokens % local + draw.longest > local else tokens // local * local

    lengths = (3, 4, 5, 90)
    local, draw = next(
        (local, draw)
        for local in range(LOCAL, 0, -1)
        for draw in [draw_at(local, *lengths)]
        if split(draw, 4, local)[0] == split(draw, 4, local)[1] and split(draw, 4, local)[0] % local
    )
    assert draw.fits[90] == 120
    together = ask(local, draw)
    for number, length in enumerate(lengths):
        assert ask(local, draw_at(local, length))[str(length)] == together[str(length)]
        for name, held in seen[-1][0].items():
            torch.testing.assert_close(seen[number][0][name], held)
        assert seen[number][1] == seen[-1][1]
        tokens, in_memory = split(draw, length, local)
        assert {held.shape[2] for held in seen[number][0].values()} == {in_memory}
        assert in_memory + len(seen[number][1]) == tokens


def test_a_model_that_always_says_city_is_right_where_it_is_the_answer(
    local_ray: None, says_city: Path, data: dict[str, str], tmp_path: Path
) -> None:
    settings = FewShot(**data, lengths=(2, 1), draws=3, questions=10, at_once=4, choice=True)
    result = evaluate("trec", subject_of(says_city), settings, tmp_path / "result")
    draws = make_draws(trec.TREC, subject_of(says_city), settings)
    shares = [sum(example.answers == ("city",) for example in draw.questions) / 10 for draw in draws]
    assert 0 < min(shares) < max(shares) < 1
    mean, half = mean_and_half_width(shares)
    scores = ("trec/accuracy", "trec/choice")
    assert list(result.points) == [Point(score, step, pytest.approx(mean)) for step in (LOCAL, 192) for score in scores]
    for row, length in zip(result.tables[0].rows, (1, 2), strict=True):
        counts = [draw.fits[length] for draw in draws]
        assert row[:2] == [length * LOCAL, round(sum(counts) / 3, 1)]
        assert row[2:] == pytest.approx([mean, max(0, mean - half), min(1, mean + half)] * 2)
    assert Result.read(tmp_path / "result").plots == ["trec.png"]
    assert (tmp_path / "result" / "trec.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("The U.S.A.!", ["usa"], True),
        ("a  Lawyer", ["Doctor", "lawyer"], True),
        ("lawyers", ["lawyer"], False),
        ("theatre", ["tre"], False),
        ("", ["x"], False),
    ],
)
def test_web_questions_take_any_accepted_answer_but_for_case_punctuation_and_articles(
    answer: str, accepted: list[str], right: bool
) -> None:
    assert webquestions.WEBQUESTIONS.is_right(answer, Example("q", tuple(accepted))) == right


def test_trec_takes_the_class_as_it_is() -> None:
    example = Example("q", ("LOC:city",))
    assert [trec.TREC.is_right(answer, example) for answer in (" LOC:city ", "loc:city", "LOC", "")] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("values", "expected"), [([0.3], (0.3, None)), ([0.2, 0.4], (0.3, 1.2706)), ([0.5, 0.5, 0.5], (0.5, 0.0))]
)
def test_the_interval_is_students(values: list[float], expected: tuple) -> None:
    assert mean_and_half_width(values) == (
        pytest.approx(expected[0]),
        expected[1] if expected[1] is None else pytest.approx(expected[1], abs=1e-4),
    )
