import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fot_model import FotLlamaForCausalLM
from jobs.evaluate import retrieval as module
from jobs.evaluate.retrieval import RetrievalReader, best_passages, passages, with_passages
from jobs.evaluate.subject import load_model, read_tokenizer
from pipelines.tokens.tokenizer import TextTokenizer

LOCAL = 64


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> TextTokenizer:
    return read_tokenizer(tokenizer_dir)


@pytest.fixture(autouse=True, scope="module")
def _short_passages():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PASSAGE", 8)
        yield


def test_a_planted_passage_is_found() -> None:
    texts = [f"the grass is green number {n}" for n in range(40)]
    texts[17] = "the pass key is 48213"
    assert best_passages(texts, "What is the pass key? The pass key is", 1) == [17]


def test_what_ranks_the_same_is_taken_from_the_end_in_order() -> None:
    assert best_passages(["a b", "ccc ddd", "a b", "ccc ddd", "ccc ddd"], "ccc", 2) == [3, 4]
    assert best_passages(["?", "!"], "no word is shared", 1) == [1]
    assert best_passages(["some words", "some more"], "?!", 1) == [1], "a query without words"


def test_all_that_fits_is_read_as_it_is(tokenizer: TextTokenizer) -> None:
    known = list(range(10, 50))
    assert with_passages(known, 40, LOCAL, tokenizer) == known


def test_passages_stand_in_order_before_the_recent_tokens(tokenizer: TextTokenizer) -> None:
    words = tokenizer.encode("\ngrass\n")
    draw = random.Random(0)
    known = [draw.randrange(2, 40) for _ in range(400)]
    for place in (3, 20, 33):
        known[8 * place : 8 * place + len(words)] = words
    shown = with_passages(known, 48, LOCAL, tokenizer, words)
    recent = 48 - 32  # half of the local context are four passages
    assert len(shown) == 48
    assert shown[-recent:] == known[-recent:]
    found = [shown[first : first + 8] for first in range(0, 32, 8)]
    places = [passages(known, 8).index(piece) for piece in found]
    assert places == sorted(places)
    assert {3, 20, 33} < set(places)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 270), room=st.integers(20, LOCAL))
def test_no_more_is_shown_than_there_is_room_for_and_nothing_twice(
    tokenizer: TextTokenizer, length: int, room: int
) -> None:
    known = list(range(2, 2 + length))  # each token tells its place
    shown = with_passages(known, room, LOCAL, tokenizer)
    assert room - 8 < len(shown) <= room or shown == known, "but for a last passage that is short"
    assert shown == sorted(set(shown))


def test_where_all_fits_losses_are_those_of_the_local_context(save_model) -> None:
    directory = save_model(max_position_embeddings=LOCAL, mem_positionals=True)
    model = FotLlamaForCausalLM.from_pretrained(directory).eval()
    text_1T = torch.randint(2, 280, (1, LOCAL + 1), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = RetrievalReader(model, read_tokenizer(directory), LOCAL).losses(text_1T, 1)
        log_probabilities = model(text_1T[:, :-1], use_cache=False).logits.log_softmax(-1)
    wanted = -log_probabilities.gather(2, text_1T[:, 1:, None]).sum()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.fixture
def watched(save_model, monkeypatch):
    """A reader, what it was to choose passages by and what it read."""
    directory = save_model(max_position_embeddings=LOCAL)
    model, chosen_by, read = load_model(directory, directory), [], []
    own = module.with_passages

    def noted(known, *arguments):
        chosen_by.append(list(known))
        return own(known, *arguments)

    monkeypatch.setattr(module, "with_passages", noted)
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][0].tolist()))
    yield RetrievalReader(model, read_tokenizer(directory), LOCAL), chosen_by, read
    hook.remove()


@pytest.mark.parametrize(("context", "scored"), [(1, 1), (4, 1), (4, 2)])
def test_passages_are_chosen_by_what_comes_before_the_scored_tokens_alone(watched, context: int, scored: int) -> None:
    reader, chosen_by, read = watched
    text_1T = torch.randint(2, 280, (1, context * LOCAL + 1), generator=torch.Generator().manual_seed(context))
    with torch.inference_mode():
        losses = reader.losses(text_1T, scored)
    text = text_1T[0].tolist()
    part = LOCAL // module.PARTS
    starts = range((context - scored) * LOCAL, context * LOCAL, part)
    assert chosen_by == [text[: start + 1] for start in starts]
    assert all(len(each) <= LOCAL for each in read), "no more than the local context in a call"
    assert [each[-part:] for each in read] == [text[start : start + part] for start in starts]
    assert losses.shape == (1, scored)


def test_scored_tokens_change_only_their_own_losses_and_later_ones(watched) -> None:
    """Another last part changes nothing about the parts before it."""
    reader, _, _ = watched
    one = torch.randint(2, 280, (3 * LOCAL + 1,), generator=torch.Generator().manual_seed(0))
    other = one.clone()
    other[-LOCAL // module.PARTS :] = (other[-LOCAL // module.PARTS :] + 7) % 270 + 2
    with torch.inference_mode():
        first, second = (reader._row_losses(each, 2 * LOCAL) for each in (one, other))
    kept = LOCAL - LOCAL // module.PARTS
    torch.testing.assert_close(first[:kept], second[:kept])
    assert not torch.allclose(first[kept:], second[kept:])


def test_a_question_is_answered_from_the_passage_it_finds(watched) -> None:
    reader, _, read = watched
    tokenizer = reader._tokenizer
    words, filler = tokenizer.encode("grass is green"), tokenizer.encode("1 2 3 ")
    prompt = (filler * 200)[: 5 * LOCAL - 4 - len(words)] + words
    prompt[72 : 72 + len(words)] = words
    answer_BA = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        logits = reader.ask(torch.tensor([prompt]), len(words), 4)(answer_BA)
    assert logits.shape[:2] == (1, 5)
    (shown,) = read
    assert len(shown) <= LOCAL
    assert shown[-4:] == [5, 6, 7, 8]
    planted = passages(prompt, 8)[72 // 8]
    assert any(shown[first : first + 8] == planted for first in range(LOCAL - 8))
