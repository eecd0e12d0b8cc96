"""A server process: listens, serves, and on SIGTERM lets go of everybody within seconds."""

from __future__ import annotations

import importlib
import logging
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from autotune.config import AutotuneError
from autotune.redaction import without_passwords
from autotune.registered import RegistryError
from autotune.server.app import create_app
from autotune.server.entry import Guest
from autotune.server.service import Service, Settings
from autotune.stopping import stopping
from autotune.store import StoreError
from autotune.store.promotions import unsettled_names

__all__ = ["serve"]

logger = logging.getLogger(__name__)

DRAIN_S = 5  # for what is being answered when the server is to end
KEEP_ALIVE_S = 15


def serve(settings: Settings, host: str, port: int, say: Callable[[str], None], guest: Guest | None = None) -> None:
    """Serve until SIGINT or SIGTERM. say: told the address, once requests are taken in. guest: as of `create_app`.

    Raises AutotuneError where the address cannot be listened on, and StoreError where the database is away.
    """
    app = create_app(settings, guest)
    service: Service = app.state.service
    service.submissions.counts()  # the database must be there, with its tables, before anybody asks
    threading.Thread(target=_settle, args=(service,), daemon=True).start()
    threading.Thread(target=importlib.import_module, args=("autotune.objective",), daemon=True).start()  # with SciPy
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )
    with _listening(host, port) as listener:
        address = f"[{host}]" if ":" in host else host
        with stopping() as stop:  # uvicorn raises the signal again when it is done
            say(f"http://{address}:{listener.getsockname()[1]}")
            _Server(config, service, stop).run([listener])


def _settle(service: Service) -> None:
    """Have aliases follow the log where a promotion was broken off; where it cannot be now, whoever asks next does."""
    try:
        if unsettled_names(service.database):
            service.profiles.list()
    except (RegistryError, StoreError) as error:
        logger.warning("promotions that were broken off are left as they are: %s", without_passwords(str(error)))


class _Server(uvicorn.Server):
    """stop: whether a signal came before uvicorn listened to signals."""

    def __init__(self, config: uvicorn.Config, service: Service, stop: Callable[[], bool]) -> None:
        super().__init__(config)
        self._service, self._stop = service, stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.should_exit = self.should_exit or self._stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.stopping.set()
        super().handle_exit(sig, frame)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise AutotuneError(
            f"--host and --port must be free to listen on, got {host} and {port}: {error.strerror or error}; "
            "choose others"
        ) from error
