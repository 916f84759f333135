"""The recipe's data parts: strict, frozen pydantic models. Unknown keys are errors."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Source(Part):
    """One source of documents.

    `path`: a file, a directory, a glob, or `python:stdlib` (the running interpreter's standard library).
    .jsonl files hold a document a line; any other file is one document. In a directory each top-level entry is a
    document of its own, a subdirectory as its files concatenated directory by directory in seeded random order; with
    `directory: one_document` the whole directory is a single document (a repository).
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    path: str
    directory: Literal["document_per_entry", "one_document"] = "document_per_entry"
    suffixes: tuple[str, ...] | None = Field(None, description="take only files that end so, in directories")
    exclude: tuple[str, ...] = Field((), description="names of files or directories to leave out, * and ? allowed")
    text_field: str = "text"
    id_field: str = "id"
    held_out: Fraction = Field(0.05, description="share of documents kept for evaluation, drawn by document hash")


class Data(Part):
    """Corpus and tokenization."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    task_bytes: Annotated[int, Field(gt=0)] = Field(4_000_000, description="bytes of text a tokenization task takes")
    max_bad_lines: Annotated[int, Field(ge=0)] = Field(0, description="broken .jsonl lines tolerated, in all")


class TokenizerPart(Part):
    """`path`: a Hugging Face tokenizer directory. Without one, the base checkpoint's tokenizer is taken, and where the
    base is pre-trained here, a byte-level BPE of `vocab_size` is trained on the corpus."""

    path: str | None = None
    vocab_size: Annotated[int, Field(ge=258)] = 2048
