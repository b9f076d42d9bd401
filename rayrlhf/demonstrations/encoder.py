"""Text embeddings by a Hugging Face encoder: pooled hidden states, normalized to length 1.

An encoder must be pooled as it was trained. Sentence-transformers folders state it in `1_Pooling/config.json`; for others the
user must set it, because vectors with the wrong pooling look fine and rank badly.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Pooling = Literal["mean", "cls"]
_MODULES = ("Transformer", "Pooling", "Normalize")
"""Modules of sentence-transformers that are computed here."""


def pooling_of(folder: Path) -> Pooling:
    """Return the pooling that an encoder's folder states.

    Raises:
        UserError: none is stated, or an unsupported one, or the encoder has more layers after it.
    """
    path, modules = folder / "1_Pooling" / "config.json", folder / "modules.json"
    if not path.is_file():
        raise UserError(f"encoder {folder}: no 1_Pooling/config.json states its pooling; set pooling to mean or cls")
    for module in json.loads(modules.read_text()) if modules.is_file() else ():
        kind = str(module.get("type")).rpartition(".")[2]
        if kind not in _MODULES:
            raise UserError(f"{modules}: a layer {kind} is not supported, expected {', '.join(_MODULES)}")
    stored = json.loads(path.read_text())
    modes = [name.removeprefix("pooling_mode_") for name, used in stored.items() if name.startswith("pooling_mode_") and used]
    if modes == ["mean_tokens"]:
        return "mean"
    if modes == ["cls_token"]:
        return "cls"
    raise UserError(f"{path}: expected pooling by mean or cls, found {' and '.join(modes) or 'none'}; set pooling")


def pool(hidden: "Tensor", mask: "Tensor", pooling: Pooling) -> "Tensor":
    """Return one vector of length 1 per text.

    Args:
        hidden: [texts, tokens, width], the last hidden states.
        mask: [texts, tokens], 1 on tokens and 0 on padding at the right.
        pooling: `mean` over the tokens, or the first one (`cls`).

    Returns:
        [texts, width], float32; a text without tokens gives zeros.
    """
    from torch.nn.functional import normalize

    states = hidden.float().masked_fill(~mask.bool().unsqueeze(-1), 0.0)
    pooled = states[:, 0] if pooling == "cls" else states.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return normalize(pooled, dim=-1)


class Encoder:
    """An encoder in memory."""

    def __init__(self, path: str, pooling: Pooling | None = None, max_tokens: int = 256) -> None:
        """Load the encoder in float32 on the CPU.

        Args:
            path: a folder, hub name or built-in.
            pooling: None uses the folder's.
            max_tokens: longer texts are truncated at the end.

        Raises:
            UserError: no such model, or its pooling is unknown.
        """
        from rayrlhf.models.load import load_encoder
        from rayrlhf.models.model_path import model_folder

        section = ModelSection(path=path)
        self._pooling = pooling or pooling_of(model_folder(section))
        self._max_tokens = max_tokens
        self._tokenizer, self._model = load_encoder(section)

    def encode(self, texts: Sequence[str], batch: int = 32) -> NDArray[np.float32]:
        """Return float32 [texts, width], rows of length 1, zeros for a text without tokens."""
        import torch

        tokens = [self._tokenizer(text, truncation=True, max_length=self._max_tokens)["input_ids"] for text in texts]
        vectors = np.zeros((len(texts), int(self._model.config.hidden_size)), dtype=np.float32)
        by_length = sorted((row for row in range(len(texts)) if tokens[row]), key=lambda row: len(tokens[row]))
        for start in range(0, len(by_length), batch):
            rows = by_length[start : start + batch]
            width = len(tokens[rows[-1]])
            ids = torch.tensor([tokens[row] + [0] * (width - len(tokens[row])) for row in rows])
            mask = torch.tensor([[1] * len(tokens[row]) + [0] * (width - len(tokens[row])) for row in rows])
            with torch.inference_mode():
                hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
                vectors[rows] = pool(hidden, mask, self._pooling).numpy()
        return vectors
