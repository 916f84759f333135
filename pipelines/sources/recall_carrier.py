"""Text that says nothing to be remembered, between the facts of a recall document: sentences of a small grammar.

Some of them hold numbers, which belong to no made-up name.
"""

from collections.abc import Iterator
from itertools import count, cycle
from random import Random


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = words(
    "table river window letter garden stone basket ladder mirror kettle blanket hammer candle barrel bridge fence "
    "wheel bottle curtain pillow saddle bucket pulley clock carpet chimney drawer compass feather flute glove harp "
    "jacket kite lamp map needle stove paddle quilt ribbon saw tent vase wallet chisel bell cup drum teapot fork gate "
    "hat notebook jug key ledger mask net sail plough rake shovel tray pan violin whistle yoke bench crate shelf spoon"
)
ADJECTIVES = words(
    "small heavy quiet narrow broken polished wooden rusty dusty crooked painted fragile hollow sturdy plain round "
    "green borrowed clean damp curved flat gentle hidden wet jagged lonely modern neat strange patient rough silent "
    "thin useful velvet warm woven young brittle cheap dull lean famous golden humble leather little muddy noble"
)
PLACES = words(
    "harbour market kitchen cellar library station workshop attic valley orchard chapel courtyard stable tower mill "
    "meadow tunnel theatre bakery archive corridor square laundry greenhouse museum barn lighthouse quarry forest bay"
)
PEOPLE = words(
    "baker sailor teacher carpenter gardener farmer clerk painter miller weaver potter printer hunter doctor tailor "
    "smith porter singer cook judge shepherd mason glazier courier surveyor librarian locksmith beekeeper cobbler pilot"
)
DONE = words(
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


def carrier_text(draw: Random) -> Iterator[str]:
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


def _sentence(draw: Random) -> str:
    words = {
        name: draw.sample(choices, 3)
        for name, choices in (("n", NOUNS), ("j", ADJECTIVES), ("p", PLACES), ("r", PEOPLE), ("d", DONE), ("w", WHEN))
    }
    filled = draw.choice(PATTERNS).format(**words, m=draw.randint(2, 900))
    return filled[0].upper() + filled[1:]


def _entry(draw: Random, number: int) -> str:
    goods, person = draw.choice(NOUNS), draw.choice(PEOPLE)
    return draw.choice(ENTRIES).format(i=number, n=goods, r=person, p=draw.choice(PLACES), m=draw.randint(2, 9999))
