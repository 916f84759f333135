"""Synthetic documents that train recall: made-up facts, stated early and asked for again far later.

A document mixes carrier text, sentences of a small grammar, with 20 to 60 facts about made-up names: numbers, codes,
passwords, colours, dates, homes, assignments, lines of configuration, definitions. Each is stated once, sometimes
twice, and asked for later in other words: as question and answer, restated, or with a blank to be filled in. Several
facts of one kind are about different names, and some about one name are of different kinds, so both must be matched.
Names are of made-up syllables, drawn anew for each document: none has two values in one document, hardly any is met in
two. No wording of the passkey evaluation occurs: it stays unseen.
"""

from collections.abc import Sequence
from random import Random

from pipelines.config import DISTANCE, LEAST_CHARACTERS
from pipelines.sources.recall_carrier import carrier_text
from pipelines.sources.recall_facts import DIALOGUES, KINDS, Fact
from pipelines.sources.recall_names import Names

VERSION = 1  # of the generator: another gives other texts
QUESTIONS = 20, 60  # the least and the most facts in a document
CHARACTERS_PER_QUESTION = 320
STATED_TWICE, ASKED_TWICE, SAME_NAME, RECALLED, OWN_LINE = 0.15, 0.1, 0.3, 0.4, 0.6  # how often
KINDS_AT_ONCE = 1, 6  # in one document


def recall_document(seed: int, number: int, characters: int, distance: tuple[float, float] = DISTANCE) -> str:
    """Document `number` of a seed's, about `characters` long: a pure function, the same text everywhere.

    `distance`: the least and the most between a fact and its question, about, as share of the document's length.
    Raises ValueError for fewer than 4,000 characters.
    """
    if characters < LEAST_CHARACTERS:
        raise ValueError(f"a recall document needs at least {LEAST_CHARACTERS} characters, not {characters}")
    draw = Random(f"recall/{seed}/{number}/{characters}/{distance}")
    least, most = distance
    events: list[tuple[float, str]] = []  # (place as share of the document, text)
    for fact in _facts(draw, min(max(characters // CHARACTERS_PER_QUESTION, QUESTIONS[0]), QUESTIONS[1])):
        forms = draw.sample(fact.kind.states, 2)
        asked = 1 - (1 - least) * draw.random() ** 1.25  # more of them late
        for form in forms[: 1 + (draw.random() < STATED_TWICE)]:
            events.append((draw.uniform(max(0.0, asked - most), asked - least), fact.fill(form)))
        for place in [asked, draw.uniform(asked, 1)][: 1 + (draw.random() < ASKED_TWICE)]:
            events.append((place, _question(draw, fact)))
    return _lay_out(draw, sorted(events), characters)


def _facts(draw: Random, wanted: int) -> list[Fact]:
    """Facts of a few kinds, no two about the same attribute of the same name."""
    names = Names(draw)
    kinds = draw.sample(KINDS, draw.randint(*KINDS_AT_ONCE))
    known: dict[tuple[int, str, str], Fact] = {}
    while len(known) < wanted:
        place = draw.randrange(len(kinds))
        kind = kinds[place]
        attribute = draw.choice(kind.attributes)
        met = [fact.entity for fact in known.values() if fact.kind.entity is kind.entity]
        entity = draw.choice(met) if met and draw.random() < SAME_NAME else kind.entity(names)
        if (place, attribute, entity) not in known:
            known[place, attribute, entity] = Fact(kind, attribute, entity, kind.value(names))
    return list(known.values())


def _question(draw: Random, fact: Fact) -> str:
    """The fact asked for: question and answer, restated, or filled in."""
    kind = fact.kind
    if draw.random() < RECALLED:
        return fact.fill(draw.choice(kind.recalls))
    answer = draw.choice(("{v}", *kind.answers))
    return fact.fill(draw.choice(DIALOGUES).format(q=draw.choice(kind.questions), a=answer))


def _lay_out(draw: Random, events: Sequence[tuple[float, str]], characters: int) -> str:
    """The events at their places, carrier text between them; earlier where what follows would not fit."""
    carrier = carrier_text(draw)
    left = sum(len(text) + 1 for _, text in events)
    paragraphs: list[list[str]] = [[]]
    written, room = 0, draw.randint(3, 8)

    def write(text: str, own_line: bool) -> None:
        nonlocal written, room
        if (own_line or len(paragraphs[-1]) >= room) and paragraphs[-1]:
            paragraphs.append([])
            room = draw.randint(3, 8)
        paragraphs[-1].append(text)
        written += len(text) + 1
        if own_line:
            paragraphs.append([])

    for place, text in events:
        while written < min(place * characters, characters - left):
            write(next(carrier), False)
        write(text, "\n" in text or draw.random() < OWN_LINE)
        left -= len(text) + 1
    while written < characters:
        write(next(carrier), False)
    return "\n".join(" ".join(paragraph) for paragraph in paragraphs if paragraph) + "\n"
