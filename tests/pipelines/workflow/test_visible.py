import pytest

from pipelines.workflow.progress import console, say
from pipelines.workflow.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07\x1b[31mid\n2", r"\x1b]0;title\x07\x1b[31mid\n2"),
        ("a\r\tb\x7f\x9b", r"a\r\tb\x7f\x9b"),
        ("a\u2028b\u202ec\u2066", r"a\u2028b\u202ec\u2066"),
        ("\ud800", r"\ud800"),
        ("é 漢字 😀\u00a0\u200d", "é 漢字 😀\u00a0\u200d"),
        (r"\n [bold]", r"\n [bold]"),
    ],
)
def test_what_would_do_something_to_a_terminal_is_shown(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown


def test_what_is_said_is_a_line(capsys, monkeypatch):
    monkeypatch.setattr(console, "file", None)
    say("source \x1b[31m[red]a\nb")
    assert capsys.readouterr().err == "source \\x1b[31m[red]a\\nb\n"
