"""What can go wrong, by cause. Every message says the rule, what came, and the way out."""

__all__ = ["BTPError", "BusyDeviceError", "PlanError", "ProfileError", "RealizationError", "UnsupportedModelError"]


class BTPError(Exception):
    """Base of every error this package raises on purpose."""


class PlanError(BTPError, ValueError):
    """The plan breaks a rule, by itself or together with the model it is applied to."""


class ProfileError(BTPError):
    """A profile file is unreadable, altered, from another schema, or made for another model."""


class UnsupportedModelError(BTPError):
    """The model, or its attention kernel, is not one the package knows how to prune."""


class BusyDeviceError(BTPError):
    """Another process measures, or computes, on the device that a latency is to be measured on."""


class RealizationError(BTPError):
    """A forward pass cannot, or did not, do what the plan says."""
