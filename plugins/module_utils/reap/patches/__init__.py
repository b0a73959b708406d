"""The vLLM patches: check them against a site-packages folder, apply all of them or none.

Read `catalogue` for what they are, `core` for how they are applied, `proofs` for how they are proven before a byte is
written, `inside` for the files they add, `selftest` for the check that runs in the image.
"""

from .catalogue import CUTEDSL_SWITCH, PATCHES
from .core import ROUTERS, Patch, Plan, Verdict, patch_set_hash, plan, report, write

__all__ = [
    "CUTEDSL_SWITCH",
    "PATCHES",
    "ROUTERS",
    "Patch",
    "Plan",
    "Verdict",
    "patch_set_hash",
    "plan",
    "report",
    "write",
]
