"""Whether a model fits a host, before it is loaded; and what would.

advised_fit    the whole answer: ledger, verdict, advice
memory_fit     the same without advice
start_gate     may this load begin now
ledger_table   (in .table) the answer as text
"""

from .advice import advised_fit, request_from_profile
from .fit import memory_fit
from .gate import Gate, start_gate
from .host import HostMemory
from .types import Fit, FitRequest, KvFit, Term

__all__ = [
    "Fit",
    "FitRequest",
    "Gate",
    "HostMemory",
    "KvFit",
    "Term",
    "advised_fit",
    "memory_fit",
    "request_from_profile",
    "start_gate",
]
