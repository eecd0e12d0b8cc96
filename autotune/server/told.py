"""What studies were told, read once: a page that is asked for again, or followed, reads what is new."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autotune.store import Database, Leases
from autotune.store.progress import Overview, Standing

if TYPE_CHECKING:
    from autotune.objective import Told

__all__ = ["ToldTrials"]

MOST_STUDIES = 32  # that are kept in memory, no fewer than one picture has; 2,000 trials are some 10 MB
MOST_BEST = 10_000


@dataclass(slots=True)
class _Known:
    told: list[Told] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def place(self) -> int:
        return self.places[-1] if self.places else 0


class ToldTrials:
    """Of the studies of one database; one that was deleted and begun again is another by when it was created."""

    def __init__(self, database: Database) -> None:
        self._database, self._overview = database, Overview(database)
        self._known: OrderedDict[tuple[str, float], _Known] = OrderedDict()
        self._best: OrderedDict[tuple[str, float, int], float | None] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, name: str, created: float, after: int = 0) -> tuple[Sequence[Told], int]:
        """All in the order of telling, after a place in it, as of `store.Evaluation`; and the place of the last."""
        from autotune.objective import Told  # with SciPy, which no server has to wait for when it starts

        known = self._of((name, created))
        with known.lock:
            for each in Leases(self._database, name).told_after(known.place):
                known.told.append(Told.from_dict(each.record))
                known.places.append(each.place)
            first = bisect_right(known.places, after)
            return known.told[first:], known.place

    def best(self, standings: Sequence[Standing]) -> dict[str, float | None]:
        """The highest feasible score of each; None for a study without one, or without labels."""
        keys = {each.name: (each.name, each.created, each.num_told) for each in standings}
        with self._lock:
            missing = [name for name, key in keys.items() if key not in self._best]
        found = self._overview.best(missing) if missing else {}
        with self._lock:
            for name in missing:
                self._best[keys[name]] = found.get(name)
            best = {name: self._best.get(key) for name, key in keys.items()}
            while len(self._best) > MOST_BEST:
                self._best.popitem(last=False)
        return best

    def _of(self, key: tuple[str, float]) -> _Known:
        with self._lock:
            known = self._known.setdefault(key, _Known())
            self._known.move_to_end(key)
            while len(self._known) > MOST_STUDIES:
                self._known.popitem(last=False)
        return known
