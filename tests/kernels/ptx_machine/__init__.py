"""A machine that runs PTX."""

from .driver import running_on
from .instruction import PtxError
from .machine import FoundError, Launch, Machine

__all__ = ["FoundError", "Launch", "Machine", "PtxError", "running_on"]
