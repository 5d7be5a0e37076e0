"""Which devices `pytest --device=...` can run with, and what this machine lacks for one."""

import shutil
import sysconfig
from pathlib import Path

STAND_INS = ("fake", "mini")
VARIABLE = "GRADWATCH_TEST_DEVICE"  # what tells the workers, and programs that a test starts


def missing(name: str) -> str:
    """What is missing for a device; empty if nothing."""
    import torch

    if name in STAND_INS and not hasattr(torch._C, "_acc"):
        return f"torch {torch.__version__} takes no stand-in for a device yet"
    if name == "mini":
        return _missing_to_compile()
    if name not in STAND_INS and not getattr(torch, name).is_available():
        return f"there is no {name} device"
    return ""


def _missing_to_compile() -> str:
    from torch.utils import cpp_extension  # brings setuptools along

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the headers of Python are missing (python3-dev)"
    return ""
