"""Passkey retrieval: a number hidden in filler, at a random depth, and asked for last.

Two prompts:

- `text`: Landmark Attention's, as LongLLaMA uses it.
- `digits`, for models too small to read: lines of digits 1 to 9, drawn at random; among them one line of the marker 000
  and the key; and last the marker again, after which the key is to follow. Keys are of digits 1 to 9 as well, so the
  marker is nowhere else, and what follows it tells the key from filler.

The prompt is read as the model reads long texts (`readers.py`). Two scores: `exact`, the greedy continuation is the
number (every token of it is the likeliest after those before) and goes on with no other digit, as in Landmark
Attention's script; `choice`, the number is likelier than nine others (chance: 0.1), which still says something of
models too small to spell it.

Each trial is drawn by (seed, length, its number), whoever reads it and whichever are read together.

Shapes: B trials, T tokens of a prompt, A tokens that an answer may have, C candidates, V vocabulary.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from torch.nn import functional

from jobs.common.plot import plot_heat_maps
from jobs.config.evaluation import Passkey
from jobs.evaluate.cells import Cell, Json
from jobs.evaluate.full_attention import Ask
from jobs.evaluate.readers import check_reading, held_bytes, open_reader, rows_together
from jobs.evaluate.subject import Subject, read_tokenizer, weights_bytes
from jobs.evaluate.trials import interval, share, write_trials
from jobs.measures.result import Point, Result, Table, Value
from pipelines.tokens.tokenizer import TextTokenizer
from pipelines.workflow.errors import UserError

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
KEY = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
MARKER = "000"
CANDIDATES = 10
KEY_DIGITS = "123456789"  # of the digits prompt
TOKENS_AT_ONCE = 2**17  # of prompts that are read together
LINES_AT_ONCE = 1000  # drawn and tokenized
DEPTHS = 5  # rows of the heat map
GOOD = 0.9  # what `length_90` asks for
SCORES = ("exact", "choice")


@dataclass(frozen=True)
class Parts:
    """Of a prompt, as token ids: what it begins with, the line with the key, the question; the key and nine others as
    they would follow the question; and filler without end, line by line."""

    head: list[int]
    hidden: list[int]
    question: list[int]
    answers: list[list[int]]
    filler: Iterator[list[int]]


def cells(subject: Subject, settings: Passkey) -> list[Cell]:
    """Trials by length, some at a time. Raises UserError where the prompt does not fit."""
    check_prompt(read_tokenizer(subject.model), subject.local, settings)
    check_reading(subject)
    local, weights, made = subject.local, weights_bytes(subject.model, subject.dtype), []
    for length, numbers in _batches(subject, settings):
        rows, tokens = _rows(subject, settings, length), length * local
        held = held_bytes(subject, "model", tokens, rows) + 16 * rows * tokens  # and the prompts themselves
        cell = Cell(
            key=_key(length, numbers),
            function=run_trials,
            arguments=(subject, settings, length, numbers),
            tokens=len(numbers) * tokens,
            bytes=weights + held,
            weights=weights,
            what=f"passkey at {tokens} tokens, {rows} prompts at once (evaluation.passkey.at_once)",
        )
        made.append(cell)
    return made


def check_prompt(tokenizer: TextTokenizer, local: int, settings: Passkey) -> None:
    """Raises UserError where the prompt does not fit the shortest length, or the answer the last window."""
    if answer_room(settings) >= local:
        raise UserError(
            f"passkey: an answer of {settings.digits} digits takes up to {answer_room(settings)} tokens, more than a "
            f"local context of {local} holds beside the question: lower evaluation.passkey.digits"
        )
    parts = _parts(tokenizer, settings, random.Random(0))
    needed = len(parts.head) + len(parts.hidden) + len(parts.question) + 3 * answer_room(settings)  # keys may be longer
    if min(settings.lengths) * local < needed:
        raise UserError(
            f"passkey at {min(settings.lengths)} x {local} tokens: the prompt needs up to {needed}; raise the shortest "
            f"of evaluation.passkey.lengths to {-(-needed // local)}"
        )


def answer_room(settings: Passkey) -> int:
    """Tokens that an answer may have: a byte each, and a space of up to three."""
    return settings.digits + 3


def make_trial(
    tokenizer: TextTokenizer, tokens: int, settings: Passkey, seed: str
) -> tuple[float, list[int], list[list[int]]]:
    """The key's depth (0 to 1), a prompt that ends in the question and leaves of `tokens` the room for an answer, and
    the answers, the right one first."""
    draw = random.Random(seed)
    depth = draw.random()
    parts = _parts(tokenizer, settings, draw)
    room = tokens - answer_room(settings) - len(parts.head) - len(parts.hidden) - len(parts.question)
    around: list[int] = []
    before = 0  # the last start of a line at this depth
    while len(around) < room:
        before = len(around) if len(around) <= room * depth else before
        around += next(parts.filler)
    return depth, [*parts.head, *around[:before], *parts.hidden, *around[before:room], *parts.question], parts.answers


def question_length(tokenizer: TextTokenizer, settings: Passkey) -> int:
    """Tokens of the question that a prompt ends in."""
    return len(_parts(tokenizer, settings, random.Random(0)).question)


def _parts(tokenizer: TextTokenizer, settings: Passkey, draw: random.Random) -> Parts:
    if settings.prompt == "digits":
        return _digit_parts(tokenizer, settings.digits, draw)
    keys = [str(key) for key in draw.sample(range(10 ** (settings.digits - 1), 10**settings.digits), CANDIDATES)]
    return Parts(
        head=[tokenizer.bos, *tokenizer.encode(TASK)],
        hidden=_after(tokenizer, "\n", KEY.format(key=keys[0])),
        question=[*_after(tokenizer, "\n", "\n"), *_after(tokenizer, "\n", QUESTION)],
        answers=[_after(tokenizer, QUESTION, f" {key}") for key in keys],
        filler=repeat(_after(tokenizer, "\n", FILLER)),
    )


def _digit_parts(tokenizer: TextTokenizer, digits: int, draw: random.Random) -> Parts:
    """The key is tokenized apart from the marker before it: so it has the same tokens in its line and as the answer."""
    keys: dict[str, None] = {}
    while len(keys) < CANDIDATES:
        keys["".join(draw.choices(KEY_DIGITS, k=digits))] = None
    newline, marker = _after(tokenizer, "\n", "\n"), _after(tokenizer, "\n", MARKER)
    answers = [_after(tokenizer, f"\n{MARKER}", key) for key in keys]

    def filler() -> Iterator[list[int]]:
        size = len(MARKER) + digits
        while True:
            lines = ["".join(draw.choices(KEY_DIGITS, k=size)) + "\n" for _ in range(LINES_AT_ONCE)]
            yield from _all_after(tokenizer, "\n", lines)

    return Parts([tokenizer.bos], [*marker, *answers[0], *newline], [*newline, *marker], answers, filler())


def _after(tokenizer: TextTokenizer, before: str, text: str) -> list[int]:
    """Tokens of a text that follows another."""
    return _all_after(tokenizer, before, [text])[0]


def _all_after(tokenizer: TextTokenizer, before: str, texts: list[str]) -> list[list[int]]:
    """Where a tokenizer joins the end of one with the other's start, the other is tokenized alone."""
    head, *wholes = (ids.tolist() for ids in tokenizer.encoder([before, *(before + text for text in texts)]))
    return [
        whole[len(head) :] if whole[: len(head)] == head else tokenizer.encode(text)
        for text, whole in zip(texts, wholes, strict=True)
    ]


def run_trials(subject: Subject, settings: Passkey, length: int, numbers: Sequence[int]) -> Json:
    """A cell: {"depth", "exact", "choice"} of each trial."""
    tokenizer, local, room = read_tokenizer(subject.model), subject.local, answer_room(settings)
    seeds = [f"{subject.seed}/passkey/{length}/{number}" for number in numbers]
    depths, prompts, answers = zip(
        *(make_trial(tokenizer, length * local, settings, seed) for seed in seeds), strict=True
    )
    prompts_BT = torch.tensor(prompts, dtype=torch.long)
    ask = open_reader(subject, "model").ask(prompts_BT, question_length(tokenizer, settings), room)
    scores_BC, exact_B = weigh(ask, answers, room, tokenizer)
    choice_B = scores_BC[:, 0] > scores_BC[:, 1:].max(1).values
    outcomes = zip(depths, exact_B.tolist(), choice_B.tolist(), strict=True)
    return [{"depth": depth, "exact": exact, "choice": choice} for depth, exact, choice in outcomes]


def weigh(
    ask: Ask, answers: Sequence[list[list[int]]], room: int, tokenizer: TextTokenizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each answer [B, C] after what was read, and whether each token of the first one is the
    likeliest, and so is one that begins with no digit after them [B]. The answers are padded to `room` tokens."""
    scores, exact_B = [], torch.zeros(len(answers), dtype=torch.bool)
    for candidate in range(CANDIDATES):
        row = [answer[candidate] for answer in answers]
        answer_BA = torch.tensor([ids + [tokenizer.eos] * (room - len(ids)) for ids in row])
        real_BA = torch.arange(room) < torch.tensor([[len(ids)] for ids in row])
        logits_BAV = ask(answer_BA).float().cpu()  # one more than the answer's tokens
        losses_BA = functional.cross_entropy(logits_BAV[:, :-1].transpose(1, 2), answer_BA, reduction="none")
        scores.append(-(losses_BA * real_BA).sum(1))
        if candidate == 0:
            likeliest_BA = logits_BAV.argmax(-1)
            after = [
                tokenizer.tokenizer.id_to_token(int(line[len(ids)]))
                for line, ids in zip(likeliest_BA, row, strict=True)
            ]
            ends_B = torch.tensor([not (token or "")[:1].isdigit() for token in after])
            exact_B = ((likeliest_BA[:, :-1] == answer_BA) | ~real_BA).all(1) & ends_B
    return torch.stack(scores, dim=1), exact_B


def summarize(subject: Subject, settings: Passkey, results: Mapping[str, Json], output: Path) -> Result:
    """Both scores by length, and a map of them by length and depth."""
    trials: dict[int, list[dict[str, float]]] = {}
    for length, numbers in sorted(_batches(subject, settings)):
        trials.setdefault(length * subject.local, []).extend(results[_key(length, numbers)])
    write_trials(trials, output)
    shares = {score: {tokens: share(own, score) for tokens, own in trials.items()} for score in SCORES}
    reached = longest_good(shares["exact"])
    points = [Point(f"passkey/{score}", tokens, found) for score in SCORES for tokens, found in shares[score].items()]
    points.append(Point("passkey/length_90", 0, reached))
    rows: list[list[Value]] = []
    for tokens, own in trials.items():
        row: list[Value] = [tokens, len(own)]
        for score in SCORES:
            row += [shares[score][tokens], interval(own, score)]
        rows.append(row)
    note = (
        f"A number of {settings.digits} digits in {'filler text' if settings.prompt == 'text' else 'lines of digits'}. "
        f"exact: spelt greedily; choice: likelier than {CANDIDATES - 1} others (chance {1 / CANDIDATES}). "
        f"Intervals of 95 %. {GOOD:.0%} exact {f'up to {reached:,} tokens' if reached else 'at no length'}."
    )
    columns = ["tokens of context", "trials", "exact", "interval", "choice", "interval"]
    titles = {"exact": "exact", "choice": f"choice of {CANDIDATES}"}
    edges = [f"{bin / DEPTHS:.0%} to {(bin + 1) / DEPTHS:.0%}" for bin in range(DEPTHS)]
    maps = {titles[score]: by_depth(list(trials.values()), score) for score in SCORES}
    plot_heat_maps(maps, list(trials), edges, output / "passkey.png")
    table = Table("Passkey retrieval", columns, rows, note)
    return Result("passkey", settings.model_dump(mode="json"), points, [table], ["passkey.png"])


def longest_good(shares: Mapping[int, float]) -> int:
    """The longest length whose share is `GOOD`, as at all shorter ones; 0 if there is none."""
    reached = 0
    for tokens in sorted(shares):
        if shares[tokens] < GOOD:
            break
        reached = tokens
    return reached


def by_depth(columns: Sequence[Sequence[Mapping[str, float]]], score: str) -> list[list[float | None]]:
    """Shares of each column's trials, a row for each of `DEPTHS` depths; None where there are no trials."""
    rows: list[list[float | None]] = []
    for depth in range(DEPTHS):
        there = [[trial for trial in own if int(trial["depth"] * DEPTHS) == depth] for own in columns]
        rows.append([share(own, score) if own else None for own in there])
    return rows


def _batches(subject: Subject, settings: Passkey) -> list[tuple[int, list[int]]]:
    """(length, numbers of trials read together)."""
    numbers = list(range(settings.trials))
    return [
        (length, numbers[first : first + rows])
        for length in dict.fromkeys(settings.lengths)
        if subject.reading.reaches(length * subject.local)
        for rows in [_rows(subject, settings, length)]
        for first in range(0, settings.trials, rows)
    ]


def _rows(subject: Subject, settings: Passkey, length: int) -> int:
    """Prompts read together."""
    tokens = length * subject.local
    most = min(settings.at_once, settings.trials, max(1, TOKENS_AT_ONCE // tokens))
    return rows_together(subject, "model", tokens, most)


def _key(length: int, numbers: Sequence[int]) -> str:
    return f"{length}-{numbers[0]}"
