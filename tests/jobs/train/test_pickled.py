import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from jobs.train.pickled import foreign_code


class Ran:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_what_trainings_write_is_loaded(tmp_path: Path) -> None:
    scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2, False)
    state = {
        "module": OrderedDict(weight=torch.zeros(2, dtype=torch.bfloat16)),
        "optimizer": {"stage": ZeroStageEnum.weights, "at": fragment_address(2, 3)},
        "scalers": [LossScaler(1.0), scaler],
    }
    torch.save(state, tmp_path / "state.pt")
    assert foreign_code([tmp_path / "state.pt"]) is None


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_code_is_found_without_being_run(tmp_path: Path, protocol: int) -> None:
    torch.save({"module": {"weight": torch.zeros(2)}}, tmp_path / "good.pt")
    torch.save({"a": [torch.zeros(1), Ran()]}, tmp_path / "bad.pt", pickle_protocol=protocol)
    found = foreign_code([tmp_path / "good.pt", tmp_path / "bad.pt"])
    assert found is not None
    assert str(tmp_path / "bad.pt") in found


@pytest.mark.parametrize("content", [pickle.dumps(Ran()), b"", b"PK\x03\x04 cut"])
def test_what_torch_did_not_write_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    found = foreign_code([tmp_path / "x.pt"])
    assert found is not None
    assert "is none of torch's checkpoints" in found


def test_a_script_of_torch_is_refused(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "x.pt")
    assert foreign_code([tmp_path / "x.pt"]) is not None
