"""Reward model: a trunk with a scalar head that scores prompt and response as text.

It has its own tokenizer and template and never receives the policy's token ids, so policy and reward model may come from
different families. Prompt and response are joined by `reward.model.template`, or the format stored with the model, or its chat
template, in this order. A process reward model has a value after each step of the response, the log-odds that it is right.
"""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardModelSection
from rayrlhf.config.train import UNSHARED, SharePrefixes
from rayrlhf.data.answer_format import AnswerFormat
from rayrlhf.data.messages import Message
from rayrlhf.data.records import Float32, Int32, TokenSequence
from rayrlhf.data.supervised.step_encoding import check_separator
from rayrlhf.data.templates import conversation, last_user_text
from rayrlhf.engines.scoring.frozen import autocast, hold_linear_weights_in, score_sequences, training_device
from rayrlhf.engines.scoring.offload import move_to_device
from rayrlhf.errors import UserError
from rayrlhf.library_types import PretrainedConfig, Tokenizer
from rayrlhf.models.gated_head import GatedHead, find_gated_head, gated_score
from rayrlhf.models.load import load_architecture, load_tokenizer, resolve_dtype
from rayrlhf.models.model_path import model_folder, one_line_reason, present_folder
from rayrlhf.models.network import build_network
from rayrlhf.models.value_head import architecture_of, find_head
from rayrlhf.rewards.step_rewards import ScoredSteps, split_steps
from rayrlhf.storage.notes import read_note

if TYPE_CHECKING:
    from rayrlhf.engines.scoring.vllm_pooling import PooledReward

STATISTICS_FILE = "reward_statistics.json"
"""File next to a reward model's weights: `mean` and `spread` (standard deviation) of its rewards on held-out responses."""
BATCH_TOKENS = 8192
"""Token budget of one forward."""


class RewardModelEngine:
    """Scores (prompt, response) pairs by the value at the last token, as in reward training."""

    _scorer: "PooledReward | _TorchReward"

    def __init__(self, section: RewardModelSection, share_prefixes: SharePrefixes = "auto") -> None:
        """Load trunk, head and tokenizer on this process's device.

        Raises:
            UserError: the model cannot be loaded, has no scalar head, or has no format to join prompt and response.
        """
        self._section = section
        folder = model_folder(section.model)
        self._tokenizer, self._format, self._mean, self._std = _read(section, folder)
        head = _gated_head(section, folder)
        self._gated = head is not None
        if section.backend == "vllm":
            from rayrlhf.engines.scoring.vllm_pooling import PooledReward

            config = load_architecture(section.model)
            self._rows, self._longest = config.get_text_config().vocab_size, _longest(section, config)
            self._scorer = PooledReward(section, config, self._longest, folder)
        else:
            self._scorer = _TorchReward(section, head, share_prefixes)
            network = self._scorer.network
            self._rows, config = network.model.get_input_embeddings().num_embeddings, network.model.config
            self._longest = _longest(section, config)
        _require_head(section, folder)  # of a hub model pickled weights are here only now
        self.load_check, self.shares_prefixes = self._scorer.load_check, self._scorer.shares_prefixes

    def score(self, prompts: Sequence[str | list[Message]], responses: Sequence[str]) -> Float32:
        """Return one reward per pair, float32 [B].

        A prompt is text, or a conversation, of which `reward.model.template` takes the last user turn.
        Texts longer than `reward.model.max_length` tokens, or the model's positions, lose their left end. With
        `reward.model.normalize` rewards have mean 0 and standard deviation 1 over the model's held-out responses.
        """
        sequences = [self._sequence(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        values = self._scorer.rewards(sequences)
        return (values - np.float32(self._mean)) / np.float32(self._std)

    def score_steps(self, prompts: Sequence[str | list[Message]], responses: Sequence[str]) -> list[ScoredSteps]:
        """Return the probability of each step of each response, for a process reward model.

        Prompts as in `score`; one that is too long with its response loses its left end.

        Raises:
            UserError: the steps alone are too long.
        """
        splits = [split_steps(response, str(self._format.step_separator)) for response in responses]
        rows = [self._step_row(prompt, steps) for prompt, (steps, _) in zip(prompts, splits, strict=True)]
        assert isinstance(self._scorer, _TorchReward)
        values = self._scorer.values([TokenSequence(ids, int(ends[0]) + 1) for ids, ends in rows])
        found = []
        for row, (_, places), (_, ends) in zip(values, splits, rows, strict=True):
            logits = row[ends - ends[0]].astype(np.float64)
            found.append(ScoredSteps((1 / (1 + np.exp(-logits))).astype(np.float32), places))
        return found

    def _step_row(self, prompt: str | list[Message], steps: Sequence[str]) -> tuple[Int32, NDArray[np.int64]]:
        """Return the tokens of a prompt with its steps, and the steps' last positions."""
        written, template = self._format, self._section.template
        if template is not None:
            prompt = template.removesuffix("{response}").replace("{prompt}", last_user_text(prompt))
            written = replace(written, chat=False)
        with self._named_template():
            ids, ends = written.step_token_ids(self._tokenizer, prompt, steps)
        cut = max(len(ids) - self._longest, 0)
        if ends[0] < cut:
            raise UserError(
                f"reward.model.max_length {self._longest}: the {len(steps)} steps of a response and their prompt have "
                f"{len(ids)} tokens, so the first step would be cut; expected more, or fewer rollout.max_new_tokens"
            )
        return self._checked(np.asarray(ids, dtype=np.int32)[cut:]), np.asarray(ends) - cut

    def _sequence(self, prompt: str | list[Message], response: str) -> TokenSequence:
        if self._section.template is not None:
            text = self._section.template.replace("{prompt}", last_user_text(prompt)).replace("{response}", response)
            ids = self._tokenizer(text)["input_ids"]
        else:
            with self._named_template():
                ids = self._format.token_ids(self._tokenizer, prompt, response)
        kept = self._checked(np.asarray(ids, dtype=np.int32)[-self._longest :])
        return TokenSequence(kept, self._prompt_length(prompt, ids) if self._gated else len(kept) - 1)

    def _prompt_length(self, prompt: str | list[Message], ids: Sequence[int]) -> int:
        """Return the number of kept tokens up to the end of the prompt."""
        turns = conversation(prompt, self._format.system_prompt)
        with self._named_template():
            opening = self._tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        place = f"reward.model {self._section.model.path!r}"
        if list(ids[: len(opening)]) != list(opening):
            raise UserError(f"{place}: its gating reads the prompt's end, but its chat template writes other tokens there")
        kept = len(opening) - max(len(ids) - self._longest, 0)
        if kept < 1:
            raise UserError(
                f"reward.model.max_length {self._longest}: its gating reads the prompt's end, which would be cut of the "
                f"{len(ids)} tokens of prompt and response; expected more, or fewer rollout.max_new_tokens"
            )
        return kept

    def _checked(self, kept: Int32) -> Int32:
        """Return tokens that the model has an embedding for."""
        if kept.max(initial=0) >= self._rows:
            raise UserError(
                f"reward.model {self._section.model.path!r}: its tokenizer writes token {kept.max()}, expected at most "
                f"{self._rows - 1}, the last one of the model"
            )
        return kept

    @contextmanager
    def _named_template(self) -> Iterator[None]:
        """Name the model whose chat template refuses a conversation."""
        from jinja2 import TemplateError

        try:
            yield
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(
                f"reward.model {self._section.model.path!r}: its chat template refuses a conversation: {one_line_reason(error)}"
                "; set reward.model.template to a text with {prompt} and {response}, which reads the last user turn"
            ) from error


class _TorchReward:
    """Values of token sequences by a frozen network on this process's device."""

    def __init__(self, section: RewardModelSection, head: GatedHead | None, share_prefixes: SharePrefixes) -> None:
        self._device, self._dtype, self._gated = training_device(), resolve_dtype(section.model.dtype), head is not None
        network = build_network(section.model, frozenset({"value"}), "zero", 0, frozen=True, outputs=section.outputs, head=head)
        network.accept_packed_rows(packing=False, unshared=UNSHARED[share_prefixes])
        self.load_check, self.shares_prefixes = network.check.line(), network.check.shares_prefixes
        self.network = network
        hold_linear_weights_in(network, self._dtype)
        self._offload = move_to_device(network, self._device, offload=section.offload)

    def rewards(self, sequences: Sequence[TokenSequence]) -> Float32:
        """Return one reward per sequence, float32 [B]."""
        found = self.values(sequences)
        return np.array([gated_score(row) if self._gated else row[-1] for row in found], dtype=np.float32)

    def values(self, sequences: Sequence[TokenSequence]) -> list[Float32]:
        """Return the values of each sequence, float32 [R + 1]."""
        with self._offload.in_place(), autocast(self._device, self._dtype):
            scores = score_sequences(
                self.network,
                sequences,
                frozenset({"values"}),
                temperature=1.0,
                token_budget=BATCH_TOKENS,
                device=self._device,
                shares_prefixes=self.shares_prefixes,
            )
        return [score.values for score in scores if score.values is not None]


def _longest(section: RewardModelSection, config: PretrainedConfig) -> int:
    """Return the maximum tokens of a text."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(section.max_length, positions or section.max_length)


def check_reward_models(section: RewardModelSection) -> None:
    """Check heads, formats and statistics of all members before weights load.

    Hub models are checked where they are in the cache.

    Raises:
        UserError: as `RewardModelEngine`.
    """
    for model in section.models:
        folder = present_folder(model)
        if folder is not None:
            _read(section.model_copy(update={"model": model}), folder)
            _require_head(section.model_copy(update={"model": model}), folder)


def _read(section: RewardModelSection, folder: Path) -> tuple[Tokenizer, AnswerFormat, float, float]:
    """Return tokenizer, format, and mean and standard deviation of the rewards."""
    if section.backend == "vllm":
        _check_pooling(section, folder)
    tokenizer, stored = load_tokenizer(section.model), _format(section, folder)
    if section.template is None and stored.chat and not tokenizer.chat_template:
        raise UserError(
            f"reward.model {section.model.path!r}: its tokenizer has no chat template; "
            "set reward.model.template to a text with {prompt} and {response}"
        )
    if stored.step_separator is not None:
        check_separator(tokenizer, stored.step_separator, "reward.model.steps.separator")
    return tokenizer, stored, *(_statistics(section, folder) if section.normalize else (0.0, 1.0))


def _format(section: RewardModelSection, folder: Path) -> AnswerFormat:
    """Return the stored format of a model, or that of its kind.

    Raises:
        UserError: the model scores steps where whole responses are to be scored, or the reverse; its gating contradicts a
            setting; or the separator of its steps is unknown.
    """
    found, place = AnswerFormat.read(folder), f"reward.model {section.model.path!r}"
    architecture = architecture_of(folder)
    process = architecture.endswith("ForTokenClassification") if found is None else found.step_separator is not None
    if section.steps is None:
        if process:
            raise UserError(f"{place}: a process reward model, which scores steps; set reward.model.steps to score them")
        return found or AnswerFormat()
    _gated_head(section, folder)
    if not process and (found is not None or architecture.endswith("ForSequenceClassification")):
        raise UserError(f"{place}: an outcome reward model, which scores whole responses; remove reward.model.steps")
    stored, given = None if found is None else found.step_separator, section.steps.separator
    if stored is not None and given not in (None, stored):
        raise UserError(f"{place}: trained with {stored!r} between steps, expected the same as reward.model.steps.separator")
    if stored is None and given is None:
        raise UserError(f"{place}: no separator of steps is stored with it; set reward.model.steps.separator")
    return found or AnswerFormat(step_separator=given)


def _gated_head(section: RewardModelSection, folder: Path) -> GatedHead | None:
    """Return the gated head of a model, without settings that contradict it."""
    head = find_gated_head(folder)
    given = [name for name in ("outputs", "steps", "template") if getattr(section, name) is not None]
    if head is not None and given:
        raise UserError(
            f"reward.model {section.model.path!r}: its gating weights the outputs by the prompt in its chat template; remove "
            f"reward.model.{given[0]}"
        )
    return head


def _check_pooling(section: RewardModelSection, folder: Path) -> None:
    """Check that vLLM is installed and serves a model in pooling mode."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("reward.model.backend: vllm is not installed; pip install 'rayrlhf[cpu]' ('rayrlhf[gpu]' on GPUs)")
    found, gated = architecture_of(folder) or "model of unknown architecture", find_gated_head(folder) is not None
    if gated or not found.endswith("ForSequenceClassification"):
        raise UserError(
            f"reward.model.backend vllm: {section.model.path!r} is a {found}{' with gating' if gated else ''}; expected a "
            "classifier of sequences, or backend torch"
        )


def _require_head(section: RewardModelSection, folder: Path) -> None:
    if _gated_head(section, folder) is None and find_head(folder, section.outputs) is None:
        raise UserError(
            f"reward.model {section.model.path!r}: no scalar head in its files, expected weights named "
            "`score.weight` or `v_head.summary.weight` with one output (of a classifier with several, set reward.model.outputs)"
        )


def stored_chance(models: Sequence[ModelSection]) -> float | None:
    """Return the stored `evaluation/chance_probability`, the largest of several models.

    It is the probability that coins order the held-out pairs as well as the model did. None for models without the statistics
    of `rayrlhf reward`.
    """
    found = []
    for model in models:
        folder = present_folder(model)
        path = folder / STATISTICS_FILE if folder is not None else None
        chance = read_note(path).get("evaluation/chance_probability") if path is not None and path.is_file() else None
        found += [float(chance)] if isinstance(chance, int | float) else []
    return max(found, default=None)


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
        raise UserError(f"reward.model.normalize: {path}: standard deviation {std:g}, expected > 0")
    return mean, std
