"""`grpo report RUN [RUN ...] [--output FILE] [--watch]`: one or more runs as a page for a browser, or as a picture, and
their summary as a table.

In: the files of each run folder, finished or not. Out: report.html (or a PNG, PDF, SVG), its path and a small table on
standard output; with --watch, a page that follows the runs, until Ctrl-C. A report loads no model and needs no jax.
"""

import argparse
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence

from rl.files.local_files import UNFINISHED
from rl.files.stores import check_path, is_remote, written_file
from rl.run_folder.contents import REPORT, is_own_curves
from rl.tools.report.figure import FORMATS, write_plot
from rl.tools.report.page import MOST_SAMPLES, write_page
from rl.tools.report.read import read_runs
from rl.tools.report.summary import format_table
from rl.tools.report.watch import serve

_PAGES = (".html", ".htm")


def main(argv: Sequence[str]) -> int:
    """Writes the page or the picture and prints the table.

    Raises:
      ValueError: a folder holds no metrics, the output's ending is not supported, or another file is in its place.
    """
    parser = argparse.ArgumentParser(prog="grpo report", description="Show runs as a page, and print their summary.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--output", metavar="FILE", help="page (.html) or picture to write")
    parser.add_argument("--samples", type=int, default=MOST_SAMPLES, metavar="N", help="samples in the page at most")
    parser.add_argument("--watch", action="store_true", help="serve the page, and follow the runs")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="of --watch; 0: any free one")
    arguments = parser.parse_args(argv)
    if arguments.samples < 0:
        raise ValueError(f"--samples must be >= 0, got {arguments.samples}")
    if arguments.watch:
        return _watch(arguments)
    output = arguments.output or f"{arguments.runs[0].rstrip('/')}/{REPORT}"
    check_path(output, "--output", may_be_remote=True)
    ending = pathlib.PurePath(output).suffix.lower()
    if ending not in (*_PAGES, *FORMATS):
        raise ValueError(f"--output must end in one of {', '.join((*_PAGES, *FORMATS))}, got {output!r}")
    is_page = ending in _PAGES
    runs = read_runs(arguments.runs, metrics_only=not is_page)
    if is_page:
        _write(output, lambda path: write_page(runs, path, arguments.samples))
    else:
        _write(output, lambda path: write_plot(runs, path))
    print(format_table(runs))
    print(f"\n{'report' if is_page else 'curves'}: {output}")
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    if arguments.output is not None:
        raise ValueError(f"--output must be left out with --watch, which writes no file, got {arguments.output!r}")
    for run in arguments.runs:
        if is_remote(run):
            raise ValueError(f"--watch must follow runs on this machine, got {run!r}; leave it out for a report of now")
    read_runs(arguments.runs)  # what cannot be read is said before the server starts
    serve(arguments.runs, arguments.port, arguments.samples)
    return 0


def _write(output: str, write: Callable[[pathlib.Path], None]) -> None:
    """Writes a file at once, in place of one that this command wrote."""
    with written_file(output) as path:
        _check_place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as scratch:
            draft = pathlib.Path(scratch) / path.name
            write(draft)
            os.replace(draft, path)


def _check_place(path: pathlib.Path) -> None:
    """ValueError where a file that this command did not write is in the way. A stranger's run folder may hold a link
    there.
    """
    if os.path.lexists(path) and not is_own_curves(path):
        raise ValueError(
            f"the report must be a new file, or one that grpo report wrote, got {str(path)!r}, which is "
            f"{'a link' if path.is_symlink() else 'something else'}; move it away, or name another one by --output"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
