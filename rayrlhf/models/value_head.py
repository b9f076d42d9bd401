"""Scalar head of a critic: one linear layer on the trunk's final hidden state.

A critic on the policy's trunk and a separate critic use the same head. It is stored under TRL's names (`v_head.summary.*`), and
is initialized from any checkpoint with a scalar head: a critic of this project, a TRL policy with a value head, or a reward
model, which is a sequence classifier whose head is called `score`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

HEAD_FILE = "value_head/model.safetensors"
"""Value head in a Hugging Face folder. It has a subfolder because vLLM loads every safetensors file next to the weights."""
OLD_HEAD_FILE = "value_head.safetensors"

HeadInit = Literal["normal", "zero", "default"]
_SUMMARY, _SCORE = "v_head.summary.", "score."


class ValueHead(nn.Module):
    """Linear layer from hidden state to value, in float32."""

    def __init__(self, hidden_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return float32 [...] values of hidden states [..., H].

        Never in reduced precision, because returns are regressed.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.summary(hidden.to(self.summary.weight.dtype))
        return values.squeeze(-1).float()

    def initialize(self, kind: HeadInit, seed: int) -> None:
        """Initialize the weights.

        Args:
            kind: `zero` predicts 0 everywhere; `normal` draws weights from N(0, 1/(H+1)) and a zero bias (Stiennon et al. 2020,
                appendix B); `default` is the initialization of `torch.nn.Linear`.
            seed: of the draw; every rank draws the same.
        """
        weight, bias = self.summary.weight, self.summary.bias
        generator = torch.Generator().manual_seed(seed)
        bound = weight.shape[1] ** -0.5
        with torch.no_grad():
            if kind == "default":
                weight.copy_(torch.empty_like(weight).uniform_(-bound, bound, generator=generator))
                if bias is not None:
                    bias.copy_(torch.empty_like(bias).uniform_(-bound, bound, generator=generator))
                return
            weight.zero_()
            if bias is not None:
                bias.zero_()
            if kind == "normal":
                weight.normal_(std=(weight.shape[1] + 1) ** -0.5, generator=generator)


def find_head(folder: Path) -> dict[str, Tensor] | None:
    """Return the scalar head stored in a Hugging Face folder, or None.

    The head is {"weight": [1, H]}, with "bias": [1] if it has one. A classifier with several labels has no scalar head.
    """
    for file in _head_files(folder):
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            for prefix in (_SUMMARY, _SCORE):
                if f"{prefix}weight" not in names:
                    continue
                head = {
                    part: tensors.get_tensor(f"{prefix}{part}") for part in ("weight", "bias") if f"{prefix}{part}" in names
                }
                if head["weight"].shape[0] == 1:
                    return head
    return None


def make_head(hidden_size: int, stored: dict[str, Tensor] | None, kind: HeadInit, seed: int, *, bias: bool = True) -> ValueHead:
    """Build a head from stored weights, or a new one initialized by `kind` (see `ValueHead.initialize`).

    Raises:
        ValueError: the stored head has another hidden size.
    """
    if stored is None:
        head = ValueHead(hidden_size, bias=bias)
        head.initialize(kind, seed)
        return head
    if stored["weight"].shape[1] != hidden_size:
        raise ValueError(f"the stored value head reads {stored['weight'].shape[1]} hidden units, the trunk has {hidden_size}")
    head = ValueHead(hidden_size, bias="bias" in stored)
    head.summary.load_state_dict(stored)
    return head


def _head_files(folder: Path) -> Iterable[Path]:
    """Files that may hold the head, dedicated ones first."""
    dedicated = [folder / name for name in (HEAD_FILE, OLD_HEAD_FILE) if (folder / name).is_file()]
    return dedicated + sorted(set(folder.glob("*.safetensors")) - set(dedicated))
