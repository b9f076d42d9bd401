"""Vectors depend on the text alone, and pooling is never guessed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rayrlhf.demonstrations.encoder import Encoder, Pooling, pool, pooling_of
from rayrlhf.errors import UserError
from rayrlhf.models.builtin import resolve_model
from tests.models.hub import as_hub_model


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
    for modes, found in (
        ({"max_tokens": True}, "max_tokens"),
        ({"mean_tokens": True, "cls_token": True}, "mean_tokens and cls"),
    ):
        config.write_text(json.dumps({f"pooling_mode_{name}": used for name, used in modes.items()}))
        with pytest.raises(UserError, match=f"expected pooling by mean or cls, found {found}"):
            pooling_of(tmp_path)
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(UserError, match=r"modules\.json: a layer Dense is not supported"):
        pooling_of(tmp_path)


def test_an_encoder_by_hub_name_is_pooled_as_its_folder_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = as_hub_model(Path(resolve_model("builtin:tiny?layers=1&hidden=64")), tmp_path, "acme/encoder", monkeypatch)
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    np.testing.assert_array_equal(Encoder("acme/encoder").encode(["ab"]), Encoder(str(snapshot), "cls").encode(["ab"]))
    (snapshot / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"^model\.path 'acme/encoder': cannot load it"):
        Encoder("acme/encoder")
