"""What a check found: one line each, in four degrees.

In: the words of a check. Out: `Finding`, and its line `DEGREE  WHAT: VALUE; CHANGE`.
"""

from typing import Literal, NamedTuple

Degree = Literal["ok", "note", "change", "wrong"]


class Finding(NamedTuple):
    """One finding.

    Attributes:
      degree: ok; note: worth knowing; change: the run starts, and would be better otherwise; wrong: the run would not
        start, or not fit.
      what: that was looked at. value: what was found.
      change: the key to change, or what else to do; "" where there is nothing to do, or `value` says it.
    """

    degree: Degree
    what: str
    value: str
    change: str = ""

    @property
    def line(self) -> str:
        """The finding for a person."""
        return f"{self.degree:<6}  {self.what}: {self.value}{f'; {self.change}' if self.change else ''}"


def size_text(size: float) -> str:
    """Bytes in the unit that suits them, with three digits or so."""
    for unit, bytes_of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= bytes_of:
            return f"{size / bytes_of:.1f} {unit}"
    return f"{size:.0f} bytes"
