"""YAML to plain values, remembering where each one stands. Pure.

The core schema of YAML 1.2: ``on``, ``off``, ``yes`` and ``no`` are strings, and
``2:4`` is one too, where YAML 1.1 reads the number 124. Tags that build objects
are refused, and so are duplicate keys, which PyYAML lets the last one win.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

BYTES_MAX = 256 * 1024
TOO_LARGE = f"the file is larger than {BYTES_MAX // 1024} KiB"
DEPTH_MAX = 20
VALUES_MAX = 10_000
"""After aliases are written out: a few lines of them can name billions of values."""

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """What is wrong, and where: 1-based line and column, 0 for no place in the file."""

    line: int
    column: int
    path: str
    message: str

    def show(self, name: str) -> str:
        """One line, as compilers write them: ``job.yaml:6:5: restarts.max: ...``."""
        place = f"{name}:{self.line}:{self.column}: " if self.line else ""
        return f"{place}{self.path}: {self.message}" if self.path else f"{place}{self.message}"


@dataclass(slots=True)
class Document:
    """Plain values, and the places of values and of the keys that name them."""

    value: Any = None
    values: dict[Path, tuple[int, int]] = field(default_factory=dict)
    keys: dict[Path, tuple[int, int]] = field(default_factory=dict)
    texts: dict[Path, str] = field(default_factory=dict)
    """Scalars written without quotes, as typed."""
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: Path, *, of_key: bool = False) -> tuple[int, int]:
        """Where ``path`` stands, or the nearest thing around it that does."""
        if of_key and path in self.keys:
            return self.keys[path]
        for length in range(len(path), -1, -1):
            if path[:length] in self.values:
                return self.values[path[:length]]
        return (0, 0)


def show_path(path: Path) -> str:
    """``("args", 2)`` as people write it: ``args[2]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


class _Loader(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer):
    """The front half of PyYAML with its own resolver: nothing here builds objects."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)

    def resolve(self, kind: type, value: str | None, implicit: Any) -> str:
        if kind is not yaml.nodes.ScalarNode:
            return "tag:yaml.org,2002:map" if kind is yaml.nodes.MappingNode else "tag:yaml.org,2002:seq"
        if implicit[0]:
            for tag, pattern, _ in _CORE:
                if pattern.fullmatch(value or ""):
                    return f"tag:yaml.org,2002:{tag}"
        return "tag:yaml.org,2002:str"

    def descend_resolver(self, parent: object, index: object) -> None:
        """Nothing is resolved by position."""

    def ascend_resolver(self) -> None:
        """Nothing is resolved by position."""


def _float(text: str) -> float:
    special = {".nan": "nan", ".inf": "inf", "-.inf": "-inf", "+.inf": "inf"}
    return float(special.get(text.lower(), text))


_CORE: tuple[tuple[str, re.Pattern[str], Callable[[str], Any]], ...] = (
    ("null", re.compile(r"~|null|Null|NULL|"), lambda _: None),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    ("int", re.compile(r"[-+]?[0-9]+"), int),
    ("int", re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+"), lambda text: int(text, 0)),
    (
        "float",
        re.compile(
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
        _float,
    ),
)


def parse(text: str) -> Document:
    """Read one document; whatever is wrong is in ``problems``, never raised."""
    document = Document()
    if len(text.encode(errors="replace")) > BYTES_MAX:
        document.problems.append(Problem(1, 1, "", TOO_LARGE))
        return document
    try:
        root = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = "; ".join(part for part in (error.problem, error.context) if part)
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        document.problems.append(Problem(line, column, "", f"not valid YAML: {what}"))
        return document
    except (yaml.YAMLError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        document.problems.append(Problem(1, 1, "", f"not valid YAML: {what}"))
        return document
    if root is not None:
        _Reader(document).read(root)
    return document


class _Reader:
    """Turns nodes into values, with a bound on how many there may be."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._left = VALUES_MAX

    def read(self, root: yaml.Node) -> None:
        try:
            self._document.value = self._value(root, ())
        except OverflowError as error:
            self._document.value = None
            self._document.problems.append(Problem(*_place(root), "", str(error)))

    def _value(self, node: yaml.Node, path: Path) -> Any:
        self._left -= 1
        if self._left < 0:
            raise OverflowError(f"more than {VALUES_MAX} values, aliases written out")
        if len(path) > DEPTH_MAX:
            raise OverflowError(f"nested deeper than {DEPTH_MAX}, or an alias that contains itself")
        self._document.values[path] = _place(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, "seq", path)
            return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        self._check_tag(node, "map", path)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, path, "a key must be a word")
                continue
            key = key_node.value
            inner = (*path, key)
            if key == "<<" and key_node.style is None:
                self._problem(key_node, path, "merge keys (<<) are not supported: write the values out")
            elif key in result:
                line = self._document.keys[inner][0]
                self._problem(key_node, inner, f"given twice, first on line {line}")
            else:
                self._document.keys[inner] = _place(key_node)
                result[key] = self._value(value_node, inner)
        return result

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        short = node.tag.removeprefix("tag:yaml.org,2002:")
        if node.style is None:
            self._document.texts[path] = node.value
        if short == "str":
            return node.value
        for tag, pattern, build in _CORE:
            if tag == short and pattern.fullmatch(node.value):
                try:
                    return build(node.value)
                except ValueError:
                    # Python parses no more than 4,300 digits: more takes quadratic time.
                    self._problem(node, path, "a number of too many digits")
                    return None
        self._problem(node, path, f"the tag {_show_tag(node.tag)} is not accepted here")
        return None

    def _check_tag(self, node: yaml.Node, expected: str, path: Path) -> None:
        if node.tag != f"tag:yaml.org,2002:{expected}":
            self._problem(node, path, f"the tag {_show_tag(node.tag)} is not accepted here")

    def _problem(self, node: yaml.Node, path: Path, message: str) -> None:
        self._document.problems.append(Problem(*_place(node), show_path(path), message))


def _place(node: yaml.Node) -> tuple[int, int]:
    mark = node.start_mark
    return (mark.line + 1, mark.column + 1)


def _show_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every scalar of a plain value with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value
