"""Reward functions: signature, binding and calls.

    def judge(prompts: list[str], responses: list[str], **columns: list) -> list[float]

A reward function gets a whole batch by keyword and returns one number per response, synchronously or as a coroutine. It gets
exactly the parameters that its signature names, out of: `prompts`, `responses`, `rollouts` (`rayrlhf.data.records.Rollout`),
`finish_reasons` ("stop" or "length"), and the columns of the dataset, each a list of the batch's length; `**columns` gets every
column. The config's `arguments` are bound by name. `None` for a sample means that the function does not apply to it. With
`per: token` or `per: turn` it returns a list of numbers per response instead (`rayrlhf.rewards.returned_values`).

Reward functions of TRL's trainers run unchanged. One that names `completions`, `completion_ids` or `trainer_state` gets them in
TRL's form: `completions` as text, or as one assistant message each where the prompts are messages, and `prompts` likewise.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from rayrlhf.config.judge import DIAGNOSTICS
from rayrlhf.config.reward import RewardSection
from rayrlhf.data.messages import Message
from rayrlhf.data.records import Prompt, Rollout
from rayrlhf.errors import UserError
from rayrlhf.rewards.cache import ContentCache
from rayrlhf.rewards.registry import RewardFunction, import_files, resolve
from rayrlhf.rewards.returned_values import Per

MODEL_PART = "reward_model"
"""Name of the reward model's part among those of the functions."""
SPREAD_PART = "reward_model_spread"
"""Name of the part with the standard deviation over the members; it has weight 0."""
STEPS_PART = "reward_model_steps"
"""Name of the part with the number of steps that a process reward model scored; it has weight 0."""
JUDGE_PART = "judge_model"
"""Name of the judge's part among those of the reward; its diagnostics begin with it."""
BATCH_FIELDS = ("prompts", "responses", "rollouts", "finish_reasons")
"""Fields of every batch; a dataset column of the same name is not passed on."""
TRL_FIELDS = ("completions", "completion_ids", "trainer_state")
"""Fields of a batch for functions that name one of them."""
_UNCACHED = ("rollouts", "completion_ids", "trainer_state")
"""Fields that a cached function does not get, because they are never equal."""


@dataclass(frozen=True, slots=True)
class BoundFunction:
    """A reward function with its weight and its configured arguments.

    Attributes:
        name: name in metrics, samples and errors; unique among the functions of a run.
        function: see the module's docstring.
        weight: factor of its values in the score.
        arguments: keyword arguments of every call; they override a dataset column of the same name.
        cache: content cache; None calls the function for every sample.
        per: unit of one returned number, see `rayrlhf.rewards.returned_values`.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cache: ContentCache | None = None
    per: Per = "response"

    @property
    def is_async(self) -> bool:
        """True if a call returns a coroutine."""
        call = type(self.function).__call__
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)

    @property
    def required(self) -> list[str]:
        """Names of the parameters without a default."""
        parameters = inspect.signature(self.function).parameters
        return [name for name, one in parameters.items() if _takes_keyword(one) and one.default is one.empty]

    def call(self, batch: "ScoringBatch") -> Any:
        """Call the function on a batch; the returned value is unchecked.

        Raises:
            UserError: the function needs a column that the dataset does not have.
            Exception: any exception of the function.
        """
        parameters = inspect.signature(self.function).parameters
        fields = batch.fields() | (batch.trl_fields() if any(name in parameters for name in TRL_FIELDS) else {})
        offered = {**batch.columns, **fields, **self.arguments}
        missing = [name for name in self.required if name not in offered]
        if missing:
            columns = ", ".join(sorted(batch.columns)) or "none"
            raise UserError(f"reward function {self.name!r} needs column {missing[0]!r}; the dataset's columns are: {columns}")
        if not _takes_all(parameters):
            offered = {
                name: value for name, value in offered.items() if name in parameters and _takes_keyword(parameters[name])
            }
        if self.cache is not None:
            offered = {name: value for name, value in offered.items() if name not in _UNCACHED}
            per_sample = [name for name in offered if name not in self.arguments]
            call = self.cache.call_async if self.is_async else self.cache.call
            return call(self.function, offered, per_sample)
        return self.function(**offered)


@dataclass(frozen=True, slots=True)
class ScoringBatch:
    """Samples to score: lists of length B, and the dataset's columns, each a list [B].

    `messages` has the whole conversation of each prompt, or None for a prompt of plain text.
    """

    prompts: list[str]
    responses: list[str]
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    rollouts: list[Rollout] | None = None
    finish_reasons: list[str] | None = None
    messages: list[list[Message] | None] | None = None

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def whole_prompts(self) -> list[str | list[Message]]:
        """All turns of each prompt that is a conversation, and the text of others."""
        messages = self.messages or [None] * len(self)
        return [text if turns is None else turns for text, turns in zip(self.prompts, messages, strict=True)]

    def fields(self) -> dict[str, list[Any]]:
        """Return the lists that are not dataset columns."""
        return {name: value for name in BATCH_FIELDS if (value := getattr(self, name)) is not None}

    def trl_fields(self) -> dict[str, Any]:
        """Return the fields of TRL's reward functions."""
        prompts = self.whole_prompts
        fields: dict[str, Any] = {
            "prompts": prompts,
            "completions": [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for text, prompt in zip(self.responses, prompts, strict=True)
            ],
        }
        if self.rollouts:
            fields["completion_ids"] = [rollout.response_ids.tolist() for rollout in self.rollouts]
            fields["trainer_state"] = SimpleNamespace(global_step=self.rollouts[0].key.step)
        return fields

    @classmethod
    def of_rollouts(cls, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> "ScoringBatch":
        """Pair each rollout with its prompt; missing columns of a row are None."""
        if len(prompts) != len(rollouts):
            raise ValueError(f"{len(prompts)} prompts for {len(rollouts)} rollouts")
        names = sorted({name for prompt in prompts for name in prompt.columns})
        return cls(
            prompts=[prompt.text for prompt in prompts],
            responses=[rollout.text for rollout in rollouts],
            columns={name: [prompt.columns.get(name) for prompt in prompts] for name in names},
            rollouts=list(rollouts),
            finish_reasons=[rollout.finish_reason for rollout in rollouts],
            messages=[prompt.messages for prompt in prompts],
        )


def required_columns(functions: Sequence[BoundFunction]) -> dict[str, str]:
    """Return the columns that every row must have, and the function that needs each."""
    return {
        name: f"reward function {function.name!r}"
        for function in functions
        for name in function.required
        if name not in (*BATCH_FIELDS, *TRL_FIELDS, *function.arguments)
    }


def read_columns(functions: Sequence[BoundFunction]) -> set[str] | None:
    """Return all columns that functions may read; None if one gets every column."""
    signatures = [inspect.signature(function.function).parameters for function in functions]
    if any(_takes_all(parameters) for parameters in signatures):
        return None
    return {name for parameters in signatures for name in parameters}


def load_functions(section: RewardSection) -> list[BoundFunction]:
    """Resolve a config's reward functions; one listed twice gets the names `name` and `name_2`.

    Raises:
        UserError: a name cannot be resolved or is that of a model's part, or an argument does not fit the function's signature.
    """
    import_files(section.files)
    owners = _owned_parts(section)
    functions: list[BoundFunction] = []
    for name, entry in zip(section.function_names, section.functions, strict=True):
        function = resolve(entry.name)
        _check_arguments(entry.name, function, entry.arguments)
        reads = [name for name in _UNCACHED if name in inspect.signature(function).parameters]
        if entry.cache and reads:
            raise UserError(f"reward function {entry.name!r} reads {reads[0]}, which are never equal: expected cache: false")
        if name in owners:
            raise UserError(f"reward function {entry.name!r}: the name {name!r} is that of a part of {owners[name]}; rename it")
        cache = ContentCache(name) if entry.cache else None
        functions.append(BoundFunction(name, function, entry.weight, entry.arguments, cache, entry.per))
    return functions


def _owned_parts(section: RewardSection) -> dict[str, str]:
    """Return the names of the models' parts and metrics, and the section of each."""
    owned = dict.fromkeys((MODEL_PART, SPREAD_PART, STEPS_PART), "reward.model") if section.model is not None else {}
    if section.judge is not None:
        names = [*DIAGNOSTICS, *(criterion.name for criterion in section.judge.criteria)]
        owned |= dict.fromkeys((JUDGE_PART, *(f"{JUDGE_PART}_{name}" for name in names)), "reward.judge")
    return owned


def _check_arguments(name: str, function: RewardFunction, arguments: Mapping[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UserError(f"reward function {name!r}: parameter {parameter.name!r} must accept a keyword (remove the '/')")
    for argument in arguments:
        if argument in BATCH_FIELDS:
            raise UserError(f"reward function {name!r}: argument {argument!r} comes from the batch and cannot be set")
        if argument not in parameters and not _takes_all(parameters):
            settable = [key for key, value in parameters.items() if _takes_keyword(value) and key not in BATCH_FIELDS]
            nearest = difflib.get_close_matches(argument, settable, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it takes {', '.join(settable) or 'none'}"
            raise UserError(f"reward function {name!r} takes no argument {argument!r}; {hint}")


def _takes_keyword(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _takes_all(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
