"""YAML as people mean it: safe, without surprises, and with the line of every key kept.

PyYAML's own loader reads `1e-4` as text, `010` as 8, `no` as false, `12:30` as 750, and lets the last of two
equal keys win in silence. In the configuration of a train each of these changes a result, so scalars follow
YAML 1.2 here and a repeated key is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError

MAX_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 50

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAG = "tag:yaml.org,2002:"
_KNOWN_TAGS = {_TAG + kind for kind in ("null", "bool", "int", "float", "str", "map", "seq")}


@dataclass(frozen=True)
class YamlFile:
    """What a file holds: its mapping, and the line (from 1) of every key by its path of keys."""

    path: Path
    values: dict[str, Any]
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)


def read_yaml(path: Path) -> YamlFile:
    """Read one YAML mapping.

    Raises UserError, with line and column where known, for a file that is missing, larger than 1 MiB, not
    UTF-8, empty, not YAML, not a mapping, or has a repeated key, a tag, or aliases that expand without end.
    """
    text = _read_text(path)
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is None:
            raise UserError("the file is empty", file=path, expected="a mapping such as `name: my-train`")
        if not isinstance(root, yaml.MappingNode):
            raise _not_a_mapping(path, root, text)
        reader = _Reader(path)
        values = reader.mapping(root, ())
    except yaml.YAMLError as error:
        raise _invalid_yaml(path, error, text) from error
    except RecursionError as error:
        raise UserError("the YAML is nested too deeply", file=path) from error
    return YamlFile(path, values, reader.lines)


def parse_scalar(text: str) -> Any:
    """The value a plain YAML text stands for, lists in brackets included; text that is no YAML stays text."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        return None if root is None else _Reader(Path("command line")).value(root, ())
    except (yaml.YAMLError, RecursionError):
        return text


class _Loader(yaml.SafeLoader):
    """Only composes nodes; the implicit types are YAML 1.2's."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name and shape
    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # PyYAML takes seconds for a file of 1 MiB that is all brackets; no configuration is that long.
        self.composed += 1
        if self.composed > MAX_NODES:
            mark = self.get_mark()
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_NODES} values", mark)
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"(~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), ["t", "T", "f", "F"])
_Loader.add_implicit_resolver(_TAG + "int", re.compile(rf"({_INTEGER.pattern})\Z"), [*"-+0123456789"])
_Loader.add_implicit_resolver(
    _TAG + "float", re.compile(rf"({_FLOAT.pattern}|{_INFINITE.pattern})\Z"), [*"-+.0123456789"]
)


class _Reader:
    """Turns nodes into plain values, remembering lines and counting, so that an alias bomb ends early."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[tuple[str, ...], int] = {}
        self.count = 0

    def mapping(self, node: yaml.MappingNode, where: tuple[str, ...]) -> dict[str, Any]:
        self._check(node, where)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self.value(key_node, where)
            if not isinstance(key, str):
                raise UserError("a parameter's name must be text", file=self.path, line=line, value=key, field=str(key))
            if key in values:
                first = self.lines[(*where, key)]
                raise UserError(
                    f"`{key}` stands twice, on line {first} and on line {line}",
                    file=self.path,
                    line=line,
                    field=key,
                    mend="keep one of the two",
                )
            self.lines[(*where, key)] = line
            values[key] = self.value(value_node, (*where, key))
        return values

    def value(self, node: yaml.Node, where: tuple[str, ...]) -> Any:
        self._check(node, where)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, where)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*where, str(index))) for index, item in enumerate(node.value)]
        return _scalar(node)

    def _check(self, node: yaml.Node, where: tuple[str, ...]) -> None:
        self.count += 1
        line = node.start_mark.line + 1
        if self.count > MAX_NODES:
            raise UserError(
                f"the file expands to more than {MAX_NODES} values",
                file=self.path,
                line=line,
                mend="drop the aliases",
            )
        if len(where) > MAX_DEPTH:
            raise UserError("the YAML is nested too deeply", file=self.path, line=line)
        if node.tag not in _KNOWN_TAGS:
            raise UserError(f"the tag {node.tag} is not allowed", file=self.path, line=line, mend="write a plain value")


def _scalar(node: yaml.Node) -> Any:
    text = str(node.value)
    if node.tag == _TAG + "null":
        return None
    if node.tag == _TAG + "bool":
        return text.lower() == "true"
    if node.tag == _TAG + "int" and _INTEGER.fullmatch(text):
        return int(text) if len(text) < 40 else float(text)
    if node.tag == _TAG + "float" and _INFINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    if node.tag == _TAG + "float" and _FLOAT.fullmatch(text):
        return float(text)
    return text


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UserError("this is a folder, not a file", file=path, expected="a YAML file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError("there is no such file", file=path, mend="check the path") from error
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror}", file=path) from error
    if len(data) > MAX_BYTES:
        raise UserError(
            "the file is larger than 1 MiB",
            file=path,
            expected="a short YAML file",
            mend="is this the dataset?",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            "the file is not UTF-8",
            file=path,
            line=data[: error.start].count(b"\n") + 1,
            value=data[error.start : error.start + 8],
            expected="UTF-8 text",
            mend="save the file again with the encoding UTF-8",
        ) from error


def _invalid_yaml(path: Path, error: yaml.YAMLError, text: str) -> UserError:
    if isinstance(error, yaml.reader.ReaderError):
        line = text[: error.position].count("\n") + 1
        return UserError(f"the character U+{_code(error.character):04X} is not allowed", file=path, line=line)
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return UserError(f"this is not YAML: {error}", file=path)
    mark = error.problem_mark
    problem = f"this is not YAML: {error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    if path.suffix == ".jsonl":
        return UserError(problem, file=path, line=mark.line + 1, mend="is this a dataset? name it as `dataset:`")
    near = text.splitlines()[max(0, mark.line - 1) : mark.line + 1]
    return UserError(problem, file=path, line=mark.line + 1, expected="`name: value`", mend=_hint(near))


def _code(character: object) -> int:
    return ord(character) if isinstance(character, str) else int(str(character))


def _not_a_mapping(path: Path, root: yaml.Node, text: str) -> UserError:
    found = "a list" if isinstance(root, yaml.SequenceNode) else "plain text"
    return UserError(
        f"the file holds {found}, not parameters",
        file=path,
        line=root.start_mark.line + 1,
        expected="one `name: value` on each line",
        mend=_hint(text.splitlines()),
    )


def _hint(lines: list[str]) -> str | None:
    if any("：" in line for line in lines):
        return "write the colon as `: ` (half-width, with a space), not as `：`"
    if any("\t" in line for line in lines):
        return "indent with spaces; YAML allows no tabs there"
    return None
