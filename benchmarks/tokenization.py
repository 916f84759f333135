"""Tokenizing a corpus and writing its tokens, beside the bare library, datatrove and Hugging Face datasets.

    python -m venv .venv-peers
    .venv-peers/bin/pip install "datatrove[processing]" datasets transformers tokenizers
    python -m benchmarks.tokenization TOKENIZER CORPUS... --peers .venv-peers/bin/python

TOKENIZER: whatever a recipe's tokenizer.path may be. CORPUS: .jsonl.gz files with a field `text`; their documents are
spread over 16 plain .jsonl files first. Every figure is tokens a second of a process of its own, from its first
document read to the last token written, without imports and without starting Ray; `bare` is the library's encode_batch
of the texts in memory, with as many threads, and nothing written. Rounds alternate between all rows; the median counts.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

FILES = 16
TASK_BYTES = 2_000_000
RESULT = "result.json"


def bare(tokenizer: Path, corpus: Path, output: Path, cores: int) -> Callable[[], int]:
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = read_texts(corpus)
    return lambda: sum(map(len, library.encode_batch(texts, add_special_tokens=False)))


def in_process(tokenizer: Path, corpus: Path, output: Path, cores: int) -> Callable[[], int]:
    """Encode and write, without Ray and without reading."""
    from pipelines.sources.corpus import Document
    from pipelines.tokens.minhash import signature
    from pipelines.tokens.shards import Encoded, write_shard
    from pipelines.tokens.tokenizer import load_tokenizer

    ours = load_tokenizer(tokenizer)
    texts = read_texts(corpus)
    documents = [Document(str(number), "s", text, "file", 0, 0, "") for number, text in enumerate(texts)]

    def run() -> int:
        batches = (
            [Encoded(each, tokens, signature(each.text)) for tokens in ours.encode_documents([each.text])]
            for each in documents
        )
        return write_shard(output / "shard.arrow", batches, ours.vocab_size)[1]

    return run


def with_ray(backend: str) -> Callable[[Path, Path, Path, int], Callable[[], int]]:
    def prepare(tokenizer: Path, corpus: Path, output: Path, cores: int) -> Callable[[], int]:
        from pipelines.workflow.environment import WORKERS, prepare_environment

        prepare_environment()
        import ray

        from pipelines.config import Data, Source
        from pipelines.sources.file_hashes import FileHashes
        from pipelines.sources.listing import list_entries
        from pipelines.sources.units import group_units
        from pipelines.tokens.tokenize import Encoding, tokenize
        from pipelines.workflow.progress import Progress

        source = Source(name="s", path=str(corpus / "*.jsonl"))
        data = Data(sources=(source,), task_bytes=TASK_BYTES)
        units = group_units(list_entries(data, 0, FileHashes(output / "hashes.json")), data.task_bytes)
        ray.init(
            address="local",
            num_cpus=cores,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200_000_000,
            runtime_env={"env_vars": WORKERS},
        )
        imported = ray.remote(num_cpus=1)(lambda: __import__("pipelines.tokens.tokenize") and time.sleep(2))
        ray.get([imported.remote() for _ in range(cores)])

        def run() -> int:
            with Progress("shards", sum(unit.bytes for unit in units), "B") as progress:
                return tokenize(units, data, Encoding(tokenizer, backend, output), progress).tokens

        return run

    return prepare


def datatrove(tokenizer: Path, corpus: Path, output: Path, cores: int) -> Callable[[], int]:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    steps = [
        JsonlReader(str(corpus)),
        DocumentTokenizer(
            str(output / "tokens"), str(tokenizer / "tokenizer.json"), eos_token="</s>", shuffle_documents=False
        ),
    ]
    executor = LocalPipelineExecutor(steps, tasks=cores, workers=cores, logging_dir=str(output / "logs"))

    def run() -> int:
        executor.run()
        return sum(file.stat().st_size for file in (output / "tokens").glob("*.ds")) // 2

    return run


def datasets(tokenizer: Path, corpus: Path, output: Path, cores: int) -> Callable[[], int]:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    library = AutoTokenizer.from_pretrained(tokenizer)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"tokens": library(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]}

    def run() -> int:
        files = sorted(map(str, corpus.glob("*.jsonl")))
        texts = load_dataset("json", data_files=files, split="train", cache_dir=str(output / "cache"))
        tokens = texts.map(encode, batched=True, batch_size=32, num_proc=cores, remove_columns=texts.column_names)
        tokens.save_to_disk(str(output / "tokens"), num_proc=cores)
        return sum(map(len, tokens["tokens"]))

    return run


def read_texts(corpus: Path) -> list[str]:
    lines = [line for file in sorted(corpus.glob("*.jsonl")) for line in file.read_bytes().splitlines()]
    return [json.loads(line)["text"] for line in lines]


BARE = "bare tokenizers encode_batch"
IN_PROCESS = "fot, one process, no reading"
OURS = {
    BARE: bare,
    IN_PROCESS: in_process,
    "fot": with_ray("huggingface"),
    "fot, gigatoken": with_ray("gigatoken"),
}
PEERS = {"datatrove": datatrove, "datasets.map": datasets}


def measure(name: str, tokenizer: Path, corpus: Path, output: Path, cores: int) -> None:
    """Leave tokens and seconds of one row in the output. Runs in a process of its own."""
    run = (OURS | PEERS)[name](tokenizer, corpus, output, cores)
    began = time.perf_counter()
    tokens = run()
    (output / RESULT).write_text(json.dumps([tokens, time.perf_counter() - began]))


def tokens_a_second(python: str, name: str, tokenizer: Path, corpus: Path, cores: int) -> float:
    several = name == BARE and cores > 1
    threads = {"TOKENIZERS_PARALLELISM": "true" if several else "false", "RAYON_NUM_THREADS": str(cores)}
    with tempfile.TemporaryDirectory() as output:
        command = [python, __file__, "--row", name, tokenizer, corpus, output, str(cores)]
        path = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)} if name in OURS else {}
        environment = os.environ | threads | path | {"OMP_NUM_THREADS": "1", "HF_HOME": output}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-2000:]}")
        tokens, seconds = json.loads(Path(output, RESULT).read_text())
        return tokens / seconds


def main() -> None:
    import torch

    from benchmarks.machine import heading
    from pipelines.tokens.tokenizer import import_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("corpus", nargs="+", type=Path)
    parser.add_argument("--peers", help="the interpreter of the peers' virtual environment")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    rows = dict.fromkeys(OURS, sys.executable) | (dict.fromkeys(PEERS, asked.peers) if asked.peers else {})
    with tempfile.TemporaryDirectory() as directory:
        tokenizer, corpus = Path(directory, "tokenizer"), Path(directory, "corpus")
        corpus.mkdir()
        import_tokenizer(asked.tokenizer, tokenizer)
        lines = [line for file in asked.corpus for line in gzip.decompress(file.read_bytes()).splitlines(keepends=True)]
        for number in range(FILES):
            (corpus / f"{number:02d}.jsonl").write_bytes(b"".join(lines[number::FILES]))
        runs = [(name, cores) for name in rows for cores in asked.cores if cores == 1 or name != IN_PROCESS]
        rates: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
        for _ in range(asked.rounds):
            for name, cores in runs:
                rates[name, cores].append(tokens_a_second(rows[name], name, tokenizer, corpus, cores))
    print(heading(torch.device("cpu")), end="\n\n")
    print("| what | cores | tokens/s | of bare |")
    print("|---|---|---|---|")
    for (name, cores), each in rates.items():
        share = statistics.median(each) / statistics.median(rates[BARE, cores])
        print(f"| {name} | {cores} | {statistics.median(each):,.0f} | {share:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        measure(sys.argv[2], *map(Path, sys.argv[3:6]), int(sys.argv[6]))
    else:
        main()
