"""Network of any role: transformer trunk with output layer, value head, or both.

It computes only the requested outputs, only at the requested positions, as flat [N] tensors. Batches are padded on the right
and attention is causal, so no real token attends to padding: no attention mask is needed (the fast causal kernel runs) and
positions count from 0. Packed rows hold samples end to end without padding.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError
from rayrlhf.library_types import PreTrainedModel
from rayrlhf.models.distillation import FullTeacher, TopTeacher, divergence
from rayrlhf.models.frozen_prefix import FrozenPrefix
from rayrlhf.models.load import disable_dropout, load_causal_model, load_trunk, resolve_path
from rayrlhf.models.logprobs import logprobs_and_entropy
from rayrlhf.models.lora import add_lora
from rayrlhf.models.packed_attention import attend_within_segments
from rayrlhf.models.value_head import HeadInit, ValueHead, find_head, make_head

Head = Literal["lm", "value"]
OutputName = Literal["logprobs", "entropy", "values", "hidden", "divergence"]


class Positions(NamedTuple):
    """Positions to read in a padded batch [B, L], as flat indices.

    The flat index of position t in row b is b * L + t.

    Attributes:
        predictors: int64 [N], the position that predicts each response token.
        targets: int64 [N], the response tokens.
        values: int64 [M], positions of values: before each response token, and after the last one.
        lengths: tokens of each sample without padding.
        packed: samples are end to end in one row [1, sum of lengths], instead of one row each.
    """

    predictors: Tensor
    targets: Tensor
    values: Tensor
    lengths: list[int]
    packed: bool = False


class TeacherSignal(NamedTuple):
    """Teacher outputs at N positions: hidden states, or most likely tokens.

    See `rayrlhf.models.distillation`.

    Attributes:
        hidden: float32 [N, H], for `Network.teacher_layer`; None if `ids` is set.
        ids: int64 [N, K], or None.
        logprobs: float32 [N, K + 1], or None.
    """

    hidden: Tensor | None = None
    ids: Tensor | None = None
    logprobs: Tensor | None = None


class NetworkOutput(NamedTuple):
    """Requested outputs, flat in the order of the positions; None for the rest.

    A NamedTuple, so that module hooks see the tensors.

    Attributes:
        logprobs: float32 [N].
        entropy: float32 [N], nats.
        values: float32 [M].
        hidden: [N, H], the final hidden state at each predictor.
        divergence: float32 [N], forward KL from a teacher, nats.
    """

    logprobs: Tensor | None
    entropy: Tensor | None
    values: Tensor | None
    hidden: Tensor | None
    divergence: Tensor | None = None


class Network(nn.Module):
    """Transformer trunk with heads.

    Attributes:
        model: transformers model: a causal language model with an "lm" head, otherwise the trunk only.
        v_head: value head, or None.
        prefix: cached outputs of the frozen lower layers, if `remember_frozen_layers` was called.
        teacher_layer: weight [V, H] and bias of the output layer for a teacher's hidden states; not parameters of this network.
            None without a teacher.
        noise_alpha: strength of NEFTune noise on the embeddings while gradients are enabled; None adds none.
    """

    def __init__(self, model: PreTrainedModel, v_head: ValueHead | None) -> None:
        super().__init__()
        self.model = model
        self.v_head = v_head
        self.has_lm_head = model.get_output_embeddings() is not None
        self.prefix: FrozenPrefix | None = None
        self.teacher_layer: tuple[Tensor, Tensor | None] | None = None
        self.noise_alpha: float | None = None
        self._by_segments = False

    @property
    def trunk(self) -> Any:
        """Transformer without its output layer."""
        return getattr(self.model, self.model.base_model_prefix) if self.has_lm_head else self.model

    def remember_frozen_layers(self, count: int) -> None:
        """Run the first `count` layers, which must be frozen, once per sequence.

        No effect for architectures that do not allow it (see `FrozenPrefix.supports`).
        """
        if FrozenPrefix.supports(self.trunk, count):
            self.prefix = FrozenPrefix(self.trunk, count)

    def accept_packed_rows(self) -> None:
        """Prepare for packed rows; not together with `remember_frozen_layers`, which needs padded ones."""
        self._by_segments = attend_within_segments(self.trunk)

    def forward(
        self,
        input_ids: Tensor,
        positions: Positions,
        outputs: frozenset[OutputName],
        temperature: float = 1.0,
        teacher: TeacherSignal | None = None,
    ) -> NetworkOutput:
        """Compute the requested outputs of a batch.

        Args:
            input_ids: int64 [B, L], right-padded with any valid token id; [1, L] packed.
            positions: positions to read.
            outputs: fields of the output to compute.
            temperature: divides the logits of log-probs and entropy.
            teacher: teacher outputs at each predictor, for `divergence`.

        Raises:
            ValueError: an output needs a head that this network does not have.
        """
        self._check(outputs)
        if self.prefix is not None:
            hidden = self.prefix.run(input_ids, positions.lengths).flatten(0, 1)
        else:
            hidden = self.trunk(**self._trunk_inputs(input_ids, positions), use_cache=False).last_hidden_state.flatten(0, 1)
        logprobs = entropy = values = predicting = None
        if outputs & {"logprobs", "entropy", "hidden", "divergence"}:
            predicting = hidden.index_select(0, positions.predictors)
        if predicting is not None and outputs & {"logprobs", "entropy"}:
            head = self.model.get_output_embeddings()
            logprobs, entropy = logprobs_and_entropy(
                predicting, head.weight, head.bias, positions.targets, temperature=temperature, entropy="entropy" in outputs
            )
        apart = None
        if predicting is not None and teacher is not None and "divergence" in outputs:
            apart = self._divergence(predicting, teacher)
        if "values" in outputs and self.v_head is not None:
            values = self.v_head(hidden.index_select(0, positions.values))
        return NetworkOutput(
            logprobs if "logprobs" in outputs else None,
            entropy if "entropy" in outputs else None,
            values,
            predicting if "hidden" in outputs else None,
            apart,
        )

    def _divergence(self, predicting: Tensor, teacher: TeacherSignal) -> Tensor:
        head = self.model.get_output_embeddings()
        if teacher.ids is not None and teacher.logprobs is not None:
            return divergence(predicting, head.weight, head.bias, TopTeacher(teacher.ids, teacher.logprobs))
        if teacher.hidden is None or self.teacher_layer is None:
            raise ValueError("a teacher's hidden states need its output layer: expected teacher_layer to be set")
        return divergence(predicting, head.weight, head.bias, FullTeacher(teacher.hidden, *self.teacher_layer))

    def _trunk_inputs(self, input_ids: Tensor, positions: Positions) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if positions.packed:
            starts = [torch.arange(length, device=input_ids.device) for length in positions.lengths]
            inputs["position_ids"] = torch.cat(starts)[None]
        if self._by_segments:
            inputs["segments"] = positions.lengths if positions.packed else None
        if self.noise_alpha is not None and torch.is_grad_enabled():
            embedded = self.trunk.get_input_embeddings()(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = embedded + _noise(embedded, positions, self.noise_alpha)
        return inputs

    def _check(self, outputs: frozenset[OutputName]) -> None:
        if "values" in outputs and self.v_head is None:
            raise ValueError("values requested from a network without a value head")
        if outputs & {"logprobs", "entropy", "divergence"} and not self.has_lm_head:
            raise ValueError("log-probs requested from a network without an output layer")


def build_network(
    model: ModelSection, heads: frozenset[Head], head_init: HeadInit, seed: int, *, head_bias: bool = True
) -> Network:
    """Load a role's network in float32 on the CPU, without dropout.

    As in TRL, dropout is off because log-probs must be deterministic.

    Args:
        model: initial weights, and adapters.
        heads: {"lm"} a policy or reference, {"lm", "value"} a policy with the critic on its trunk, {"value"} a separate critic.
        head_init: initialization of a value head that the checkpoint does not hold.
        seed: for the head and the adapters; equal on every rank.
        head_bias: a new value head has a bias.

    Raises:
        UserError: the model cannot be loaded, or its value head has another width.
        ValueError: `heads` is empty.
    """
    if not heads:
        raise ValueError("a network needs at least one head")
    backbone: PreTrainedModel = load_causal_model(model) if "lm" in heads else load_trunk(model)
    v_head = None
    if "value" in heads:
        folder = Path(resolve_path(model))
        try:
            stored = find_head(folder) if folder.is_dir() else None
            v_head = make_head(backbone.config.hidden_size, stored, head_init, seed, bias=head_bias)
        except ValueError as error:
            raise UserError(f"model.path {model.path!r}: {error}") from error
    if model.lora is not None:
        backbone.requires_grad_(False)
        add_lora(backbone, model.lora, seed)
    disable_dropout(backbone)
    if model.gradient_checkpointing:
        _checkpoint_activations(backbone)
    return Network(backbone, v_head)


def _noise(embedded: Tensor, positions: Positions, alpha: float) -> Tensor:
    """Return NEFTune noise [B, T, H], uniform in +-alpha / sqrt(L x H).

    L counts the sample's own tokens (Jain et al. 2023, section 2.1).
    """
    lengths = torch.tensor(positions.lengths, dtype=embedded.dtype, device=embedded.device)
    tokens = lengths.repeat_interleave(lengths.long())[None, :, None] if positions.packed else lengths[:, None, None]
    return torch.empty_like(embedded).uniform_(-1, 1) * (alpha / (tokens * embedded.shape[-1]).sqrt())


def _checkpoint_activations(backbone: PreTrainedModel) -> None:
    """Recompute activations in the backward pass.

    It needs training mode; dropout is 0 everywhere, so nothing else changes.
    """
    backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    backbone.train()
