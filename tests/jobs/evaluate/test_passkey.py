import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from jobs.config.evaluation import MemorySettings, Passkey
from jobs.evaluate import passkey as module
from jobs.evaluate.full_attention import FullReader
from jobs.evaluate.passkey import FILLER, KEY, MARKER, QUESTION, TASK, by_depth, longest_good, make_trial
from jobs.evaluate.readers import MemoryReader
from jobs.evaluate.subject import Reading, Subject, load_model
from pipelines.tokens.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from pipelines.workflow.errors import UserError

LOCAL = 64


def byte_level(directory: Path) -> None:
    train_tokenizer([TASK + FILLER + KEY.format(key=12345) + QUESTION] * 3, 400, directory)


def llama_like(directory: Path) -> None:
    """A piece for every character, and a space before every text."""
    characters = sorted(set(TASK + FILLER + KEY + QUESTION + "0123456789"))
    pieces = ["<unk>", "<s>", "</s>", "▁", *(each for each in characters if each != " ")]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(directory)


@pytest.fixture(scope="module", params=[byte_level, llama_like])
def directory(request, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    request.param(made)
    return made


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> TextTokenizer:
    return load_tokenizer(directory)


def decoded(tokenizer: TextTokenizer, ids: list[int]) -> str:
    return tokenizer.tokenizer.decode(ids)


@pytest.mark.parametrize("seed", "abcd")
def test_the_text_prompt_hides_the_key_at_its_depth_and_ends_with_the_question(tokenizer, seed: str) -> None:
    settings = Passkey()
    depth, prompt, answers = make_trial(tokenizer, 1200, settings, seed)
    assert len(prompt) == 1200 - module.answer_room(settings)
    text, key = decoded(tokenizer, prompt), decoded(tokenizer, answers[0]).strip()
    assert len(key) == 5
    assert text.startswith(TASK)
    assert text.endswith(QUESTION)
    assert text.count(key) == 2
    hidden = text.index(KEY.format(key=key))
    assert text.endswith("\n" + QUESTION), "on a line of its own"
    filler = text[len(TASK) : hidden] + text[hidden + len(KEY.format(key=key)) : -len("\n" + QUESTION)]
    assert not Counter(filler) & Counter("0123456789"), "no other key"
    assert filler == (FILLER * 99)[: len(filler)]
    assert 0 <= depth * len(filler) - (hidden - len(TASK)) <= 1.1 * len(FILLER), "at the start of the line there"


@pytest.mark.parametrize("seed", "abcd")
def test_the_digits_prompt_is_of_digits_and_line_breaks_with_one_marked_key(tokenizer, seed: str) -> None:
    settings = Passkey(prompt="digits", digits=4)
    depth, prompt, answers = make_trial(tokenizer, 1200, settings, seed)
    assert len(prompt) == 1200 - module.answer_room(settings)
    text, keys = decoded(tokenizer, prompt).lstrip(" "), [decoded(tokenizer, answer) for answer in answers]
    assert set(text) == set("0123456789\n")
    lines = text.split("\n")
    assert lines[-1] == MARKER
    assert [line for line in lines[:-1] if "0" in line] == [MARKER + keys[0].strip()]
    assert text.count("0") == 2 * len(MARKER)
    assert lines.index(MARKER + keys[0].strip()) / len(lines) == pytest.approx(depth, abs=0.05)
    assert {len(line) for line in lines[:-2]} == {len(MARKER) + 4}, "the key's line is as long as the others"
    assert len(set(lines)) > 0.99 * len(lines), "filler is drawn, not repeated"
    assert len({key.strip() for key in keys}) == 10
    assert all(set(key.strip()) <= set("123456789") for key in keys)


@pytest.mark.parametrize("kind", ["text", "digits"])
def test_the_key_in_the_prompt_has_the_tokens_of_the_answer(tokenizer, kind: str) -> None:
    _, prompt, answers = make_trial(tokenizer, 700, Passkey(prompt=kind), "seed")
    right, size = answers[0], len(answers[0])
    there = [place for place in range(len(prompt)) if prompt[place : place + size] == right]
    assert there
    before = [prompt[place - 1] for place in there]
    assert prompt[-1] in before, "what is asked with last came before it"


def test_a_trial_is_drawn_by_its_seed(tokenizer) -> None:
    one, again, other = (make_trial(tokenizer, 700, Passkey(prompt="digits"), seed) for seed in "aab")
    assert one == again
    assert one != other


def test_a_long_prompt_takes_time_by_its_length(tokenizer) -> None:
    _, prompt, _ = make_trial(tokenizer, 262_144, Passkey(prompt="digits"), "long")
    assert len(prompt) == 262_144 - module.answer_room(Passkey())


class Knowing:
    """Stands in for a reader: finds the key in the prompt and spells it after the question, with `more` behind it, or
    avoids it."""

    def __init__(self, tokenizer: TextTokenizer, question: str, reads_from: str, knows: bool, more: str) -> None:
        self.tokenizer, self.question, self.reads_from = tokenizer, question, reads_from
        self.sign, self.more = 9.0 if knows else -9.0, more
        self.read: list[tuple[int, int]] = []

    def ask(self, prompt_BT: torch.Tensor, question: int, room: int):
        self.read.append((prompt_BT.shape[1], room))
        likely = []
        for row in prompt_BT.tolist():
            assert decoded(self.tokenizer, row[-question:]).strip() == self.question.strip()
            key = decoded(self.tokenizer, row).split(self.reads_from)[1].split(".")[0].split("\n")[0]
            answer = module._after(self.tokenizer, self.reads_from, key)
            answer += module._after(self.tokenizer, self.reads_from + key, self.more) if self.more else []
            likely.append(answer)

        def after(answer_BA: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(likely), answer_BA.shape[1] + 1, self.tokenizer.vocab_size)
            for row, answer in enumerate(likely):
                for place, token in enumerate(answer):
                    logits[row, place, token] = self.sign
            return logits

        return after


KINDS = {"text": (QUESTION, "The pass key is"), "digits": ("\n" + MARKER, "\n" + MARKER)}


@pytest.mark.parametrize(
    ("knows", "more", "exact", "choice"),
    [(True, "", True, True), (True, ".", True, True), (True, "6", False, True), (False, "", False, False)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_knows_scores_all_and_one_that_avoids_the_key_scores_nothing(
    directory: Path, tokenizer: TextTokenizer, monkeypatch, kind: str, knows: bool, more: str, exact: bool, choice: bool
) -> None:
    """A number that goes on is not exact."""
    settings = Passkey(prompt=kind, digits=4)
    reader = Knowing(tokenizer, *KINDS[kind], knows, more)
    monkeypatch.setattr(module, "open_reader", lambda *_: reader)
    subject = Subject({"model": directory}, LOCAL, seed=0)
    result = module.run_trials(subject, settings, 12, [0, 1, 2])
    assert [(trial["exact"], trial["choice"]) for trial in result] == [(exact, choice)] * 3
    room = module.answer_room(settings)
    assert reader.read == [(12 * LOCAL - room, room)], "read once, whatever is asked"
    assert len({trial["depth"] for trial in result}) == 3


def test_trials_do_not_depend_on_how_many_are_read_together(model_dir: Path) -> None:
    outcomes = []
    for at_once in (1, 3):
        settings = Passkey(lengths=(20, 24), trials=5, digits=2, prompt="digits", at_once=at_once)
        cells = module.cells(Subject({"model": model_dir}, 16, seed=3), settings)
        with torch.inference_mode():
            outcomes.append([trial for cell in cells for trial in cell.function(*cell.arguments)])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", ["memory", "full"])
def test_answers_are_weighed_as_in_one_long_pass(model_dir: Path, kind: str) -> None:
    model, tokenizer = load_model(model_dir, model_dir), load_tokenizer(model_dir)
    settings, local = Passkey(digits=2, prompt="digits"), 16
    reader = MemoryReader(model, MemorySettings(), local) if kind == "memory" else FullReader(model, local)
    _, prompt, answers = make_trial(tokenizer, 7 * local, settings, "seed")
    room = module.answer_room(settings)
    with torch.inference_mode():
        (scores,), exact_B = module.weigh(reader.ask(torch.tensor([prompt]), 4, room), [answers], room, tokenizer)
        for answer, score in zip(answers, scores.tolist(), strict=True):
            ids = torch.tensor([*prompt, *answer])  # without positions, windows read into memory are one causal pass
            logits = model(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None]).sum().item()
            assert score == pytest.approx(expected, rel=1e-4)
            if answer == answers[0]:
                assert exact_B.tolist() == [logits.argmax(-1).tolist() == answer]


def test_a_rival_is_given_the_same_prompts_up_to_its_length(model_dir: Path) -> None:
    settings = Passkey(lengths=(20, 24, 40), trials=2, digits=2, prompt="digits")
    own = module.cells(Subject({"model": model_dir}, 16, seed=3), settings)
    rival = module.cells(Subject({"model": model_dir}, 16, seed=3, reading=Reading("full", 24 * 16)), settings)
    assert {cell.key.partition("-")[0] for cell in rival} == {"20", "24"}
    trials = {key: cell.arguments[1:] for cells in (own, rival) for cell in cells for key in [cell.key]}
    assert all(cell.arguments[1:3] == trials[cell.key][:2] for cell in rival), "drawn by the same settings and length"


def test_fewer_prompts_are_read_at_once_where_they_are_long_or_few(model_dir: Path) -> None:
    longest = module.TOKENS_AT_ONCE // 16
    settings = Passkey(lengths=(20, longest // 4, longest, 2 * longest), trials=9, prompt="digits", at_once=6)
    cells = module.cells(Subject({"model": model_dir}, 16, seed=3), settings)
    numbers = [cell.arguments[2:] for cell in cells]
    assert [len(own) for length, own in numbers if length == 20] == [6, 3]
    assert [len(own) for length, own in numbers if length == longest // 4] == [4, 4, 1]
    for length in settings.lengths:
        assert [number for each, own in numbers if each == length for number in own] == list(range(9))
    assert {len(own) for length, own in numbers if length >= longest} == {1}
    few = module.cells(Subject({"model": model_dir}, 16, seed=3), Passkey(lengths=(20,), trials=2, prompt="digits"))
    assert few[0].bytes < cells[0].bytes
    assert few[0].what == "passkey at 320 tokens, 2 prompts at once (evaluation.passkey.at_once)"


def test_the_result_has_shares_intervals_and_a_map(model_dir: Path, measure, tmp_path: Path) -> None:
    settings = Passkey(lengths=(24, 20), trials=6, digits=2, prompt="digits", at_once=4)
    result = measure(module, Subject({"model": model_dir}, 16, seed=3), settings)
    metrics = {(point.metric, point.step) for point in result.points}
    assert {("passkey/exact", 320), ("passkey/choice", 384), ("passkey/length_90", 0)} <= metrics
    (table,) = result.tables
    assert [row[:2] for row in table.rows] == [[320, 6], [384, 6]]
    assert table.rows[0][3] == "0.000 to 0.390"  # none of six
    assert (tmp_path / result.plots[0]).exists()


def test_memory_is_asked_for_what_is_read_at_once(model_dir: Path) -> None:
    subject = Subject({"model": model_dir}, 16, seed=0)
    one, four = (module.cells(subject, Passkey(lengths=(200,), trials=8, at_once=n))[0].bytes for n in (1, 4))
    weights = module.weights_bytes(model_dir)
    assert four - weights == 4 * (one - weights)


def test_a_length_that_cannot_hold_the_prompt_is_a_users_error(tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match="the prompt needs up to"):
        module.check_prompt(tokenizer, 9, Passkey(lengths=(1,)))
    with pytest.raises(UserError) as error:
        module.check_prompt(tokenizer, 16, Passkey(lengths=(1,)))
    enough = int(str(error.value).split()[-1])
    module.check_prompt(tokenizer, 16, Passkey(lengths=(enough,)))
    room = module.answer_room(Passkey())
    module.check_prompt(tokenizer, room + 1, Passkey(lengths=(999,)))
    with pytest.raises(UserError, match=r"takes up to 8 tokens.* lower evaluation.passkey.digits"):
        module.check_prompt(tokenizer, room, Passkey(lengths=(999,)))


def test_the_longest_good_length_has_no_bad_one_before_it() -> None:
    assert longest_good({512: 1.0, 1024: 0.9, 2048: 0.85, 4096: 1.0}) == 1024
    assert longest_good({512: 0.8, 1024: 1.0}) == 0
    assert longest_good({1024: 0.95, 512: 1.0}) == 1024


def test_the_map_has_a_row_for_each_depth() -> None:
    draw = random.Random(0)
    trials = [{"depth": draw.random(), "exact": 0} for _ in range(200)]
    for trial in trials:
        trial["exact"] = trial["depth"] >= 0.4
    assert by_depth([trials, [{"depth": 0.99, "exact": False}]], "exact") == [
        [0, None], [0, None], [1, None], [1, None], [1, 0],
    ]  # fmt: skip
