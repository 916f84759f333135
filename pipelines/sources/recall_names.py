"""Made-up names and values of recall documents."""

import string
from random import Random

from pipelines.sources.recall_carrier import ADJECTIVES, NOUNS, PEOPLE, PLACES, words

# A consonant first, so that "a" goes before every word. Some 700 thousand words of two syllables, 180 million of three.
ONSETS = words("b br c ch d dr f fl g gr h j k kl l m n p pr r s sh sk st t th tr v w y z")
VOWELS = words("a e i o u ai ea io")
CODAS = ["", "l", "m", "n", "nd", "r", "rn", "s", "sk", "t", "x", "ck"]
ROLES = words("limit size count offset token level seed index width depth rate quota")
MONTHS = words("January February March April May June July August September October November December")
SHADES = words("pale dark bright dusty deep faded glossy smoky")
COLOURS = words("red orange amber olive teal indigo violet crimson grey white black brown turquoise beige scarlet")
CONTAINERS = words("crates barrels sacks boxes jars bundles pallets baskets")
GOODS = words("salt apples rope soap nails wool barley lamps copper paper honey tiles cork sugar candles coal")


class Names:
    """Draws names and values; no made-up word twice."""

    def __init__(self, draw: Random) -> None:
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
