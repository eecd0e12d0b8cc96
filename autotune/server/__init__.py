"""The service over HTTP: jobs are handed in and followed, studies and profiles are looked at, versions are promoted.

It runs no job and keeps nothing of its own but how often it was asked: the truth is the database and the registry, so
several servers may stand side by side, and one that is killed is missed by nobody. It imports neither torch nor Optuna.
"""

from autotune.server.app import create_app
from autotune.server.running import serve
from autotune.server.service import Settings

__all__ = ["Settings", "create_app", "serve"]
