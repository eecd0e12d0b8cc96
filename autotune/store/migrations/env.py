"""Alembic's way in: the store hands over its connection; by hand, `alembic -x url=…` brings its own."""

from alembic import context
from sqlalchemy import Connection, create_engine

from autotune.store.tables import metadata

TABLE = "btp_schema_version"  # Optuna and MLflow keep an alembic_version of their own beside it


def _migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=TABLE,
        render_as_batch=True,
        include_name=_is_ours,
    )
    with context.begin_transaction():
        context.run_migrations()


def _is_ours(name: str | None, kind: str, parents: object) -> bool:
    """Optuna's tables lie in the same database, and are not ours to change."""
    return kind != "table" or name in metadata.tables


given = context.config.attributes.get("connection")
if given is not None:
    _migrate(given)
else:
    with create_engine(context.get_x_argument(as_dictionary=True)["url"]).begin() as connection:
        _migrate(connection)
