"""Warnings of libraries are in a file of the run folder, and those of users on the terminal."""

import logging
import warnings
from unittest.mock import patch

import pytest
import yaml

from rayrlhf.observe.library_warnings import FILE_NAME, LIBRARY_WARNINGS
from rayrlhf.rewards.sandbox import UncontainedWarning

LIBRARY, USER = yaml.__file__, "/home/me/reward.py"


def say(text, file, category=FutureWarning):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn_explicit(text, category, file, 3)


def log(text, file, name="some.library"):
    with without_handlers():
        logging.getLogger(name).handle(logging.LogRecord(name, logging.WARNING, file, 3, text, None, None))


def without_handlers():
    """Without the handlers that pytest adds to the root logger."""
    return patch.object(logging.root, "handlers", [])


@pytest.fixture
def kept():
    with LIBRARY_WARNINGS.kept():
        yield LIBRARY_WARNINGS


def test_libraries_are_in_the_file_and_users_and_this_package_on_the_terminal(kept, tmp_path, capsys):
    say("early", LIBRARY)
    log("logged", LIBRARY)
    kept.write_to(tmp_path)
    say("later", LIBRARY)
    say("mine", USER)
    log("my line", USER, "mine")
    log("cut 3 prompts", LIBRARY, "rayrlhf.data.prompt_datasets")
    say("no sandbox", LIBRARY, UncontainedWarning)
    lines = [line[9:] for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert lines == [f"{LIBRARY}:3: FutureWarning: early", "some.library: logged", f"{LIBRARY}:3: FutureWarning: later"]
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        f"{USER}:3: FutureWarning: mine",
        "my line",
        "cut 3 prompts",
        f"{LIBRARY}:3: UncontainedWarning: no sandbox",
    ]


def test_a_log_call_with_wrong_arguments_raises_nothing_in_its_library(kept, capsys):
    with without_handlers():
        logging.getLogger("some.library").warning("deprecated", FutureWarning)
    assert "not all arguments converted" in capsys.readouterr().err


def test_handlers_of_users_stay_theirs(kept, tmp_path):
    kept.write_to(tmp_path)
    with without_handlers():
        logging.basicConfig(filename=tmp_path / "mine.log", level=logging.INFO)
        logging.getLogger("mine").info("a line")
        logging.root.handlers[0].close()
        logging.root.setLevel(logging.WARNING)
    assert "a line" in (tmp_path / "mine.log").read_text()


def test_verbose_shows_libraries_too(kept, tmp_path, capsys):
    kept.shown = True
    kept.write_to(tmp_path)
    say("early", LIBRARY)
    assert "early" in capsys.readouterr().err
    assert "early" in (tmp_path / FILE_NAME).read_text()


def test_a_disk_that_is_full_ends_nothing_and_without_a_command_nothing_is_kept(kept, tmp_path, capsys):
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    kept.write_to(tmp_path)
    say("lost", LIBRARY)
    assert capsys.readouterr().err == ""


def test_outside_of_a_command_warnings_stay_as_they_are(tmp_path):
    LIBRARY_WARNINGS.write_to(tmp_path)
    with pytest.warns(FutureWarning, match="seen"):
        warnings.warn_explicit("seen", FutureWarning, LIBRARY, 3)
    assert not (tmp_path / FILE_NAME).exists()
