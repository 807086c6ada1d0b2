"""How much memory this process has, as Linux tells it."""

from __future__ import annotations

from pathlib import Path

_PROCESS = Path("/proc/self")


def forget_peak() -> None:
    """Makes the most that it had (`VmHWM`) what it has now; does nothing on other systems."""
    if (_PROCESS / "clear_refs").exists():
        (_PROCESS / "clear_refs").write_text("5")


def memory_mib(name: str) -> float:
    """`VmRSS`, what it has, or `VmHWM`, the most that it had; 0 on other systems."""
    status = _PROCESS / "status"
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) / 1024 if found else 0.0
