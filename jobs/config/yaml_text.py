"""YAML as people mean it: what YAML 1.1 reads as something else is text, and what would be lost in silence is refused.

As in YAML 1.2 only `true` and `false` are truth values (`yes`, `no`, `on`, `off` are words), `010` is no octal number,
`1:30` no number to the base 60, and `2024-01-01` text. A key twice in one mapping is refused.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml


class YamlError(ValueError):
    """One line that says what is wrong, and where."""


class _Loader(yaml.SafeLoader):
    """PyYAML's, with plain scalars resolved as described above."""


_FIRST: dict[str, str] = {
    "tag:yaml.org,2002:bool": "tTfF",
    "tag:yaml.org,2002:int": "-+0123456789",
    "tag:yaml.org,2002:float": "-+0123456789.",
}
_PLAIN = {
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)",
    "tag:yaml.org,2002:float": r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _PLAIN and tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _PLAIN.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_FIRST[_tag]))


def read_text(text: str) -> Any:
    """What a text in YAML says. Raises YamlError where it is none, and for a key that stands twice or has no name."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if (wrong := next(_wrong_keys(node, "", set()), None)) is not None:
            raise YamlError(wrong)
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise YamlError(f"it is no YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def read_value(text: str) -> Any:
    """What is written behind a key's `=` on the command line: YAML, but that a # begins no comment.

    Raises YamlError for a # that is not part of the value, and as `read_text`, but for what is no YAML: that is text.
    """
    text = text.strip()
    try:
        if _has_comment(text):
            first = next(token for token in yaml.scan(text) if not isinstance(token, yaml.StreamStartToken))
            if isinstance(first, yaml.StreamEndToken) or (isinstance(first, yaml.ScalarToken) and first.plain):
                return text
            raise YamlError("its # would begin a comment: put the text that it belongs to in quotes")
        yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return text
    return read_text(text)


def _wrong_keys(node: yaml.Node, path: str, seen: set[int]) -> Iterator[str]:
    """What is wrong with the keys of a document, by their full names."""
    if id(node) in seen:  # an alias: looked at where it was written
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            yield from _wrong_keys(item, f"{path}{place}.", seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        written, line = (key.tag, str(key.value)), key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:null":
            yield f"line {line}: {path.rstrip('.') or 'it'} has a key that is no name"
        elif written in lines:
            yield f"{path}{key.value} stands twice, in lines {lines[written]} and {line}: remove one"
        lines[written] = line
        yield from _wrong_keys(value, f"{path}{key.value}.", seen)


def _has_comment(text: str) -> bool:
    """Whether a # stands outside of everything that YAML takes from the text."""
    end = 0
    for token in yaml.scan(text):
        if "#" in text[end : token.start_mark.index]:
            return True
        end = max(end, token.end_mark.index)
    return False
