import numpy as np
import pytest
import torch

from fot_model import FotLlamaForCausalLM
from jobs.evaluate.subject import open_documents
from jobs.measures.scoring import score, score_chain
from jobs.measures.windows import Window, read_contexts, read_windows

LOCAL = 16  # as the model of the fixtures

CPU = torch.device("cpu")


def text(dataset, window: Window, context: int) -> torch.Tensor:
    return torch.from_numpy(read_contexts(dataset, [window], context, LOCAL))


@pytest.mark.parametrize(("context", "scored"), [(1, 1), (2, 1), (5, 1), (5, 3)])
def test_losses_are_those_of_a_long_causal_pass(subject_of, model_dir, context: int, scored: int) -> None:
    dataset = open_documents(subject_of({"s": [30, 140]}))
    model = FotLlamaForCausalLM.from_pretrained(model_dir).eval()
    window = Window(1, 100)
    with torch.no_grad():
        (found,) = score(model, text(dataset, window, context), LOCAL, CPU, scored=scored).tolist()
        start = window.start - (context - 1) * LOCAL
        ids = torch.tensor(dataset.tokens(1, start, window.start + LOCAL + 1).astype(np.int64))
        log_probabilities = model(ids[None, :-1], use_cache=False).logits[0, -scored * LOCAL :].log_softmax(-1)
    expected = -log_probabilities.gather(1, ids[-scored * LOCAL :, None]).view(scored, LOCAL).sum(1)
    assert found == pytest.approx(expected.tolist(), rel=1e-5)


def test_without_a_memory_layer_what_was_before_makes_no_difference(subject_of, model_dir) -> None:
    dataset = open_documents(subject_of({"s": [140]}))
    model = FotLlamaForCausalLM.from_pretrained(model_dir, mem_layers=[]).eval()
    with torch.no_grad():
        one, four = (score(model, text(dataset, Window(0, 64), context), LOCAL, CPU) for context in (1, 4))
    assert torch.equal(one, four)


def test_a_chain_scores_as_if_all_of_its_windows_were_read(subject_of, save_model) -> None:
    """Also those further back than there are layers, which it leaves out; nearer ones matter."""
    dataset = open_documents(subject_of({"s": [140]}))
    layers, window = 2, Window(0, 6 * LOCAL)
    model = FotLlamaForCausalLM.from_pretrained(save_model(num_hidden_layers=layers, mem_layers=[])).eval()
    read: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[0]))
    found = {}
    with torch.no_grad():
        for context in range(1, 7):
            ((found[context],),) = score_chain(model, text(dataset, window, context), LOCAL, CPU).tolist()
            assert read[-1] == min(context, layers + 1)
            chain = [Window(0, window.start - back * LOCAL) for back in range(context - 1, -1, -1)]
            tokens_RT = torch.from_numpy(read_windows(dataset, chain, LOCAL + 1))
            plan = torch.arange(-1, context - 1)[:, None]
            logits_LV = model(tokens_RT[:, :-1], plan=plan, objective="transformer_xl").logits[-1]
            expected = torch.nn.functional.cross_entropy(logits_LV, tokens_RT[-1, 1:], reduction="sum").item()
            assert found[context] == pytest.approx(expected, rel=1e-5)
    assert len({round(nats, 2) for nats in found.values()}) == layers + 1
