"""Damaged notes end a command with one line."""

import pytest

from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.errors import UserError
from rayrlhf.observe.samples import read_samples
from rayrlhf.storage.notes import read_note
from rayrlhf.tuning.merge import exported_model

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


@pytest.mark.parametrize("content", [b"", b"PAR1", b"\x00" * 99])
def test_damaged_samples_and_parts_are_one_line(tmp_path, content):
    samples, parts = tmp_path / "step-000001.parquet", PartFolder(tmp_path)
    readers = [(samples, lambda: read_samples(tmp_path)), (parts.part(0), lambda: list(parts.rows()))]
    for path, read in [*readers, (parts.part(0), lambda: parts.read(0))]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path.name} is damaged \(.*\): "):
            read()


@pytest.mark.parametrize("text", ["", "model: [", "- 1", "run: {}"])
def test_a_damaged_configuration_of_a_merge_is_one_line(tmp_path, text):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "adapter_config.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        exported_model(tmp_path, merge=True)
