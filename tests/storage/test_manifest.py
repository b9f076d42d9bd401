"""Checkpoint folders that were torn, cut or changed are told from whole ones, wherever the damage is."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.storage.manifest import (
    FILE_NAME,
    DamagedError,
    Manifest,
    fingerprint_differences,
    read_manifest,
    verify,
    write_hashed,
    write_manifest,
)

CONTENT = {"state.json": b'{"step": 10}', "policy/model.pt": bytes(range(256)) * 5, "policy/random.pt": b"x"}


def write(folder):
    (folder / "policy").mkdir(parents=True)
    files = {name: write_hashed(folder / name, content) for name, content in CONTENT.items()}
    write_manifest(folder, Manifest(10, {"train.zero_stage": "0"}, files, 0.5))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole") / "step-000010")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "step-000010"


def damaged_copy(whole, scratch, name, change):
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(whole, scratch)
    (scratch / name).write_bytes(change((scratch / name).read_bytes()))
    return scratch


def test_a_whole_folder_gives_back_what_was_claimed(whole):
    manifest = verify(whole)
    assert (manifest.step, manifest.metric, manifest.fingerprint) == (10, 0.5, {"train.zero_stage": "0"})
    assert set(manifest.files) == set(CONTENT)


@given(st.sampled_from([*CONTENT, FILE_NAME]), st.integers(0, 10**6), st.integers(0, 7))
def test_any_flipped_bit_is_found(whole, scratch, name, position, bit):
    def flip(content):
        changed = bytearray(content)
        changed[position % len(content)] ^= 1 << bit
        return bytes(changed)

    with pytest.raises(DamagedError):
        verify(damaged_copy(whole, scratch, name, flip))


@given(st.sampled_from([*CONTENT, FILE_NAME]), st.integers(0, 10**6))
def test_any_truncation_is_found(whole, scratch, name, length):
    with pytest.raises(DamagedError):
        verify(damaged_copy(whole, scratch, name, lambda content: content[: length % len(content)]))


def test_a_missing_file_is_named(whole, scratch):
    damaged_copy(whole, scratch, "state.json", lambda content: content)
    (scratch / "policy/random.pt").unlink()
    with pytest.raises(DamagedError, match=r"policy/random\.pt: No such file"):
        verify(scratch)


def test_a_folder_without_manifest_is_not_a_checkpoint(tmp_path):
    with pytest.raises(DamagedError, match=r"manifest\.json: No such file"):
        read_manifest(tmp_path)


def test_a_layout_of_another_version_is_refused_by_its_number(whole, scratch):
    import hashlib

    def newer(content):
        body = json.loads(content)
        del body["sha256"]
        body["format"] = 2
        return json.dumps(body | {"sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}).encode()

    with pytest.raises(DamagedError, match="format 2, expected 1"):
        verify(damaged_copy(whole, scratch, FILE_NAME, newer))


def test_a_full_disk_is_an_error_and_not_a_record():
    from pathlib import Path

    with pytest.raises(OSError, match="No space left"):
        write_hashed(Path("/dev/full"), b"content")


def test_fingerprints_say_in_what_they_differ():
    assert fingerprint_differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == ["b: 2 -> 3", "c: absent -> 4"]
    assert fingerprint_differences({"a": "1"}, {"a": "1"}) == []
