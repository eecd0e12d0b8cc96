"""One lock for each device: whoever measures there holds it, across processes, workers and jobs of a host."""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from btp.errors import BusyDeviceError

__all__ = ["computing", "device_lock", "lock_name"]


def lock_name(device: torch.device) -> str:
    """What the device's lock is called: by the GPU's UUID, which all processes agree on, or by the host for its CPU."""
    if device.type == "cuda":
        return f"gpu-{torch.cuda.get_device_properties(device).uuid}"
    return f"cpu-{socket.gethostname()}"


@contextmanager
def device_lock(device: torch.device, timeout_s: float = 600.0) -> Iterator[None]:
    """Hold the device's lock; the thread that holds it may take it again.

    The lock is a file in `BTP_LOCK_DIR`, by default the folder btp-locks where temporary files go. Containers that
    share a device must share that folder; where a host name is not one machine's alone, its CPU lock is not either.
    It falls with the process that holds it, however that ends. Raises BusyDeviceError, with the holder's process id,
    when it is not free within `timeout_s`.
    """
    path = _lock_folder() / f"{lock_name(device)}.lock"
    with _gate(path, timeout_s) as is_first, ExitStack() as users:
        if is_first:
            _name_holder(path)
            users.enter_context(_users(path, fcntl.LOCK_EX))
        yield


@contextmanager
def computing(device: torch.device, timeout_s: float = 600.0) -> Iterator[None]:
    """Use the device for something else than measuring, beside others who do: not while somebody measures there.

    Who measures waits until all who compute are done with what they are at, and nobody begins while it waits: so hold
    this for a batch at a time. Raises BusyDeviceError as `device_lock` does.
    """
    path = _lock_folder() / f"{lock_name(device)}.lock"
    with ExitStack() as users:
        with _gate(path, timeout_s) as is_first:
            if is_first:  # else it is this thread itself that measures
                users.enter_context(_users(path, fcntl.LOCK_SH))
        yield


@contextmanager
def _gate(path: Path, timeout_s: float) -> Iterator[bool]:
    """The lock itself; whether this thread did not hold it already."""
    lock = FileLock(path, mode=0o666, is_singleton=True)
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise BusyDeviceError(
            f"one process at a time may measure on a device, but process {_holder(path)} has held {path.stem} "
            f"for the {timeout_s:g} s waited; let it end, or wait longer"
        ) from error
    try:
        yield lock.lock_counter == 1
    finally:
        lock.release()


@contextmanager
def _users(path: Path, kind: int) -> Iterator[None]:
    """A lock that many share, or one holds alone; it falls with the process too."""
    descriptor = os.open(path.with_suffix(".users"), os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


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
