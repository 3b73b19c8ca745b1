"""The steps of a run folder in a store, for readers: which steps are complete, and local copies of them.

In: a path or URL of a run. Out: a local run folder with the requested step. Nothing here writes to a store;
`rl.run_folder.mirror` does.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from typing import NamedTuple

from rl.files.local_files import file_hash
from rl.files.stores import (
    Store,
    cache_folder,
    check_name,
    check_path,
    download_all,
    is_remote,
    local_copy,
    new_copy,
    open_store,
    short_name,
)
from rl.run_folder.contents import BEST, CHECKPOINTS, CONFIG, EVENTS, IDENTITY, METRICS, SAMPLES, Step
from rl.run_folder.ledger import read_ledger

STEPS = f"{CHECKPOINTS}/"
MARKER = "uploaded.json"
_DIGEST = re.compile(r"[0-9a-f]{64}")
FILES = (CONFIG, IDENTITY, METRICS, SAMPLES, EVENTS)


class DamagedStepError(ValueError):
    """A step differs from what was uploaded."""


class Marker(NamedTuple):
    """The marker of a complete step in a store.

    Attributes:
      run: id of the run that wrote it.
      digest: hash of the step's hashes.json; equal steps have equal digests.
      files: {name: (bytes, sha256)} of every file of the step.
    """

    run: str
    digest: str
    files: dict[str, tuple[int, str]]


def local_source(path: str | os.PathLike, step: Step | None = None, with_samples: bool = False) -> pathlib.Path:
    """A local path from which to read what is at a path or URL.

    A local path is returned unchanged. The files of a run at a URL, and those of one step, are copied, verified and
    kept. Anything else at a URL is copied by `rl.files.stores.local_copy`.

    Args:
      step: the step of the run, or BEST; None: the newest.
      with_samples: whether to copy samples.jsonl as well, which may be large.

    Raises:
      ValueError: there is nothing at the path, the run has no such step, or a file differs from what was uploaded.
    """
    check_path(os.fspath(path), "what is read", may_be_remote=True)
    if not is_remote(path):
        return pathlib.Path(path).expanduser()
    store = open_store(os.fspath(path))
    if store.read("run.json") is None:
        return local_copy(path)
    return copy_of_run(store, cache_folder() / "runs", step, with_samples)


def local_report(path: str | os.PathLike, metrics_only: bool = False) -> pathlib.Path:
    """A local folder with what a report shows of a run: metrics.jsonl and, unless `metrics_only`, those of `FILES` that
    are there. A URL's files are downloaded anew; a local path is returned unchanged.

    Raises:
      ValueError: the URL has no metrics.jsonl.
    """
    check_path(os.fspath(path), "a run", may_be_remote=True)
    if not is_remote(path):
        return pathlib.Path(path)
    place = cache_folder() / "metrics" / short_name(os.fspath(path))
    copy_of_report(open_store(os.fspath(path)), place, metrics_only)
    return place


def copy_of_report(store: Store, place: pathlib.Path, metrics_only: bool = False) -> None:
    """The files of `local_report`, downloaded anew into a folder."""
    store.download(METRICS, place / METRICS)
    there = () if metrics_only else store.stats()
    for name in set(FILES) - {METRICS}:
        if name in there:
            store.download(name, place / name)
        else:
            (place / name).unlink(missing_ok=True)  # of an earlier report


def copy_of_run(store: Store, cache: pathlib.Path, step: Step | None, with_samples: bool = False) -> pathlib.Path:
    """See `local_source`."""
    markers = read_markers(store)
    if not markers:
        raise ValueError(f"{store.url} must be a run folder with a complete checkpoint, and it has none")
    newest = max(markers)
    step = newest if step is None else _best(store, newest) if step == BEST else step
    if not isinstance(step, int) or step not in markers:
        raise ValueError(f"--step must be one of the checkpoints of {store.url}, {sorted(markers)}, got {step}")
    cache = cache / short_name(store.url)
    place = cache / f"{step}-{markers[step].digest[:16]}"
    if not place.is_dir():
        with new_copy(place) as draft:
            fetch_step(store, step, markers[step], draft)
    names = FILES if with_samples else [name for name in FILES if name != "samples.jsonl"]
    stats = {name: stat for name, stat in store.stats().items() if name in names}
    view = cache / f"run-{hashlib.sha256(json.dumps([place.name, stats]).encode()).hexdigest()[:16]}"
    if not view.is_dir():
        with new_copy(view) as draft:
            download_all(store, {name: draft / name for name in stats})
            (draft / STEPS).mkdir()
            (draft / STEPS / str(step)).symlink_to(place.absolute(), target_is_directory=True)
    return view


def _best(store: Store, newest: int) -> int:
    """The step of the best checkpoint, by the record of the newest one. ValueError where there is none."""
    content = store.read(f"{STEPS}{newest}/loop/metadata")
    best = None
    with contextlib.suppress(ValueError, TypeError, KeyError):
        best = json.loads(content or b"")[BEST]["step"]
    if not isinstance(best, int):
        raise ValueError(
            f"--step {BEST} needs a run that keeps its best checkpoint (checkpoint.best.metric), got {store.url}, "
            "whose newest checkpoint names none"
        )
    return best


def fetch_step(store: Store, step: int, marker: Marker, folder: pathlib.Path) -> None:
    """Downloads a step and compares its files with the marker. DamagedStepError where they differ."""
    download_all(store, {f"{STEPS}{step}/{name}": folder / name for name in marker.files})
    for name, wanted in marker.files.items():
        if _is_other(folder / name, wanted):
            store.download(f"{STEPS}{step}/{name}", folder / name)  # a second time, because the network may have failed
            if _is_other(folder / name, wanted):
                raise DamagedStepError(
                    f"{store.url}/{STEPS}{step}/{name} must be what was uploaded, but it is damaged; remove "
                    f"{store.url}/{STEPS}{step}/{MARKER}, and the step before it counts"
                )


def _is_other(path: pathlib.Path, wanted: tuple[int, str]) -> bool:
    size, digest = wanted
    return path.stat().st_size != size or file_hash(path) != digest


def step_of(name: str) -> int | None:
    """The step to which an object of a run belongs; None where it belongs to none."""
    number, slash, _ = name.removeprefix(STEPS).partition("/")
    is_step = name.startswith(STEPS) and slash and number.isascii() and number.isdecimal()
    return int(number) if is_step and number == str(int(number)) else None


def read_markers(store: Store) -> dict[int, Marker]:
    """{step: marker} of the complete steps of the run in a store. A step that the ledger does not list does not count.
    ValueError where the ledger or a marker cannot be read.
    """
    markers, ledger = {}, read_ledger(store)
    if ledger is None:
        return {}
    for name in store.stats(STEPS):
        step = step_of(name)
        if step is None or name != f"{STEPS}{step}/{MARKER}" or name not in ledger.files:
            continue
        content = store.read(name)
        if content is None:
            continue  # removed just now by the running process
        try:
            fields = json.loads(content)
            files = {file: (int(size), str(digest)) for file, (size, digest) in fields["files"].items()}
            for file in files:
                check_name(file, store.url)
            if not _DIGEST.fullmatch(fields["digest"]):  # it becomes part of a path
                raise ValueError("a digest that is none")
            marker = Marker(str(fields["run"]), fields["digest"], files)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{store.url}/{name} must be the marker of a step, got {content[:80]!r}") from error
        if marker.run == ledger.run:
            markers[step] = marker
    return markers
