"""SentencePiece models (.model) as tokenizers of the tokenizers library that encode alike.

BPE and Unigram. A BPE model's merges are all the ways to join two pieces into a third, best score first. Pieces that
text must not become (control, unknown, bytes) take no part. What the model defines as the user's symbols is cut out
before, and is then one piece.
"""

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pipelines.workflow.errors import UserError

SPACE = "▁"
UNIGRAM, BPE = 1, 2  # of TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # of SentencePiece.Type


def convert(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its special tokens' names: bos_token, eos_token, unk_token, as far as the model has them.

    Raises UserError for files of another kind, and where the sentencepiece package is not installed.
    """
    model = _read(path)
    trainer = model.trainer_spec
    if trainer.model_type not in (UNIGRAM, BPE) or trainer.treat_whitespace_as_suffix:
        raise UserError(f"{path} is a SentencePiece model of an unknown kind: give a BPE or a Unigram model")
    numbers = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    names = {name: model.pieces[number].piece for name, number in numbers.items() if number >= 0}
    tokenizer = Tokenizer(_bpe(model) if trainer.model_type == BPE else _unigram(model))
    tokenizer.normalizer = _normalizer(model.normalizer_spec)
    if cuts := _pre_tokenizers(model):
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = _decoder(model.normalizer_spec)
    special = [piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    if "bos_token" in names:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, trainer.bos_id)]
        )
    return tokenizer, names


def _read(path: Path) -> Any:
    """The file's ModelProto."""
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError:
        raise UserError(f"{path} needs the sentencepiece package: pip install 'fot[sentencepiece]'") from None
    try:
        content = SentencePieceProcessor(model_file=str(path)).serialized_model_proto()
    except (OSError, RuntimeError):
        raise UserError(f"{path} is no SentencePiece model: set tokenizer.path to another file or directory") from None
    return sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]


def _bpe(model: Any) -> models.BPE:
    pieces = {piece.piece: number for number, piece in enumerate(model.pieces)}
    mergeable = {piece.piece: piece.score for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED)}
    merges = [
        (left, right)
        for piece in mergeable
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        if left in mergeable and right in mergeable
    ]
    merges.sort(key=lambda pair: mergeable["".join(pair)], reverse=True)
    return models.BPE(
        pieces,
        merges,
        unk_token=model.pieces[model.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        ignore_merges=bool(_symbols(model)),
    )


def _unigram(model: Any) -> models.Unigram:
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    return models.Unigram(pieces, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)


def _symbols(model: Any) -> list[str]:
    return [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" +"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _pre_tokenizers(model: Any) -> list[pre_tokenizers.PreTokenizer]:
    """Cuts at the user's symbols; before every space, where no piece holds one after another character; and within
    strings like <0x0A>, where whole words are looked up, lest text become a byte."""
    cuts: list[pre_tokenizers.PreTokenizer] = []
    if symbols := sorted(_symbols(model), key=len, reverse=True):
        cuts.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, symbols))), "isolated"))
    if not any(SPACE in piece.piece[1:] for piece in model.pieces):
        cuts.append(pre_tokenizers.Split(SPACE, "merged_with_next"))
    if model.trainer_spec.byte_fallback and (symbols or model.trainer_spec.model_type == UNIGRAM):
        cuts.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous"))
    return cuts


def _decoder(spec: Any) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else [])])
