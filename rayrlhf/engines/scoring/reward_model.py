"""Reward model: a trunk with a scalar head that scores prompt and response as text.

It has its own tokenizer and template and never receives the policy's token ids, so policy and reward model may come from
different families. Prompt and response are joined by `reward.model.template`, or the format stored with the model, or its chat
template, in this order.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rayrlhf.config.reward import RewardModelSection
from rayrlhf.data.answer_format import AnswerFormat
from rayrlhf.data.records import Float32, TokenSequence
from rayrlhf.engines.scoring.frozen import autocast, hold_linear_weights_in, score_sequences, training_device
from rayrlhf.engines.scoring.offload import move_to_device
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_tokenizer, model_folder, resolve_dtype
from rayrlhf.models.network import build_network
from rayrlhf.models.value_head import find_head

STATISTICS_FILE = "reward_statistics.json"
"""File next to a reward model's weights: `mean` and `spread` (standard deviation) of its rewards on held-out responses."""
BATCH_TOKENS = 8192
"""Token budget of one forward."""


class RewardModelEngine:
    """Scores (prompt, response) pairs by the value at the last token, as in reward training."""

    def __init__(self, section: RewardModelSection) -> None:
        """Load trunk, head and tokenizer on this process's device.

        Raises:
            UserError: the model cannot be loaded, has no scalar head, or has no format to join prompt and response.
        """
        self._section = section
        self._tokenizer = load_tokenizer(section.model)
        folder = model_folder(section.model)
        self._format = AnswerFormat.read(folder) or AnswerFormat()
        if section.template is None and self._format.chat and not self._tokenizer.chat_template:
            raise UserError(
                f"reward.model {section.model.path!r}: its tokenizer has no chat template; "
                "set reward.model.template to a text with {prompt} and {response}"
            )
        if find_head(folder) is None:
            raise UserError(
                f"reward.model {section.model.path!r}: no scalar head in its files, expected weights named "
                "`score.weight` or `v_head.summary.weight` (train one with a sequence-classification head of one label)"
            )
        self._mean, self._std = _statistics(section, folder) if section.normalize else (0.0, 1.0)
        self._device = training_device()
        self._dtype = resolve_dtype(section.model.dtype)
        network = build_network(section.model, frozenset({"value"}), "zero", 0)
        self.load_check = network.check.line()
        self._network = network.requires_grad_(False)
        hold_linear_weights_in(network, self._dtype)
        self._rows = network.model.get_input_embeddings().num_embeddings
        self._offload = move_to_device(network, self._device, offload=section.offload)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float32:
        """Return one reward per pair, float32 [B].

        Texts longer than `reward.model.max_length` tokens lose their left end. With `reward.model.normalize` rewards have mean
        0 and standard deviation 1 over the model's held-out responses.
        """
        sequences = [self._sequence(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        with self._offload.in_place(), autocast(self._device, self._dtype):
            scores = score_sequences(
                self._network,
                sequences,
                frozenset({"values"}),
                temperature=1.0,
                token_budget=BATCH_TOKENS,
                device=self._device,
            )
        values = np.array([score.values[-1] for score in scores if score.values is not None], dtype=np.float32)
        return (values - np.float32(self._mean)) / np.float32(self._std)

    def _sequence(self, prompt: str, response: str) -> TokenSequence:
        if self._section.template is not None:
            text = self._section.template.replace("{prompt}", prompt).replace("{response}", response)
            ids = self._tokenizer(text)["input_ids"]
        else:
            ids = self._format.token_ids(self._tokenizer, prompt, response)
        kept = np.asarray(ids, dtype=np.int32)[-self._section.max_length :]
        if kept.max(initial=0) >= self._rows:
            raise UserError(
                f"reward.model {self._section.model.path!r}: its tokenizer writes token {kept.max()}, expected at most "
                f"{self._rows - 1}, the last one of the model"
            )
        return TokenSequence(kept, len(kept) - 1)


def _statistics(section: RewardModelSection, folder: Path) -> tuple[float, float]:
    """Read mean and standard deviation stored with the model.

    Raises:
        UserError: they are missing or invalid.
    """
    path = folder / STATISTICS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        mean, std = float(found["mean"]), float(found["spread"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"reward.model.normalize: {path}: expected the statistics that `rayrlhf reward` stores with the model; "
            "set reward.model.normalize=false for other models"
        ) from error
    if not std > 0:
        raise UserError(f"reward.model.normalize: {path}: spread {std:g}, expected > 0 (a standard deviation)")
    return mean, std
