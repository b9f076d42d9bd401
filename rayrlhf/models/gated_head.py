"""Reward of several objectives, weighted by a gating network (Wang et al. 2024, "ArmoRM").

With h the trunk's state at the end of the prompt and g that at the end of the response, the reward is
sum_i w_i (A^T B g)_i, w = s softmax(f(h) / T). B is the regression layer, A the transform of its outputs that removes the
effect of length, and f layers with ReLU between them. They are read by the tensor names of `RLHFlow/ArmoRM-Llama3-8B-v0.1`,
without its code.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from rayrlhf.data.records import Float32
from rayrlhf.errors import UserError
from rayrlhf.models.value_head import ValueHead, stored_tensors

_REGRESSION, _TRANSFORM, _SCALE = "regression_layer.weight", "reward_transform_matrix", "gating.logit_scale"
TEMPERATURE = 10.0
"""T of models whose configuration has no `gating_temperature`."""


class GatedHead(ValueHead):
    """Weights and rewards of m objectives at each position, in float32."""

    stored_names = ("regression_layer.", "gating.", _TRANSFORM)

    def __init__(self, layers: list[nn.Linear], scale: Tensor, temperature: float, rewards: Tensor) -> None:
        """Take over the weights.

        Args:
            layers: the gating network's.
            scale: [1], s.
            temperature: T.
            rewards: [m, H], A^T B.
        """
        nn.Module.__init__(self)
        self.layers, self._temperature = nn.ModuleList(layers), temperature
        self.scale, self.rewards = nn.Parameter(scale), nn.Parameter(rewards)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return weights, then rewards of the objectives, float32 [..., 2 m].

        Hidden states are [..., H].
        """
        with torch.autocast(hidden.device.type, enabled=False):
            state = gate = hidden.float()
            for index, layer in enumerate(self.layers):
                gate = layer(gate.relu() if index else gate)
            weights = self.scale * (gate / self._temperature).softmax(-1)
            return torch.cat([weights, state @ self.rewards.T], -1)


def gated_score(values: Float32) -> Float32:
    """Return the reward of a response.

    Args:
        values: float32 [R + 1, 2 m], outputs of the head from the end of the prompt to that of the response.
    """
    objectives = values.shape[1] // 2
    score: Float32 = values[0, :objectives] @ values[-1, objectives:]
    return score


def find_gated_head(folder: Path) -> GatedHead | None:
    """Return the gated head stored in a Hugging Face folder, or None.

    Raises:
        UserError: tensors are missing, or of other kinds of such models (quantiles, batch norms).
    """
    tensors = {name: tensor.float() for name, tensor in stored_tensors(folder, GatedHead.stored_names).items()}
    if not tensors:
        return None
    other = f"reward model {folder}: its gating is not that of ArmoRM:"
    count = sum(re.fullmatch(r"gating\.layers\.\d+\.weight", name) is not None for name in tensors)
    gating = [(f"gating.layers.{index}.weight", f"gating.layers.{index}.bias") for index in range(count)]
    expected = {_REGRESSION, _TRANSFORM, _SCALE, *(name for pair in gating for name in pair)}
    if odd := sorted(expected ^ tensors.keys()):
        raise UserError(f"{other} {odd[0]} is {'missing' if odd[0] in expected else 'unknown'}")
    regression, transform = tensors[_REGRESSION], tensors[_TRANSFORM]
    shapes = [tuple(tensors[weight].shape) for weight, _ in gating]
    widths = [regression.shape[1], *(shape[0] for shape in shapes)]
    if transform.shape != (len(regression), widths[-1]) or shapes != list(zip(widths[1:], widths, strict=False)):
        raise UserError(
            f"{other} {len(regression)} outputs of {_REGRESSION}, a {_TRANSFORM} of shape {list(transform.shape)}, and layers "
            f"of {list(map(list, shapes))}"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    temperature = float(config.get("gating_temperature", TEMPERATURE))
    layers = [_linear(tensors[weight], tensors[bias]) for weight, bias in gating]
    return GatedHead(layers, tensors[_SCALE], temperature, transform.T @ regression)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer
