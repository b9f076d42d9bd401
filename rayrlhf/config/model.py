"""Initial weights of the roles, their precision and adapters."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section

Precision = Literal["auto", "float32", "bfloat16"]


class LoraSection(Section):
    """Low-rank adapters (peft) instead of full fine-tuning.

    The reference is then the policy without its adapters.
    """

    rank: int = Field(16, ge=1)
    """Rank of an adapter."""
    alpha: float = Field(32.0, gt=0)
    """Scale of an adapter: its output is multiplied by `alpha` / `rank`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout recorded in the exported adapter. Not applied here, because log-probs must be deterministic."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the adapted linear layers; `all-linear` adapts all except the output layer and the experts."""
    last_layers: int | None = Field(None, ge=1)
    """Adapt only the last n decoder layers; the backward pass then ends there. Default: all layers."""


class ModelSection(Section):
    """One model and its precision, chat template and adapters."""

    path: str
    """A local folder, a hub name, or a built-in (`builtin:tiny`, `builtin:smollm2-135m-instruct`)."""
    dtype: Precision = "auto"
    """Compute precision. `auto` is bfloat16 on GPUs and on CPUs with AVX512-BF16 or AMX, else float32."""
    head_dtype: Literal["model", "float32"] = "model"
    """Precision of the output layer for log-probs, in training, scoring and sampling: `model` is `dtype`. `float32` reduces
    the log-prob gap between trainer and rollout engine of a bfloat16 model: for SmolLM2 to 0.52 to 0.64 times."""
    revision: str | None = None
    """Branch, tag or commit of a hub model. Default: its main branch."""
    trust_remote_code: bool = False
    """Execute Python code from the model's folder or hub repository."""
    chat_template: Path | None = None
    """Jinja file that replaces the tokenizer's chat template. Default: the tokenizer's own."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation in training and scoring."""
    lora: LoraSection | None = None
    """Train adapters only. Default: full fine-tuning."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, about a third more time."""

    def check_scalar(self) -> None:
        """Refuse settings without effect on a critic or reward model, which has no log-probs.

        Raises:
            ValueError: `head_dtype` is set.
        """
        if self.head_dtype != "model":
            raise ValueError(f"head_dtype '{self.head_dtype}' of {self.path} has no effect, as the model gives no log-probs")


class CriticSection(Section):
    """The value function: a separate model, a head on the policy's trunk, or none."""

    kind: Literal["separate", "shared", "none"] = "separate"
    """`separate`: a model of its own. `shared`: a value head on the policy's trunk. Default: `none` if the section is missing
    and the advantage estimator reads no values, else `separate`."""
    model: ModelSection | None = None
    """Initial weights of a separate critic, for example the export of a reward model. Default: those of the policy."""
    head_init: Literal["normal", "zero", "default"] = "zero"
    """Initialization of a new value head: `zero`, `normal` N(0, 1/(hidden+1)), or `default`, torch's own for Linear."""
    learning_rate: float | None = Field(None, gt=0)
    """Learning rate of a separate critic, or of the value head on the policy's trunk. Default: `train.learning_rate`. For a
    head choose a lower rate than for LoRA adapters: it reads hundreds of hidden units at once, and at 1e-3 its values swing by
    more than the rewards."""
    warmup_steps: int = Field(0, ge=0)
    """Critic warm-up: steps at the start in which only the separate critic is trained, so that the first advantages are
    useful."""
    pretrain_steps: int = Field(0, ge=0)
    """Value pretraining (VC-PPO), in place of `warmup_steps`: critic warm-up on Monte-Carlo returns (lambda 1). Only with the
    estimator gae."""

    @property
    def steps_alone(self) -> int:
        """Steps at the start in which only the critic trains."""
        return self.warmup_steps or self.pretrain_steps

    @model_validator(mode="after")
    def _check_critic_settings(self) -> Self:
        for name in ("model", "learning_rate", "warmup_steps", "pretrain_steps"):
            used = self.kind == "separate" or (self.kind == "shared" and name == "learning_rate")
            if not used and getattr(self, name):
                raise ValueError(f"{name} has no effect with kind '{self.kind}': remove it, or set kind to 'separate'")
        if self.model is not None:
            self.model.check_scalar()
        if self.warmup_steps and self.pretrain_steps:
            raise ValueError("warmup_steps and pretrain_steps both let the critic train alone: remove one of them")
        return self


class DivergenceSection(Section):
    """Generalized Jensen-Shannon divergence from the teacher (GKD, Agarwal et al. 2024, equation 1).

    It is averaged over the step's sampled tokens, with both distributions at temperature 1.
    """

    beta: float = Field(0.5, ge=0, le=1)
    """Interpolation: 0 is the forward KL(teacher || policy), 1 the reverse KL(policy || teacher), 0.5 the Jensen-Shannon
    divergence. Default: TRL 1.16."""
    vocabulary: int = Field(64, ge=1)
    """Number of most likely tokens of the teacher that are sent to the policy, at 8 bytes each per response token. All other
    tokens count as one outcome. The divergence is then a lower bound of that over the whole vocabulary."""
    student_share: float = Field(1.0, ge=0, le=1)
    """Share of the steps on the policy's own samples; the others use responses of the dataset (lambda of GKD). `run.seed` and
    the step decide. Only in the built-in loop, and only with `algorithm.advantage.estimator: distillation`."""
    response_field: str | None = None
    """Column of `data.train` with the dataset's response. Needed with a `student_share` below 1."""

    @model_validator(mode="after")
    def _check_responses(self) -> Self:
        if self.student_share < 1 and self.response_field is None:
            raise ValueError(
                f"student_share {self.student_share:g} takes the other responses from the dataset: set response_field to their "
                "column"
            )
        if self.student_share == 1 and self.response_field is not None:
            raise ValueError("response_field has no effect with student_share 1: remove it, or lower student_share")
        return self


class TeacherSection(Section):
    """Teacher of on-policy distillation: a frozen model that scores the policy's own samples.

    For each sampled token the log-ratio log teacher - log policy, the negative estimate of the reverse KL, is added to the
    advantages of any `algorithm.advantage.estimator`. With `distillation` it is the whole advantage. With `divergence` the
    policy loss has a divergence over the vocabulary instead.
    """

    model: ModelSection
    """The teacher, with the policy's tokenizer."""
    coefficient: float = Field(1.0, gt=0)
    """Weight of the log-ratio (per nat) in the advantage, or of the divergence in the loss."""
    discount: float = Field(0.0, ge=0, le=1)
    """Discount of later tokens' log-ratios in a token's advantage. 0: only its own log-ratio. 1: the sum from the token on,
    which is the gradient of the reverse KL of whole responses."""
    clip: float | None = Field(None, gt=0)
    """Bound on the absolute log-ratio of a token, in nats. Default: none."""
    divergence: DivergenceSection | None = None
    """Divergence over the vocabulary in the policy loss, in place of log-ratios in the advantages. Default: none."""
    offload: bool = False
    """Keep the weights in main memory and copy them to the GPU for scoring only. No effect on a CPU."""

    @model_validator(mode="after")
    def _check_divergence(self) -> Self:
        if self.divergence is not None and (self.discount or self.clip is not None):
            key = "discount" if self.discount else "clip"
            raise ValueError(f"{key} changes the log-ratio in the advantage, which divergence replaces: remove one of them")
        return self


class ReferenceSection(Section):
    """Reference model of the KL penalty."""

    model: ModelSection | None = None
    """Initial weights. Default: those of the policy; with LoRA the policy without its adapters, which needs no copy."""
    offload: bool = False
    """Keep the weights in main memory and copy them to the GPU for scoring only. No effect on a CPU."""
