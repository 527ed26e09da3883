"""Every key of a configuration struct: default, unit, range and meaning, from the struct itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import getdoc
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}
PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "none"}
UNBOUNDED = 1e18  # bounds beyond it only keep infinities out


@dataclass(frozen=True)
class Key:
    """One key as the tables show it."""

    name: str
    default: str
    unit: str
    values: str
    meaning: str


def sections(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, type, list[Key]]]:
    """Each section of a configuration: its dotted name, its struct and its own keys."""
    own: list[Key] = []
    below: list[tuple[str, type]] = []
    hints = get_type_hints(kind, include_extras=True)
    meanings = described(kind)
    for field in msgspec.structs.fields(kind):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            below.append((f"{prefix}{field.name}", field.type))
            continue
        made = field.default
        if made is msgspec.NODEFAULT:
            made = field.default_factory()  # pyright: ignore[reportCallIssue]
        said = "none" if made is None else msgspec.json.encode(made).decode()
        values, unit = spelled(hints[field.name])
        own.append(Key(field.name, said, unit or "–", values, meanings.get(field.name, "")))
    if own:
        yield prefix.removesuffix("."), kind, own
    for name, struct in below:
        yield from sections(struct, f"{name}.")


def spelled(hint: Any) -> tuple[str, str]:
    """The values a type admits, in words, and the unit stated with it."""
    if hasattr(hint, "__metadata__"):
        kind, unit = spelled(hint.__origin__)
        bounds: list[str] = []
        for meta in hint.__metadata__:
            unit = (meta.extra or {}).get("unit", unit)
            for name, words in BOUNDS.items():
                bound = getattr(meta, name)
                if bound is not None and abs(bound) < UNBOUNDED:
                    bounds.append(words.format(f"{bound:g}" if abs(bound) < 1e6 else f"{bound:,}"))
            if meta.min_length:
                bounds.append(f"at least {meta.min_length} of them")
        return ", ".join([kind, *bounds]), unit
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{msgspec.json.encode(a).decode()}`" for a in arguments), ""
    if origin is tuple:
        kind, unit = spelled(arguments[0])
        many = "list of" if arguments[-1] is Ellipsis else f"{len(arguments)} of"
        return f"{many}: {kind}", unit
    if origin is dict:
        return f"table of {spelled(arguments[1])[0]}", ""
    if origin in (Union, UnionType):
        return " or ".join(spelled(a)[0] for a in arguments), ""
    return PLAIN.get(hint, f"`{hint}`"), ""


def described(kind: type) -> dict[str, str]:
    """The ``Attributes:`` part of a struct's docstring, and of its bases', by key."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = getdoc(base) if base.__doc__ and issubclass(base, msgspec.Struct) else ""
        _, _, part = (text or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?=    \w)", "\n" + part.split("\n\n")[0]):
            names, colon, words = entry.strip().partition(": ")
            if colon:
                found |= dict.fromkeys(names.split(", "), " ".join(words.split()))
    return found


def table(kind: type[msgspec.Struct]) -> str:
    """Markdown: a heading and a table for each section."""
    lines: list[str] = []
    for section, struct, keys in sections(kind):
        if section:
            about = (getdoc(struct) or "").partition("Attributes:")[0].strip()
            lines += [f"## `[{section}]`", "", as_markdown(about), ""]
        lines += ["| key | default | unit | values | meaning |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| `{k.name}` | `{k.default}` | {k.unit} | {cell(k.values)} | {cell(k.meaning)} |"
            for k in keys
        ]
        lines.append("")
    return "\n".join(lines)


def as_markdown(text: str) -> str:
    """A docstring's literals in Markdown's single backticks."""
    return text.replace("``", "`")


def cell(text: str) -> str:
    """Text for a table's cell."""
    return as_markdown(text).replace("|", "\\|").replace("<", "&lt;")
