"""One lock for each device: whoever measures there holds it, across processes, workers and jobs of a host."""

import fcntl
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from btp.errors import BusyDeviceError

__all__ = ["computing", "device_lock", "lock_name"]

WAIT_S = 5.0  # from one sign of life to the next
POLL_S = 0.005


def lock_name(device: torch.device) -> str:
    """What the device's lock is called: by the GPU's UUID, which all processes agree on, or by the host for its CPU."""
    if device.type == "cuda":
        return f"gpu-{torch.cuda.get_device_properties(device).uuid}"
    return f"cpu-{socket.gethostname()}"


@contextmanager
def device_lock(
    device: torch.device, timeout_s: float = 600.0, waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the device's lock; the thread that holds it may take it again.

    The lock is a file in `BTP_LOCK_DIR`, by default the folder btp-locks where temporary files go. Containers that
    share a device must share that folder; where a host name is not one machine's alone, its CPU lock is not either.
    It falls with the process that holds it, however that ends. waiting: called every few seconds while it is not free;
    what it raises ends the wait. Raises BusyDeviceError, with the holder's process id, when it is not free within
    `timeout_s`, and RuntimeError inside `computing`.
    """
    path = _lock_folder() / f"{lock_name(device)}.lock"
    if path in _computing():
        raise RuntimeError("a thread must measure outside of `computing`, or it waits for itself; leave that first")
    until = time.monotonic() + timeout_s
    with _gate(path, timeout_s, until, waiting) as is_first, ExitStack() as users:
        if is_first:
            _name_holder(path)
            users.enter_context(_users(path, fcntl.LOCK_EX, until, waiting))
        yield


@contextmanager
def computing(
    device: torch.device, timeout_s: float = 600.0, waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Use the device for something else than measuring, beside others who do: not while somebody measures there.

    Who measures waits until all who compute are done with what they are at, and nobody begins while it waits: so hold
    this for a batch at a time. waiting, raises: as of `device_lock`.
    """
    path = _lock_folder() / f"{lock_name(device)}.lock"
    until = time.monotonic() + timeout_s
    with ExitStack() as users:
        with _gate(path, timeout_s, until, waiting) as is_first:
            if is_first and path not in _computing():  # else it is this thread itself that measures or computes
                users.enter_context(_users(path, fcntl.LOCK_SH, until, waiting))
                _computing().add(path)
                users.callback(_computing().discard, path)
        yield


_local = threading.local()


def _computing() -> set[Path]:
    """The locks that this thread computes under."""
    found: set[Path] = _local.__dict__.setdefault("paths", set())
    return found


@contextmanager
def _gate(path: Path, timeout_s: float, until: float, waiting: Callable[[], None]) -> Iterator[bool]:
    """The lock itself; whether this thread did not hold it already."""
    lock = FileLock(path, mode=0o666, is_singleton=True)
    while True:
        try:
            lock.acquire(timeout=max(0.0, min(WAIT_S, until - time.monotonic())))
            break
        except Timeout as error:
            if time.monotonic() >= until:
                raise BusyDeviceError(
                    f"one process at a time may measure on a device, but process {_holder(path)} has held {path.stem} "
                    f"for the {timeout_s:g} s waited; let it end, or wait longer"
                ) from error
            waiting()
    try:
        yield lock.lock_counter == 1
    finally:
        lock.release()


@contextmanager
def _users(path: Path, kind: int, until: float, waiting: Callable[[], None]) -> Iterator[None]:
    """A lock that many share, or one holds alone; it falls with the process too."""
    descriptor = os.open(path.with_suffix(".users"), os.O_RDONLY | os.O_CREAT, 0o666)
    asked = time.monotonic()
    try:
        while not _flocked(descriptor, kind):
            if time.monotonic() >= until:
                raise BusyDeviceError(
                    f"who measures on {path.stem} waits until nobody else computes there, but somebody still did after "
                    "all the time waited; let them end, or wait longer"
                )
            if time.monotonic() - asked > WAIT_S:
                asked = time.monotonic()
                waiting()
            time.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)


def _flocked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_folder() -> Path:
    folder = Path(os.environ.get("BTP_LOCK_DIR") or Path(tempfile.gettempdir()) / "btp-locks")
    try:
        folder.mkdir(parents=True)
        folder.chmod(0o777)  # other users measure on this device as well
    except FileExistsError:
        pass
    return folder


def _name_holder(path: Path) -> None:
    """Beside the lock, not in it: the holder may belong to another user, and its file then cannot be written to."""
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(str(os.getpid()), encoding="utf-8")
    fresh.replace(path.with_suffix(".pid"))


def _holder(path: Path) -> str:
    try:
        return path.with_suffix(".pid").read_text(encoding="utf-8")
    except OSError:
        return "(unknown)"
