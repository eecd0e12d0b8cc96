"""Dense prefixes within a bound: the latest used in memory, older ones on disk, the oldest worked out anew."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from autotune.config import AutotuneError
from btp.prefix import DensePrefix

__all__ = ["DISK_SHARE", "MEMORY_SHARE", "PrefixStore", "PrefixTooLargeError", "free_bytes"]

MEMORY_SHARE = 0.25  # of what is free on the model's device when a store is made
DISK_SHARE = 0.25  # of what is free in the folder for temporary files


def free_bytes(device: str) -> int:
    """Memory that is free on a device; on a CPU, what can be had without swapping."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class PrefixTooLargeError(AutotuneError):
    """A plan asks for a dense prefix that memory has no room for."""


class PrefixStore:
    """Keeps one prefix a key while not in use. Its folder of spilled ones goes when the store or the program does.

    memory_bytes: how much of them may lie in memory; None for `MEMORY_SHARE` of what is free. disk_bytes: the same for
    the disk and `DISK_SHARE`; a prefix that fits neither is dropped, and filled again when it is next used.
    """

    def __init__(self, device: str, memory_bytes: int | None = None, disk_bytes: int | None = None) -> None:
        self._device = device
        self.memory_bytes = int(MEMORY_SHARE * free_bytes(device)) if memory_bytes is None else memory_bytes
        self.folder = Path(tempfile.mkdtemp(prefix="btp-prefixes-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        free_disk = shutil.disk_usage(self.folder).free
        self.disk_bytes = int(DISK_SHARE * free_disk) if disk_bytes is None else disk_bytes
        self._held: OrderedDict[Hashable, DensePrefix] = OrderedDict()  # the latest used last
        self._sizes: dict[Hashable, int] = {}  # of those held
        self._spilled: OrderedDict[Hashable, Path] = OrderedDict()
        self._num_files = 0

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def num_spilled(self) -> int:
        return len(self._spilled)

    @property
    def held_bytes(self) -> int:
        return sum(self._sizes.values())

    @property
    def spilled_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._spilled.values())

    @contextmanager
    def borrowed(self, key: Hashable) -> Iterator[DensePrefix]:
        """The key's prefix, empty where there is none yet; kept again afterwards, with what was added.

        Raises PrefixTooLargeError where this one alone is more than may lie in memory.
        """
        prefix = self._take(key)
        yield prefix
        size = prefix.num_bytes
        if size > self.memory_bytes:
            raise PrefixTooLargeError(
                "the dense prefix of one batch must fit the memory set aside for prefixes, "
                f"{self.memory_bytes / 2**20:.1f} MiB, but takes {size / 2**20:.1f} MiB; use fewer --workers, free "
                "memory on the device, or tune plans whose first stage comes earlier"
            )
        while self._held and self.held_bytes + size > self.memory_bytes:
            self._spill()
        self._held[key], self._sizes[key] = prefix, size

    def _take(self, key: Hashable) -> DensePrefix:
        if key in self._held:
            del self._sizes[key]
            return self._held.pop(key)
        if key not in self._spilled:
            return DensePrefix()
        path = self._spilled.pop(key)
        prefix = DensePrefix.load(path, self._device)
        path.unlink()
        return prefix

    def _spill(self) -> None:
        """Write the least recently used prefix to disk, where older ones make room for it."""
        key, prefix = self._held.popitem(last=False)
        size = self._sizes.pop(key)
        while self._spilled and self.spilled_bytes + size > self.disk_bytes:
            self._spilled.popitem(last=False)[1].unlink()
        if size <= self.disk_bytes:
            self._num_files += 1
            path = self.folder / f"{self._num_files}.pt"
            prefix.save(path)
            self._spilled[key] = path
