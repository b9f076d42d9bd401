"""Damaged notes end a command with one line."""

import pytest

from rayrlhf.errors import UserError
from rayrlhf.storage.notes import read_note

DAMAGED = {
    "empty": b"",
    "truncated": b'{"rollout": ',
    "flipped bit": b'{"rollout": 2\xfd',
    "another kind": b"[1]",
    "a number": b"3",
    "100,000 brackets": b"[" * 100_000,
    "zeros": bytes(64),
}


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize("damage", [name for name in DAMAGED if name != "100,000 brackets"])
def test_a_damaged_note_is_one_line_with_its_remedy(tmp_path, damage, suffix):
    path = tmp_path / f"note{suffix}"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(UserError, match=r"note\.\w+ is damaged \(.*\): remove it") as caught:
        read_note(path, "remove it")
    assert "\n" not in str(caught.value)


def test_deep_nesting_is_damage_and_a_whole_note_is_read(tmp_path):
    path = tmp_path / "note.json"
    path.write_bytes(DAMAGED["100,000 brackets"])
    with pytest.raises(UserError, match="is damaged"):
        read_note(path)
    path.write_text('{"rollout": 2}')
    assert read_note(path) == {"rollout": 2}
    with pytest.raises(FileNotFoundError):
        read_note(tmp_path / "none")
