"""Files of Google Cloud Storage (gs://) and S3 (s3://): which paths name them, operations on them, local copies.

In: a path or URL of the user's. Out: `Store`, the objects below a URL; `local_copy`, the local path of an input, which
is downloaded once; `check_path`, which refuses every other scheme. A store has no rename, no append and no lock. It
promises two things: an object is there whole or not at all, and a write may depend on the object's version
(`write_if`). Not here: run folders (`rl.run_folder.mirror`). fsspec and its drivers are extras of the package; they are
imported only when a URL is opened.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

T = TypeVar("T")

EXTRAS = {"gs": "gcs", "s3": "s3"}  # scheme -> the extra of the package that has its driver
_SCHEME = re.compile(r"[A-Za-z][\w+.:-]*(?=://)")
_RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)  # beside the retries of the drivers themselves
_LAST = ("config.json", "adapter_config.json")
_NUM_TRANSFERS = 8  # files on their way at a time


class Stat(NamedTuple):
    """The size of an object in bytes, and a stamp of the store that changes with its content."""

    size: int
    stamp: str


class Versions(Protocol):
    """Conditional writes in one kind of store. A version is a string; None means that there is no object."""

    def version(self, path: str) -> str | None:
        """The current version of an object."""
        ...

    def write_if(self, path: str, data: bytes, version: str | None) -> str | None:
        """Writes if the object still has this version. Returns the new version, or None where it had another one."""
        ...


class Store:
    """The objects below a URL, by names relative to it.

    An operation that fails for a reason that may pass is repeated with back-off, then raises ValueError. Objects appear
    whole. Threads may share a store.
    """

    def __init__(self, url: str, fs: Any, versions: Versions, errors: tuple[type[Exception], ...] = (OSError,)):
        """A store on an fsspec file system.

        Args:
          errors: exceptions of the file system for a store that cannot be reached, or that refuses.
        """
        self.url = url.rstrip("/")
        self._fs, self._versions, self._errors = fs, versions, errors
        self._root = fs._strip_protocol(self.url).rstrip("/")

    def stats(self, under: str = "") -> dict[str, Stat]:
        """{name: stat} of the objects whose names begin with `under` ("" or a folder's name with "/"), sorted by name.
        ValueError for a name that no file below a folder can have.
        """
        found = self._try("list", under, lambda: self._fs.find(f"{self._root}/{under}".rstrip("/"), detail=True)) or {}
        stats = {}
        for path, info in sorted(found.items()):
            name = path[len(self._root) + 1 :] if path.startswith(self._root + "/") else ""
            if name.startswith(under) and not name.endswith("/") and name:  # some stores hold an object for a folder
                check_name(name, self.url)
                stamp = [info.get(key) for key in ("generation", "ETag", "md5Hash", "created") if info.get(key)]
                stats[name] = Stat(info["size"], json.dumps(stamp, default=str))
        return stats

    def read(self, name: str) -> bytes | None:
        """The bytes of an object; None where it is not there."""
        return self._try("read", name, lambda: self._fs.cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        """Makes or replaces an object."""
        self._try("write", name, lambda: self._fs.pipe_file(self._path(name), data), must_exist=True)

    def upload(self, path: pathlib.Path, name: str) -> None:
        """Makes or replaces an object with the bytes of a file, which must not change meanwhile."""
        self._try("write", name, lambda: self._fs.put_file(str(path), self._path(name)), must_exist=True)

    def download(self, name: str, path: pathlib.Path) -> None:
        """Writes the bytes of an object to a file; missing folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._try("read", name, lambda: self._fs.get_file(self._path(name), str(path)), must_exist=True)

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects in the given order; missing ones are ignored."""
        for name in names:
            self._try("remove", name, functools.partial(self._fs.rm_file, self._path(name)))

    def version(self, name: str) -> str | None:
        """The version of an object, for `write_if`; None where there is no such object."""
        return self._try("read", name, lambda: self._versions.version(self._path(name)))

    def write_if(self, name: str, data: bytes, version: str | None) -> str | None:
        """Writes an object if it still has this version (None: if it does not exist). Returns the new version, or None
        where another writer was first. After a network error that writer may have been this call: read the object to be
        sure.
        """
        return self._try(
            "write", name, lambda: self._versions.write_if(self._path(name), data, version), must_exist=True
        )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _try(self, verb: str, name: str, function: Callable[[], T], must_exist: bool = False) -> T | None:
        """Calls `function`, with retries; None where there is no such object, unless it must exist."""
        for seconds in (*_RETRY_SECONDS, None):
            try:
                return function()
            except self._errors as error:
                if isinstance(error, FileNotFoundError) and not must_exist:
                    return None
                if seconds is None or isinstance(error, FileNotFoundError | PermissionError):
                    raise ValueError(
                        f"{self.url}/{name} could not be {_PAST[verb]} ({type(error).__name__}: {str(error)[:300]}); "
                        "check the name of the bucket, the credentials and the network, then start the same command "
                        "again"
                    ) from error
            time.sleep(seconds)
        raise AssertionError


_PAST = {"list": "listed", "read": "read", "write": "written", "remove": "removed"}


class _GoogleVersions:
    """Versions are generations of objects: https://cloud.google.com/storage/docs/request-preconditions"""

    def __init__(self, fs: Any):
        self._fs = fs

    def version(self, path: str) -> str | None:
        self._fs.invalidate_cache()
        return str(self._fs.info(path)["generation"])

    def write_if(self, path: str, data: bytes, version: str | None) -> str | None:
        from gcsfs.retry import HttpError  # pyright: ignore[reportMissingImports]

        bucket, name, _ = self._fs.split_path(path)
        try:
            made = self._fs.call(
                "POST",
                f"{self._fs._location}/upload/storage/v1/b/{bucket}/o",
                uploadType="media",
                name=name,
                ifGenerationMatch=version or "0",
                headers={"Content-Type": "application/octet-stream"},
                data=data,
                json_out=True,
            )
        except FileExistsError:  # how the driver reports 412, "condition not met"
            return None
        except HttpError as error:  # how older drivers report it
            if str(error.code) == "412":
                return None
            raise
        return str(made["generation"])


class _S3Versions:
    """By the ETag of an object: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html"""

    def __init__(self, fs: Any):
        self._fs = fs

    def version(self, path: str) -> str | None:
        return self._fs.info(path, refresh=True)["ETag"]

    def write_if(self, path: str, data: bytes, version: str | None) -> str | None:
        bucket, key, _ = self._fs.split_path(path)
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            return self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)["ETag"]
        except OSError as error:
            response = getattr(error.__cause__, "response", None) or {}
            # A conflict: another writer wrote at the same time. Not found: the object to replace is gone.
            lost = ("PreconditionFailed", "ConditionalRequestConflict", *(["NoSuchKey"] if version else []))
            if response.get("Error", {}).get("Code") in lost:
                return None
            raise


def scheme_of(path: str | os.PathLike) -> str | None:
    """The scheme of a URL; None for anything without ://, such as a path, a hub id, `module:name` or C:\\folder."""
    match = _SCHEME.match(os.fspath(path))
    return match[0] if match else None


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path names objects that `open_store` opens."""
    return scheme_of(path) in EXTRAS


def check_path(value: str | None, key: str, may_be_remote: bool) -> None:
    """Refuses a URL that the key or option does not take.

    Raises:
      ValueError: the scheme is neither gs nor s3, the path must be local, or the URL names no bucket and folder.
    """
    if value is None:
        return
    scheme = scheme_of(value)
    if not may_be_remote and scheme is not None:
        raise ValueError(f"{key} must be a local path, got {value!r}; copy the file to this machine first")
    schemes = " or ".join(f"{name}://" for name in EXTRAS)
    if scheme is not None and scheme not in EXTRAS:
        raise ValueError(f"{key} must be a local path or begin with {schemes}, got {value!r}; copy it to one of these")
    if re.match(r"(gs|s3):/(?!/)", value) or (scheme and not re.match(r"\w+://[^/\s]+/.*[^/]", value)):
        raise ValueError(
            f"{key} must name a bucket and a folder or file in it, like gs://bucket/name, got {value!r}; put it into a "
            "folder of the bucket"
        )


def check_name(name: str, url: str) -> None:
    """Refuses an object's name whose local copy would lie outside the folder of the copy.

    Raises:
      ValueError: a part of the name is empty, `.` or `..`, or the name has a backslash or a null character.
    """
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
        raise ValueError(
            f"{url} must hold objects with the names of files below it, got {name[:200]!r}; remove that object, or use "
            "another folder"
        )


def open_store(url: str) -> Store:
    """The objects below a URL, with the credentials that the driver finds by itself.

    Raises:
      ValueError: another scheme, or the package of the driver is missing.
    """
    check_path(url, "a URL", may_be_remote=True)
    scheme = scheme_of(url)
    assert scheme is not None
    import fsspec

    try:
        fs = fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise ValueError(
            f'{url} needs a package that is not installed ({error}); pip install "tandem-grpo[{EXTRAS[scheme]}]"'
        ) from error
    if scheme == "gs":
        import aiohttp  # pyright: ignore[reportMissingImports]
        from gcsfs.retry import HttpError  # pyright: ignore[reportMissingImports]
        from google.auth.exceptions import GoogleAuthError  # pyright: ignore[reportMissingImports]

        return Store(url, fs, _GoogleVersions(fs), (OSError, HttpError, aiohttp.ClientError, GoogleAuthError))
    import aiohttp  # pyright: ignore[reportMissingImports]
    from botocore.exceptions import BotoCoreError, ClientError  # pyright: ignore[reportMissingImports]

    return Store(url, fs, _S3Versions(fs), (OSError, BotoCoreError, ClientError, aiohttp.ClientError))


def cache_folder() -> pathlib.Path:
    """The local folder for copies of remote files. It may be deleted when nothing runs."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tandem"


def short_name(url: str) -> str:
    """A file name for a URL: its last part, and a hash."""
    last = re.sub(r"[^\w.-]", "_", url.rstrip("/").rpartition("/")[2])[:60]
    return f"{last}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]}"


def local_copy(path: str | os.PathLike) -> pathlib.Path:
    """The local path of an input. A URL is downloaded into `cache_folder`, unless this version of it is there.

    Raises:
      ValueError: the URL names nothing, or it cannot be read.
    """
    if not is_remote(path):
        return pathlib.Path(path).expanduser()
    return copy_of(open_store(os.fspath(path)), cache_folder() / "inputs")


def copy_of(store: Store, cache: pathlib.Path) -> pathlib.Path:
    """The local copy, below `cache`, of the file or folder at a store's URL. An existing copy is taken."""
    stats = store.stats()
    if not stats:
        # The URL names one object, which is listed with its folder.
        folder, _, name = store.url.rpartition("/")
        parent = Store(folder, store._fs, store._versions, store._errors)
        found = parent.stats(name)
        if name not in found:
            raise ValueError(f"{store.url} must be a file or a folder with files, and nothing is there; check the name")
        return _copy(parent, {name: found[name]}, cache / short_name(store.url)) / name
    return _copy(store, stats, cache / short_name(store.url))


def _copy(store: Store, stats: Mapping[str, Stat], cache: pathlib.Path) -> pathlib.Path:
    """A folder below `cache` that holds these objects in their present version."""
    place = cache / hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
    if not place.is_dir():
        with new_copy(place) as draft:
            download_all(store, {name: draft / name for name in stats})
            for name, stat in stats.items():
                if (size := (draft / name).stat().st_size) != stat.size:
                    raise ValueError(
                        f"{store.url}/{name} must have {stat.size} bytes, got {size}: it changed while it was read; "
                        "start again when nobody writes there"
                    )
    return place


@contextlib.contextmanager
def new_copy(place: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, which appears at `place` whole or not at all. If another process was first, its copy
    stays.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as scratch:
        draft = pathlib.Path(scratch) / "copy"
        draft.mkdir()
        yield draft
        try:
            os.rename(draft, place)
        except OSError:
            if not place.is_dir():
                raise


def download_all(store: Store, places: Mapping[str, pathlib.Path]) -> None:
    """Downloads objects to files, several at a time."""
    with ThreadPoolExecutor(_NUM_TRANSFERS) as pool:
        for _ in pool.map(lambda item: store.download(*item), places.items()):
            pass


def upload_all(store: Store, paths: Mapping[str, pathlib.Path]) -> None:
    """Uploads files as objects, several at a time."""
    with ThreadPoolExecutor(_NUM_TRANSFERS) as pool:
        for _ in pool.map(lambda item: store.upload(item[1], item[0]), paths.items()):
            pass


def file_names(folder: pathlib.Path) -> list[str]:
    """The paths of all files below a folder, relative to it and sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def uploaded_folder(store: Store) -> Iterator[pathlib.Path]:
    """A new local folder whose files are uploaded to the store's URL at the end. config.json goes last, because readers
    take a folder without it for no model.

    Raises:
      ValueError: the URL holds something already, or it cannot be written.
    """
    if store.stats():
        raise ValueError(f"export folder must be new or empty, got {store.url}; choose another one or remove it")
    with _scratch() as scratch:
        folder = scratch / "out"
        folder.mkdir()
        yield folder
        names = file_names(folder)
        for part in ([name for name in names if name not in _LAST], [name for name in names if name in _LAST]):
            upload_all(store, {name: folder / name for name in part})


@contextlib.contextmanager
def written_file(out: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A local path to write a file to. For a URL, the file is uploaded at the end."""
    if not is_remote(out):
        yield pathlib.Path(out)
        return
    folder, _, name = os.fspath(out).rpartition("/")
    store = open_store(folder)
    with _scratch() as scratch:
        yield scratch / name
        store.upload(scratch / name, name)


@contextlib.contextmanager
def continued_file(out: str | os.PathLike, suffixes: Sequence[str]) -> Iterator[pathlib.Path]:
    """A local path of a file to append to.

    `suffixes` names the files that belong to it: the file's name with each suffix, "" for the file itself. For a URL
    they are local copies that outlive the process. The longer of the remote and the local file is continued. At the
    end, also after an error, they are uploaded, the file itself last.

    Raises:
      ValueError: the remote file and the local one are different files.
    """
    if not is_remote(out):
        yield pathlib.Path(out)
        return
    folder, _, name = os.fspath(out).rpartition("/")
    store = open_store(folder)
    with continued_copy(store, name, suffixes, cache_folder() / "outputs" / short_name(os.fspath(out))) as path:
        yield path


@contextlib.contextmanager
def continued_copy(store: Store, name: str, suffixes: Sequence[str], folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """See `continued_file`."""
    path, there = folder / name, store.read(name)
    here = path.read_bytes() if path.is_file() else None
    if there is not None and (here is None or not here.startswith(there)):
        if here is not None and not there.startswith(here):
            raise ValueError(
                f"{store.url}/{name} does not go on from its copy {path}, and the copy not from it; remove the one "
                "that you do not want"
            )
        for suffix in suffixes:
            store.download(name + suffix, folder / (name + suffix))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    finally:
        for suffix in sorted(suffixes, reverse=True):
            if (folder / (name + suffix)).is_file():
                store.upload(folder / (name + suffix), name + suffix)


@contextlib.contextmanager
def _scratch() -> Iterator[pathlib.Path]:
    """A folder for files to upload. It lies in the cache, because /tmp may be memory and too small."""
    parent = cache_folder() / "outputs"
    parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(dir=parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)
