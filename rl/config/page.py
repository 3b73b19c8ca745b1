"""docs/configuration.md and the tables of the pages "coming from": `python -m rl.config.page`, in the checkout.

In: `configs/base.yml` (defaults and comments), `rl.config.sections` (types), `rl.config.peer_keys`. Out: the page with
a table for each section, and in each page of a peer the table of its keys, between two marks.
"""

import dataclasses
import pathlib
import re
import textwrap
import types
import typing
from collections.abc import Iterator

from rl.config.load import base_text
from rl.config.peer_keys import PEER_KEYS
from rl.config.sections import LIST_ENTRIES, MAPPING_ENTRIES, Config

# Pages with a table of a peer's keys. docs/from-maxtext.md has a table of its own, which a test compares.
PEER_PAGES = {"TRL": "from-trl.md", "verl": "from-verl.md", "Tunix": "from-tunix.md"}
_WIDTH = 100  # characters of a line of prose
_MARKS = re.compile(
    r"(<!-- keys: written by `python -m rl\.config\.page` -->\n\n).*?(\n<!-- end of keys -->)", re.DOTALL
)
_HEAD = (
    "Every key, with its type, its default and what it does. A recipe says what differs from these, in YAML; on the "
    "command line `section.key=value` does the same. A key that is not here is refused, with the nearest that is. The "
    "defaults and texts are those of `configs/base.yml`, the types those of `rl/config/sections.py`."
)
_ENTRIES = (
    "Some keys hold lists or mappings of entries. The fields of an entry that are left out have the value in the table."
)
_LINE = re.compile(r"(?P<indent> *)(?P<name>\w+):(?P<value>.*?)(?:(?:^|\s+)# ?(?P<comment>.*))?$")


class Key(typing.NamedTuple):
    """A line of base.yml: the dotted key, its default as it is written there ("" for a section), and its comment."""

    name: str
    default: str
    comment: str


def base_keys(text: str) -> Iterator[Key]:
    """The keys of base.yml in their order, sections among them."""
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = None if line.lstrip().startswith("#") else _LINE.match(line)
        if found:
            indent = len(found["indent"])
            above = [entry for entry in above if entry[0] < indent]
            above.append((indent, found["name"]))
            yield Key(".".join(name for _, name in above), found["value"].strip(), (found["comment"] or "").strip())


def type_name(kind: typing.Any) -> str:
    """A type as a reader of YAML says it: `whole number or null`, `list (text)`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return type_name(parts[0])
    if origin is typing.Literal:
        return " \\| ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in parts)
    if origin is list:
        return "list" if parts[0] is typing.Any else f"list ({type_name(parts[0])})"
    if origin is dict:
        return "mapping" if parts[1] is typing.Any else f"mapping ({type_name(parts[1])})"
    if dataclasses.is_dataclass(kind):
        return "entries"
    return {str: "text", bool: "true or false", int: "whole number", float: "number", type(None): "null"}[kind]


def field_type(name: str) -> typing.Any:
    """The type of a dotted key in the classes of the configuration."""
    kind: typing.Any = Config
    for part in name.split("."):
        if not dataclasses.is_dataclass(kind):
            return None  # inside a mapping: its keys have no type of their own
        kind = typing.get_type_hints(kind, include_extras=True)[part]
    return kind


def configuration_page() -> str:
    """The text of docs/configuration.md."""
    lines = ["# Every key", "", "<!-- Written by `python -m rl.config.page`. -->", "", *_wrapped(_HEAD)]
    open_section = None
    for key in base_keys(base_text()):
        kind = field_type(key.name)
        section = key.name.rpartition(".")[0]
        if dataclasses.is_dataclass(kind) or key.name == "mesh.rules":
            said = typing.cast(type, kind).__doc__ if dataclasses.is_dataclass(kind) else None
            title = [f"{'#' * (2 + key.name.count('.'))} {key.name}", ""]
            text = " ".join(filter(None, [said, f"{_sentence(key.comment)}" if key.comment else None]))
            lines += ["", *title, *_wrapped(text)]
            open_section = None
            continue
        if open_section != section:
            lines += ["", "| key | type | default | what it does |", "|---|---|---|---|"]
            open_section = section
        shown = "" if kind is None else type_name(kind)
        lines.append(f"| `{key.name}` | {shown} | `{_cell(key.default)}` | {_cell(key.comment)} |")
    lines += ["", "## Entries", "", *_wrapped(_ENTRIES)]
    for name, entry in {**LIST_ENTRIES, **MAPPING_ENTRIES}.items():
        said = _wrapped((entry.__doc__ or "").split("\n\n")[0].replace("\n", " "))
        lines += ["", f"### Entries of {name}", "", *said, "", "| field | type | left out |", "|---|---|---|"]
        hints = typing.get_type_hints(entry, include_extras=True)
        for field in dataclasses.fields(entry):
            lines.append(f"| `{field.name}` | {type_name(hints[field.name])} | {_left_out(field)} |")
    return "\n".join(lines) + "\n"


def peer_table(peer: str) -> str:
    """The table of a peer's keys."""
    rows = [f"| {peer} | here | |", "|---|---|---|"]
    for row in PEER_KEYS:
        if row.peer == peer:
            ours = ", ".join(f"`{key}`" for key in row.ours.split(", ")) if row.ours else "none"
            rows.append(f"| `{row.key}` | {ours} | {_cell(row.note)} |")
    return "\n".join(rows) + "\n"


def with_peer_table(text: str, peer: str) -> str:
    """A page with its table of keys written anew. ValueError: the page has not the two marks around it."""
    if len(_MARKS.findall(text)) != 1:
        raise ValueError(f"the page of {peer} must have the two marks of its table of keys once, got {text[:80]!r}")
    return _MARKS.sub(lambda found: found[1] + peer_table(peer) + found[2], text)


def _left_out(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{'null' if field.default is None else str(field.default).lower()}`"
    return "must be given" if field.default_factory is dataclasses.MISSING else "empty"


def _sentence(comment: str) -> str:
    text = _cell(comment)
    return f"{text[:1].upper()}{text[1:]}."


def _cell(text: str) -> str:
    """A text in a table, with links to the pages that it names."""
    linked = re.sub(r"(?<![`\w/])docs/([\w-]+\.md)", r"[\1](\1)", text)
    return re.sub(r"(?<!\\)\|", r"\\|", linked)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False, break_long_words=False)


def main(docs: pathlib.Path) -> None:
    """Writes the pages below `docs`."""
    (docs / "configuration.md").write_text(configuration_page())
    for peer, name in PEER_PAGES.items():
        (docs / name).write_text(with_peer_table((docs / name).read_text(), peer))


if __name__ == "__main__":
    main(pathlib.Path("docs"))
