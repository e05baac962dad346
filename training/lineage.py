"""What code made a model: recorded in its bundle beside corpus, vocabulary and recipe."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GIT_TIMEOUT_S = 10
# What decides how a training computes, beside our own code.
PACKAGES = ("torch", "deepspeed", "ray", "numpy", "pyarrow", "safetensors", "mlflow")


def code_version() -> dict[str, str]:
    """`genescale_version`, and `git_commit` when the code runs from a checkout (`-dirty` when it has changes)."""
    recorded = {"genescale_version": version("genescale")}
    root = Path(__file__).resolve().parent.parent
    # Only this checkout's own folder: an installed package may lie inside somebody else's repository.
    if (root / ".git").exists():
        commit = _git(root, "rev-parse", "HEAD")
        if commit:
            changed = _git(root, "status", "--porcelain", "--untracked-files=no")
            recorded["git_commit"] = f"{commit}-dirty" if changed else commit
    return recorded


def environment() -> dict[str, str]:
    """Versions of Python and of the libraries that compute, and the machine of the driver."""
    found = {"python": platform.python_version(), "system": platform.platform(), "processors": str(os.cpu_count())}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _git(root: Path, *arguments: str) -> str:
    """Output of a git command; empty when there is no git or no commit yet."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
