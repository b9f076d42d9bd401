"""The scalar head: initialisation, and every checkpoint it can come from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rayrlhf.models.value_head import HEAD_FILE, ValueHead, find_head, make_head


def test_a_zero_head_predicts_zero_and_learns() -> None:
    head = make_head(16, None, "zero", seed=0)
    hidden = torch.randn(3, 5, 16)
    assert torch.equal(head(hidden), torch.zeros(3, 5))
    head(hidden).sum().backward()
    assert float(head.summary.weight.grad.abs().sum()) > 0


def test_a_normal_head_has_the_published_spread_and_no_bias() -> None:
    head = make_head(4095, None, "normal", seed=0)
    assert float(head.summary.weight.std()) == pytest.approx(1 / 64, rel=0.05)
    assert float(head.summary.bias) == 0.0


def test_a_default_head_is_uniform_within_torchs_bound() -> None:
    head = make_head(4096, None, "default", seed=0)
    largest = float(head.summary.weight.abs().max())
    assert 0.99 / 64 < largest <= 1 / 64
    assert float(head.summary.bias) != 0.0


@pytest.mark.parametrize("kind", ["normal", "default"])
def test_the_draw_depends_on_the_seed_alone(kind: str) -> None:
    torch.manual_seed(1)
    first = make_head(8, None, kind, seed=3)
    torch.manual_seed(2)
    second = make_head(8, None, kind, seed=3)
    other = make_head(8, None, kind, seed=4)
    assert torch.equal(first.summary.weight, second.summary.weight)
    assert not torch.equal(first.summary.weight, other.summary.weight)


def test_values_are_float32_under_a_bfloat16_trunk() -> None:
    head = make_head(8, None, "normal", seed=0)
    hidden = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden)
    assert values.dtype == torch.float32
    assert torch.equal(values, head(hidden))


@pytest.mark.parametrize(
    ("file", "tensors", "has_bias"),
    [
        ("model.safetensors", {"v_head.summary.weight": (1, 6), "v_head.summary.bias": (1,)}, True),
        ("model.safetensors", {"score.weight": (1, 6), "model.norm.weight": (6,)}, False),
        ("pytorch_model.bin", {"score.weight": (1, 6), "model.norm.weight": (6,)}, False),
        ("pytorch_model-00002-of-00002.bin", {"v_head.summary.weight": (1, 6), "v_head.summary.bias": (1,)}, True),
        (HEAD_FILE, {"v_head.summary.weight": (1, 6), "v_head.summary.bias": (1,)}, True),
        ("value_head.safetensors", {"v_head.summary.weight": (1, 6), "v_head.summary.bias": (1,)}, True),
    ],
)
def test_a_stored_head_is_taken_over_bit_for_bit(
    tmp_path: Path, file: str, tensors: dict[str, tuple[int, ...]], has_bias: bool
) -> None:
    stored = {name: torch.randn(shape) for name, shape in tensors.items()}
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (torch.save if file.endswith(".bin") else save_file)(stored, tmp_path / file)
    head = make_head(6, find_head(tmp_path), "zero", seed=0)
    assert (head.summary.bias is not None) == has_bias
    assert any(torch.equal(head.summary.weight, tensor) for tensor in stored.values())


def test_a_dedicated_file_wins_over_a_score_layer(tmp_path: Path) -> None:
    save_file({"score.weight": torch.ones(1, 6)}, tmp_path / "model.safetensors")
    (tmp_path / HEAD_FILE).parent.mkdir()
    save_file({"v_head.summary.weight": torch.full((1, 6), 2.0)}, tmp_path / HEAD_FILE)
    head = find_head(tmp_path)
    assert head is not None
    assert float(head["weight"][0, 0]) == 2.0


def test_a_classifier_of_several_labels_has_no_scalar_head(tmp_path: Path) -> None:
    save_file({"score.weight": torch.ones(3, 6)}, tmp_path / "model.safetensors")
    assert find_head(tmp_path) is None


def test_a_head_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="reads 6 hidden units, the trunk has 8"):
        make_head(8, {"weight": torch.ones(1, 6)}, "zero", seed=0)


def test_the_checkpoint_names_are_trls() -> None:
    assert sorted(f"v_head.{name}" for name in ValueHead(4).state_dict()) == ["v_head.summary.bias", "v_head.summary.weight"]
