"""The recipe's data parts: strict, frozen pydantic models. Unknown keys are errors."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

STDLIB, SITE_PACKAGES, RECALL = "python:stdlib", "python:site-packages", "synthetic:recall"
MAX_LEFT_OUT = 0.1
LEAST_CHARACTERS = 4000  # of a recall document: they hold 20 facts, their questions and some text between
DISTANCE = 0.25, 1.0  # of a fact from its question, as share of the document
STDLIB_CODE = {"suffixes": [".py"], "exclude": ["test", "tests", "idle_test", "encodings", "pydoc_data"]}
BUILT_IN = (STDLIB, SITE_PACKAGES, RECALL)  # paths of what every environment has


def source_of(path: str) -> dict[str, Any]:
    """The settings of a source that a command names by its path alone: of the standard library what is code, without
    tests, which are tables more than text."""
    return {"path": path, **(STDLIB_CODE if path == STDLIB else {})}


class Part(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]


class Recall(Part):
    """Of `synthetic:recall`: how many documents there are, how long each is, about, and how far a question is from the
    fact that it asks for, at least and at most, as share of the document's length."""

    documents: Annotated[int, Field(gt=0, le=1_000_000)]
    characters: Annotated[int, Field(ge=LEAST_CHARACTERS, le=10_000_000)] = 16_000
    distance: tuple[Annotated[float, Field(ge=0.0, le=0.9)], Fraction] = DISTANCE

    @model_validator(mode="after")
    def _room_between(self) -> "Recall":
        least, most = self.distance
        if least >= most:
            raise ValueError(f"recall.distance: the least ({least}) is not below the most ({most})")
        return self


class Source(Part):
    """One source of documents.

    `path`: a file, a directory or a glob, on this machine or at a URL (s3://, gs://, hf:// and whatever else fsspec
    opens); `python:stdlib`, the running interpreter's standard library; `python:site-packages`, the packages installed
    beside it, each a document; or `synthetic:recall`, made-up documents with the settings of `recall`.

    A .jsonl or .json file holds a document a line, a .parquet, .arrow, .csv or .tsv file a document a row, a file whose
    ending a plugin reads (docs/plugins.md) what that finds in it, any other file is one document; each may be
    compressed. In a directory each top-level entry is a document of its own, a subdirectory as its files concatenated
    directory by directory, unless it holds records (sources/directories.py); with `directory: one_document` the whole
    directory is a single document (a repository). A directory written by Hugging Face datasets' `save_to_disk` is read
    as that data set.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    path: str
    directory: Literal["document_per_entry", "one_document"] = "document_per_entry"
    order: Literal["random", "imports"] = Field(
        "random",
        description="of files and directories in a tree: seeded random; or Isabelle theories after those they import",
    )
    suffixes: tuple[str, ...] | None = Field(
        None, description="take only files that end so, in directories; of installed packages .py by itself"
    )
    exclude: tuple[str, ...] = Field((), description="names of files or directories to leave out, * and ? allowed")
    max_tree_bytes: Positive | None = Field(
        None, description="of a tree only the first files that come to so many bytes together"
    )
    max_left_out: Fraction = Field(
        MAX_LEFT_OUT,
        description="share of its bytes that may be data which is not read, or read as plain text",
        exclude_if=lambda share: share == MAX_LEFT_OUT,  # older keys stay
    )
    follow_links: bool = Field(False, description="read symbolic links that lead out of the path, too")
    recall: Recall | None = Field(None, description="what documents `synthetic:recall` makes up")
    text_field: str = "text"
    id_field: str = "id"
    min_tokens: Positive = Field(1, description="shorter documents are left out")
    max_tokens: Positive | None = Field(None, description="longer documents are left out")
    held_out: Fraction = Field(0.05, description="share of documents kept for evaluation, drawn by document hash")
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="share of training tokens, beside the others'"
    )
    max_epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="the most that a training may read it")

    @field_validator("path")
    @classmethod
    def _known(cls, path: str) -> str:
        if path.startswith(("python:", "synthetic:")) and path not in BUILT_IN:
            near = difflib.get_close_matches(path, BUILT_IN, 1, 0.0)[0]
            raise ValueError(f"there is no source {path}: did you mean {near}? (a file of that name: ./{path})")
        return path

    @model_validator(mode="after")
    def _recall_where_it_belongs(self) -> "Source":
        if self.path == RECALL and self.recall is None:
            raise ValueError(f"source {self.name}: {RECALL} needs recall.documents, how many to make up")
        if self.path != RECALL and self.recall is not None:
            raise ValueError(f"source {self.name}: recall is of {RECALL} only: remove it, or set path to that")
        return self

    @model_validator(mode="after")
    def _lengths_in_order(self) -> "Source":
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"source {self.name}: max_tokens ({self.max_tokens}) is below min_tokens ({self.min_tokens})"
            )
        return self


class Data(Part):
    """Corpus, tokenization and mixture.

    Without weights every document is read equally often; with them, each source gives its share of the tokens and is
    begun again when it has been read. Near-duplicates (estimated Jaccard similarity of at least `similarity`) never
    serve one another as negatives; `duplicates` says whether copies of an earlier document are left out as well. A
    source that is null is left out.
    """

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    task_bytes: Positive = Field(4_000_000, description="bytes of text a tokenization task takes")
    max_bad_documents: Annotated[int, Field(ge=0)] = Field(
        0, description="broken lines, rows and files tolerated, in all"
    )
    duplicates: Literal["keep", "drop_exact", "drop_near"] = "keep"
    similarity: Annotated[float, Field(ge=0.5, le=1.0)] = 0.8
    auto_repair: bool = Field(False, description="rebuild a shard that is found damaged during training, and go on")

    @field_validator("sources", mode="before")
    @classmethod
    def _without_null(cls, sources: Any) -> Any:
        return [source for source in sources if source is not None] if isinstance(sources, list) else sources

    @model_validator(mode="after")
    def _consistent(self) -> "Data":
        names = [source.name for source in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"data.sources: the name {repeated[0]!r} is used twice: give each source its own name")
        without = [source.name for source in self.sources if source.weight is None]
        if without and len(without) < len(names):
            raise ValueError(
                f"data.sources: {without[0]!r} has no weight, others do: give all sources a weight or none"
            )
        from pipelines.shares import too_small  # numpy, which `fot --help` need not wait for

        weights = {source.name: source.weight for source in self.sources if source.weight is not None}
        if weights and (wrong := too_small(weights)) is not None:
            raise ValueError(wrong)
        return self


class TokenizerPart(Part):
    """`path`: a Hugging Face tokenizer directory, a SentencePiece model file, or a hub id (with an optional
    `revision`). Without one, the base checkpoint's tokenizer is taken, and where the base is pre-trained here, a
    byte-level BPE of `vocab_size` is trained on the corpus. `backend: gigatoken` is used where it gives the same tokens
    on every document of a sample of the corpus."""

    path: str | None = None
    revision: str | None = None
    vocab_size: Annotated[int, Field(ge=258)] = 2048
    backend: Literal["huggingface", "gigatoken"] = "huggingface"
