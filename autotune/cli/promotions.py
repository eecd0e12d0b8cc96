"""Who is champion, from the command line: promotions, the way back, and the log."""

from __future__ import annotations

import getpass
import json
import socket
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from autotune.cli.console import errors, plain, print_tables
from autotune.cli.options import DebugOption, JsonOption
from autotune.cli.profiles import DEMO, WIDTH, ReferenceArgument, RegistryAddress, registry_at, say
from autotune.config import STORAGE, AutotuneError

if TYPE_CHECKING:
    from autotune.profiles import Profiles, Promotion

__all__ = ["app"]

app = typer.Typer()

LogStorage = Annotated[
    str | None,
    typer.Option("--storage", envvar=STORAGE, help="Database of the log; default: study.db beside a SQLite registry."),
]
WhyOption = Annotated[str, typer.Option(help="For the log.")]
WhoOption = Annotated[str, typer.Option(help="For the log; default: user@host.")]
NameArgument = Annotated[str, typer.Argument(help="Of the registered model.")]


@app.command()
def promote(
    reference: ReferenceArgument,
    why: WhyOption,
    who: WhoOption = "",
    alias: Annotated[str | None, typer.Option(help="Default: champion of the device it was measured on.")] = None,
    registry: RegistryAddress = DEMO,
    storage: LogStorage = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a version champion, if it is certified, within its limit and faster than dense."""
    with errors(debug):
        profiles = _profiles(registry, storage)
        done = profiles.promote(profiles.find(reference), who=who or _me(), why=why, alias=alias)
        _tell(done, as_json)


@app.command()
def rollback(
    name: NameArgument,
    alias: Annotated[str, typer.Option(help="Which alias to take back, such as champion-nvidia-h200.")],
    why: WhyOption,
    who: WhoOption = "",
    registry: RegistryAddress = DEMO,
    storage: LogStorage = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Promote the version that an alias was on before, through the same gates."""
    with errors(debug):
        _check_name(name)
        done = _profiles(registry, storage).rollback(name, alias, who=who or _me(), why=why)
        _tell(done, as_json)


@app.command()
def log(
    name: NameArgument,
    alias: Annotated[str | None, typer.Option(help="Of this alias only.")] = None,
    registry: RegistryAddress = DEMO,
    storage: LogStorage = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List promotions, newest first: who, from, to, why."""
    with errors(debug):
        _check_name(name)
        rows = _profiles(registry, storage).log(name, alias)
        if as_json:
            print(json.dumps([asdict(row) for row in rows]))
        elif rows:
            print_tables([plain("")], HEADINGS, [[_cells(row) for row in rows]], [], WIDTH)
        else:
            say(f"nothing of {name} was promoted yet")


HEADINGS = ("when", "alias", "what", "from", "to", "who", "why")


def _cells(row: Promotion) -> tuple[str, ...]:
    when = datetime.fromtimestamp(row.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return when, row.alias, row.kind, "-" if row.before is None else str(row.before), str(row.after), row.who, row.why


def _check_name(name: str) -> None:
    if set(name) & set("/:@"):
        raise AutotuneError(f"NAME must be a registered model's alone, got {name!r}; an alias goes to --alias")


def _profiles(address: str, storage: str | None) -> Profiles:
    try:
        from autotune.profiles import Profiles, promotion_database
    except ModuleNotFoundError as error:
        raise AutotuneError(f"to promote takes the tuner, but: {error}; pip install 'btp-autotune[tune]'") from error
    registry = registry_at(address)
    if storage is None and registry.file is not None and not registry.file.exists():
        raise AutotuneError(f"a registry must exist before one can promote in it, got {registry.address}")
    return Profiles(registry, promotion_database(registry, storage))


def _tell(done: Promotion, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(done)))
    else:
        before = "from nothing" if done.before is None else f"from version {done.before}"
        when = datetime.fromtimestamp(done.at, UTC).isoformat(timespec="seconds")
        say(f"models:/{done.name}@{done.alias} is version {done.after}, {before}; {done.who}, {when}: {done.why}")


def _me() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"
