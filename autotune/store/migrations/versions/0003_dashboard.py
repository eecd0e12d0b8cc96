"""Sessions of who looks at the dashboard; which model a latency was measured with"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("latency_block", schema=None) as batch_op:
        batch_op.add_column(sa.Column("scope", sa.String(length=64), nullable=True))
    op.create_table(
        "session",
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("key", sa.BigInteger(), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("expires", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["key"], ["api_key.id"], name=op.f("fk_session_key")),
        sa.PrimaryKeyConstraint("hash", name=op.f("pk_session")),
    )


def downgrade() -> None:
    op.drop_table("session")
    with op.batch_alter_table("latency_block", schema=None) as batch_op:
        batch_op.drop_column("scope")
