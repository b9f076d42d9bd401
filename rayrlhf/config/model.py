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
    """Scale of an adapter's output, which is multiplied by `alpha` / `rank`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout recorded in the exported adapter. Not applied here, because log-probs must be deterministic."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the adapted linear layers; `all-linear` adapts all but the output layer, and no layers of experts."""
    last_layers: int | None = Field(None, ge=1)
    """Adapt only the last n decoder layers, where the backward pass then ends. Default: all layers."""


class ModelSection(Section):
    """One model and its precision, chat template and adapters."""

    path: str
    """A local folder, a hub name, or a built-in (`builtin:tiny`, `builtin:smollm2-135m-instruct`)."""
    dtype: Precision = "auto"
    """Compute precision. `auto` is bfloat16 on GPUs and on CPUs with AVX512-BF16 or AMX, else float32."""
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
    """Learning rate of a separate critic, or of the value head on the policy's trunk. Default: `train.learning_rate`. A head
    reads hundreds of hidden units at once: at the rate of LoRA adapters (1e-3) its values swing by more than the rewards."""
    warmup_steps: int = Field(0, ge=0)
    """Critic warm-up: steps at the start in which only a separate critic trains, so that the first advantages carry signal."""

    @model_validator(mode="after")
    def _check_critic_settings(self) -> Self:
        for name in ("model", "learning_rate", "warmup_steps"):
            used = self.kind == "separate" or (self.kind == "shared" and name == "learning_rate")
            if not used and getattr(self, name):
                raise ValueError(f"{name} has no effect with kind '{self.kind}': remove it, or set kind to 'separate'")
        return self


class ReferenceSection(Section):
    """Reference model of the KL penalty."""

    model: ModelSection | None = None
    """Initial weights. Default: those of the policy; with LoRA the policy without its adapters, which needs no copy."""
    offload: bool = False
    """Keep the weights in main memory and copy them to the GPU for scoring only. No effect on a CPU."""
