"""Passkey retrieval: a number hidden in filler, at a random depth, and asked for last.

Two prompts:

- `text`: Landmark Attention's, as LongLLaMA uses it.
- `digits`, for models too small to read: lines of digits 1 to 9, drawn at random; among them one line of the marker 000
  and the key; and last the marker again, after which the key is to follow. Keys are of digits 1 to 9 as well, so the
  marker is nowhere else, and what follows it tells the key from filler.

The text is read window by window into memory; the last window holds the question. Two scores: `exact`, the greedy
continuation is the number (every token of it is the likeliest after those before) and goes on with no other digit, as
in Landmark Attention's script; `choice`, the number is likelier than nine others (chance: 0.1), which still says
something of models too small to spell it.

Each trial is drawn by (seed, length, its number), whichever are read together.

Shapes: B trials, T tokens of a prompt, L tokens a window, A tokens that an answer may have, C candidates.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from torch.nn import functional

from fot_model import FotCache, FotLlamaForCausalLM
from jobs.evaluate.cells import Cell, Json
from jobs.evaluate.config import Passkey
from jobs.evaluate.result import Cell as Value
from jobs.evaluate.result import Point, Result, Table
from jobs.evaluate.subject import (
    Subject,
    load_model,
    memory_bytes,
    new_cache,
    read_into,
    read_tokenizer,
    weights_bytes,
)
from jobs.plot import plot_heat_maps
from pipelines.errors import UserError
from pipelines.tokenizer import TextTokenizer

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
Z = 1.96  # of a 95 % interval
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
    local, weights = subject.local, weights_bytes(subject.model)
    rows = {length: _rows(settings, length, local) for length in settings.lengths}
    held = {
        length: memory_bytes(subject.model, subject.memory, (length - 1) * local, local, rows[length])
        + 16 * rows[length] * length * local  # the prompts themselves
        for length in settings.lengths
    }
    return [
        Cell(
            key=_key(length, numbers),
            function=run_trials,
            arguments=(subject, settings, length, numbers),
            tokens=len(numbers) * (length + CANDIDATES - 1) * local,
            bytes=weights + held[length],
            weights=weights,
            what=f"passkey at {length * local} tokens, {rows[length]} prompts at once (evaluation.passkey.at_once)",
        )
        for length, numbers in _batches(settings, local)
    ]


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
    model = load_model(subject.model, subject.model)
    seeds = [f"{subject.seed}/passkey/{length}/{number}" for number in numbers]
    depths, prompts, answers = zip(
        *(make_trial(tokenizer, length * local, settings, seed) for seed in seeds), strict=True
    )
    asked = (length - 1) * local
    prompts_BT = torch.tensor(prompts, dtype=torch.long)
    cache = new_cache(model, subject.memory)
    read_into(model, cache, prompts_BT[:, :asked], local)
    scores_BC, exact_B = weigh(model, cache, prompts_BT[:, asked:], answers, room, tokenizer)
    choice_B = scores_BC[:, 0] > scores_BC[:, 1:].max(1).values
    outcomes = zip(depths, exact_B.tolist(), choice_B.tolist(), strict=True)
    return [{"depth": depth, "exact": exact, "choice": choice} for depth, exact, choice in outcomes]


def weigh(
    model: FotLlamaForCausalLM,
    cache: FotCache,
    question_BL: torch.Tensor,
    answers: Sequence[list[list[int]]],
    room: int,
    tokenizer: TextTokenizer,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each answer [B, C] after what the cache has read and the question, and whether each token of
    the first one is the likeliest, and so is one that begins with no digit after them [B]. The answers are padded to
    `room` tokens; the cache forgets them."""
    read, scores, exact_B = cache.get_seq_length(), [], torch.zeros(len(answers), dtype=torch.bool)
    for candidate in range(CANDIDATES):
        row = [answer[candidate] for answer in answers]
        answer_BA = torch.tensor([ids + [tokenizer.eos] * (room - len(ids)) for ids in row])
        real_BA = torch.arange(room) < torch.tensor([[len(ids)] for ids in row])
        window_BL = torch.cat([question_BL, answer_BA], dim=1).to(model.device)
        output = model(
            window_BL, past_key_values=cache, last_context_length=window_BL.shape[1], logits_to_keep=room + 1
        )
        cache.truncate(read)
        logits_BAV = output.logits[:, :-1].float().cpu()
        losses_BA = functional.cross_entropy(logits_BAV.transpose(1, 2), answer_BA, reduction="none")
        scores.append(-(losses_BA * real_BA).sum(1))
        if candidate == 0:
            likeliest_BA = output.logits.argmax(-1).cpu()
            after = [
                tokenizer.tokenizer.id_to_token(int(line[len(ids)]))
                for line, ids in zip(likeliest_BA, row, strict=True)
            ]
            ends_B = torch.tensor([not (token or "")[:1].isdigit() for token in after])
            exact_B = ((likeliest_BA[:, :-1] == answer_BA) | ~real_BA).all(1) & ends_B
    return torch.stack(scores, dim=1), exact_B


def summarize(subject: Subject, settings: Passkey, results: Mapping[str, Json], output: Path) -> Result:
    """Both scores by length, and a map of them by length and depth."""
    trials: dict[int, list[dict[str, float]]] = {length * subject.local: [] for length in sorted(settings.lengths)}
    for length, numbers in _batches(settings, subject.local):
        trials[length * subject.local] += results[_key(length, numbers)]
    shares = {score: {tokens: _share(own, score) for tokens, own in trials.items()} for score in SCORES}
    reached = longest_good(shares["exact"])
    points = [Point(f"passkey/{score}", tokens, share) for score in SCORES for tokens, share in shares[score].items()]
    points.append(Point("passkey/length_90", 0, reached))
    rows: list[list[Value]] = []
    for tokens, own in trials.items():
        row: list[Value] = [tokens, len(own)]
        for score in SCORES:
            low, high = wilson(sum(bool(trial[score]) for trial in own), len(own))
            row += [shares[score][tokens], f"{low:.3f} to {high:.3f}"]
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


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, spread = successes / trials, Z * Z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / trials + spread / trials / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


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
        rows.append([_share(own, score) if own else None for own in there])
    return rows


def _share(trials: Sequence[Mapping[str, float]], score: str) -> float:
    return sum(bool(trial[score]) for trial in trials) / len(trials)


def _batches(settings: Passkey, local: int) -> list[tuple[int, list[int]]]:
    """(length, numbers of trials read together)."""
    numbers = list(range(settings.trials))
    return [
        (length, numbers[first : first + rows])
        for length in dict.fromkeys(settings.lengths)
        for rows in [_rows(settings, length, local)]
        for first in range(0, settings.trials, rows)
    ]


def _rows(settings: Passkey, length: int, local: int) -> int:
    """Prompts read together."""
    return min(settings.at_once, settings.trials, max(1, TOKENS_AT_ONCE // (length * local)))


def _key(length: int, numbers: Sequence[int]) -> str:
    return f"{length}-{numbers[0]}"
