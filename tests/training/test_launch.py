"""What a launch hands to Ray Train."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.train.v2._internal.execution.storage import get_fs_and_path

from training.launch import aside


def test_a_relative_out_gives_ray_train_a_path_that_it_can_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, path = get_fs_and_path(str(aside(Path("run"))))
    assert Path(path) == tmp_path / "run" / ".ray"
