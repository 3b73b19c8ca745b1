"""The page of a report: one HTML file that works by itself, offline, in any browser of today.

In: runs. Out: HTML with its style, its code and its data inside. The data are JSON, gzip and base64, which browsers
unpack by themselves (`DecompressionStream`). A policy in the page (CSP) lets the browser run this code and nothing
else, and connect to nothing; so what a policy or a reward function wrote stays text, whatever it is.
"""

import base64
import gzip
import hashlib
import html
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from rl.run_folder.contents import CURVES_MARK
from rl.tools.report.data import page_data
from rl.tools.report.read import Run

MOST_SAMPLES = 1600  # of each run: 8 a step for 200 steps
_FOLDER = pathlib.Path(__file__).parent
_SCRIPTS = ("basics.js", "charts.js", "samples.js", "page.js")  # in this order: later ones use earlier ones


def write_page(runs: Sequence[Run], path: pathlib.Path, most_samples: int = MOST_SAMPLES) -> None:
    """Writes the page of the runs, as they are now."""
    data = base64.b64encode(packed(page_data(runs, most_samples))).decode("ascii")
    path.write_text(page_html(" and ".join(run.name for run in runs), data), encoding="utf-8")


def packed(data: Any) -> bytes:
    """JSON, as gzip. Equal data give equal bytes."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # Level 9 would take three times as long for a hundredth less.
    return gzip.compress(text.encode("utf-8", "surrogatepass"), compresslevel=6, mtime=0)


def page_html(title: str, data: str, live: bool = False) -> str:
    """The page around packed data. live: it has none, and asks its server for them."""
    style = _read("page.css")
    script = "\n".join(_read(name) for name in _SCRIPTS)
    parts = {
        "MARK": CURVES_MARK,
        "POLICY": content_policy(live),
        "TITLE": html.escape(title),
        "STYLE": style,
        "SCRIPT": script,
        "LIVE": "yes" if live else "no",
        "DATA": data,
    }
    # In one pass: what is put in is not looked through again.
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def content_policy(live: bool) -> str:
    """What the browser may do for the page: run the one script and use the one style that are in it."""
    script = _hash("\n".join(_read(name) for name in _SCRIPTS))
    connect = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{_hash(_read('page.css'))}'; connect-src {connect}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
