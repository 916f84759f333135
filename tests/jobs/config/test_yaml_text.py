from pathlib import Path

import pytest
import yaml

from jobs.config.yaml_text import YamlError, read_text, read_value

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("/data/books #2", "/data/books #2"),
        ("#2", "#2"),
        ("a#b", "a#b"),
        ('"a #b"', "a #b"),
        ("'a #b'", "a #b"),
        ("[a, 'b #c']", ["a", "b #c"]),
        ("{path: /a, weight: 1.5}", {"path": "/a", "weight": 1.5}),
        ("", None),
        ("null", None),
        ("~", None),
        ("12", 12),
        (" 12 ", 12),
        ("1_000", 1000),
        ("0x10", 16),
        ("010", "010"),
        ("1:30", "1:30"),
        ("1e3", "1e3"),
        ("1.0e3", "1.0e3"),
        ("1.0e+3", 1000.0),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("/a: b: c", "/a: b: c"),
        ("[4, 16", "[4, 16"),
        ("@a", "@a"),
    ],
)
def test_a_value_is_what_is_written(written: str, value: object) -> None:
    read = read_value(written)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("written", ["[a #b]", "[a] # b", "{a: b #c}", '"a" #b', "a: b #c"])
def test_a_comment_where_it_would_cut_a_value_is_refused(written: str) -> None:
    with pytest.raises(YamlError, match=r"^its # would begin a comment: put the text that it belongs to in quotes$"):
        read_value(written)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "a stands twice, in lines 1 and 3: remove one"),
        ('a: 1\n"a": 3\n', "a stands twice, in lines 1 and 2: remove one"),
        ("a:\n  b:\n  - {c: 1}\n  - {c: 1, d: 2, c: 1}\n", "a.b.1.c stands twice, in lines 4 and 4: remove one"),
        ("a: &x {b: 1}\nc: {<<: *x, <<: *x}\n", "c.<< stands twice, in lines 2 and 2: remove one"),
        ("a:\n  ~: 3\n", "line 2: a has a key that is no name"),
        ("~: 3\n", "line 1: it has a key that is no name"),
        ("? [a]\n: 3\n", "line 1: it has a key that is no name"),
        ("a: [1", "it is no YAML: "),
        ("a: !!python/name:os.system 1", "it is no YAML: could not determine a constructor"),
    ],
)
def test_what_would_be_lost_or_is_no_yaml_is_named(text: str, message: str) -> None:
    with pytest.raises(YamlError) as caught:
        read_text(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_merged_key_may_be_set_otherwise() -> None:
    assert read_text("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}\n")["d"] == {"b": 3, "c": 2}


def test_many_aliases_of_aliases_are_looked_at_once() -> None:
    doubled = "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 60))
    assert read_text(f"a0: &a0 1\n{doubled}")["a1"] == {"x": 1, "y": 1}


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_say_the_same_as_ever(recipe: Path) -> None:
    assert read_text(recipe.read_text()) == yaml.safe_load(recipe.read_text())


def test_what_pyyaml_writes_reads_back() -> None:
    content = {"a": ["yes", "010", "2024-01-01", "1:30", "a #b", "", "1e3", "null"], "b": [True, None, 1.5, -3, 1e-9]}
    assert read_text(yaml.safe_dump(content)) == content
