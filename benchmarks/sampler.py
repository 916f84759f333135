"""The sampler on a large data set: tokens/s of one process, time to the first batch and to step 10,000, memory.

    python -m benchmarks.sampler SHARDS [--gigabytes 1]

SHARDS: the token shards of a prepared recipe (`fot data prepare` prints where). Their documents are repeated under new
ids until the copies hold that many gigabytes, in a temporary directory; index and packing are timed too. Every figure
of the sampler comes from a fresh process, which is given nothing but paths.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.batches.dataset import TokenDataset
from pipelines.batches.index import index_documents
from pipelines.batches.packing import pack_source
from pipelines.batches.sampler import BatchShape, CrossBatchSampler
from pipelines.config import Data, Source
from pipelines.tokens.shards import Manifest, Shard
from pipelines.workflow.hashing import hash_file

SHAPES = {"8 x 4 x 512": BatchShape(512, 4, 8, 2), "2 x 4 x 2048": BatchShape(2048, 4, 2, 16)}
SECONDS = 10.0
FAR = 10_000


def repeat(origin: Path, target: Path, gigabytes: float) -> Manifest:
    """Copies of a data set's shards as one large data set: the same tokens under other ids, signatures and hashes."""
    manifest = Manifest.read(origin)
    shards: list[Shard] = []
    copy = 0
    while sum((target / shard.file).stat().st_size for shard in shards) < gigabytes * 1e9:
        for shard in manifest.shards:
            table = pa.ipc.open_file(pa.memory_map(str(origin / shard.file))).read_all()
            path = target / f"copy-{copy:04d}-{shard.file}"
            unlike = np.random.default_rng(len(shards)).integers(2**32, size=(len(table), 128), dtype=np.uint32)
            columns = {
                "document_id": pa.array([f"{copy}/{each}" for each in table["document_id"].to_pylist()]),
                "content_hash": pa.array([f"{copy}/{each}" for each in table["content_hash"].to_pylist()]),
                "signature": pa.FixedSizeListArray.from_arrays(pa.array(unlike.ravel()), 128),
            }
            for name, column in columns.items():
                table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
            shards.append(replace(shard, file=path.name, sha256=hash_file(path)))
        copy += 1
    made = replace(manifest, shards=tuple(shards), generations=[len(shards)], parent=None)
    made.write(target)
    return made


def measure(directory: Path, shape: BatchShape) -> dict[str, float]:
    """In a fresh process: open, first batch, far batch, then as many steps as fit into SECONDS."""
    began = time.perf_counter()
    data = json.loads((directory / "sources.json").read_text())
    sources = tuple(Source(name=name, path="x") for name in data)
    dataset = TokenDataset(directory, directory)
    sampler = CrossBatchSampler.open(dataset, directory / str(shape.group_tokens), sources, shape, seed=0)
    sampler.micro_batch(0, 0)
    first = time.perf_counter() - began
    began = time.perf_counter()
    sampler.micro_batch(FAR, 0)
    far = time.perf_counter() - began
    began, step = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        for number in range(shape.micro_batches):
            sampler.micro_batch(step, number)
        step += 1
    rate = step * shape.tokens_per_step / (time.perf_counter() - began)
    return {"first": first, "far": far, "rate": rate, "memory": peak_resident()}


def peak_resident() -> float:
    """Bytes. Not getrusage's figure: that of a child process begins with its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--measure", choices=SHAPES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.shards, SHAPES[arguments.measure])))
        return
    from benchmarks.machine import default_device, heading  # torch: not in the processes that are measured

    print(heading(default_device()))
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary)
        manifest = repeat(arguments.shards, target, arguments.gigabytes)
        names = list(dict.fromkeys(shard.unit["source"] for shard in manifest.shards))
        (target / "sources.json").write_text(json.dumps(names))
        size = sum((target / shard.file).stat().st_size for shard in manifest.shards)
        print(
            f"{size / 1e9:.2f} GB in {len(manifest.shards)} shards: {manifest.documents} documents, "
            f"{manifest.tokens} tokens"
        )
        began = time.perf_counter()
        index_documents(target, Data(sources=tuple(Source(name=name, path="x") for name in names)), target)
        print(f"index: {time.perf_counter() - began:.1f} s")
        print("groups, rows, tokens  packing  first batch  step 10,000    tokens/s   resident")
        for name, shape in SHAPES.items():
            groups = target / str(shape.group_tokens)
            groups.mkdir()
            began = time.perf_counter()
            for number in range(len(names)):
                pack_source(target, target, number, shape.group_tokens, groups)
            packing = time.perf_counter() - began
            command = [sys.executable, "-m", "benchmarks.sampler", str(target), "--measure", name]
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            result = subprocess.run(command, capture_output=True, text=True, check=True, env=one_thread)
            got = json.loads(result.stdout)
            print(
                f"{name:>20}  {packing:5.1f} s  {got['first'] * 1e3:8.0f} ms  {got['far'] * 1e3:8.1f} ms  "
                f"{got['rate'] / 1e6:6.1f} M/s  {got['memory'] / 1e6:6.0f} MB"
            )


if __name__ == "__main__":
    main()
