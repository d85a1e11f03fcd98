"""Places where a prepared corpus lies: a directory, or an object store (S3, GCS, Azure, HTTP).

The only file that knows obstore.  A store answers with bytes, right or wrong: whoever reads them checks them.
"""

import contextlib
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from data_pipeline.atomic_files import Recoverable, Unreachable, expand_user
from data_pipeline.directory import Directory

SCHEMES = ("s3", "gs", "az", "https", "http")
REQUEST_SECONDS = 30  # that one request may take: 4 MiB at 140 kB/s
CONNECT_SECONDS = 5
BACKOFF = 0.1, 15.0  # seconds before the first retry and the most before any
TOLD_AFTER, TOLD_EVERY = 10.0, 60.0  # seconds of waiting until it is said, and said again
PATIENCE = 600.0

_log = logging.getLogger("data_pipeline")
_refusal = re.compile(r"non-2xx status code: (\d+)")
_again = {"408", "425", "429"}  # of the 4xx, those that may pass
_metadata = ("169.254.169.254", "metadata.google")  # where a machine outside of a cloud finds no credentials
Result = TypeVar("Result")


class Missing(ValueError):
    """There is no such object."""


class Store(Protocol):
    """Named objects, read by ranges.  Thread-safe, and can be pickled.

    Attributes:
      is_remote: whether a request takes long enough that several should be made side by side.
    """

    is_remote: bool

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Returns bytes `start` to `stop` of an object (None: to its end).

        Raises:
          ValueError: there is no such object or range, or it may not be read.
          Unreachable: the store does not answer.
        """
        ...

    def size(self, name: str) -> int:
        """Returns the size of an object in bytes.  Raises as `read`."""
        ...

    def path(self, name: str) -> str:
        """Returns the whole name of an object, for messages."""
        ...

    def keep(self, places: int) -> None:
        """Keeps what reading at so many places in turn takes."""
        ...

    def waiting(self) -> str:
        """Describes what is waited for, if a request takes long; else ""."""
        ...

    def separate(self) -> "Store":
        """Returns the same store for a reader that can be closed apart from the others."""
        ...

    def close(self) -> None:
        """Stops the retries of failed requests, and refuses new requests."""
        ...


def is_remote(location: Path | str) -> bool:
    """Returns whether `location` names a directory of an object store."""
    return isinstance(location, str) and location.partition("://")[0] in SCHEMES and "://" in location


def open_store(location: Path | str, patience: float = PATIENCE) -> Store:
    """Returns the store of a directory or a URL; asks it nothing yet.

    Args:
      patience: seconds that an object store may be silent.

    Raises:
      ValueError: the URL is malformed or has secrets in it, or obstore is not installed.
    """
    return Remote(str(location), patience) if is_remote(location) else Directory(expand_user(location))


class Remote:
    """A directory of an object store.

    Requests that fail transiently (429, 5xx, resets, cut or stalled answers) are retried for `patience` seconds; other
    failures raise ValueError at once.
    """

    is_remote = True

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self._url, self._patience = checked_url(url), patience
        self._obstore, self._store = _connect(self._url)
        self._traffic, self._closed = _Traffic(), threading.Event()

    def __reduce__(self) -> tuple:
        return Remote, (self._url, self._patience)

    def read(self, name: str, start: int = 0, stop: int | None = None, etag: str = "") -> memoryview:
        """Returns bytes of an object as `Store.read`; with its ETag, refuses another version of it."""

        def get() -> memoryview:
            if stop is None:
                return memoryview(self._obstore.get(self._store, name).bytes())
            if etag:
                options = {"range": (start, stop), "if_match": etag}
                data = memoryview(self._obstore.get(self._store, name, options=options).bytes())
            else:
                data = memoryview(self._obstore.get_range(self._store, name, start=start, end=stop))
            if len(data) != stop - start:
                raise ValueError(
                    f"{self.path(name)} ends at byte {start + len(data)} of {stop}: upload the corpus again"
                )
            return data

        return self._with_retries(name, get)

    def size(self, name: str) -> int:
        return self.stat(name).size

    def stat(self, name: str) -> "Listed":
        """Returns the size and the ETag of an object.  Raises as `read`."""
        return self._with_retries(name, lambda: _listed(self._obstore.head(self._store, name), name))

    def objects(self) -> list["Listed"]:
        """Returns all objects below the directory, by their names relative to it.  Raises as `read`."""
        found = self._obstore.list
        return self._with_retries("", lambda: [_listed(o, o["path"]) for page in found(self._store) for o in page])

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object unless there is one of that name; returns whether it was written.  Raises as `read`."""

        def put() -> bool:
            try:
                self._obstore.put(self._store, name, data, mode="create")
            except self._obstore.exceptions.AlreadyExistsError:
                return False
            return True

        return self._with_retries(name, put)

    def upload(self, name: str, file: Path) -> None:
        """Writes a file as an object, whole or not at all, over what is there.  Raises as `read`."""
        self._with_retries(name, lambda: self._obstore.put(self._store, name, file, use_multipart=True))

    def delete(self, names: list[str]) -> None:
        """Deletes objects; those that are not there count as deleted.  Raises as `read`."""
        self._with_retries("", lambda: self._obstore.delete(self._store, names))

    def path(self, name: str) -> str:
        return f"{self._url}/{name}"

    def keep(self, places: int) -> None:
        pass

    def waiting(self) -> str:
        traffic = self._traffic
        with traffic.lock:
            seconds = time.monotonic() - min(traffic.begun.values(), default=time.monotonic())
        return f"{self._url} does not answer{traffic.trouble}, {_spoken(seconds)}" if seconds >= TOLD_AFTER else ""

    def separate(self) -> "Remote":
        other = object.__new__(Remote)  # copy.copy would connect again, by __reduce__
        other.__dict__ |= self.__dict__
        other._closed = threading.Event()
        return other

    def close(self) -> None:
        self._closed.set()

    def _with_retries(self, name: str, request: Callable[[], Result]) -> Result:
        """Makes a request until it is answered."""
        pause, traffic = BACKOFF[0], self._traffic
        with traffic.timed() as began:
            while True:
                if self._closed.is_set():
                    raise Unreachable(f"{self._url} is closed")
                try:
                    result = request()
                    traffic.answered, traffic.trouble = True, ""
                    return result
                except (self._obstore.exceptions.BaseError, OSError) as error:  # OSError: such as FileNotFoundError
                    reason = self._reason(name, error)
                traffic.trouble = f" ({reason})"
                if time.monotonic() - began > self._patience:
                    raise Unreachable(
                        f"{self._url} has not answered for {_spoken(self._patience)} ({reason}): the same command "
                        "goes on when it does; --remote_patience waits longer"
                    )
                self._tell()
                left = began + self._patience - time.monotonic()
                self._closed.wait(min(pause * random.uniform(0.5, 1), max(0.0, left) + 0.01))
                pause = min(2 * pause, BACKOFF[1])

    def _reason(self, name: str, error: Exception) -> str:
        """Describes a failure that may pass.  Raises ValueError if it will not, Recoverable if no object is wrong."""
        text = " ".join(str(error).partition("\n\n")[0].split())
        status = found.group(1) if (found := _refusal.search(text)) else ""
        path, kind = self.path(name), type(error).__name__
        if not self._traffic.answered and any(host in text for host in _metadata):
            raise Recoverable(f"{self._url}: no credentials were found in the environment: see docs/data.md")
        if "NoSuchBucket" in text:
            raise Missing(f"{path}: there is no such bucket: check its name, or make it")
        if isinstance(error, FileNotFoundError) or kind == "NotFoundError" or status == "404":
            raise Missing(f"{path} does not exist: check the name, and that the corpus was uploaded whole")
        if kind in ("PermissionDeniedError", "UnauthenticatedError") or status in ("401", "403"):
            raise Recoverable(f"{path} is refused with these credentials ({status or kind}): see docs/data.md")
        if kind == "PreconditionError" or status == "412":
            raise ValueError(f"{path} was changed while it was read: prepare the corpus again")
        if status == "416":
            raise ValueError(f"{path} is shorter than the manifest says: upload the corpus again")
        if "non-partial response" in text or "Range request not supported" in text:
            raise Recoverable(f"{path}: the server answers without ranges: copy the corpus to a disk or another store")
        if (status.startswith("4") and status not in _again) or "builder error" in text:
            raise Recoverable(f"{path}: {text[:200]}")
        return f"status {status}" if status else re.sub(r"^.* - |Generic \w+ error: ", "", text)[:120]

    def _tell(self) -> None:
        """Logs that the store does not answer, once a minute for all requests together."""
        words, now = self.waiting(), time.monotonic()
        with self._traffic.lock:
            if not words or now - self._traffic.told < TOLD_EVERY:
                return
            self._traffic.told = now
        _log.warning("%s", words)


class Listed(NamedTuple):
    """An object of a store."""

    name: str
    size: int
    etag: str  # of this version of it; "" if the store gives none


def _listed(found: Any, name: str) -> Listed:
    return Listed(name, int(found["size"]), found["e_tag"] or "")


class _Traffic:
    """The requests to a store, of all its readers."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.begun: dict[object, float] = {}  # those in flight, and since when
        self.answered = False  # whether one ever was
        self.told, self.trouble = -TOLD_EVERY, ""  # when the last line was logged, and why the last failure was

    @contextlib.contextmanager
    def timed(self) -> Iterator[float]:
        """Counts a request as in flight; yields when it began."""
        token, began = object(), time.monotonic()
        with self.lock:
            self.begun[token] = began
        try:
            yield began
        finally:
            with self.lock:
                del self.begun[token]


def checked_url(url: str) -> str:
    """Returns the URL of a directory without a slash at its end.

    Raises:
      ValueError: it has no bucket or host, or something in it that may be a secret: runs keep the URL in config.json.
    """
    scheme, _, rest = url.partition("://")
    place = rest.partition("/")[0]
    if "@" in place or "?" in rest or "#" in rest:
        shown = f"{scheme}://{re.sub(r'^[^/]*@', '', rest).partition('?')[0].partition('#')[0]}"
        raise ValueError(
            f"{shown} is given with a user, a password or a query, which a run would write into its config.json: leave "
            "them out, and give credentials in the environment (docs/data.md)"
        )
    if not place:
        raise ValueError(f"{url} names no bucket or host: write {scheme}://BUCKET/DIRECTORY")
    return url.rstrip("/")


def _connect(url: str) -> tuple[Any, Any]:
    """Returns the module obstore and its store of `url`; credentials come from the environment, as obstore has it."""
    try:
        import obstore
        from obstore.store import from_url
    except ImportError:
        raise Recoverable(f"{url} needs obstore: pip install 'charlstm[remote]'") from None
    client = {
        # A custom endpoint says itself whether it is http; https stays https, whatever it redirects to.
        "allow_http": not url.startswith("https:"),
        "timeout": f"{REQUEST_SECONDS}s",
        "connect_timeout": f"{CONNECT_SECONDS}s",
        "user_agent": "charlstm",
    }
    try:
        # We retry ourselves, so that waiting is logged; obstore's few retries are for requesting credentials.
        return obstore, from_url(url, client_options=client, retry_config={"max_retries": 2})  # type: ignore[call-overload]
    except (obstore.exceptions.BaseError, ValueError, OSError) as error:
        raise ValueError(f"{url}: {' '.join(str(error).partition('Debug source')[0].split())}") from None


def _spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min"
