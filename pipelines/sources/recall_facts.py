"""What a recall document tells and asks: kinds of facts with many wordings.

In every form of a question's answer the name comes before the value, so that the value can be known from what was read.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.sources.recall_names import Names


@dataclass(frozen=True)
class FactKind:
    """A kind of fact. Forms hold {e}, the name it is about, {a}, one of `attributes`, and {v}, the value.

    `states`: how it is stated. `questions`, `answers`: of question and answer; the bare value is an answer, too.
    `recalls`: how it is restated or filled in, {e} before {v}. `entity`, `value`: draw one.
    """

    entity: Callable[[Names], str]
    value: Callable[[Names], str]
    states: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    recalls: tuple[str, ...]
    attributes: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Fact:
    """What a document says of a name."""

    kind: FactKind
    attribute: str
    entity: str
    value: str

    def fill(self, form: str) -> str:
        return form.format(a=self.attribute, e=self.entity, v=self.value)


KINDS = (
    FactKind(
        Names.person,
        Names.digits,
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
    FactKind(
        Names.name,
        Names.digits,
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
    FactKind(
        Names.name,
        Names.part,
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
    FactKind(
        Names.person,
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
    FactKind(
        Names.word,
        Names.password,
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
    FactKind(
        Names.person,
        Names.colour,
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
    FactKind(
        Names.person,
        Names.date,
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
    FactKind(
        Names.name,
        Names.date,
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
    FactKind(
        Names.person,
        Names.name,
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
    FactKind(
        Names.person,
        Names.trade,
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
    FactKind(
        Names.name,
        Names.person,
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
    FactKind(
        Names.identifier,
        Names.literal,
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
    FactKind(
        Names.word,
        Names.option,
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
    FactKind(
        Names.word,
        Names.meaning,
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
    FactKind(
        Names.word,
        Names.thing,
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
    FactKind(
        Names.name,
        Names.quantity,
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
    FactKind(
        Names.name,
        Names.time,
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
    FactKind(
        Names.name,
        Names.version,
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
    FactKind(
        Names.name,
        Names.metres,
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
    FactKind(
        Names.word,
        Names.digits,
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
    FactKind(
        Names.person,
        Names.quantity,
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
