"""The smallest valid PPO configuration, as a tree and as a file."""

from pathlib import Path

import pytest

MINIMAL = """\
model: {path: builtin:tiny}
reward: {functions: [{name: length}]}
data: {train: {path: builtin:word-problems}}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path
