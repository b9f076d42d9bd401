"""Scalar head of a critic: one linear layer on the trunk's final hidden state.

A critic on the policy's trunk and a separate critic use the same head. It is stored under TRL's names (`v_head.summary.*`), and
is initialized from any checkpoint with a scalar head: a critic of this project, a TRL policy with a value head, or a reward
model, which is a sequence classifier whose head is called `score`. The files may be safetensors or pickled.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rayrlhf.errors import UserError
from rayrlhf.plugins import did_you_mean

HEAD_FILE = "value_head/model.safetensors"
"""Value head in a Hugging Face folder. It has a subfolder because vLLM loads every safetensors file next to the weights."""
OLD_HEAD_FILE = "value_head.safetensors"

HeadInit = Literal["normal", "zero", "default"]
HEAD_NAMES = ("v_head.summary.", "score.")
"""Beginnings of a stored head's names."""


class ValueHead(nn.Module):
    """Linear layer from hidden state to value, in float32."""

    stored_names: tuple[str, ...] = HEAD_NAMES
    """Beginnings of its tensors' names in a checkpoint."""

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


def find_head(folder: Path, outputs: Mapping[str, float] | None = None) -> dict[str, Tensor] | None:
    """Return the scalar head stored in a Hugging Face folder, or None.

    The head is {"weight": [1, H]}, with "bias": [1] if it has one. A classifier with several labels has no scalar head, unless
    `outputs` weights them: a weighted sum of linear outputs is one linear output. That of a token classifier with two labels is
    their difference, the log-odds of the second one.

    Args:
        outputs: label or number of an output -> its weight.

    Raises:
        UserError: pickled weights cannot be read, or the classifier has no such output.
    """
    for file in _head_files(folder):
        tensors = _read(file, HEAD_NAMES)
        for prefix in HEAD_NAMES:
            head = {part: tensors[prefix + part] for part in ("weight", "bias") if prefix + part in tensors}
            two_labels = "weight" in head and len(head["weight"]) == 2 and not outputs
            if two_labels and architecture_of(folder).endswith("ForTokenClassification"):
                return {part: tensor[1:].float() - tensor[:1].float() for part, tensor in head.items()}
            if "weight" in head and outputs:
                weights = output_weights(folder, outputs, len(head["weight"]))
                return {part: (weights @ tensor.float()).reshape(1, *tensor.shape[1:]) for part, tensor in head.items()}
            if "weight" in head and head["weight"].shape[0] == 1:
                return head
    return None


def architecture_of(folder: Path) -> str:
    """Return the class that a Hugging Face folder names in its configuration; empty for none."""
    file = folder / "config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("architectures") if file.is_file() else None
    return str(found[0]) if found else ""


def output_weights(folder: Path, outputs: Mapping[str, float], count: int) -> Tensor:
    """Return the weight of each output of a classifier, float32 [count]."""
    labels = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
    # Labels may be numerals, and then override the numbers.
    numbers = {str(number): number for number in range(count)} | {str(label): int(number) for number, label in labels.items()}
    weights = torch.zeros(count)
    for name, weight in outputs.items():
        if not 0 <= numbers.get(name, -1) < count:
            near = did_you_mean(name, numbers)
            raise UserError(
                f"reward.model.outputs: {folder} has no output {name!r}{near}; expected one of {', '.join(numbers)}"
            )
        weights[numbers[name]] += weight
    return weights


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


def stored_tensors(folder: Path, beginnings: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of a Hugging Face folder by beginnings of their names."""
    return {name: tensor for file in _head_files(folder) for name, tensor in _read(file, beginnings).items()}


def _read(file: Path, beginnings: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of a file whose names begin with one of some texts."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys() if name.startswith(beginnings)}  # noqa: SIM118
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # pickle, zip and torch have classes of their own
        raise UserError(f"{file}: cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    return {name: tensor.clone() for name, tensor in tensors.items() if name.startswith(beginnings)}


def _head_files(folder: Path) -> Iterable[Path]:
    """Files that may hold the head, dedicated ones first.

    Pickled weights are read where there are no others.
    """
    dedicated = [folder / name for name in (HEAD_FILE, OLD_HEAD_FILE) if (folder / name).is_file()]
    weights = sorted(set(folder.glob("*.safetensors")) - set(dedicated)) or sorted(folder.glob("pytorch_model*.bin"))
    return dedicated + weights
