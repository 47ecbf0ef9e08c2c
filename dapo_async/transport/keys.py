"""Keys of the wire in files: how they are made and read, and who is on a learner's allow-list.

    DIR/learner/                stays with the learner (``network.keys``)
        learner.secret
        workers/NAME.public     the allow-list: who has the secret of one of these may connect
    DIR/NAME/                   goes to the machines of that worker (``dapo-async work --keys``)
        worker.secret
        learner.public          the only learner that it talks to

The allow-list is looked at with every handshake: a file that is added counts at once, and one that is taken away keeps
its owner out from the next connection on; one whose contents change counts within a second. A secret that other users
of the machine may read is refused.
"""

import contextlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dapo_async.errors import ConfigError
from dapo_async.transport.curve import DialerKeys, KeyPair, ListenerKeys, is_key, new_pair, public_of

log = logging.getLogger(__name__)

LEARNER_SECRET, LEARNER_PUBLIC, WORKER_SECRET = "learner.secret", "learner.public", "worker.secret"
ALLOWED = "workers"
REREAD_S = 1.0  # between two readings of a list in which no file has come or gone
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class _List(NamedTuple):
    """The allow-list as it was read."""

    keys: frozenset[bytes]
    changed: int | None  # when a file of it had come or gone last, by the file system's clock
    read_at: float


class LearnerKeys:
    """A learner's keys: its own, the allow-list, and a pair of this process for the workers that it starts itself."""

    def __init__(self, folder: str) -> None:
        """Raises ``ConfigError`` if ``folder`` is no learner's."""
        self._folder = Path(folder)
        if (self._folder / WORKER_SECRET).is_file():
            raise ConfigError(f"network.keys = {folder}: is a worker's folder; name the learner's, beside it")
        secret = _secret(self._folder / LEARNER_SECRET, "network.keys", folder)
        for path in (self._folder, self._folder / ALLOWED):
            if path.is_dir() and (mode := path.stat().st_mode & 0o777) & 0o022:
                raise ConfigError(f"{path} can be written by other users (mode {mode:o}): chmod 700 it")
        self._own = KeyPair(public_of(secret), secret)
        self._local = new_pair()
        self._told: set[str] = set()
        self._known: dict[Path, bytes] = {}  # the list as it was read last
        self._list = _List(frozenset(), None, 0.0)

    @property
    def for_listeners(self) -> ListenerKeys:
        """What a listener needs."""
        return ListenerKeys(self._own, self._admits)

    @contextlib.contextmanager
    def for_local_workers(self, where: Path) -> Iterator[Path]:
        """A folder in ``where`` for workers that this process starts; only its user may look into it.

        It is removed afterwards. Where this process is killed it stays, and opens nothing: its key ended with it.
        """
        with tempfile.TemporaryDirectory(prefix="worker-keys-", dir=where) as made:
            folder = Path(made)
            _write(folder / WORKER_SECRET, self._local.secret, secret=True)
            _write(folder / LEARNER_PUBLIC, self._own.public)
            yield folder

    def _admits(self, key: bytes) -> bool:
        return key == self._local.public or key in self._allowed()

    def _allowed(self) -> frozenset[bytes]:
        """The keys of the list now. It is read when a file has come or gone, and else once in ``REREAD_S``, so that
        strangers who knock a thousand times a second cost no more than that."""
        now, changed = time.monotonic(), _changed(self._folder / ALLOWED)
        if changed != self._list.changed or now - self._list.read_at >= REREAD_S:
            self._list = _List(frozenset(self._read_list()), changed, now)  # in one step: two listeners' threads ask
        return self._list.keys

    def _read_list(self) -> set[bytes]:
        """What cannot be read at this moment counts as it was read last."""
        known = self._known  # of two listeners' threads one may write it meanwhile
        try:
            paths = sorted(path for path in (self._folder / ALLOWED).iterdir() if path.suffix == ".public")
        except FileNotFoundError:
            paths = []
        except OSError as error:
            log.warning("%s cannot be read (%s): the list is taken as it was", self._folder / ALLOWED, error)
            paths = list(known)
        found: dict[Path, bytes] = {}
        for path in paths:
            try:
                found[path] = _key(path)
            except FileNotFoundError:
                continue  # removed since it was listed
            except OSError as error:
                log.warning("%s cannot be read (%s): taken as it was", path, error)
                found |= {path: known[path]} if path in known else {}
            except ValueError as error:
                if path.name not in self._told:
                    self._told.add(path.name)
                    log.warning("%s admits nobody: %s", path, error)
        self._known = found
        return set(found.values())


def worker_keys(folder: str) -> DialerKeys:
    """A worker's keys from its folder. Raises ``ConfigError`` if it is none."""
    path = Path(folder)
    if (path / LEARNER_SECRET).is_file():
        raise ConfigError(f"--keys {folder}: is the learner's folder, which stays there; name a worker's, beside it")
    secret = _secret(path / WORKER_SECRET, "--keys", folder)
    try:
        learner = _key(path / LEARNER_PUBLIC)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--keys {folder}: {LEARNER_PUBLIC} is missing or no key ({error})") from None
    return DialerKeys(KeyPair(public_of(secret), secret), learner)


def make_keys(folder: Path, worker: str) -> str:
    """Make the learner's keys in ``folder`` unless they are there, and a worker's. Returns what to do with them.

    Raises ``ConfigError`` if the name is none, or if there is such a worker: its machines would be locked out.
    """
    if not NAME.fullmatch(worker) or worker == "learner":
        raise ConfigError(f"--worker {worker}: letters, digits, dots, dashes; and not learner")
    learner, other = folder / "learner", folder / worker
    public = learner / ALLOWED / f"{worker}.public"
    for taken in (other, public):
        if taken.exists():
            raise ConfigError(f"{taken} exists; nothing was changed. Another worker gets keys with --worker NAME")
    try:
        for part in (folder, learner, learner / ALLOWED):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (learner / LEARNER_SECRET).exists():
            _write(learner / LEARNER_SECRET, new_pair().secret, secret=True)
        own = public_of(_secret(learner / LEARNER_SECRET, "keys", str(folder)))
        pair = new_pair()
        other.mkdir(mode=0o700)
        _write(other / WORKER_SECRET, pair.secret, secret=True)
        _write(other / LEARNER_PUBLIC, own)
        _write(public, pair.public)
    except OSError as error:
        raise ConfigError(f"cannot write keys to {folder}: {error.strerror}; name a folder of yours") from None
    return (
        f"{learner} stays with the learner: dapo-async learn CONFIG --set network.keys={learner} ...\n"
        f"{other} is for the machines of {worker}: copy it there (it holds a secret), then\n"
        f"  dapo-async work --connect tcp://LEARNER:PORT --keys {other}\n"
        f"Whoever should not connect any more: delete their file from {learner / ALLOWED}."
    )


def _changed(folder: Path) -> int | None:
    """When a file came to ``folder`` or went last; None if that cannot be told."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def _write(path: Path, key: bytes, *, secret: bool = False) -> None:
    """A new file, from its first moment readable by nobody else if ``secret``."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with open(descriptor, "wb") as file:
        file.write(key + b"\n")


def _secret(path: Path, setting: str, folder: str) -> bytes:
    try:
        key = _key(path)
        public_of(key)
        mode = path.stat().st_mode & 0o777
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{setting} = {folder}: {path.name}: {reason}; make keys with: dapo-async keys DIR") from None
    if mode & 0o077:
        raise ConfigError(f"{path} can be read by other users (mode {mode:o}): chmod 600 it, or make new keys")
    return key


def _key(path: Path) -> bytes:
    """The key in a file. Raises ``OSError``, or ``ValueError`` if there is none."""
    key = path.read_bytes().strip()
    if not is_key(key):
        raise ValueError("holds no key")
    return key
