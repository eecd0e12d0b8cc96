"""The truth: who tries what, what every trial came to, what was answered and measured; in one database for all."""

from autotune.store.database import Database, StoreError, begin_immediately
from autotune.store.leases import Evaluation, Lease, LeaseLostError, Leases, this_worker
from autotune.store.results import Results, note_promotion

__all__ = [
    "Database",
    "Evaluation",
    "Lease",
    "LeaseLostError",
    "Leases",
    "Results",
    "StoreError",
    "begin_immediately",
    "note_promotion",
    "this_worker",
]
