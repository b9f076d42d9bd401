"""Generative judge of responses, on rollout replicas of its own."""

import re
import string
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.config.section import Section

FIELD = re.compile(r"\{(\w+)\}")
"""Field of a judge's template."""
ANSWER_FIELDS = {"pointwise": ("response",), "pairwise": ("first", "second"), "listwise": ("answers",)}
"""Fields with responses that a template of each mode needs."""
DIAGNOSTICS = ("agreement", "cached", "mass", "missing")
"""Names of the judge's parts that are not criteria."""
LETTERS = string.ascii_uppercase
"""Letters of compared responses."""
_UNREAD = {
    "logprobs": ("verdict", "low", "high", "temperature", "max_new_tokens"),
    "text": ("labels", "min_mass"),
}
"""Settings without effect, by `score`."""


class CriterionSection(Section):
    """One weighted criterion of a rubric."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    """Name in metrics."""
    text: str = Field(min_length=1)
    """Criterion in words; it replaces `{criterion}` in the judge's template."""
    weight: float = Field(1.0, gt=0)
    """Weight in the mean over all criteria."""


class JudgeSection(Section):
    """Generative judge inside the run: a language model on replicas of its own.

    They are placed, monitored and restarted like those of the policy. The score is in [0, 1]. For a judge behind a URL see the
    reward function `judge`.
    """

    model: ModelSection
    """The judge, with its own tokenizer and chat template."""
    weight: float = 1.0
    """Weight of this part in the score."""
    mode: Literal["pointwise", "pairwise", "listwise"] = "pointwise"
    """`pointwise` judges each response by itself. `pairwise` compares the responses to one prompt in pairs, each pair in both
    orders; the score is the mean probability of being the better one. `listwise` shows all responses to a prompt at once, at
    most 26."""
    score: Literal["logprobs", "text"] = "logprobs"
    """`logprobs`: expected value over the probabilities of the labels as the next token, without sampling. `text`: read from a
    sampled completion by `verdict`."""
    template: str | None = None
    """Prompt of the judge, sent as a user turn, or as plain text where the model has no chat template. Fields: `{prompt}` (the
    whole conversation), `{response}` (pairwise `{first}` and `{second}`, listwise `{answers}`), `{labels}`, `{criterion}`, and
    columns of the dataset. Default: a text for the mode."""
    labels: dict[str, float] = Field(default_factory=lambda: {str(value): float(value) for value in range(1, 6)}, min_length=2)
    """Labels of `score: logprobs` with their values, which are scaled to [0, 1]. Each must be one token right after the prompt.
    With `pairwise` and `listwise` the labels are A, B, ..."""
    min_mass: float = Field(0.1, ge=0, le=1)
    """Minimum probability of all labels together; below it the response has no score."""
    verdict: str | None = None
    """Regular expression of `score: text` with one group; its last match counts. The group is a number from `low` to `high`,
    with `pairwise` A or B, with `listwise` a ranking such as B > A > C. Default: `Score: N`, `Better: A` or `Ranking: B >
    A`."""
    low: float = 0.0
    """Number of the worst verdict."""
    high: float = 10.0
    """Number of the best verdict."""
    votes: int = Field(1, ge=1)
    """Completions per question with `score: text`; their scores are averaged. With `listwise`: orders of the responses, each
    used once unless `temperature` is above 0."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of completions; 0 is greedy."""
    max_new_tokens: int = Field(512, ge=1)
    """Maximum tokens of a completion."""
    criteria: list[CriterionSection] = Field(default_factory=list)
    """Criteria of a rubric, each judged in its own question. The score is their weighted mean, and each criterion is a metric.
    Default: one question without `{criterion}`."""
    opponents: int | None = Field(None, ge=1)
    """With `pairwise`: compare a response only with those up to this many places away in its group, taken as a circle.
    Default: with all others."""
    against: str | None = None
    """Column of the dataset with a response that is added to each group of `pairwise` and `listwise` for comparison, without a
    score of its own. Needed to judge single responses, as in evaluations. Default: none."""
    chat_arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, such as `{enable_thinking: false}`."""
    backend: Literal["vllm", "transformers"] = "vllm"
    """Engine of the replicas."""
    replicas: int = Field(1, ge=1)
    """Number of replicas, which split the responses; see `placement.judge`."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Devices per replica, as in `rollout`."""
    max_model_length: int | None = Field(None, ge=2)
    """Maximum tokens of the judge's prompt and completion together. Default: the model's context."""
    max_concurrent: int = Field(64, ge=1)
    """Maximum requests that a replica decodes at a time."""
    memory_gib: float = Field(2.0, gt=0)
    """Maximum KV cache of a replica on a CPU, in GiB."""
    gpu_memory_utilization: float = Field(0.3, gt=0, le=1)
    """Share of GPU memory that a replica may use."""

    @property
    def engine(self) -> RolloutSection:
        """The replicas' engine."""
        shared = set(type(self).model_fields) & set(RolloutSection.model_fields) - {"temperature", "max_new_tokens"}
        new = self.max_new_tokens if self.score == "text" else 1
        return RolloutSection.model_validate({name: getattr(self, name) for name in shared} | {"max_new_tokens": new})

    @property
    def repeats(self) -> bool:
        """True if the same is asked more than once, so that answers may disagree."""
        return self.votes > 1 or self.mode == "pairwise"

    def check_letters(self, samples: int, setting: str) -> None:
        """Check that `listwise` has a letter for each response to a prompt.

        Args:
            setting: key of the number of samples.

        Raises:
            ValueError: it has fewer.
        """
        count = samples + (self.against is not None)
        if self.mode == "listwise" and count > len(LETTERS):
            raise ValueError(
                f"reward.judge.mode 'listwise' shows at most {len(LETTERS)} responses at once, found {count}: lower {setting}, "
                "or set mode to 'pairwise' with opponents"
            )

    @model_validator(mode="after")
    def _check_effects(self) -> Self:
        unread = dict.fromkeys(_UNREAD[self.score], f"score '{self.score}'")
        if self.mode != "pointwise":
            unread |= dict.fromkeys(("labels", "low", "high"), f"mode '{self.mode}'")
        else:
            unread["against"] = "mode 'pointwise'"
        if self.mode != "pairwise":
            unread["opponents"] = f"mode '{self.mode}'"
        for name, reason in unread.items():
            # A run folder's configuration names all keys, so only other values than the defaults were meant.
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name} has no effect with {reason}: remove it")
        if self.model.lora is not None:
            raise ValueError("model.lora has no effect: the judge is not trained; remove it")
        if self.votes > 1 and self.mode != "listwise" and self.temperature == 0:
            raise ValueError(
                f"votes {self.votes} would all be equal: set score to 'text' with a temperature above 0, or votes to 1"
            )
        return self

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        if len(set(self.labels.values())) < 2:
            raise ValueError("labels: all have the same value; expected a worst and a best one")
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} and high {self.high:g}: expected low < high")
        if self.verdict is not None:
            try:
                groups = re.compile(self.verdict).groups
            except re.error as error:
                raise ValueError(f"verdict {self.verdict!r}: {error}") from error
            if groups != 1:
                raise ValueError(f"verdict {self.verdict!r}: expected one group in parentheses, found {groups}")
        names = [*DIAGNOSTICS, *(criterion.name for criterion in self.criteria)]
        taken = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if taken is not None:
            raise ValueError(f"criteria: the name {taken!r} is taken; choose another")
        return self

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template is None:
            return self
        names = FIELD.findall(self.template)
        needed = [*ANSWER_FIELDS[self.mode], *(["criterion"] if self.criteria else [])]
        for name in needed:
            if name not in names:
                raise ValueError(f"template has no {{{name}}}, which mode '{self.mode}' and criteria need")
        if "criterion" in names and not self.criteria:
            raise ValueError("template has {criterion}, but there are no criteria")
        return self
