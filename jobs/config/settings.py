"""Settings from YAML, with `key=value` on top, checked against a strict model: whatever is wrong is one line."""

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError

from jobs.config.yaml_text import YamlError, read_text, read_value
from pipelines.workflow.credentials import hide_credentials
from pipelines.workflow.errors import UserError

Model = TypeVar("Model", bound=BaseModel)
Content = dict[str, Any]


def _directory(work_dir: str) -> str:
    if "://" in work_dir:
        raise ValueError(
            f"work_dir {work_dir} is a URL: give a directory, on a cluster one that all nodes share (checkpoints.path "
            f"may be a URL)"
        )
    return os.path.expanduser(work_dir)


WorkDirectory = Annotated[str, AfterValidator(_directory)]  # of a recipe: holds all that is made


def read_yaml(path: Path) -> Content:
    """The keys of a recipe file, unchecked. Raises UserError where it cannot be read or holds none."""
    try:
        content = read_text(path.read_text())
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"recipe {path} is not UTF-8 text") from None
    except YamlError as error:
        raise UserError(f"recipe {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} holds no keys: see recipes/quickstart.yaml")
    return content


def validated(model: type[Model], content: Content, where: str) -> Model:
    """The model with this content. Raises UserError, one line that begins with `where`, without credentials."""
    try:
        read = model.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {hide_credentials(_first_error(model, error))}") from None
    if (key := next(_truth_for_number(content, read, ""), None)) is not None:
        raise UserError(f"{where}: {key} is true or false: give a number")
    return read


def _truth_for_number(given: Any, read: Any, key: str) -> Iterator[str]:
    """Keys of numbers that were given as true or false, which pydantic takes for 1 and 0."""
    if isinstance(given, bool) and isinstance(read, int | float) and not isinstance(read, bool):
        yield key
    elif isinstance(given, dict):
        for name, value in given.items():
            inner = read.get(name) if isinstance(read, Mapping) else getattr(read, str(name), None)
            yield from _truth_for_number(value, inner, f"{key}.{name}".lstrip("."))
    elif isinstance(given, list) and isinstance(read, list | tuple):
        for place, (value, inner) in enumerate(zip(given, read, strict=False)):
            yield from _truth_for_number(value, inner, f"{key}.{place}")


def read_overridden(path: Path, overrides: Sequence[str]) -> Content:
    """A recipe file's keys, with what --set changes. Raises UserError as `read_yaml` and `override` do."""
    content = read_yaml(path)
    for text in overrides:
        override(content, text)
    return content


def override(content: Content, text: str) -> None:
    """Apply "key.path=value", the value in YAML. Raises UserError where it has no place."""
    key, equals, written = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: write it as key=value, for example --set finetune.steps=200")
    try:
        value = read_value(written)
    except YamlError as error:
        raise UserError(f"--set {text}: {error}") from None
    set_key(content, key, value)


def set_key(content: Content, key: str, value: Any) -> None:
    """Set "key.path" to a value; places of a list by number. Raises UserError where it has no place."""
    at: Any = content
    names = key.split(".")
    for place, name in enumerate(names):
        last = place == len(names) - 1
        if isinstance(at, list):
            if not name.isdigit() or int(name) > len(at):
                raise UserError(
                    f"--set {key}: {'.'.join(names[:place])} is a list of {len(at)}, not indexed by {name!r}"
                )
            if int(name) == len(at):
                at.append({})
            index: Any = int(name)
        else:
            if not isinstance(at.get(name), dict | list) and not last:
                at[name] = {}
            index = name
        if last:
            at[index] = value
        else:
            at = at[index]
            if not isinstance(at, dict | list):
                raise UserError(f"--set {key}: {'.'.join(names[: place + 1])} is a value and has no keys")


def _first_error(model: type[BaseModel], error: ValidationError) -> str:
    """The first error as one line that names the key and the nearest right one."""
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    names = [str(name) for name in first["loc"]]
    if "objective" in names[:-1]:  # pydantic puts the kind of objective behind its name
        del names[names.index("objective") + 1]
    where = ".".join(names)
    if first["type"] == "extra_forbidden":
        known = set(_keys(model, names[:-1]))  # of another kind of objective, it may be among them
        near = difflib.get_close_matches(names[-1], known, 1, 0.5) if names[-1] not in known else []
        hint = f": did you mean {'.'.join([*names[:-1], near[0]])}?" if near else ": remove it"
        return f"unknown key {where}{hint}"
    if first["type"] == "missing":
        return f"{where} is missing: give it in the file or with --set {where}=VALUE"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not where or first["type"] == "value_error":
        return message
    return f"{where} = {first['input']!r}: {message}"


def _keys(model: Any, path: Iterable[str]) -> list[str]:
    """Names of the keys a recipe takes at a path."""
    models = [model]
    for name in path:
        found = [fields[name]() for fields in map(_fields, models) if name in fields]
        if found:  # otherwise a place in a list, or a key of a mapping
            models = [child for annotation in found for child in _models_in(annotation)]
    return [name for child in models for name in _fields(child)]


def _fields(model: Any) -> Mapping[str, Callable[[], Any]]:
    """The keys that a model takes, with what gives their types; of plugins, too, which need not be loaded for the names
    alone."""
    own = {name: lambda field=field: field.annotation for name, field in model.model_fields.items()}
    return {**(model.more_keys() if hasattr(model, "more_keys") else {}), **own}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models a type annotation speaks of, inside unions, tuples and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]
