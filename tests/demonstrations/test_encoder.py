"""Vectors depend on the text alone, and pooling is never guessed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rayrlhf.demonstrations.encoder import Encoder, Pooling, pool, pooling_of
from rayrlhf.errors import UserError


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_what_stands_behind_the_mask_reaches_no_vector(pooling: Pooling) -> None:
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    expected = []
    for row, length in enumerate([3, 1, 5]):
        states = hidden[row, :length]
        vector = states[0] if pooling == "cls" else states.mean(dim=0)
        expected.append(vector / vector.norm())
    hidden[mask == 0] = float("nan")
    torch.testing.assert_close(pool(hidden, mask, pooling), torch.stack(expected))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_batch_gives_the_vectors_of_its_texts_alone(pooling: Pooling) -> None:
    encoder = Encoder("builtin:tiny", pooling, max_tokens=20)
    texts = ["a", "zebra and ant", "", "b" * 50, "b" * 20, "some words"]
    together = encoder.encode(texts, batch=2)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), [float(bool(text)) for text in texts], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_an_encoder_that_does_not_say_how_it_pools_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="states its pooling; set pooling to mean or cls"):
        Encoder("builtin:tiny")
    (tmp_path / "1_Pooling").mkdir()
    config = tmp_path / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert pooling_of(tmp_path) == "cls"
    config.write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert pooling_of(tmp_path) == "mean"
    config.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="expected pooling by mean or cls"):
        pooling_of(tmp_path)
