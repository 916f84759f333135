"""Few-shot in context: questions after as many demonstrations as fit each length.

    Question: What county is Modesto , California in ?
    Type: LOC:city

A draw is an order of the training questions and a choice of test questions, the same at every length: a longer prompt
is the shorter one with more demonstrations behind it. So one cell reads a draw's demonstrations once, window by window
into memory, and stops at each length to ask: what is left of the demonstrations and the question stand in the local
context. Scores: `accuracy`, the greedy answer up to the line's end is right; `choice`, for classes alone, the likeliest
of all classes is.

Kinds of questions are given by modules of their own: trec.py, webquestions.py.
"""

import math
import random
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path

from jobs.common.plot import plot_curves
from jobs.config.evaluation import FewShot
from jobs.evaluate.cells import Cell, Json
from jobs.evaluate.questions import Example, read_examples
from jobs.evaluate.subject import (
    Subject,
    load_model,
    memory_bytes,
    new_cache,
    read_config,
    read_into,
    read_tokenizer,
    weights_bytes,
)
from jobs.measures.result import Point, Result, Table
from pipelines.workflow.errors import UserError

ANSWER = 64  # tokens of an answer that is no class, at most
END = "\n\n"
USUAL = "most frequent answer"


@dataclass(frozen=True)
class QuestionSet:
    """A set of questions. `answer_is`: the word before an answer; `questions`, `answers`: names that columns may have;
    `plain`: what of an answer is compared; `classes`: whether all answers are known beforehand."""

    name: str
    answer_is: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    plain: Callable[[str], str]
    classes: bool

    def ask(self, example: Example) -> str:
        return f"Question: {example.question}\n{self.answer_is}:"

    def show(self, example: Example) -> str:
        return f"{self.ask(example)} {example.answers[0]}{END}"

    def is_right(self, answer: str, example: Example) -> bool:
        return self.plain(answer) in map(self.plain, example.answers)


@dataclass(frozen=True)
class Demonstrations:
    """`demonstrations`: the tokens of each that fits the longest prompt, in order; `fits`: {multiple of the local
    context: how many of them fit}; `usual`: the most frequent answer of all demonstrations; `room`: tokens kept for an
    answer; `longest`: tokens of the longest question and its answer."""

    demonstrations: Sequence[Sequence[int]]
    fits: Mapping[int, int]
    questions: Sequence[Example]
    classes: Sequence[str]
    usual: str
    room: int
    longest: int


def cells(kind: QuestionSet, subject: Subject, settings: FewShot) -> list[Cell]:
    """One for each draw. Raises UserError for data that cannot be used, and for lengths that hold no demonstration."""
    longest, weights = max(settings.lengths) * subject.local, weights_bytes(subject.model, subject.dtype)
    held = memory_bytes(subject.model, subject.memory, longest, subject.local, dtype=subject.dtype)
    held += _local_bytes(subject, settings.at_once)
    return [
        Cell(
            key=f"draw-{number}",
            function=ask_draw,
            arguments=(kind, subject, draw, settings.at_once, settings.choice),
            tokens=sum(map(len, draw.demonstrations)),
            bytes=weights + held,
            weights=weights,
            what=f"{kind.name} with {longest} tokens of demonstrations",
        )
        for number, draw in enumerate(make_draws(kind, subject, settings))
    ]


def check_files(kind: QuestionSet, settings: FewShot) -> tuple[list[Example], list[Example]]:
    """The questions to show and those to ask. Raises UserError for settings and files that cannot be used with any
    model."""
    if settings.choice and not kind.classes:
        raise UserError(f"evaluation.{kind.name}.choice: its answers are no classes to choose among: leave it out")
    train, test = (
        read_examples(getattr(settings, part), f"evaluation.{kind.name}.{part}", kind.questions, kind.answers)
        for part in ("train", "test")
    )
    return train, test


def make_draws(kind: QuestionSet, subject: Subject, settings: FewShot) -> list[Demonstrations]:
    train, test = check_files(kind, settings)
    encode = read_tokenizer(subject.model).encoder
    shown = [ids.tolist() for ids in encode([kind.show(example) for example in train])]
    without_answer = map(len, encode([kind.ask(example) for example in train]))
    room = max(len(whole) - asked for whole, asked in zip(shown, without_answer, strict=True))
    room = room if kind.classes else min(room, ANSWER)
    longest = room + max(map(len, encode([kind.ask(example) for example in test])))
    if longest > subject.local:
        raise UserError(
            f"{kind.name}: the longest question and its answer take {longest} tokens, the local context holds "
            f"{subject.local}: it cannot be asked of this model"
        )
    classes = sorted({example.answers[0] for example in train}) if kind.classes else []
    usual = Counter(example.answers[0] for example in train).most_common(1)[0][0]
    draws = []
    for number in range(settings.draws):
        draw = random.Random(f"{subject.seed}/{kind.name}/{number}")
        order = draw.sample(range(len(train)), len(train))
        questions = [test[place] for place in draw.sample(range(len(test)), min(settings.questions, len(test)))]
        ends = list(accumulate((len(shown[place]) for place in order), initial=1))[1:]  # after bos
        fits = {length: bisect_right(ends, length * subject.local - longest) for length in sorted(settings.lengths)}
        if not all(fits.values()):
            needed = longest + ends[0]
            raise UserError(
                f"evaluation.{kind.name}.lengths: {min(fits)} x {subject.local} tokens hold no demonstration: one, a "
                f"question and its answer need up to {needed}; let lengths begin at {-(-needed // subject.local)}"
            )
        demonstrations = [shown[place] for place in order[: max(fits.values())]]
        draws.append(Demonstrations(demonstrations, fits, questions, classes, usual, room, longest))
    return draws


def ask_draw(kind: QuestionSet, subject: Subject, draw: Demonstrations, at_once: int, choice: bool) -> Json:
    """In a task: {multiple of the local context: {"demonstrations": how many, "usual": share of questions that the most
    frequent answer answers, "accuracy": ..., "choice": ...}}."""
    import torch

    from jobs.evaluate.asking import SharedPrompt

    tokenizer, model = read_tokenizer(subject.model), load_model(subject.model, subject.model, subject.dtype)
    cache, local = new_cache(model, subject.memory), subject.local
    questions = [tokenizer.encode(kind.ask(example)) for example in draw.questions]

    def share(answers: Sequence[str]) -> float:
        return sum(map(kind.is_right, answers, draw.questions)) / len(draw.questions)

    def text(answer: Sequence[int]) -> str:
        whole = [*takewhile(lambda token: token != tokenizer.eos, answer)]
        return str(tokenizer.tokenizer.decode(whole)).lstrip(" ").split("\n")[0]

    def ended(answer: list[int]) -> bool:
        return tokenizer.eos in answer or "\n" in tokenizer.tokenizer.decode(answer)

    results: dict[str, dict[str, float]] = {}
    for length, count in draw.fits.items():
        ids = [tokenizer.bos, *(token for shown in draw.demonstrations[:count] for token in shown)]
        whole = len(ids) // local * local
        alone = len(ids) - whole + draw.longest > local  # what is left of the demonstrations is a window of its own
        begin = len(ids) if alone else whole
        read_into(model, cache, torch.tensor([ids[cache.get_seq_length() : begin]]), local)
        prompt = SharedPrompt(model, cache.memory, ids[begin:], at_once, local)
        measured = {"demonstrations": count, "usual": share([draw.usual] * len(questions))}
        measured["accuracy"] = share([text(answer) for answer in prompt.answer(questions, draw.room, ended)])
        if choice:
            chosen = []
            for example, question in zip(draw.questions, questions, strict=True):
                answered = [tokenizer.encode(f"{kind.ask(example)} {name}{END}") for name in draw.classes]
                scores = prompt.log_probabilities(question, [ids[len(question) :] for ids in answered])
                chosen.append(draw.classes[scores.index(max(scores))])
            measured["choice"] = share(chosen)
        results[str(length)] = measured
        cache.truncate(whole)
    return results


def summarize(
    kind: QuestionSet, subject: Subject, settings: FewShot, results: Mapping[str, Json], output: Path
) -> Result:
    """Means over the draws, with their 95 % intervals by the t distribution."""
    scores = ["accuracy", "choice"] if settings.choice else ["accuracy"]
    points, rows = [], []
    curves: dict[str, dict[int, float]] = {score: {} for score in (*scores, USUAL)}
    for length in sorted(settings.lengths):
        tokens, draws = length * subject.local, [result[str(length)] for result in results.values()]
        row: list[int | float | None] = [tokens, round(statistics.mean(draw["demonstrations"] for draw in draws), 1)]
        for score in scores:
            mean, half = mean_and_half_width([draw[score] for draw in draws])
            points.append(Point(f"{kind.name}/{score}", tokens, mean))
            row += [mean, *((None, None) if half is None else (max(0.0, mean - half), min(1.0, mean + half)))]
            curves[score][tokens] = mean
        curves[USUAL][tokens] = statistics.mean(draw["usual"] for draw in draws)
        rows.append(row)
    usual = next(iter(curves[USUAL].values()))
    note = f"means of {len(results)} draws; the most frequent answer of all demonstrations scores {usual:.3f}"
    columns = ["tokens", "demonstrations", *(name for score in scores for name in (score, "95 % from", "to"))]
    plot = f"{kind.name}.png"
    plot_curves(curves, "tokens of context", f"{kind.name}: share of questions answered", output / plot, shares=True)
    table = Table(f"{kind.name}: questions answered in context", columns, rows, note)
    return Result(kind.name, settings.model_dump(mode="json"), points, [table], [plot])


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and half the width of its 95 % interval, None for a single value."""
    from scipy.stats import t

    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, None
    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _local_bytes(subject: Subject, rows: int) -> int:
    """Of the keys and values of all layers in the local context of so many rows."""
    config = read_config(subject.model)
    share = (config.get("num_key_value_heads") or config["num_attention_heads"]) / config["num_attention_heads"]
    return int(2 * 4 * rows * subject.local * config["num_hidden_layers"] * config["hidden_size"] * share)
