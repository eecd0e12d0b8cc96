"""One lock for each device: whoever measures there holds it, across processes, workers and jobs of a host."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from btp.errors import BusyDeviceError

__all__ = ["device_lock", "lock_name"]


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
    lock = FileLock(path, mode=0o666, is_singleton=True)
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise BusyDeviceError(
            f"one process at a time may measure on a device, but process {_holder(path)} has held {path.stem} "
            f"for the {timeout_s:g} s waited; let it end, or wait longer"
        ) from error
    try:
        _name_holder(path)
        yield
    finally:
        lock.release()


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
