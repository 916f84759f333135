"""`make` finds a Python that will do, or says in one line what is missing."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUND_BY_MAKE = re.search(r"^PYTHON \?= \$\(BIN\)/python (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
assert FOUND_BY_MAKE is not None
NAMES = FOUND_BY_MAKE[1].split()
PYTHON = '#!/bin/sh\nexec "{real}" -c "import sys; {before}; exec(sys.argv[1])" "$2"\n'
BOTH = ("cc", "c++")
INHERITED = ("CC", "CXX", "PYTHON", "MAKE", "MFLAGS")  # from the make that runs these tests
MAKES_ENVIRONMENTS = """#!/bin/sh
[ "$1" = -c ] && exit
[ "$*" = "-m venv .venv" ] || exit 9
mkdir -p .venv/bin
for program in pip fot; do
    printf '#!/bin/sh\necho %s "$PIP_CONSTRAINT" "$@"\n' $program > .venv/bin/$program
    chmod +x .venv/bin/$program
done
"""
SHIM = "#!/bin/sh\necho $0: command not found >&2\nexit 127\n"


def of_version(*version: int, before: str = "pass") -> str:
    """A program that takes itself for a Python of this version."""
    text = ".".join(map(str, version))
    before = f"sys.version_info = {(*version, 'final', 0)}; sys.version = '{text} (main)'; {before}"
    return PYTHON.format(real=sys.executable, before=before)


WITHOUT_VENV = "sys.modules['ensurepip'] = None"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a command where these programs, a compiler and what the script itself uses are all that is on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "sed", "dirname", "touch", "mkdir", "chmod"):
        (programs / name).symlink_to(str(shutil.which(name)))

    def run(command: list, compilers: tuple[str, ...] = BOTH, cwd: Path = tmp_path, **pythons: str):
        for name, text in {**dict.fromkeys(compilers, SHIM), **pythons}.items():
            program = programs / name.replace("_", ".")
            program.write_text(text)
            program.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
        environment["PATH"] = str(programs)
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)

    return run


FIND = ["sh", ROOT / "distribution/find_python.sh", *NAMES]


def test_it_is_looked_for_under_the_names_of_all_versions_that_the_package_admits() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$', project, re.MULTILINE)
    assert found is not None
    first, end = map(int, found.groups())
    assert [*(f"python3.{minor}" for minor in range(first, end)), "python3"] == NAMES
    for minor in range(first, end):
        assert f'"Programming Language :: Python :: 3.{minor}"' in project


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3_13": of_version(3, 13, 5), "python3": of_version(3, 11, 2)}, "python3.13"),
        ({"python3_13": SHIM, "python3_12": SHIM, "python3": of_version(3, 11, 2)}, "python3"),
        ({"python3": of_version(3, 14, 0), "python3_11": of_version(3, 11, 2)}, "python3.11"),
        ({"python3_13": of_version(3, 13, 0, before=WITHOUT_VENV), "python3": of_version(3, 12, 0)}, "python3"),
    ],
)
def test_the_first_that_will_do_is_taken(run, pythons, chosen) -> None:
    done = run(FIND, **pythons)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{chosen}\n", "")


@pytest.mark.parametrize(
    ("pythons", "compilers", "missing"),
    [
        (
            {},
            BOTH,
            "Python 3.11 to 3.13 (none of python3.11 python3.12 python3.13 python3 runs; one elsewhere",
        ),
        ({"python3": of_version(3, 9, 2)}, BOTH, "Python 3.11 to 3.13 (python3 is 3.9.2; one elsewhere"),
        ({"python3": of_version(3, 14, 0)}, BOTH, "Python 3.11 to 3.13 (python3 is 3.14.0; one elsewhere"),
        (
            {"python3": of_version(3, 12, 1, before=WITHOUT_VENV)},
            BOTH,
            "(python3 is 3.12.1 but lacks venv, Debian: apt-get install python3.12-venv; one elsewhere",
        ),
        ({"python3": of_version(3, 12, 1)}, ("cc",), "Missing: a C and a C++ compiler (Debian: apt-get install"),
        ({"python3": of_version(3, 8, 0)}, (), "make PYTHON=/path/to/python); a C and a C++ compiler"),
    ],
)
def test_what_is_missing_is_said_in_one_line(run, pythons, compilers, missing) -> None:
    done = run(FIND, compilers, **pythons)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Missing: ")
    assert missing in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    copy = tmp_path / "checkout"
    (copy / "distribution").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "distribution/find_python.sh"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def test_make_says_it_and_makes_nothing(run, checkout) -> None:
    make = shutil.which("make")
    done = run([make, "quickstart"], cwd=checkout, python3=of_version(3, 9, 2))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert [line.partition(" (")[0] for line in lines] == ["Missing: Python 3.11 to 3.13"]
    assert not (checkout / ".venv").exists()


def test_make_takes_the_python_that_is_named(run, checkout) -> None:
    make = shutil.which("make")
    done = run([make, "quickstart", "PYTHON=mine"], cwd=checkout, mine=SHIM, python3=of_version(3, 12, 0))
    assert done.returncode == 2
    assert "(none of mine runs; " in done.stderr
    assert not (checkout / ".venv").exists()


def test_make_installs_once_with_the_python_that_it_found_and_runs(run, checkout) -> None:
    make = [shutil.which("make"), "--silent", "quickstart"]
    first = run(make, cwd=checkout, python3_13=SHIM, python3_12=MAKES_ENVIRONMENTS, python3=of_version(3, 9, 2))
    assert first.stdout.splitlines() == [
        f"pip {checkout}/constraints.txt install --quiet --editable .[dev]",
        "fot  run recipes/quickstart.yaml",
    ]
    assert (first.returncode, first.stderr) == (0, "")
    assert run(make, cwd=checkout).stdout == "fot  run recipes/quickstart.yaml\n"
