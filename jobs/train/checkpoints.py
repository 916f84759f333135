"""Checkpoints of a training, as each of its ranks takes and restores them.

Saving stops the training only while the state is copied to CPU memory; a thread writes the copies. Restoring takes the
newest complete checkpoint whose files are what their records say. On the number of ranks that wrote it a training
continues bit for bit; on another one DeepSpeed's universal checkpoint, made in a temporary directory, carries the
optimizer over.
"""

import copy
import io
import os
import secrets
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import distributed

from fot_model import Adapter
from fot_model.adapter import DESCRIPTION, WEIGHTS, tensors_digest
from jobs.config.training import CheckpointSettings
from jobs.train.checkpoint_store import (
    MODEL_FILES,
    Checkpoint,
    CheckpointStore,
    Files,
    Record,
    step_name,
    superseded,
)
from jobs.train.pickled import foreign_code
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import say
from pipelines.workflow.store import RECORD

UNIVERSAL = "universal"
STATES = "_states.pt"  # how names of DeepSpeed's files end
WHOLE = "mp_rank_"  # and begin, of one that all ranks read


class Checkpoints:
    """The checkpoints of a training under `where`, for one rank of an initialised process group.

    `identity`: JSON that says what training it is; another's checkpoints are refused. `settings`: how many are kept.
    `tokenizer`: a directory whose files go into every checkpoint, so that it can be exported alone. `frozen`: the rest
    of a model that is trained in part; checkpoints then hold what is trained, and of the rest how to know it. The last
    one made for a place is the one that writes there. It is made, and every method but `timings` is called, by all
    ranks; raises UserError where they do not share the place.
    """

    def __init__(
        self,
        where: str,
        identity: Mapping[str, Any],
        settings: CheckpointSettings,
        tokenizer: Path,
        frozen: "Frozen | None" = None,
    ) -> None:
        self._store, self._identity = CheckpointStore(where), identity
        self._settings, self._tokenizer, self._frozen = settings, tokenizer, frozen
        self._rank, self._world = distributed.get_rank(), distributed.get_world_size()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._timings: dict[str, float] = {}
        self._copies = _Copies()
        self._owner = self._own()

    def save(self, engine: Any, step: int, state: Mapping[str, Any]) -> None:
        """Copy what DeepSpeed saves, and write it in the background. `state`: JSON that `restore` returns.

        Waits for the checkpoint before to be written, and raises what went wrong with it.
        """
        began = time.monotonic()
        self._finish()
        engine.checkpoint_engine, engine._copy_recovery_script = self._copies, lambda path: None
        self._copies.without = frozen_names(engine.module) if self._frozen is not None else frozenset()
        engine.save_checkpoint(
            os.sep, tag=step_name(step), save_latest=False, exclude_frozen_parameters=self._frozen is not None
        )
        dtype = str(next(engine.module.parameters()).dtype).removeprefix("torch.")
        base = None if self._frozen is None else self._frozen.reference
        record = Record(step, self._rank, self._world, {}, self._identity, state, dtype, 0.0, base)
        model = _model_files(engine.module, self._tokenizer, self._frozen) if self._rank == 0 else {}
        self._timings["checkpoint_pause_seconds"] = time.monotonic() - began
        self._writing = self._thread.submit(self._write, record, self._copies.taken, model)

    def wait(self) -> None:
        """Until every rank has written its part of the last checkpoint. Raises what went wrong."""
        self._finish()
        distributed.barrier()
        self._remove_superseded()

    def restore(self, engine: Any) -> tuple[int, dict[str, Any]] | None:
        """Load the newest complete checkpoint that is not damaged. Returns its (step, state), None if there is none.

        Incomplete ones and newer, damaged ones are removed: their steps will be written anew. Raises UserError if the
        newest is of another training, and if there are some but all are damaged.
        """
        self.wait()
        began = time.monotonic()
        found = _of_rank_0(self._store.all)
        complete = [checkpoint for checkpoint in found if checkpoint.complete]
        if complete:
            self._store.check_identity(complete[-1], self._identity)
        store = self._store
        restored = next((found for found in reversed(complete) if self._load(engine, store, found)), None)
        if restored is None and (complete or any(checkpoint.unreadable for checkpoint in found)):
            raise UserError(
                f"{self._store.name}: none of the {len(found)} checkpoints can be read whole: bring their files "
                f"back, or remove them to train from the beginning"
            )
        self._check_owner()
        if self._rank == 0:
            for checkpoint in found:
                if not checkpoint.complete or (restored is not None and checkpoint.step > restored.step):
                    self._store.remove(checkpoint)
        distributed.barrier()
        if restored is None:
            return None
        self._timings["checkpoint_restore_seconds"] = seconds = time.monotonic() - began
        say(f"checkpoint {step_name(restored.step)} restored in {seconds:.1f} s")
        return restored.step, dict(restored.records[0].state)

    def take_over(self, engine: Any, where: str, step: int) -> tuple[int, dict[str, Any]]:
        """Load the checkpoint of another training under `where`. Returns its (step, state). Raises UserError where it
        is not there whole."""
        store = CheckpointStore(where)
        found = next((each for each in _of_rank_0(store.all) if each.step == step and each.complete), None)
        if found is None or not self._load(engine, store, found):
            raise UserError(f"{store.name} has no whole checkpoint of step {step}, which this training goes on from")
        say(f"goes on from {step_name(step)} of {store.name}")
        return step, dict(found.records[0].state)

    def _own(self) -> str:
        """From now on what an earlier start of this training may still be writing counts for nothing."""
        owner = str(_of_rank_0(lambda: secrets.token_hex(8)))
        if self._rank == 0:
            self._store.make()
            self._store.own(owner)
        distributed.barrier()
        if self._store.owner() != owner:
            raise UserError(
                f"{self._store.name}: rank {self._rank} does not see there what rank 0 writes: set checkpoints.path to "
                f"storage that all nodes share"
            )
        return owner

    def _check_owner(self) -> None:
        """Raises UserError where a later start of this training has taken the place over."""
        if (owner := self._store.owner()) != self._owner:
            why = "was removed" if owner is None else "is written to by another start of this training now"
            raise UserError(f"checkpoints.path {self._store.name} {why}: this one stops")

    def timings(self) -> dict[str, float]:
        """Seconds that the last save paused the training, its writing and a restore took, each told once."""
        return {name: self._timings.pop(name) for name in list(self._timings)}

    def _finish(self) -> None:
        """Until what is being written is written. Raises what went wrong with it."""
        if self._writing is None:
            return
        if not self._writing.done():
            began = time.monotonic()
            self._writing.exception()
            say(f"waited {time.monotonic() - began:.1f} s until the checkpoint was written")
        writing, self._writing = self._writing, None
        writing.result()

    def _write(self, record: Record, states: dict[str, Any], model: dict[str, bytes]) -> None:
        began, files = time.monotonic(), {}
        self._check_owner()
        self._store.drop_record(record)
        for name, content in model.items():
            files[name] = self._store.write(record.step, name, partial(_put, content))
        for name in list(states):
            files[name] = self._store.write(record.step, name, partial(torch.save, states.pop(name)))
        self._check_owner()
        self._store.write_record(replace(record, files=files, time=time.time()))
        self._timings["checkpoint_write_seconds"] = seconds = time.monotonic() - began
        size = sum(size for _, size in files.values())
        say(f"checkpoint {step_name(record.step)}: rank {record.rank} wrote {size / 1e6:.1f} MB in {seconds:.1f} s")
        self._remove_superseded()

    def _remove_superseded(self) -> None:
        if self._rank == 0 and self._store.owner() == self._owner:
            keep, keep_hours = self._settings.keep, self._settings.keep_hours
            for checkpoint in superseded(self._store.all(), keep, keep_hours, time.time()):
                self._store.remove(checkpoint)

    def _load(self, engine: Any, store: CheckpointStore, checkpoint: Checkpoint) -> bool:
        """Load a complete checkpoint. False if a file is damaged."""
        name, local = step_name(checkpoint.step), store.local
        check_base(store, checkpoint, self._frozen)
        convert = engine.zero_optimization() and checkpoint.records[0].world != self._world
        with _node_directory() as temporary:
            target = None if local is not None else temporary / name
            damaged = store.damaged(checkpoint.step, self._to_read(checkpoint, convert), target)
            first = next((file for file in _of_all_ranks(damaged) if file is not None), None)
            if first is not None:
                if self._rank == 0:
                    say(f"checkpoint {name} is damaged ({first}): the one before is taken")
                return False
            parent = local or temporary
            read = [parent / name / file for file in self._to_read(checkpoint, convert)]
            foreign = next((what for what in _of_all_ranks(foreign_code(read)) if what is not None), None)
            if foreign is not None:
                raise UserError(f"{foreign}: no training of fot wrote that, and nothing of it was loaded")
            if convert:
                if _local_rank() == 0:
                    _make_universal(parent / name, temporary)
                distributed.barrier()
                _load_universal(engine, temporary)
            else:
                load = None if self._frozen is None else _load_trained
                engine.load_checkpoint(str(parent), tag=name, custom_load_fn=load)
        return True

    def _to_read(self, checkpoint: Checkpoint, convert: bool) -> Files:
        """The files that this rank looks after: its own; on each node the first rank what all read."""
        if convert:
            files = checkpoint.files if _local_rank() == 0 else {}
            return {name: file for name, file in files.items() if name.endswith(STATES)}
        own = checkpoint.records[self._rank].files if self._rank < len(checkpoint.records) else {}
        all_read = {name: file for name, file in checkpoint.files.items() if name.startswith(WHOLE)}
        files = {name: file for name, file in own.items() if name.endswith(STATES) and name not in all_read}
        return {**files, **all_read} if _local_rank() == 0 else files


class _Copies(TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine that keeps copies in CPU memory, by file name, in place of writing files."""

    without: Set[str] = frozenset()  # names of the module's state that are left out

    def create(self, info: Any) -> None:
        self.taken: dict[str, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        for name in self.without & state_dict.get("module", {}).keys():
            del state_dict["module"][name]  # DeepSpeed leaves a tied one in
        self.taken[os.path.basename(path)] = cpu_copy(state_dict, {})


def cpu_copy(value: Any, copies: dict[Any, torch.Tensor]) -> Any:
    """A copy of nested containers with their tensors in CPU memory.

    Each tensor becomes as large as what it shows, however large the buffer that it is a view of; those that show the
    same place, like tied embeddings, stay one. `copies`: those made so far.
    """
    if isinstance(value, torch.Tensor):
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if place not in copies:
            copies[place] = value.detach().to("cpu", copy=True)
        return copies[place]
    if isinstance(value, dict):
        made = copy.copy(value)  # keeps the attributes of a module's state
        for key, item in value.items():
            made[key] = cpu_copy(item, copies)
        return made
    if type(value) in (list, tuple):
        return type(value)(cpu_copy(item, copies) for item in value)
    return copy.deepcopy(value)


@dataclass(frozen=True)
class Frozen:
    """The rest of a model that is trained in part: its base's directory, and the adapter that the training will come
    to, with the tensors in it that are not trained here."""

    path: Path
    adapter: Adapter

    @property
    def reference(self) -> dict[str, str]:
        """What a checkpoint says of it."""
        kept = {"kept": tensors_digest(self.adapter.tensors)} if self.adapter.tensors else {}
        return {"path": str(self.path.resolve()), "fingerprint": self.adapter.base, **kept}


def frozen_names(model: torch.nn.Module) -> frozenset[str]:
    """Of its state, what is not trained, tied parameters by all of their names."""
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if not parameter.requires_grad)


def check_base(store: CheckpointStore, checkpoint: Checkpoint, frozen: Frozen | None) -> None:
    """Raises UserError where the parameters that a checkpoint lacks were others than those that are there now."""
    theirs, ours = (
        {name: value for name, value in (reference or {}).items() if name != "path"}
        for reference in (checkpoint.records[0].base, None if frozen is None else frozen.reference)
    )
    if theirs != ours:
        where = "a model" if frozen is None else frozen.path.resolve()
        raise UserError(
            f"{store.name}: the base of the checkpoint of step {checkpoint.step} was not what is in {where} now (its "
            f"fingerprint was {theirs.get('fingerprint')}): bring that base back, or set another checkpoints.path"
        )


def _load_trained(src: Mapping[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """What DeepSpeed calls to load the module's own state."""
    result = dst.load_state_dict(src, strict=False)
    assert not result.unexpected_keys, result
    assert set(result.missing_keys) == frozen_names(dst), result


def _model_files(model: Any, tokenizer: Path, frozen: Frozen | None) -> dict[str, bytes]:
    """What makes a Hugging Face directory of weights, by name."""
    configurations = {"config.json": model.config, "generation_config.json": model.generation_config}
    files = {name: config.to_json_string().encode() for name, config in configurations.items()}
    beside = [file for kind in ("*.json", "*.jinja") for file in tokenizer.glob(kind) if file.name != RECORD]
    files |= {file.name: file.read_bytes() for file in beside}
    if frozen is not None:
        with tempfile.TemporaryDirectory() as directory:
            frozen.adapter.save(directory)
            files |= {name: (Path(directory) / name).read_bytes() for name in (DESCRIPTION, WEIGHTS)}
    return {f"{MODEL_FILES}/{name}": content for name, content in files.items()}


def _put(content: bytes, stream: IO[bytes]) -> None:
    stream.write(content)


def _make_universal(checkpoint: Path, directory: Path) -> None:
    """Convert a checkpoint to DeepSpeed's universal form, in a directory."""
    (directory / "from").symlink_to(checkpoint)  # DeepSpeed takes paths for patterns: plain names are safe
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(
            Namespace(
                input_folder=str(directory / "from"),
                output_folder=str(directory / UNIVERSAL),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,  # parameters of which ZeRO says nothing are taken whole
            )
        )


def _load_universal(engine: Any, directory: Path) -> None:
    """Load what `_make_universal` made, at any number of ranks."""
    groups = [{key: group[key] for key in group if key != "params"} for group in engine.optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(directory), tag=UNIVERSAL)
    finally:
        engine._config.load_universal_checkpoint = False
    # ZeRO 3 gives every group the settings of the first, and all of them one counter, which each would count up.
    for group, own in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(own)
    for state in engine.basic_optimizer.state.values():
        state["step"] = copy.deepcopy(state["step"])


@contextmanager
def _node_directory() -> Iterator[Path]:
    """A temporary directory that the ranks of a node share, removed when all have left."""
    made = tempfile.mkdtemp(prefix="checkpoint-") if _local_rank() == 0 else None
    path = Path(_of_all_ranks(made)[distributed.get_rank() - _local_rank()])  # ranks of a node are consecutive
    try:
        yield path
        distributed.barrier()
    finally:
        if made is not None:
            shutil.rmtree(made)


def _local_rank() -> int:
    return int(os.environ["LOCAL_RANK"])


def _of_all_ranks(value: Any) -> list[Any]:
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _of_rank_0(make: Callable[[], Any]) -> Any:
    values = [make() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(values)
    return values[0]
