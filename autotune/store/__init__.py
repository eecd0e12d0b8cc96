"""The truth: who tries what, what every trial came to, what was answered and measured; in one database for all."""

from autotune.store.database import Database, StoreError, begin_immediately
from autotune.store.keys import SCOPES, Key, Keys
from autotune.store.leases import Evaluation, Lease, LeaseLostError, Leases, this_worker
from autotune.store.promotions import Promotion, Promotions
from autotune.store.results import Block, Results
from autotune.store.studies import Studies, StudyRow
from autotune.store.submissions import (
    FINAL,
    STATES,
    ConflictError,
    JobEvent,
    NoSubmissionError,
    Submission,
    Submissions,
)

__all__ = [
    "FINAL",
    "SCOPES",
    "STATES",
    "Block",
    "ConflictError",
    "Database",
    "Evaluation",
    "JobEvent",
    "Key",
    "Keys",
    "Lease",
    "LeaseLostError",
    "Leases",
    "NoSubmissionError",
    "Promotion",
    "Promotions",
    "Results",
    "StoreError",
    "Studies",
    "StudyRow",
    "Submission",
    "Submissions",
    "begin_immediately",
    "this_worker",
]
