"""References to registered profiles, turned into profiles and applied: what a serving process needs, and no more."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autotune.profile_cache import ProfileCache, Pulled
from autotune.registered import Reference, RegistryError
from autotune.registry import Registry
from btp.profile import Profile

if TYPE_CHECKING:
    from torch import nn

    from btp.prefill import Trace

__all__ = ["OFFLINE", "TRACKING_URI", "Applied", "apply", "pull", "resolve"]

OFFLINE = "AUTOTUNE_OFFLINE"
"""The variable that, set to 1, has references looked up in the cache alone."""
TRACKING_URI = "MLFLOW_TRACKING_URI"

logger = logging.getLogger(__name__)


def resolve(reference: str) -> Profile:
    """The profile that models:/NAME@ALIAS or models:/NAME/VERSION names, in the registry at `$MLFLOW_TRACKING_URI`.

    An alias names what the registry has under it now: after a promotion that was cut off, what it named before, until
    the promotion is made good where its log lies. With `AUTOTUNE_OFFLINE=1`, what the cache has under that name. Raises
    RegistryError.
    """
    return pull(reference).profile


def pull(reference: str, *, registry: str | None = None, offline: bool = False) -> Pulled:
    """As `resolve`, with its papers and where they lie. registry: an address, instead of the variable's."""
    offline = offline or os.environ.get(OFFLINE, "") not in ("", "0")
    address = registry or os.environ.get(TRACKING_URI)
    wanted = Reference.parse(reference)
    if address is None and not offline:
        raise RegistryError(
            f"{wanted} is looked up in the registry that {TRACKING_URI} names, which is not set; set it, or {OFFLINE}=1"
        )
    pulled = ProfileCache().pull(wanted, Registry(address) if address else None, offline=offline)
    if offline:
        logger.warning("%s is %s, %s", wanted, pulled.resolution.uri, pulled.resolution.age)
    return pulled


@dataclass(frozen=True, slots=True, eq=False)
class Applied:
    """A model that runs by a profile until `remove`."""

    profile: Profile
    trace: Trace
    _cleanup: ExitStack = field(repr=False)

    def remove(self) -> None:
        """Have the model run dense again; a second time does nothing."""
        if self in _APPLIED:
            _APPLIED.discard(self)
            self._cleanup.close()


_APPLIED: set[Applied] = set()  # a `with` that nobody holds any more would end


def apply(
    model: nn.Module,
    reference: str | Profile,
    *,
    allow_device: bool = False,
    registry: str | None = None,
    offline: bool = False,
) -> Applied:
    """Run `model` by a registered profile from now on, for the life of the process or until `remove`.

    reference: models:/NAME@ALIAS or models:/NAME/VERSION, as `resolve` has it, or a profile. The profile must fit, as
    in `btp.prune`, which has the rest: a model that runs by a plan already is refused.
    """
    from btp.pruning import prune

    if isinstance(reference, str):
        reference = pull(reference, registry=registry, offline=offline).profile
    with ExitStack() as stack:
        trace = stack.enter_context(prune(model, reference, allow_device=allow_device))
        applied = Applied(reference, trace, stack.pop_all())
    _APPLIED.add(applied)
    return applied
