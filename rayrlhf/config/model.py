"""Which weights a role starts from, and in what form they are held."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section

Precision = Literal["auto", "float32", "bfloat16"]


class LoraSection(Section):
    """Low-rank adapters (peft) instead of full fine-tuning. The reference is then the same model without adapters."""

    rank: int = Field(16, ge=1)
    """Inner width of an adapter."""
    alpha: float = Field(32.0, gt=0)
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Noted in the exported adapter for others; nothing is dropped here, because log-probs must not depend on a coin."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of linear layers, or all of them but the output layer."""
    last_layers: int | None = Field(None, ge=1)
    """Adapt only the last n decoder layers: the backward pass then stops there."""


class ModelSection(Section):
    """One model: a local folder, a hub name, or a built-in (`builtin:tiny`, `builtin:smollm2-135m-instruct`)."""

    path: str
    """A folder, a hub name, or a built-in."""
    dtype: Precision = "auto"
    """Compute precision. `auto` is bfloat16 on GPUs and on CPUs with AVX512-BF16 or AMX, else float32."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    chat_template: Path | None = None
    """A Jinja file that replaces the tokenizer's own chat template."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation of attention in training and scoring."""
    lora: LoraSection | None = None
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""


class CriticSection(Section):
    """The value function: its own model, a head on the policy's trunk, or none."""

    kind: Literal["separate", "shared", "none"] = "separate"
    """`none` where the whole section is left out and the advantage estimator reads no values."""
    model: ModelSection | None = None
    """Where a separate critic starts, for example the export of a reward model; the policy's own start when not given."""
    head_init: Literal["normal", "zero", "default"] = "zero"
    """`default` is torch's Linear initialisation, `normal` draws N(0, 1/(hidden+1))."""
    learning_rate: float | None = Field(None, gt=0)
    """A separate critic's own learning rate; `train.learning_rate` when not given."""
    warmup_steps: int = Field(0, ge=0)
    """PPO steps at the start in which a separate critic learns alone, so that the first advantages mean something."""

    @model_validator(mode="after")
    def _check_critic_settings(self) -> Self:
        for name in ("model", "learning_rate", "warmup_steps"):
            if self.kind != "separate" and getattr(self, name):
                raise ValueError(f"{name} is of no use with kind '{self.kind}': remove it, or set kind to 'separate'")
        return self


class ReferenceSection(Section):
    """The model that the KL penalty is measured against."""

    model: ModelSection | None = None
    """The policy's own start when not given; with LoRA the policy without its adapters, and no further copy."""
    offload: bool = False
    """Keep the weights in main memory and copy them to the GPU only while responses are scored; on a CPU nothing changes."""
