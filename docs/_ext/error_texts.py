"""Every error text of the code, collected from its source, with what to do about it.

An error is a call of a class named ``...Error`` with ``expected`` and ``got``; its text reads
``FIELD: expected EXPECTED, got GOT``. What to do stands in ``errors.toml``, by group; the first
group that an error fits takes it.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("src/ilqr_vae", "training", "service", "clients/ilqr_clients")
KEBAB = re.compile(r"[a-z]+(-[a-z]+)+")
VALUE = "…"  # stands for what is known only when it happens


@dataclass(frozen=True, order=True)
class ErrorText:
    """One error of the code: its class, its text in three parts, and where it is raised."""

    field: str
    expected: str
    got: str
    kind: str
    file: str


@dataclass(frozen=True)
class Group:
    """What to do about some errors.

    Attributes:
        files: a regular expression that the file's path contains.
        fields: a regular expression that the field matches as a whole.
        expected: a regular expression that what was expected contains.
    """

    topic: str
    title: str
    do: str
    files: str = ""
    fields: str = ".*"
    expected: str = ""

    def fits(self, error: ErrorText) -> bool:
        texts = (error.file, error.expected)
        searched = zip((self.files, self.expected), texts, strict=True)
        return all(re.search(pattern, text) for pattern, text in searched) and bool(
            re.fullmatch(self.fields, error.field)
        )


def worded(node: ast.expr | None, names: dict[str, str]) -> str:
    """An expression as a reader sees it: its constants, and ``VALUE`` for the rest."""
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(worded(part, names) for part in parts)
        case ast.IfExp(body=one, orelse=other):
            said = [s for s in (worded(one, names), worded(other, names)) if s != VALUE]
            return " or ".join(said) or VALUE
        case ast.BinOp(left=one, op=ast.Add(), right=other):
            return worded(one, names) + worded(other, names)
        case ast.Name(id=name) if name in names:
            return names[name]
        case _:
            return VALUE


@cache
def collected() -> tuple[ErrorText, ...]:
    """Every error of the four packages, sorted by field."""
    found: set[ErrorText] = set()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found |= set(_errors_of(path))
    return tuple(sorted(found))


def _calls_of(path: Path) -> Iterator[tuple[ast.Call, dict[str, str], str]]:
    """Each call of a file, the texts that its scope has put together before, and its class."""
    tree = ast.parse(path.read_text())
    owners = {
        method: owner.name
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for method in owner.body
    }
    for scope in ast.walk(tree):
        if not isinstance(scope, ast.FunctionDef | ast.Module):
            continue
        names: dict[str, str] = {}
        for node in _own(scope):
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    said = worded(value, names)
                    names[name] = said if said.strip(VALUE + " ") else VALUE
                case ast.Call():
                    yield node, names, owners.get(scope, "")
                case _:
                    pass


def _errors_of(path: Path) -> Iterator[ErrorText]:
    for call, names, owner in _calls_of(path):
        kind = ast.unparse(call.func).rpartition(".")[2]
        kind = owner if kind == "__init__" else kind
        given = {k.arg: k.value for k in call.keywords}
        if kind.endswith("Error") and {"expected", "got"} <= set(given):
            parts = (call.args[0] if call.args else None, given["expected"], given["got"])
            texts = (worded(part, names) for part in parts)
            yield ErrorText(*texts, kind, path.relative_to(ROOT).as_posix())


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope in the order of the source, without those of functions within it."""
    for child in ast.iter_child_nodes(scope):
        if isinstance(child, ast.FunctionDef):
            continue
        yield child
        yield from _own(child)


@cache
def advice() -> dict[str, Any]:
    """``errors.toml``."""
    return tomllib.loads((Path(__file__).parent / "errors.toml").read_text())


@cache
def groups() -> tuple[Group, ...]:
    topics: dict[str, list[dict[str, Any]]] = advice()["errors"]
    return tuple(Group(topic, **one) for topic, many in topics.items() for one in many)


@cache
def grouped() -> dict[Group | None, tuple[ErrorText, ...]]:
    """The errors of each group; of None those that no group fits."""
    found: dict[Group | None, list[ErrorText]] = {group: [] for group in groups()}
    for error in collected():
        group = next((g for g in groups() if g.fits(error)), None)
        found.setdefault(group, []).append(error)
    return {group: tuple(errors) for group, errors in found.items()}


def page() -> str:
    """Markdown: by topic and group, what to do and the texts."""
    lines: list[str] = []
    topic = ""
    for group, errors in grouped().items():
        if group is None or not errors:
            continue
        if group.topic != topic:
            topic = group.topic
            lines += [f"## {topic}", ""]
        lines += [f"### {group.title}", "", group.do.strip(), ""]
        lines += ["| field | expected | got |", "| --- | --- | --- |"]
        seen: dict[tuple[str, ...], None] = dict.fromkeys(
            (shown(e.field), shown(e.expected), shown(e.got)) for e in errors
        )
        lines += [f"| {field} | {expected} | {got} |" for field, expected, got in seen]
        lines.append("")
    return "\n".join(lines)


def shown(text: str) -> str:
    """A part of an error's text in a table's cell."""
    flat = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return f"`{flat}`" if flat else VALUE


@cache
def warnings() -> dict[str, str]:
    """The text of every warning about a recording, by its name (``spikes-outside``)."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "src/ilqr_vae/recordings").rglob("*.py")):
        for call, names, _ in _calls_of(path):
            match call.args:
                case [ast.Constant(value=str() as name), *_, text] if KEBAB.fullmatch(name):
                    found[name] = worded(text, names)
                case _:
                    pass
    return found


def warning_table() -> str:
    """Markdown: each warning, its text and what to do."""
    lines = ["| name | text | what to do |", "| --- | --- | --- |"]
    todo = advice()["warnings"]
    lines += [
        f"| `{name}` | {shown(text)} | {todo.get(name, 'The text says what was done.')} |"
        for name, text in sorted(warnings().items())
    ]
    return "\n".join(lines)
