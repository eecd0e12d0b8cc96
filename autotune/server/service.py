"""What every request may need: the database and what lies in it, the registry, and what one server counts."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from autotune.profiles import Profiles
from autotune.registered import RegistryError
from autotune.registry import Registry
from autotune.server.entry import Entry, Guest
from autotune.server.limits import Rate, Streams
from autotune.server.told import ToldTrials
from autotune.store import Database, Keys, Studies, Submissions
from autotune.submitted import Place

__all__ = ["AwayError", "Service", "ServiceParameter", "Settings"]

PATIENCE_S = 5.0  # with a database that is away; then whoever asked is told to come again


class AwayError(RegistryError):
    """The registry could not be asked, which its text tells anybody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a server is started with. storage: address of the database.

    rate: what a key may ask for, such as "120/minute"; failed_rate: how often an address may come without a good one.
    streams: how many a key may have open. Each server counts for itself.
    """

    storage: str
    place: Place
    max_body_bytes: int = 65536
    rate: str = "120/minute"
    failed_rate: str = "20/minute"
    streams: int = 8


class Service:
    """The parts of one running server. Raises AutotuneError for settings that cannot be.

    guest: the one who may come in, where nobody needs a key. rate, streams: requests, and open streams, by key. entry:
    looks keys and sessions up. cookie: what a session's token comes in; browsers tell no ports apart. stopping: set
    once it is to end, for what would go on else.
    """

    def __init__(self, settings: Settings, guest: Guest | None = None) -> None:
        self.settings, self.guest, self.stopping = settings, guest, threading.Event()
        self.cookie = "autotune_session" if guest is None else "autotune_dashboard"
        self.rate = Rate(settings.rate)
        self.streams = Streams(settings.streams)
        self.database = Database(settings.storage, PATIENCE_S)
        self.keys, self.submissions = Keys(self.database), Submissions(self.database)
        self.studies, self.told = Studies(self.database), ToldTrials(self.database)
        self.entry = Entry(guest or self.keys, Rate(settings.failed_rate))

    @functools.cached_property
    def profiles(self) -> Profiles:
        """Raises AwayError where there is no registry."""
        if not self.settings.place.registry:
            raise AwayError("no registry was named, nor by the newest study; start with --registry")
        return Profiles(Registry(self.settings.place.registry), self.database)


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


ServiceParameter = Annotated[Service, Depends(_service)]
