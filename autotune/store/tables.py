"""The tables, one picture of them for every part of the store. What a change to them takes is a new migration."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction

__all__ = [
    "Now",
    "api_key",
    "device",
    "evaluation",
    "job",
    "kept",
    "late_result",
    "latency_block",
    "lease",
    "metadata",
    "promotion",
    "sample_result",
    "session",
    "submission",
    "submission_event",
]

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

BigId = BigInteger().with_variant(Integer(), "sqlite")  # SQLite counts only INTEGER keys up by itself


class Now(GenericFunction[float]):
    """The database's clock, as seconds since 1970: no worker's own clock has a say in who holds a lease."""

    name = "btp_now"
    type = Double()
    inherit_cache = True


@compiles(Now, "sqlite")
def _sqlite(element: Now, compiler: Any, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(Now, "postgresql")
def _postgresql(element: Now, compiler: Any, **_: Any) -> str:
    return "extract(epoch FROM clock_timestamp())::double precision"


job = Table(
    "job",
    metadata,
    Column("study", String(255), primary_key=True),
    Column("config", JSON, nullable=False, doc="what the study is asked with, for workers to start from"),
    Column("target", Integer, nullable=False, doc="how many trials"),
    Column("is_open", Boolean, nullable=False, doc="whether workers may ask"),
    Column("driver", String(255), nullable=True, doc="the one process that begins the study and ends it"),
    Column("driver_expires", Double, nullable=True, doc="by the database's clock"),
    Column("created", Double, nullable=False),
)
"""One row a study. Whoever changes what is leased, or tells, holds this row: the study's changes have one order."""

lease = Table(
    "lease",
    metadata,
    Column("token", BigId, primary_key=True, doc="fencing token: one attempt of one worker at one trial"),
    Column("study", String(255), ForeignKey(job.c.study), nullable=False),
    Column("number", Integer, nullable=False, doc="of the trial; all its attempts share it"),
    Column("attempt", Integer, nullable=False, doc="0 for the first; one that was released does not count"),
    Column("retry_of", BigId, nullable=True, unique=True, doc="token of the attempt before"),
    Column("name", String(255), nullable=True, doc="of a fixed plan"),
    Column("draw_index", Integer, nullable=True, doc="place among the draws; null for a fixed plan"),
    Column("work", JSON, nullable=True, doc="the fixed plan, or the draw once it is made"),
    Column(
        "state", String(16), nullable=False, doc="waiting, held, told, failed; expired and released were tried anew"
    ),
    Column("settled", Boolean, nullable=False, doc="whether the Optuna trial says the same"),
    Column("trial_id", BigInteger, nullable=True, doc="Optuna's, of this attempt"),
    Column("worker", String(255), nullable=True),
    Column("request", String(32), nullable=True, unique=True, doc="of the claim: asked again, it gets the same lease"),
    Column("expires", Double, nullable=True, doc="by the database's clock"),
    Column("reason", Text, nullable=True, doc="why it failed"),
    Index(None, "study", "state"),
    sqlite_autoincrement=True,
)

evaluation = Table(
    "evaluation",
    metadata,
    Column("id", BigId, primary_key=True, doc="rises in the order of telling, within a study"),
    Column("study", String(255), ForeignKey(job.c.study), nullable=False),
    Column("token", BigInteger, ForeignKey(lease.c.token), nullable=False, unique=True),
    Column("number", Integer, nullable=False),
    Column("key", Text, nullable=False, doc="equal for plans that realise the same"),
    Column("record", JSON, nullable=False, doc="all the trial was told with"),
    Column("told", Double, nullable=False),
    UniqueConstraint("study", "number"),
    sqlite_autoincrement=True,
)
"""What every finished trial came to."""

late_result = Table(
    "late_result",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("study", String(255), ForeignKey(job.c.study), nullable=False),
    Column("token", BigInteger, ForeignKey(lease.c.token), nullable=False),
    Column("worker", String(255), nullable=False),
    Column("record", JSON, nullable=False),
    Column("told", Double, nullable=False),
    sqlite_autoincrement=True,
)
"""What workers told that no longer held their lease: for an audit, and for nothing else."""

kept = Table(
    "kept",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("scope", String(64), nullable=False, doc="digest of the model, its data and its device"),
    Column("name", String(255), nullable=False),
    Column("value", JSON, nullable=False),
    UniqueConstraint("scope", "name"),
    sqlite_autoincrement=True,
)
"""What was computed once for a model on its data; of answers, what is not one sample's alone."""

sample_result = Table(
    "sample_result",
    metadata,
    Column("kept", BigInteger().with_variant(Integer(), "sqlite"), ForeignKey(kept.c.id), primary_key=True),
    Column("sample", Integer, primary_key=True, autoincrement=False),
    Column("answer", Text, nullable=False),
    Column("score", Double, nullable=False, doc="in [0, 1]"),
    Column("kl", Double, nullable=False, doc="nats a token"),
    Column("nll", Double, nullable=False, doc="nats a token"),
)
"""What a plan answered to each sample of a part of a split, which `kept` names."""

device = Table(
    "device",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("key", JSON, nullable=False),
    sqlite_autoincrement=True,
)

latency_block = Table(
    "latency_block",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("device", BigInteger, ForeignKey(device.c.id), nullable=False),
    Column("scope", String(64), nullable=True, doc="as of `kept`; null where it was measured before this was kept"),
    Column("plan", String(64), nullable=False, doc="its digest"),
    Column("limit", String(64), nullable=False),
    Column("dense_ms", JSON, nullable=False),
    Column("pruned_ms", JSON, nullable=False),
    Column("measured", Double, nullable=False),
    Index(None, "device", "plan"),
    sqlite_autoincrement=True,
)
"""Raw pairs of every measurement: latency never crosses devices."""

promotion = Table(
    "promotion",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("request", String(32), nullable=True, unique=True, doc="of whoever asked: asked again, it is the same row"),
    Column("registry", Text, nullable=False),
    Column("name", String(255), nullable=False),
    Column("alias", String(255), nullable=False),
    Column("kind", String(16), nullable=False, doc="promote or rollback"),
    Column("from_version", Integer, nullable=True),
    Column("to_version", Integer, nullable=False),
    Column("who", String(255), nullable=False),
    Column("why", Text, nullable=False),
    Column("promoted", Double, nullable=False),
    Column("applied", Boolean, nullable=False, doc="whether the registry's alias was seen to follow"),
    Index(None, "name", "alias"),
    sqlite_autoincrement=True,
)
"""Which version an alias is to point to, by whom and why: written first, and the registry's alias follows it."""

api_key = Table(
    "api_key",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("name", String(255), nullable=False, unique=True),
    Column("prefix", String(16), nullable=False, unique=True, doc="the part that is no secret: what a key is found by"),
    Column("hash", String(64), nullable=False, doc="SHA-256 of the whole key, which is random enough for it"),
    Column("scopes", JSON, nullable=False),
    Column("created", Double, nullable=False),
    Column("expires", Double, nullable=True, doc="by the database's clock"),
    Column("revoked", Double, nullable=True),
    sqlite_autoincrement=True,
)

session = Table(
    "session",
    metadata,
    Column("hash", String(64), primary_key=True, doc="SHA-256 of the token, which a cookie holds"),
    Column("key", BigInteger, ForeignKey(api_key.c.id), nullable=False, doc="that it was opened with"),
    Column("created", Double, nullable=False),
    Column("expires", Double, nullable=False, doc="by the database's clock"),
)
"""Who is logged in to the dashboard."""

submission = Table(
    "submission",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("key", BigInteger, ForeignKey(api_key.c.id), nullable=False, doc="whose it is"),
    Column("idempotency_key", String(255), nullable=True),
    Column("digest", String(64), nullable=False, doc="of the settings: one idempotency key, one request"),
    Column("settings", JSON, nullable=False),
    Column("state", String(16), nullable=False, doc="queued, running, succeeded, failed, cancelled"),
    Column("cancel_requested", Boolean, nullable=False),
    Column("attempt", Integer, nullable=False, doc="fencing token: how often it was claimed"),
    Column("worker", String(255), nullable=True),
    Column("expires", Double, nullable=True, doc="by the database's clock"),
    Column("study", String(255), nullable=True),
    Column("outcome", JSON, nullable=True),
    Column("reason", Text, nullable=True, doc="why it failed"),
    Column("created", Double, nullable=False),
    Column("started", Double, nullable=True),
    Column("finished", Double, nullable=True),
    UniqueConstraint("key", "idempotency_key"),
    Index(None, "state", "created"),
)
"""A tuning job that was handed in over HTTP, until a worker has seen it through."""

submission_event = Table(
    "submission_event",
    metadata,
    Column("id", BigId, primary_key=True, doc="rises in the order of what happened"),
    Column("submission", String(32), ForeignKey(submission.c.id), nullable=False),
    Column("kind", String(16), nullable=False, doc="state or progress"),
    Column("data", JSON, nullable=False),
    Column("at", Double, nullable=False),
    Index(None, "submission", "id"),
    sqlite_autoincrement=True,
)
"""What there is to follow of it, whoever serves the one who follows."""
