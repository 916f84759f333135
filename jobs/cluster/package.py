"""What is submitted: a recipe with all its settings, and the code that runs it.

Paths are made absolute, as this machine means them: on the cluster there is no directory that they could be relative
to. The recipe travels in the job's metadata, where it can be read later to run it again, and where everybody can read
it: so it holds no credentials. The code is the working tree's three packages, or nothing where this is an installed
version, which the cluster then must have too. A job's id is its name and a hash of both.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from jobs.cluster.job import make_metadata
from jobs.common.version import code_version
from jobs.config.checkpoint_name import is_local
from jobs.config.dictionary import DictionaryRecipe, load_dictionary
from jobs.config.recipe import Recipe, load_recipe
from jobs.config.settings import Content, read_overridden
from jobs.config.variants import load_comparison
from pipelines.config import BUILT_IN
from pipelines.sources.formats import is_url
from pipelines.workflow.credentials import has_credentials, hide_credentials
from pipelines.workflow.errors import UserError
from pipelines.workflow.hashing import hash_json

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fot_model", "jobs", "pipelines")
WORK_DIR = "work_dir"
READ = re.compile(
    r"data\.sources\.\d+\.path|base\.checkpoint|tokenizer\.path|evaluation\.(trec|webquestions)\.(train|test)"
    r"|evaluation\.lm_eval\.include"
)
WRITTEN = re.compile(rf"{WORK_DIR}|(base\.pretrain\.training|finetune)\.checkpoints\.path")
Recipes = Mapping[str, Recipe | DictionaryRecipe]
EARLIEST = (1980, 1, 1, 0, 0, 0)  # that a zip file can say


@dataclass(frozen=True)
class Code:
    """What runs, by `version` and `hash`. `content`: a zip file to be unpacked as a job's working directory; None where
    the cluster must have this version installed."""

    version: str
    hash: str
    content: bytes | None

    @property
    def uri(self) -> str:
        """The name under which Ray keeps the zip file."""
        assert self.content is not None
        return f"gcs://_ray_pkg_{hashlib.sha256(self.content).hexdigest()[:32]}.zip"


@dataclass(frozen=True)
class Submission:
    """`content`: the recipe's keys, with every path absolute. `recipes`: the same, checked, as `load_all` gives it."""

    name: str
    content: Content
    recipes: Recipes
    code: Code

    @cached_property
    def id(self) -> str:
        """The same for the same recipe and code."""
        return f"{self.name}-{hash_json({'recipe': self.content, 'code': self.code.hash})[:8]}"

    def metadata(self, first: str, attempt: int, owner: str, tags: Mapping[str, str]) -> dict[str, str]:
        """What Ray keeps of it as the given attempt of a job."""
        code = json.dumps({"version": self.code.version, "hash": self.code.hash})
        return make_metadata(first, attempt, self.name, owner, tags, code, self.text)

    @property
    def text(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(self.content, sort_keys=False, allow_unicode=True)


def make_submission(path: Path, overrides: Sequence[str], name: str | None) -> Submission:
    """What submitting a recipe file comes to. Raises UserError for whatever is wrong in it, and for credentials."""
    recipes = load_all(path, overrides)
    content = read_overridden(path, overrides)
    content.setdefault(WORK_DIR, next(iter(recipes.values())).work_dir)
    content = absolute(content)
    refuse_credentials(content, f"recipe {path}")
    chosen = name or str(content["name"])
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", chosen):
        raise UserError(f"--name {chosen}: use letters, digits, dots, dashes and underscores")
    return Submission(chosen, content, recipes, code_here())


def code_here() -> Code:
    """This working tree's code, or this installed version."""
    if (ROOT / "pyproject.toml").exists():
        return pack_code(ROOT)
    return Code(code_version(), hash_json(code_version()), None)


def load_all(path: Path, overrides: Sequence[str] = ()) -> Recipes:
    """The recipe in a file, of any kind, by its name; where it has variants, that of each by the variant's name."""
    if (dictionary := load_dictionary(path, overrides)) is not None:
        return {dictionary.name: dictionary}
    if (comparison := load_comparison(path, overrides)) is not None:
        return {
            name: comparison.recipe(name, Path("a-model") if variant.after else None)
            for name, variant in comparison.variants.items()
        }
    recipe = load_recipe(path, overrides)
    return {recipe.name: recipe}


def absolute(content: Content, directory: str = ".") -> Content:
    """The recipe with every local path absolute; relative ones lie in `directory`."""

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: changed(_below(key, name), each) for name, each in value.items()}
        if isinstance(value, list):
            return [changed(_below(key, place), each) for place, each in enumerate(value)]
        if (
            not isinstance(value, str)
            or not (READ.fullmatch(key) or WRITTEN.fullmatch(key))
            or not _is_local(key, value)
        ):
            return value
        return os.path.abspath(os.path.join(directory, os.path.expanduser(value)))

    return dict(changed("", content))


def local_paths(content: Content, keys: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """(key, path) of all absolute local paths in a recipe at keys that match."""
    for key, value in _leaves("", content):
        if isinstance(value, str) and keys.fullmatch(key) and os.path.isabs(value):
            yield key, value


def refuse_credentials(content: Content, where: str) -> None:
    """Raises UserError where a value would show a password or a signature to all who can see the job."""
    if (key := holds_credentials(content)) is not None:
        raise UserError(
            f"{where}: {key} holds credentials, which all who see the job would see: leave them out, and set them "
            f"in the environment that the cluster's nodes are started with"
        )


def holds_credentials(content: Content) -> str | None:
    """The first key whose value shows a password or a signature."""
    for key, value in _leaves("", content):
        if not isinstance(value, str):
            continue
        hidden = key == "registry.tracking_uri" and hide_credentials(value) != value
        if hidden or has_credentials(value):
            return key
    return None


def pack_code(root: Path) -> Code:
    """The packages under `root`, the same bytes for the same files, with the version they are called by."""
    files = {
        str(path.relative_to(root)): path.read_bytes()
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }
    made, version = io.BytesIO(), code_version()
    described = (
        f"Metadata-Version: 2.1\nName: fot\nVersion: {version}\n".encode()
    )  # what says the version on the cluster
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**files, "fot-0.dist-info/METADATA": described}.items():
            entry = zipfile.ZipInfo(name, EARLIEST)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return Code(version, hash_json(hashes), made.getvalue())


def _is_local(key: str, value: str) -> bool:
    if is_url(value) or value in BUILT_IN:
        return False
    if key.endswith("checkpoint"):
        return is_local(value)
    return key != "tokenizer.path" or value[:1] in "./~" or Path(value).exists()  # else it is an id of the hub's


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping or list. Keys of `variants.NAME.set` are as they stand."""
    if isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(_below(key, name), each)
    else:
        yield key, value


def _below(key: str, name: Any) -> str:
    if re.fullmatch(r"variants\.[^.]+\.set", key):
        return str(name)  # a variant sets keys of the recipe
    return f"{key}.{name}" if key else str(name)
