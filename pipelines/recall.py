"""Synthetic documents that train recall: made-up facts, stated early and asked for again far later.

A document mixes carrier text, sentences of a small grammar, with 20 to 60 facts about made-up names: numbers, codes,
passwords, colours, dates, homes, assignments, lines of configuration, definitions. Each is stated once, sometimes
twice, and asked for later in other words: as question and answer, restated, or with a blank to be filled in. In every
such form the name comes before the value, so that the value can be known from what was read. Several facts of one kind
are about different names, and some about one name are of different kinds, so both must be matched. Names are of
made-up syllables, drawn anew for each document: none has two values in one document, hardly any is met in two.

The numbers in the carrier text belong to no made-up name. No wording of the passkey evaluation occurs: it stays unseen.
"""

import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle

LEAST_CHARACTERS = 4000  # that hold 20 facts, their questions and some text between
QUESTIONS = 20, 60  # the least and the most in a document
CHARACTERS_PER_QUESTION = 320
DISTANCE = 0.25, 1.0  # of a fact from its question, as share of the document
STATED_TWICE, ASKED_TWICE, SAME_NAME, OWN_LINE = 0.15, 0.1, 0.3, 0.6  # how often
KINDS_AT_ONCE = 1, 6  # in one document

Draw = random.Random


@dataclass(frozen=True)
class Kind:
    """A kind of fact. Forms hold {e}, the name it is about, {a}, one of `attributes`, and {v}, the value.

    `states`: how it is stated. `questions`, `answers`: of question and answer; the bare value is an answer, too.
    `recalls`: how it is restated or filled in, {e} before {v}. `value`: draws one, {} being a made-up name.
    """

    entity: Callable[["_Names"], str]
    value: Callable[["_Names"], str]
    states: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    recalls: tuple[str, ...]
    attributes: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class _Fact:
    kind: Kind
    attribute: str
    entity: str
    value: str

    def fill(self, form: str) -> str:
        return form.format(a=self.attribute, e=self.entity, v=self.value)


def recall_document(seed: int, number: int, characters: int, distance: tuple[float, float] = DISTANCE) -> str:
    """Document `number` of a seed's, about `characters` long: a pure function, the same text everywhere.

    `distance`: the least and the most between a fact and its question, about, as share of the document's length.
    Raises ValueError for fewer than 4,000 characters.
    """
    if characters < LEAST_CHARACTERS:
        raise ValueError(f"a recall document needs at least {LEAST_CHARACTERS} characters, not {characters}")
    draw = Draw(f"recall/{seed}/{number}/{characters}/{distance}")
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


def _facts(draw: Draw, wanted: int) -> list[_Fact]:
    """Facts of a few kinds, no two about the same attribute of the same name."""
    names = _Names(draw)
    kinds = draw.sample(KINDS, draw.randint(*KINDS_AT_ONCE))
    known: dict[tuple[int, str, str], _Fact] = {}
    while len(known) < wanted:
        place = draw.randrange(len(kinds))
        kind = kinds[place]
        attribute = draw.choice(kind.attributes)
        met = [fact.entity for fact in known.values() if fact.kind.entity is kind.entity]
        entity = draw.choice(met) if met and draw.random() < SAME_NAME else kind.entity(names)
        if (place, attribute, entity) not in known:
            known[place, attribute, entity] = _Fact(kind, attribute, entity, kind.value(names))
    return list(known.values())


def _question(draw: Draw, fact: _Fact) -> str:
    """The fact asked for: question and answer, restated, or filled in."""
    kind = fact.kind
    if draw.random() < 0.4:
        return fact.fill(draw.choice(kind.recalls))
    answer = draw.choice(("{v}", *kind.answers))
    return fact.fill(draw.choice(DIALOGUES).format(q=draw.choice(kind.questions), a=answer))


def _lay_out(draw: Draw, events: Sequence[tuple[float, str]], characters: int) -> str:
    """The events at their places, carrier text between them; earlier where what follows would not fit."""
    carrier = _carrier(draw)
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


# Carrier text


def _carrier(draw: Draw) -> Iterator[str]:
    """Sentences without end: a few over and over, some of a pool, always new ones, or entries with numbers."""
    style = draw.randrange(5)
    if style == 0:
        return cycle([_sentence(draw) for _ in range(draw.randint(2, 6))])
    if style == 1:
        pool = [_sentence(draw) for _ in range(draw.randint(12, 40))]
        return (draw.choice(pool) for _ in count())
    if style == 2:
        return (_entry(draw, number) for number in count(draw.randint(1, 900)))
    return (_sentence(draw) for _ in count())


def _sentence(draw: Draw) -> str:
    words = {
        name: draw.sample(choices, 3)
        for name, choices in (("n", NOUNS), ("j", ADJECTIVES), ("p", PLACES), ("r", PEOPLE), ("d", DONE), ("w", WHEN))
    }
    filled = draw.choice(PATTERNS).format(**words, m=draw.randint(2, 900))
    return filled[0].upper() + filled[1:]


def _entry(draw: Draw, number: int) -> str:
    goods, person = draw.choice(NOUNS), draw.choice(PEOPLE)
    return draw.choice(ENTRIES).format(i=number, n=goods, r=person, p=draw.choice(PLACES), m=draw.randint(2, 9999))


# Names and values


class _Names:
    """Draws names and values; no made-up word twice."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self._used: set[str] = set()

    def word(self) -> str:
        """A made-up word of two or three syllables, lower case."""
        while True:
            syllables = self.draw.choice((2, 2, 3))
            word = "".join(self.draw.choice(ONSETS) + self.draw.choice(VOWELS) for _ in range(syllables))
            word += self.draw.choice(CODAS)
            if word not in self._used:
                self._used.add(word)
                return word

    def name(self) -> str:
        return self.word().capitalize()

    def person(self) -> str:
        return f"{self.name()} {self.name()}"

    def identifier(self) -> str:
        return f"{self.word()}_{self.draw.choice(ROLES)}"

    def digits(self, least: int = 4, most: int = 7) -> str:
        """A number of so many digits, the first not 0."""
        length = self.draw.randint(least, most)
        return str(self.draw.randrange(10 ** (length - 1), 10**length))

    def letters(self, alphabet: str, length: int) -> str:
        return "".join(self.draw.choice(alphabet) for _ in range(length))

    def password(self) -> str:
        return self.letters(string.ascii_letters + string.digits, self.draw.randint(6, 10))

    def part(self) -> str:
        """Such as KX-482-QB."""
        upper = string.ascii_uppercase
        return f"{self.letters(upper, 2)}-{self.digits(3, 4)}-{self.letters(upper, self.draw.randint(1, 2))}"

    def colour(self) -> str:
        return f"{self.draw.choice(SHADES)} {self.draw.choice(COLOURS)}"

    def date(self) -> str:
        return f"{self.draw.randint(1, 28)} {self.draw.choice(MONTHS)} {self.draw.randint(1800, 2090)}"

    def time(self) -> str:
        return f"{self.draw.randrange(24):02}:{self.draw.randrange(60):02}"

    def quantity(self) -> str:
        return f"{self.draw.randint(12, 980)} {self.draw.choice(CONTAINERS)} of {self.draw.choice(GOODS)}"

    def thing(self) -> str:
        return f"{self.draw.choice(ADJECTIVES)} {self.draw.choice(NOUNS)}"

    def meaning(self) -> str:
        """What a definition says."""
        return f"a {self.thing()} that is kept in the {self.draw.choice(PLACES)}"

    def trade(self) -> str:
        return self.draw.choice(PEOPLE)

    def literal(self) -> str:
        """A value in code."""
        forms = (self.digits, lambda: f'"{self.password()}"', lambda: f"0x{self.letters('0123456789abcdef', 6)}")
        return self.draw.choice(forms)()

    def option(self) -> str:
        """A value in a file of settings."""
        forms = (self.digits, self.password, lambda: f"/{self.word()}/{self.word()}", self.time)
        return self.draw.choice(forms)()

    def version(self) -> str:
        return f"{self.draw.randint(0, 30)}.{self.draw.randint(0, 60)}.{self.draw.randint(0, 99)}"

    def metres(self) -> str:
        return f"{self.draw.randint(210, 9800)} metres"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# A consonant first, so that "a" goes before every word. Some 900 thousand words of two syllables, 200 million of three.
ONSETS = _words("b br c ch d dr f fl g gr h j k kl l m n p pr r s sh sk st t th tr v w y z")
VOWELS = _words("a e i o u ai ea io")
CODAS = ["", "l", "m", "n", "nd", "r", "rn", "s", "sk", "t", "x", "ck"]
ROLES = _words("limit size count offset token level seed index width depth rate quota")
MONTHS = _words("January February March April May June July August September October November December")
SHADES = _words("pale dark bright dusty deep faded glossy smoky")
COLOURS = _words("red orange amber olive teal indigo violet crimson grey white black brown turquoise beige scarlet")
CONTAINERS = _words("crates barrels sacks boxes jars bundles pallets baskets")
GOODS = _words("salt apples rope soap nails wool barley lamps copper paper honey tiles cork sugar candles coal")

KINDS = (
    Kind(
        _Names.person,
        _Names.digits,
        (
            "The {a} of {e} is {v}.",
            "{e} was given the {a} {v}.",
            "{v} is the {a} that belongs to {e}.",
            "On the card of {e} the {a} reads {v}.",
            "Note for later: {e}, {a} {v}.",
        ),
        ("What is the {a} of {e}?", "Which {a} was given to {e}?", "What does the {a} of {e} read?"),
        ("The {a} of {e} is {v}.", "{e} has the {a} {v}.", "It is {v}."),
        (
            "As noted before, the {a} of {e} is {v}.",
            "So {e} came with the {a} {v}.",
            "Fill in the blank: the {a} of {e} is ____. Missing: {v}.",
            "Card of {e} / {a}: {v}",
        ),
        ("locker number", "badge number", "membership number", "account number", "permit number", "case number"),
    ),
    Kind(
        _Names.name,
        _Names.digits,
        (
            "The {e} {a} is {v}.",
            "Do not lose the {e} {a}: {v}.",
            "Today the {e} {a} was set to {v}.",
            "{v} is what they call the {e} {a}.",
            "{e} {a} = {v}.",
        ),
        ("What is the {e} {a}?", "Tell me the {e} {a}, please. What is it?", "To what was the {e} {a} set?"),
        ("The {e} {a} is {v}.", "The {e} {a} was set to {v}.", "It is {v}."),
        (
            "The {e} {a}, given above, is {v}.",
            "Whoever asks for the {e} {a} is told {v}.",
            "The {e} {a} is ____ (answer: {v}).",
        ),
        ("number", "figure", "signal", "index", "rating", "quota"),
    ),
    Kind(
        _Names.name,
        _Names.part,
        (
            "The gate at {e} opens with {v}.",
            "Use {v} to enter the {e} depot.",
            "Entry code for {e}: {v}.",
            "Guards at {e} ask for the code {v}.",
        ),
        (
            "Which code opens the gate at {e}?",
            "How does one enter the {e} depot?",
            "What do the guards at {e} ask for?",
        ),
        ("The gate at {e} opens with {v}.", "At {e} one needs {v}.", "With {v}."),
        (
            "We reached the gate at {e} and typed {v}.",
            "Entry code for {e}, once more: {v}",
            "Complete the line: the gate at {e} opens with ... {v}",
        ),
    ),
    Kind(
        _Names.person,
        lambda names: names.digits(3, 5),
        (
            "{e} can be reached at extension {v}.",
            "Extension {v} rings on the desk of {e}.",
            "Call {e}: ext. {v}.",
            "For {e}, dial {v} after the tone.",
        ),
        ("At which extension can {e} be reached?", "Which extension should I dial for {e}?", "How do I call {e}?"),
        ("{e} can be reached at extension {v}.", "For {e}, dial {v}.", "Extension {v}."),
        (
            "She wanted to speak to {e}, so she dialled {v}.",
            "Directory, {e}, extension {v}",
            "Fill in: {e} can be reached at extension ____ -> {v}",
        ),
    ),
    Kind(
        _Names.word,
        _Names.password,
        (
            "The password of user {e} is {v}",
            "Log in as {e} with {v}",
            "New account: user {e}, password {v}",
            "login {e} / secret {v}",
        ),
        ("What is the password of user {e}?", "With what does {e} log in?", "Which secret belongs to login {e}?"),
        ("The password of user {e} is {v}", "{e} logs in with {v}"),
        (
            "user: {e}\npassword: {v}",
            "Signing in again as {e}, we typed {v}",
            "Fill in: the password of user {e} is ____, that is {v}",
        ),
    ),
    Kind(
        _Names.person,
        _Names.colour,
        (
            "{e} owns a {v} {a}.",
            "The {a} of {e} was painted {v}.",
            "Nobody but {e} would choose a {v} {a}.",
            "A {v} {a} stands outside; it belongs to {e}.",
        ),
        ("What colour is the {a} of {e}?", "In which colour was the {a} of {e} painted?", "Which {a} does {e} own?"),
        ("The {a} of {e} is {v}.", "{e} owns one in {v}.", "It is {v}."),
        (
            "Everyone knew the {a} of {e}, for it was {v}.",
            "The {a} of {e} is ____ in colour: {v}.",
            "{e} came back with the same {a} as before, the one in {v}.",
        ),
        ("bicycle", "boat", "door", "wagon", "umbrella", "lantern"),
    ),
    Kind(
        _Names.person,
        _Names.date,
        (
            "{e} was born on {v}.",
            "The birthday of {e} is {v}.",
            "Born {v}: {e}.",
            "On {v} a child was born who was called {e}.",
        ),
        ("When was {e} born?", "What is the date of birth of {e}?", "On which day was {e} born?"),
        ("{e} was born on {v}.", "On {v}."),
        (
            "In the register, {e} is entered as born on {v}.",
            "{e} (born {v})",
            "Date of birth of {e}: ____. It is {v}.",
        ),
    ),
    Kind(
        _Names.name,
        _Names.date,
        (
            "The {e} {a} begins on {v}.",
            "On {v} they will open the {e} {a}.",
            "Mark {v} for the {e} {a}.",
            "The date of the {e} {a} was fixed: {v}.",
        ),
        (
            "When does the {e} {a} begin?",
            "On which date do they open the {e} {a}?",
            "Which day was fixed for the {e} {a}?",
        ),
        ("The {e} {a} begins on {v}.", "It was fixed for {v}.", "On {v}."),
        (
            "Nobody may come late to the {e} {a}, which begins on {v}.",
            "Calendar: {e} {a}, {v}",
            "Blank: the {e} {a} begins on [ ]. Filled: {v}.",
        ),
        ("festival", "hearing", "auction", "exhibition", "regatta"),
    ),
    Kind(
        _Names.person,
        _Names.name,
        (
            "{e} lives in {v}.",
            "The house of {e} is in {v}.",
            "Since last winter {e} has lived in {v}.",
            "In {v} one finds the home of {e}.",
            "{e} moved to the town of {v} and stayed.",
        ),
        ("Where does {e} live?", "In which town is the house of {e}?", "Where did {e} move to?"),
        ("{e} lives in {v}.", "The house of {e} is in {v}.", "In {v}."),
        (
            "A letter to {e} must be sent to {v}.",
            "As we know, {e} lives in {v}.",
            "{e} lives in ____. The missing word is {v}.",
        ),
    ),
    Kind(
        _Names.person,
        _Names.trade,
        (
            "{e} works as a {v}.",
            "By trade {e} is a {v}.",
            "They hired {e}, a {v}.",
            "The {v} in this story is called {e}.",
        ),
        ("What does {e} do for a living?", "What is {e} by trade?", "As what does {e} work?"),
        ("{e} works as a {v}.", "{e} is a {v}.", "As a {v}."),
        (
            "Ask {e}, who works as a {v}.",
            "Name: {e}. Trade: {v}.",
            "By trade {e} is a ____ ({v}).",
        ),
    ),
    Kind(
        _Names.name,
        _Names.person,
        (
            "The {a} of {e} is {v}.",
            "{v} became {a} of {e}.",
            "They chose {v} as {a} of {e}.",
            "In {e} the {a} goes by the name of {v}.",
        ),
        ("Who is the {a} of {e}?", "Whom did they choose as {a} of {e}?", "What is the name of the {a} of {e}?"),
        ("The {a} of {e} is {v}.", "In {e} it is {v}.", "They chose {v}."),
        (
            "A word from the {a} of {e}: my name is {v}.",
            "Signed, for {e}, by its {a}, {v}.",
            "The {a} of {e} is [name]. Name: {v}.",
        ),
        ("mayor", "keeper", "captain", "treasurer", "founder"),
    ),
    Kind(
        _Names.identifier,
        _Names.literal,
        (
            "{e} = {v}",
            "const {e} = {v};",
            "let {e} = {v};",
            "#define {e} {v}",
            "    self.{e} = {v}",
            "{e}: Final = {v}",
        ),
        ("What is the value of {e}?", "Which value does {e} hold?", "What does print({e}) show?"),
        ("The value of {e} is {v}", "{e} == {v}", "{e} holds {v}"),
        (
            "assert {e} == {v}",
            ">>> {e}\n{v}",
            "if {e} != {v}:\n    raise ValueError(name)",
            "print({e})  # prints {v}",
        ),
    ),
    Kind(
        _Names.word,
        _Names.option,
        (
            "[{e}]\n{a} = {v}",
            "{e}.{a}: {v}",
            "--{e}-{a}={v}",
            "export {e}_{a}={v}",
            '<option section="{e}" key="{a}">{v}</option>',
            '{{"{e}": {{"{a}": "{v}"}}}}',
        ),
        ("What is {a} set to in section {e}?", "Which {a} does {e} use?", "What is the value of {e}.{a}?"),
        ("In section {e}, {a} is set to {v}", "{e}.{a} is {v}", "{e} uses {v}"),
        (
            "# checked: {e}.{a} is {v}",
            "INFO {e} started with {a} {v}",
            "$ config get {e}.{a}\n{v}",
        ),
        ("port", "cache", "target", "socket", "mode", "salt"),
    ),
    Kind(
        _Names.word,
        _Names.meaning,
        (
            '"{e}": {v}.',
            "A {e} is {v}.",
            "{e} (noun): {v}.",
            "By the word {e} people here mean {v}.",
        ),
        ("What is a {e}?", "How is the word {e} defined?", "What do people here mean by {e}?"),
        ("A {e} is {v}.", "By {e} they mean {v}."),
        (
            "She had never seen a {e}, that is, {v}.",
            "Glossary, {e}: {v}.",
            "A {e} is ____. Answer: {v}.",
        ),
    ),
    Kind(
        _Names.word,
        _Names.thing,
        (
            'In the old tongue "{e}" stands for "{v}".',
            "{e} (old tongue) -> {v}",
            'The sign "{e}" is translated as "{v}".',
            '"{v}" would be "{e}" in their language.',
        ),
        (
            'What does "{e}" stand for in the old tongue?',
            'How is the sign "{e}" translated?',
            'Translate "{e}", please?',
        ),
        ('"{e}" stands for "{v}".', 'The sign "{e}" is translated as "{v}".'),
        (
            'They carved "{e}" into the wall, meaning "{v}".',
            "{e}, from the old tongue => {v}",
            'Dictionary: "{e}", ____; it is "{v}".',
        ),
    ),
    Kind(
        _Names.name,
        _Names.quantity,
        (
            "The depot at {e} holds {v}.",
            "At {e} they counted {v}.",
            "A cart brought {v} to {e}.",
            "{e}, stock: {v}.",
        ),
        ("What does the depot at {e} hold?", "What was counted at {e}?", "What did the cart bring to {e}?"),
        ("The depot at {e} holds {v}.", "At {e} there are {v}."),
        (
            "The stock at {e} is still {v}.",
            "Inventory {e}: {v}",
            "Fill the gap: the depot at {e} holds ____ ({v}).",
        ),
    ),
    Kind(
        _Names.name,
        _Names.time,
        (
            "The {a} to {e} leaves at {v}.",
            "At {v} the {a} to {e} departs.",
            "{a} for {e}, departure {v}.",
            "Be at the platform before {v} for the {a} to {e}.",
        ),
        (
            "When does the {a} to {e} leave?",
            "At what time does the {a} to {e} depart?",
            "When must I catch the {a} to {e}?",
        ),
        ("The {a} to {e} leaves at {v}.", "It departs at {v}."),
        (
            "Departures: {a} to {e} {v}",
            "He missed the {a} to {e}, which had left at {v}.",
            "The {a} to {e} leaves at __:__, that is {v}.",
        ),
        ("train", "ferry", "bus", "night coach"),
    ),
    Kind(
        _Names.name,
        _Names.version,
        (
            "Release {v} of {e} is out.",
            "We build with {e} {v}.",
            "{e}=={v}",
            "The stable version of {e} is {v}.",
        ),
        ("Which version of {e} is stable?", "What release of {e} is out?", "With which {e} do we build?"),
        ("The stable version of {e} is {v}.", "{e} {v}."),
        (
            "pip install {e}=={v}",
            "Requirement already satisfied: {e} in version {v}",
            "Stable version of {e}: ____ = {v}",
        ),
    ),
    Kind(
        _Names.name,
        _Names.metres,
        (
            "Mount {e} rises {v} above the sea.",
            "The summit of {e} lies at {v}.",
            "They measured {v} on top of {e}.",
            "{e}, height {v}.",
        ),
        ("How high is Mount {e}?", "At what height lies the summit of {e}?", "What did they measure on top of {e}?"),
        ("Mount {e} rises {v} above the sea.", "The summit of {e} lies at {v}."),
        (
            "Only a few have stood on {e}, whose summit lies at {v}.",
            "Map legend: {e}, {v}",
            "Mount {e} rises ____ above the sea, in figures {v}.",
        ),
    ),
    Kind(
        _Names.word,
        _Names.digits,
        (
            "| {e} | {v} |",
            "{e},{v}",
            "{e}\t{v}",
            "row {e}: {v}",
            "Enter {v} in the table under {e}.",
        ),
        ("What stands in the row of {e}?", "Which number was entered under {e}?", "Look up {e}: what does it say?"),
        ("The row of {e} says {v}.", "Under {e} there is {v}."),
        (
            "lookup({e}) -> {v}",
            "From the table, row {e}, we read {v}.",
            "Row {e}, second column: ____. Value: {v}",
        ),
    ),
    Kind(
        _Names.person,
        _Names.quantity,
        (
            "{e} ordered {v}.",
            "{v} were sent to {e}.",
            "The bill of {e} lists {v}.",
            "For {e} they packed {v}.",
        ),
        ("What did {e} order?", "What does the bill of {e} list?", "What was packed for {e}?"),
        ("{e} ordered {v}.", "For {e} it was {v}."),
        (
            "{e} asked whether the order had come, and it had: {v}.",
            "Delivery to {e}: {v}",
            "{e} ordered ____. Missing words: {v}.",
        ),
    ),
)

DIALOGUES = (
    "Question: {q} Answer: {a}",
    "Q: {q}\nA: {a}",
    "{q} {a}",
    "{q}\n{a}",
    '"{q}" she asked. "{a}" he said.',
    "User: {q}\nAssistant: {a}",
    "- {q}\n- {a}",
    "Quiz. {q} Right answer: {a}",
    "Somebody wanted to know: {q} The reply was: {a}",
)

NOUNS = _words(
    "table river window letter garden stone basket ladder mirror kettle blanket hammer candle barrel bridge fence "
    "wheel bottle curtain pillow saddle bucket pulley clock carpet chimney drawer compass feather flute glove harp "
    "jacket kite lamp map needle stove paddle quilt ribbon saw tent vase wallet chisel bell cup drum teapot fork gate "
    "hat notebook jug key ledger mask net sail plough rake shovel tray pan violin whistle yoke bench crate shelf spoon"
)
ADJECTIVES = _words(
    "small heavy quiet narrow broken polished wooden rusty dusty crooked painted fragile hollow sturdy plain round "
    "green borrowed clean damp curved flat gentle hidden wet jagged lonely modern neat strange patient rough silent "
    "thin useful velvet warm woven young brittle cheap dull lean famous golden humble leather little muddy noble"
)
PLACES = _words(
    "harbour market kitchen cellar library station workshop attic valley orchard chapel courtyard stable tower mill "
    "meadow tunnel theatre bakery archive corridor square laundry greenhouse museum barn lighthouse quarry forest bay"
)
PEOPLE = _words(
    "baker sailor teacher carpenter gardener farmer clerk painter miller weaver potter printer hunter doctor tailor "
    "smith porter singer cook judge shepherd mason glazier courier surveyor librarian locksmith beekeeper cobbler pilot"
)
DONE = _words(
    "carried repaired watched found sold borrowed painted moved cleaned described dropped lifted measured admired hid "
    "wrapped sketched counted fetched opened mended burned bought lost kept weighed turned pushed sorted forgot"
)
WHEN = [
    *(
        "in the morning",
        "after lunch",
        "before dawn",
        "late at night",
        "on a rainy day",
        "during the storm",
        "last week",
    ),
    *(
        "at noon",
        "in early spring",
        "once a month",
        "without a word",
        "with great care",
        "for no reason",
        "by accident",
    ),
    *("as usual", "in a hurry", "long ago", "every other day", "after the concert", "when nobody looked"),
]
PATTERNS = (
    "The {j[0]} {n[0]} in the {p[0]} was {d[0]} by the {r[0]} {w[0]}.",
    "{w[0]}, the {r[0]} {d[0]} a {j[0]} {n[0]}.",
    "Nobody in the {p[0]} had {d[0]} the {n[0]}, and the {r[0]} said nothing.",
    "The {r[0]} {d[0]} the {n[0]} and went back to the {p[0]}.",
    "There were {m} {j[0]} things in the {p[0]}, most of them beside the {n[0]}.",
    "A {j[0]} {n[0]} is worth more than a {j[1]} one, the {r[0]} thought.",
    "Between the {p[0]} and the {p[1]} one meets a {r[0]} {w[0]}.",
    "The {r[0]} and the {r[1]} spoke about the {n[0]} until it was {j[0]}.",
    "It took {m} days to bring the {n[0]} to the {p[0]}.",
    "If the {n[0]} is {j[0]}, the {r[0]} will be pleased.",
    "Someone {d[0]} the {n[0]} {w[0]}, someone else {d[1]} the {n[1]}.",
    "The {p[0]} looked {j[0]} and the {p[1]} looked {j[1]}.",
    "Why the {n[0]} was so {j[0]}, not even the {r[0]} could tell.",
    "{w[0]} it rained on the {p[0]}, and the {n[0]} became {j[0]}.",
    "The {r[0]} had a {j[0]} {n[0]}, a {j[1]} {n[1]} and a {j[2]} {n[2]}.",
    "From the {p[0]} came a sound like that of a {j[0]} {n[0]}.",
    "About {m} people walked past the {p[0]} {w[0]}.",
    "The story of the {j[0]} {n[0]} is told by every {r[0]}.",
    "They {d[0]} it, they {d[1]} it, and then they left it in the {p[0]}.",
    "Under the {n[0]} lay a {n[1]}, under the {n[1]} a {j[0]} {n[2]}.",
    "The {r[0]} never {d[0]} anything {w[0]}.",
    "In the end the {n[0]} was too {j[0]} for the {p[0]}.",
)
ENTRIES = (
    "Entry {i}: {m} units, {n}, {p}.",
    "{i}. The {r} paid {m} for a {n}.",
    "No. {i}, {p}, {n}, weight {m}.",
    "[{i}] {r} {p} {n} {m}",
    "Item {i} went from the {p} to the {r} for {m} coins.",
    "At mark {i} the {r} noted {m}.",
)
