from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fot_model import FotCache, FotLlamaConfig
from jobs.evaluate import passkey as module
from jobs.evaluate.passkey import FILLER, KEY, QUESTION, TASK, make_prompt, passkey, passkey_trials
from pipelines.errors import UserError
from pipelines.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

LOCAL = 64


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    train_tokenizer([TASK + FILLER + KEY.format(key=12345) + QUESTION] * 3, 400, tmp_path)
    return tmp_path


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.99])
def test_the_prompt_hides_the_key_at_its_depth_and_ends_with_the_question(tokenizer_dir: Path, depth: float) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    prompt = make_prompt(tokenizer, 600, "48213", depth, 7)
    assert len(prompt) == 593
    text = tokenizer.tokenizer.decode(prompt)
    assert text.count("48213") == 2
    assert text.endswith(QUESTION)
    assert text.index("48213") / len(text) == pytest.approx(depth, abs=0.25)


class Reader:
    """Stands in for a model: remembers the windows it was shown, and after the question spells the key or avoids it."""

    def __init__(self, tokenizer: TextTokenizer, knows: bool) -> None:
        self.tokenizer, self.sign, self.seen = tokenizer, 9.0 if knows else -9.0, torch.zeros(0, dtype=torch.long)
        self.config = FotLlamaConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=2)

    def eval(self) -> "Reader":
        return self

    def __call__(self, rows: torch.Tensor, past_key_values: FotCache, **_how: object) -> SimpleNamespace:
        nothing = torch.zeros(len(rows), 1, rows.shape[1], 2)
        past_key_values.update(nothing, nothing, 0)
        logits = torch.zeros(*rows.shape, self.tokenizer.vocab_size)
        question = self.tokenizer.encode(QUESTION)
        ends = [self._end(row.tolist(), question) for row in rows]
        if not any(ends):
            self.seen = torch.cat([self.seen, rows], dim=-1) if self.seen.numel() else rows
        for row, end in enumerate(ends):
            if end:
                text = self.tokenizer.tokenizer.decode([*self.seen[row].tolist(), *rows[row].tolist()])
                key = text.split("The pass key is ")[1][:5]
                for place, token in enumerate(self.tokenizer.encode(f" {key}")):
                    logits[row, end - 1 + place, token] = self.sign
        return SimpleNamespace(logits=logits)

    @staticmethod
    def _end(row: list[int], question: list[int]) -> int:
        """Where the question ends in a row, 0 if it is not there."""
        ends = range(len(question), len(row) + 1)
        return next((end for end in ends if row[end - len(question) : end] == question), 0)


@pytest.mark.parametrize(("knows", "score"), [(True, 1.0), (False, 0.0)])
def test_a_model_that_knows_scores_all_and_one_that_avoids_the_key_scores_nothing(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, knows: bool, score: float
) -> None:
    reader = Reader(load_tokenizer(tokenizer_dir), knows)
    monkeypatch.setattr(module.FotLlamaForCausalLM, "from_pretrained", lambda path: reader)
    result = passkey_trials(tokenizer_dir, LOCAL, 6, 5, 5, seed=0)
    assert result == {"exact": score, "choice": score}


def test_a_length_that_cannot_hold_the_prompt_is_a_users_error(tokenizer_dir: Path) -> None:
    with pytest.raises(UserError, match="the prompt needs up to"):
        passkey(tokenizer_dir, 8, [1], 1, 5, 0)
