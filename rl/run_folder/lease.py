"""Who may write to a run folder in a store: an object, `lease.json`, that one holder at a time keeps alive.

In: a store, and a token that outlives a killed process. Out: `Lease`. The object is created only if absent, and
replaced only if unchanged since it was read, so one of two processes gets it. A process that is killed leaves its lease
behind. A process with the same token may take it at once; the owner of the token makes sure that the killed process is
gone. Anyone may take it `LEASE_SECONDS` after its last renewal. Clocks may differ by less than that.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable

from rl.files.stores import Store

LEASE = "lease.json"
LEASE_SECONDS = 300.0  # since the last renewal, after which anyone may take it
RENEWAL_SECONDS = 30.0


class Lease:
    """The right to write below a store's URL, from `take` to `release`, renewed by a thread."""

    def __init__(self, store: Store, token: str, now: Callable[[], float] = time.time):
        self._store, self._token, self._now = store, token, now
        self._host = socket.gethostname()
        self._version: str | None = None
        self._is_made_here = False
        self._renewed = 0.0
        self._problem: str | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Takes the lease, once, and keeps it.

        Raises:
          ValueError: another process holds the lease, or the store cannot be written.
        """
        version = self._store.version(LEASE)  # read before the content, so that a change in between is not overwritten
        content = self._store.read(LEASE)
        if version is not None and content is not None:
            self._check_free(content)
        else:
            version = None  # the holder may have just removed it
        if not self._write(version, self._token):
            raise ValueError(
                f"output_dir {self._store.url} was taken by another process just now; stop that one or choose another "
                "output_dir"
            )
        self._is_made_here = version is None

    def start(self) -> None:
        """Renews the lease from now on, in a thread."""
        self._thread = threading.Thread(target=self._renew_often, name="lease", daemon=True)
        self._thread.start()

    def renew(self) -> None:
        """Renews the lease now. ValueError where it is gone, or the store could not be written for too long."""
        with self._lock:
            if self._problem is None and not self._write(self._version, self._token):
                holder = self._store.read(LEASE)
                what = f"is now {_holder_text(holder, self._now())}" if holder else "is gone"
                self._problem = f"the lease of {self._store.url} {what}"
        self.check()

    def check(self) -> None:
        """ValueError where the lease was lost, as far as this process knows; the store is not asked."""
        if self._problem is None and self._now() - self._renewed > LEASE_SECONDS:
            self._problem = f"the lease of {self._store.url} could not be renewed for {LEASE_SECONDS:.0f} s"
        if self._problem is not None:
            raise ValueError(
                f"{self._problem}, so this run stops before two write to one folder; its checkpoints are in the "
                "staging folder: see that no other run has this output_dir, then start the same command again"
            )

    def release(self, is_unused: bool = False) -> None:
        """Gives the lease back, unless it was lost.

        Args:
          is_unused: whether nothing was written under the lease; then it is removed, unless it was there before `take`.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            if self._problem is not None:
                return
            if not (is_unused and self._is_made_here):
                self._write(self._version, None)
            elif self._write(self._version, self._token):
                # It was held a moment ago, so nobody else can take it yet, and no other lease can be removed here.
                self._store.remove([LEASE])

    def _renew_often(self) -> None:
        while not self._stop.wait(RENEWAL_SECONDS):
            try:
                self.renew()
            except ValueError:
                if self._problem is not None:
                    return  # `check` says it
                # The store could not be reached; there is time to try again.

    def _write(self, version: str | None, token: str | None) -> bool:
        """Replaces the lease if it has this version. Returns whether it did."""
        now = self._now()
        nonce = uuid.uuid4().hex  # makes every lease's bytes unique, because the version may be a hash of them
        record = {"host": self._host, "pid": os.getpid(), "token": token, "time": now, "nonce": nonce}
        new = self._store.write_if(LEASE, json.dumps(record).encode(), version)
        if new is None:
            # A write whose answer was lost, and that was repeated, has been made all the same.
            new = self._store.version(LEASE)
            content = self._store.read(LEASE)
            if content is None or _parse(content).get("nonce") != nonce:
                return False
        self._version, self._renewed = new, now
        return True

    def _check_free(self, content: bytes) -> None:
        lease, now = _parse(content), self._now()
        token = lease.get("token")
        is_own = token == self._token and lease.get("host") == self._host
        if token is None or is_own or now - float(lease.get("time", 0.0)) > LEASE_SECONDS:
            return
        raise ValueError(
            f"output_dir {self._store.url} is {_holder_text(content, now)}; stop that run or choose another "
            f"output_dir. A run that was killed leaves its lease behind: it ends by itself {LEASE_SECONDS / 60:.0f} "
            "minutes after its last renewal"
        )


def _holder_text(content: bytes, now: float) -> str:
    lease = _parse(content)
    if lease.get("token") is None:
        return "released"
    age = now - float(lease.get("time", 0.0))
    return f"held by process {lease.get('pid')} on {lease.get('host')!r}, which renewed it {age:.0f} s ago"


def _parse(content: bytes) -> dict:
    try:
        lease = json.loads(content)
    except (ValueError, RecursionError):
        lease = None
    if not isinstance(lease, dict) or not isinstance(lease.get("time"), int | float):
        raise ValueError(f"{LEASE} must be the lease of a run, got {content[:80]!r}; choose another output_dir")
    return lease
