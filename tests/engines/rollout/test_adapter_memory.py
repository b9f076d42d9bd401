"""Folders of adapters in shared memory end with their load, or are removed by the next one."""

import os
import signal

import pytest

from rayrlhf.engines.rollout import vllm_lora
from rayrlhf.engines.rollout.vllm_lora import WEIGHTS_FILE, memory_folder


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_lora, "MEMORY_FOLDER", tmp_path)
    return tmp_path


def make_old(folder):
    os.utime(folder, (0, 0))


def test_a_folder_ends_with_its_load_also_with_a_failed_one(memory):
    def load():
        with memory_folder() as folder:
            assert folder.parent == memory
            (folder / WEIGHTS_FILE).write_bytes(b"0")
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        load()
    assert list(memory.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_folder_of_a_process_that_a_signal_ended_is_removed_by_the_next_load(memory, number):
    if (child := os.fork()) == 0:
        try:
            with memory_folder() as folder:
                (folder / WEIGHTS_FILE).write_bytes(b"0")
                if number == signal.SIGTERM:
                    signal.signal(number, signal.SIG_DFL)  # earlier tests may leave Ray's handler
                os.kill(os.getpid(), number)
                signal.pause()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    left = list(memory.iterdir())
    assert len(left) == (number != signal.SIGINT)
    for folder in left:
        make_old(folder)
    with memory_folder() as folder:
        assert list(memory.iterdir()) == [folder]


def test_folders_in_use_and_new_ones_are_kept(memory):
    new = memory / f"{vllm_lora.FOLDER_PREFIX}new"
    new.mkdir()
    with memory_folder() as used:
        make_old(used)
        with memory_folder() as folder:
            assert {*memory.iterdir()} == {new, used, folder}
