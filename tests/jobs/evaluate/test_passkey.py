import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from fot_model import FotCache, FotLlamaConfig
from jobs.evaluate import passkey as module
from jobs.evaluate.config import Passkey
from jobs.evaluate.passkey import FILLER, KEY, MARKER, QUESTION, TASK, by_depth, longest_good, make_trial, wilson
from jobs.evaluate.subject import Subject
from pipelines.errors import UserError
from pipelines.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

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


class Reader:
    """Stands in for a model: remembers the windows it was shown, and after the question spells the key, with `more`
    behind it, or avoids it."""

    device = torch.device("cpu")

    def __init__(
        self, tokenizer: TextTokenizer, question: str, reads_from: str, room: int, knows: bool, more: str
    ) -> None:
        self.tokenizer, self.reads_from, self.sign = tokenizer, reads_from, 9.0 if knows else -9.0
        self.room, self.more = room, more
        self.question = module._after(tokenizer, "\n", question)
        self.seen = torch.zeros(0, dtype=torch.long)
        self.windows: list[int] = []
        self.config = FotLlamaConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=2)

    def __call__(self, rows: torch.Tensor, past_key_values: FotCache, logits_to_keep: int, **_how: object):
        self.windows.append(rows.shape[1])
        nothing = torch.zeros(len(rows), 1, rows.shape[1], 2)
        past_key_values.update(nothing, nothing, 0)
        logits = torch.zeros(*rows.shape, self.tokenizer.vocab_size)
        ends = [self._end(row.tolist()) for row in rows]
        if not any(ends):
            self.seen = torch.cat([self.seen, rows], dim=-1) if self.seen.numel() else rows
        for row, end in enumerate(ends):
            if end:
                text = decoded(self.tokenizer, [*self.seen[row].tolist(), *rows[row].tolist()])
                key = text.split(self.reads_from)[1].split(".")[0].split("\n")[0]
                answer = module._after(self.tokenizer, self.reads_from, key)
                answer += module._after(self.tokenizer, self.reads_from + key, self.more) if self.more else []
                for place, token in enumerate(answer):
                    logits[row, end - 1 + place, token] = self.sign
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    def _end(self, row: list[int]) -> int:
        """Where the question ends in a row, 0 if it is not there."""
        size = len(self.question)
        end = len(row) - self.room
        return end if row[end - size : end] == self.question else 0


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
    reader = Reader(tokenizer, *KINDS[kind], module.answer_room(settings), knows, more)
    monkeypatch.setattr(module, "load_model", lambda *_: reader)
    monkeypatch.setattr(module, "new_cache", lambda *_: FotCache(reader.config))
    subject = Subject({"model": directory}, LOCAL, seed=0)
    result = module.run_trials(subject, settings, 12, [0, 1, 2])
    assert [(trial["exact"], trial["choice"]) for trial in result] == [(exact, choice)] * 3
    assert reader.windows == [LOCAL] * (11 + 10), "a window at a time"
    assert len({trial["depth"] for trial in result}) == 3


def test_trials_do_not_depend_on_how_many_are_read_together(model_dir: Path) -> None:
    outcomes = []
    for at_once in (1, 3):
        settings = Passkey(lengths=(20, 24), trials=5, digits=2, prompt="digits", at_once=at_once)
        cells = module.cells(Subject({"model": model_dir}, 16, seed=3), settings)
        with torch.inference_mode():
            outcomes.append([trial for cell in cells for trial in cell.function(*cell.arguments)])
    assert outcomes[0] == outcomes[1]


def test_answers_are_weighed_as_in_one_long_pass(model_dir: Path) -> None:
    model, tokenizer = module.load_model(model_dir, model_dir), load_tokenizer(model_dir)
    settings, local = Passkey(digits=2, prompt="digits"), 16
    _, prompt, answers = make_trial(tokenizer, 7 * local, settings, "seed")
    with torch.inference_mode():
        cache = FotCache(model.config)
        module.read_into(model, cache, torch.tensor([prompt[: 6 * local]]), local)
        question_BL = torch.tensor([prompt[6 * local :]])
        (scores,), exact_B = module.weigh(model, cache, question_BL, [answers], module.answer_room(settings), tokenizer)
        assert cache.get_seq_length() == 6 * local
        for answer, score in zip(answers, scores.tolist(), strict=True):
            ids = torch.tensor([*prompt, *answer])  # without positions, windows read into memory are one causal pass
            logits = model(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None]).sum().item()
            assert score == pytest.approx(expected, rel=1e-4)
            if answer == answers[0]:
                assert exact_B.tolist() == [logits.argmax(-1).tolist() == answer]


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


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(0, 10, 0.0, 0.278), (5, 10, 0.237, 0.763), (94, 100, 0.875, 0.972)]
)
def test_wilsons_interval_is_that_of_the_tables(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-3)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_its_share(of: tuple[int, int]) -> None:
    low, high = wilson(*of)
    share = of[0] / of[1]
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1


def test_the_map_has_a_row_for_each_depth() -> None:
    draw = random.Random(0)
    trials = [{"depth": draw.random(), "exact": 0} for _ in range(200)]
    for trial in trials:
        trial["exact"] = trial["depth"] >= 0.4
    assert by_depth([trials, [{"depth": 0.99, "exact": False}]], "exact") == [
        [0, None], [0, None], [1, None], [1, None], [1, 0],
    ]  # fmt: skip
