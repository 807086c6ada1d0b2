from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.memo import Memo


def test_a_value_is_computed_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"map": 0.1 + 0.2, "width": 3}

    first = Memo(tmp_path / "new").get({"row": "a"}, compute)
    again = Memo(tmp_path / "new").get({"row": "a"}, compute)
    assert first == again == {"map": 0.1 + 0.2, "width": 3}
    assert len(calls) == 1
    Memo(tmp_path / "new").get({"row": "b"}, compute)
    assert len(calls) == 2


def test_an_interrupted_value_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Memo(tmp_path).get({"row": "a"}, interrupted)
    assert list(tmp_path.iterdir()) == []
