"""The tokenizer of the tiny built-in model, for every test of this room."""

import pytest

from rayrlhf.models.tiny import byte_tokenizer


@pytest.fixture
def tokenizer():
    return byte_tokenizer()
