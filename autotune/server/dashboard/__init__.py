"""The service's pages: what they show is asked of the database and the registry, and rendered here.

They are for people: no page is in the OpenAPI, and a program asks /v1.
"""

from autotune.server.dashboard import assets, compare, optuna_ui, profiles, sessions, studies, trials
from autotune.server.dashboard.sessions import error_page

__all__ = ["error_page", "routers"]

routers = tuple(part.router for part in (sessions, assets, compare, studies, trials, profiles, optuna_ui))
