import random
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jobs.evaluate.subject import read_tokenizer
from jobs.probe.prompts import Prompt, facts_prompt, text_prompt
from pipelines.tokens.tokenizer import TextTokenizer
from pipelines.workflow.errors import UserError

LOCAL, TOKENS = 256, 1024


@pytest.fixture(scope="module")
def tokenizer(retrieving: Path) -> TextTokenizer:
    return read_tokenizer(retrieving)


def check(prompt: Prompt, tokenizer: TextTokenizer, local: int, tokens: int) -> None:
    """What every prompt keeps."""
    assert prompt.ids[0] == tokenizer.bos
    assert len(prompt.ids) <= tokens
    assert len({query.at for query in prompt.queries}) == len(prompt.queries) > 0
    for query in prompt.queries:
        assert prompt.ids[query.copy] == prompt.ids[query.at + 1], "what follows is what is to be copied"
        assert query.line[0] <= query.copy < query.line[1]
        assert query.at + 1 - query.line[1] >= local, "all of the line is far"


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_facts_are_far_and_asked_for_by_name(tokenizer: TextTokenizer, seed: str) -> None:
    prompt = facts_prompt(tokenizer, TOKENS, LOCAL, seed)
    check(prompt, tokenizer, LOCAL, TOKENS)
    lines = {tokenizer.tokenizer.decode(prompt.ids[slice(*query.line)]) for query in prompt.queries}
    assert len(lines) >= 2
    assert all(line.startswith("Note that ") for line in lines)
    asked = tokenizer.tokenizer.decode(prompt.ids).split("\n")[-len(lines) :]
    said = {line.removeprefix("Note that ") for line in lines}
    assert {line.removeprefix("As was noted, ").removesuffix(".") for line in asked} == said
    assert facts_prompt(tokenizer, TOKENS, LOCAL, seed) == prompt
    assert facts_prompt(tokenizer, TOKENS, LOCAL, seed + "x") != prompt


def test_fewer_facts_where_there_is_less_room_and_none_where_two_do_not_fit(tokenizer: TextTokenizer) -> None:
    def facts(tokens: int) -> int:
        prompt = facts_prompt(tokenizer, tokens, 64, "0")
        check(prompt, tokenizer, 64, tokens)
        return len({query.line for query in prompt.queries})

    assert 4 == facts(1024) > facts(400) >= 2
    with pytest.raises(UserError, match=r"prompts of 250 tokens are too short: 2 facts.*64 tokens between take about"):
        facts_prompt(tokenizer, 250, 64, "0")


def test_words_of_natural_text_recur_once_far_away(tokenizer: TextTokenizer) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=9)) for _ in range(6)]
    filler = "\n".join("so it goes on and on" for _ in range(20))
    text = (
        "\n"
        + " here ".join(words[:4])
        + "\n"
        + words[4] * 2
        + "\n"
        + filler
        + "\n"
        + " there ".join(words)
        + "\n" * 900
    )
    prompt = text_prompt(tokenizer, repeat(text), 700, LOCAL, "0")
    check(prompt, tokenizer, LOCAL, 700)
    copied = tokenizer.tokenizer.decode([prompt.ids[query.copy] for query in prompt.queries])
    for word in words[:4]:
        assert copied.count(word[-3:]) == 1, "all but the first token"
    assert words[4][-3:] not in copied, "three times is not rare"
    assert words[5][-3:] not in copied, "once is not recalled"
    with pytest.raises(UserError, match="no text of 700 tokens was found in which 2 words"):
        text_prompt(tokenizer, iter(["nothing comes back here, " * 500]), 700, LOCAL, "0")


def test_a_tokenizer_without_digits_is_refused() -> None:
    letters = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "Note": 3, "number": 4}, "<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.array(letters.encode(text).ids) for text in texts]

    with pytest.raises(UserError, match="cannot spell the number"):
        facts_prompt(TextTokenizer(letters, 0, 1, encode), 400, 64, "0")
