"""Passkey retrieval (the Landmark Attention prompt, as LongLLaMA uses it): a number hidden in filler, asked for last.

The text is read window by window into memory; the last window holds the question. Two scores: `exact`, the greedy
continuation is the number (every token of it is the likeliest after those before); `choice`, the number is likelier
than nine others (chance: 0.1), which still says something of models too small to spell it.

Shapes: B trials, L tokens a window, C candidates.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import ray
import torch
from torch.nn import functional

from fot_model import FotCache, FotLlamaForCausalLM
from pipelines.errors import UserError
from pipelines.progress import Progress
from pipelines.tokenizer import TextTokenizer, load_tokenizer

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
KEY = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
CANDIDATES = 10


def passkey(
    model: Path, local: int, lengths: Sequence[int], trials: int, digits: int, seed: int
) -> dict[int, dict[str, float]]:
    """{multiple of the local context: {"exact": ..., "choice": ...}}, one Ray task a length.

    Raises UserError where the prompt does not fit the shortest length.
    """
    check_lengths(model, local, lengths, digits)
    task = ray.remote(num_cpus=1, max_retries=5)(passkey_trials)
    tasks = {task.remote(model, local, length, trials, digits, seed): length for length in lengths}
    results = {}
    with Progress("passkey", len(lengths), "lengths") as progress:
        waiting = list(tasks)
        while waiting:
            (done,), waiting = ray.wait(waiting)
            results[tasks[done]] = ray.get(done)
            progress.advance(1)
    return {length: results[length] for length in lengths}


def check_lengths(tokenizer_directory: Path, local: int, lengths: Sequence[int], digits: int) -> None:
    """Raises UserError where the prompt may not fit the shortest length."""
    tokenizer = load_tokenizer(tokenizer_directory)
    pieces = (TASK, KEY.format(key=""), QUESTION)
    needed = 1 + sum(len(tokenizer.encode(piece)) for piece in pieces) + 3 * (2 * digits + 2)  # byte by byte, at worst
    if min(lengths) * local < needed:
        raise UserError(
            f"passkey at {min(lengths)} x {local} tokens: the prompt needs up to {needed}; raise the shortest of "
            f"evaluation.passkey.lengths to {-(-needed // local)}"
        )


def make_prompt(tokenizer: TextTokenizer, tokens: int, key: str, depth: float, answer_room: int) -> list[int]:
    """A prompt that ends in the question and is `tokens - answer_room` long; the key sits at `depth` (0 to 1)."""
    head, hidden = [tokenizer.bos, *tokenizer.encode(TASK)], tokenizer.encode(KEY.format(key=key))
    question, filler = tokenizer.encode(QUESTION), tokenizer.encode(FILLER)
    room = tokens - answer_room - len(head) - len(hidden) - len(question)
    before = int(room * depth) // len(filler) * len(filler)
    around = filler * (room // len(filler) + 1)
    return [*head, *around[:before], *hidden, *around[before:room], *question]


@torch.inference_mode()
def passkey_trials(model_path: Path, local: int, length: int, trials: int, digits: int, seed: int) -> dict[str, float]:
    """One task: both scores at one length."""
    draw = random.Random(f"{seed}/{length}")
    tokenizer = load_tokenizer(model_path)
    model = FotLlamaForCausalLM.from_pretrained(model_path).eval()
    candidates = [
        [str(key) for key in draw.sample(range(10 ** (digits - 1), 10**digits), CANDIDATES)] for _ in range(trials)
    ]
    answers = [[tokenizer.encode(f" {key}") for key in row] for row in candidates]
    room = max(len(answer) for row in answers for answer in row)
    prompts_BT = torch.tensor(
        [make_prompt(tokenizer, length * local, row[0], draw.random(), room) for row in candidates], dtype=torch.long
    )
    cache = FotCache(model.config)
    asked = (length - 1) * local
    for start in range(0, asked, local):
        model(prompts_BT[:, start : start + local], past_key_values=cache, last_context_length=local, logits_to_keep=1)
        cache.flush()
    exact_B = torch.zeros(trials, dtype=torch.bool)
    scores_BC = torch.zeros(trials, CANDIDATES)
    for candidate in range(CANDIDATES):
        row = [answer[candidate] for answer in answers]
        answer_BA = torch.tensor([answer + [tokenizer.eos] * (room - len(answer)) for answer in row])
        real_BA = torch.arange(room) < torch.tensor([[len(answer)] for answer in row])
        cache.truncate(asked)
        window_BL = torch.cat([prompts_BT[:, asked:], answer_BA], dim=1)
        logits = model(window_BL, past_key_values=cache, last_context_length=local).logits[:, -room - 1 : -1]
        loss_BA = functional.cross_entropy(logits.transpose(1, 2), answer_BA, reduction="none")
        scores_BC[:, candidate] = -(loss_BA * real_BA).sum(1)
        if candidate == 0:
            exact_B = ((logits.argmax(-1) == answer_BA) | ~real_BA).all(1)
    best_other = scores_BC[:, 1:].max(1).values
    return {"exact": exact_B.double().mean().item(), "choice": (scores_BC[:, 0] > best_other).double().mean().item()}
