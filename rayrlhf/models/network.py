"""Network of any role: transformer trunk with output layer, value head, or both.

It computes only the requested outputs, only at the requested positions, as flat [N] tensors. Batches are padded on the right
and attention is causal, so no real token attends to padding: no attention mask is needed (the fast causal kernel runs) and
positions count from 0. Packed rows hold samples end to end without padding, and may hold shared prefixes once. Models in which
this would make samples influence each other compute them one by one (`rayrlhf.models.load_check`).
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from rayrlhf.config.model import ModelSection
from rayrlhf.data.prefix_tree import prefix_tree
from rayrlhf.errors import UserError
from rayrlhf.library_types import PreTrainedModel
from rayrlhf.models.direct_load import WeightShards
from rayrlhf.models.distillation import divergence_from
from rayrlhf.models.frozen_prefix import FrozenPrefix
from rayrlhf.models.load import disable_dropout, load_causal_model, load_trunk
from rayrlhf.models.load_check import (
    Layout,
    LoadCheck,
    attention_on_cpu,
    check_network,
    check_training_mode,
    densest_layout,
    reads_embeddings,
    splits,
)
from rayrlhf.models.logprobs import logprobs_and_entropy
from rayrlhf.models.lora import add_lora
from rayrlhf.models.model_path import model_folder, one_line_reason
from rayrlhf.models.network_io import Head, NetworkOutput, OutputName, Positions, TeacherSignal
from rayrlhf.models.packed_attention import Segments, SegmentsError, attend_within_segments
from rayrlhf.models.router_load import RouterLoad
from rayrlhf.models.routing_replay import ARGUMENT, ForcedExperts, differing, forced_experts, parts, replay_routing
from rayrlhf.models.sequence_parallel import RowSplit
from rayrlhf.models.tensor_parallel import WeightSplit, vocabulary_part, whole_layer
from rayrlhf.models.value_head import HeadInit, ValueHead, find_head, make_head


class Network(nn.Module):
    """Transformer trunk with heads.

    Attributes:
        model: transformers model: a causal language model with an "lm" head, otherwise the trunk only.
        v_head: value head, or None.
        prefix: cached outputs of the frozen lower layers, if `remember_frozen_layers` was called.
        by_segments: the trunk attends within segments; see `attend_within_segments`.
        replays_routing: experts of the positions are forced; see `replay_routing`.
        row_split: this rank's columns of each row, if `split_rows` was called.
        weight_split: this rank's part of each weight, if they are cut (`rayrlhf.models.load_check.split_weights`).
        teacher_layer: weight [V, H] and bias of the teacher's output layer, no parameters of this network; None without one.
        float32_head: compute log-probs' logits in float32 also under autocast.
        noise_alpha: strength of NEFTune noise on the embeddings while gradients are enabled; None adds none.
        check: outcome of the check on load; decides how samples share a forward, and what follows the output layer.
        probed: padded states of that check, until `accept_packed_rows` compares others with them.
    """

    def __init__(self, model: PreTrainedModel, v_head: ValueHead | None, *, float32_head: bool = False) -> None:
        super().__init__()
        self.float32_head = float32_head
        self.model = model
        self.v_head = v_head
        self.has_lm_head = model.get_output_embeddings() is not None
        self.prefix: FrozenPrefix | None = None
        self.row_split: RowSplit | None = None
        self.weight_split: WeightSplit | None = None
        self.teacher_layer: tuple[Tensor, Tensor | None] | None = None
        self.noise_alpha: float | None = None
        self.check = LoadCheck(str(model.config.model_type))
        self.probed: Tensor | None = None
        self.by_segments = self.replays_routing = False
        self._load: RouterLoad | None = None

    @property
    def trunk(self) -> Any:
        """Transformer without its output layer."""
        if not self.has_lm_head:
            return self.model
        # A few families hold their trunk under another name than their prefix says.
        return getattr(self.model, self.model.base_model_prefix, None) or self.model.model

    def remember_frozen_layers(self, count: int) -> None:
        """Run the first `count` layers, which must be frozen, once per sequence.

        No effect for architectures that do not allow it (see `FrozenPrefix.supports`).
        """
        together = self.check.layout != "alone" and self.check.longest_together is None
        named = {"segments": None} if self.by_segments else {}
        if together and FrozenPrefix.supports(self.trunk, count, **named):
            self.prefix = FrozenPrefix(self.trunk, count)

    def add_noise(self, alpha: float) -> None:
        """Add NEFTune noise of a strength to the embeddings, while gradients are enabled.

        Raises:
            UserError: the trunk computes something else from embeddings than from tokens.
        """
        with attention_on_cpu(self.trunk):
            fits = reads_embeddings(self.trunk)
        if not fits:
            raise UserError(
                f"train.neftune_alpha: a {self.check.family} model computes something else from embeddings than from tokens; "
                "expected null"
            )
        self.noise_alpha = alpha

    def accept_packed_rows(self, *, packing: bool = True, unshared: str = "") -> None:
        """Prepare for packed rows and shared prefixes, and check both.

        Samples in them must not influence each other. Models that fail the check compute packed samples one by one, or without
        sharing. Call it before `remember_frozen_layers`.

        Args:
            packing: samples will be packed; otherwise only shared.
            unshared: the setting because of which no prefixes are shared; empty for none.
        """
        self.check = replace(self.check, unshared=unshared)
        probed, self.probed = self.probed, None
        if self.check.layout == "alone" or (unshared and not packing):
            return
        own = self.trunk.config._attn_implementation
        self.by_segments = attend_within_segments(self.trunk)
        with attention_on_cpu(self.trunk):
            try:
                layout, shares = densest_layout(self, probed, share=not unshared)
            except SegmentsError:
                self.by_segments = False
                self.trunk.set_attn_implementation(own)
                layout, shares = densest_layout(self, probed, share=False)
            if layout == "padded" and self.by_segments:  # the kernel may be wrong for padded rows too
                self.by_segments = False
                self.trunk.set_attn_implementation(own)
                layout, shares = densest_layout(self, probed, share=False)
        self.check = replace(self.check, layout=layout, shares_prefixes=shares)

    def split_rows(self, split: RowSplit, path: str) -> None:
        """Compute only this rank's columns of every row, and check them.

        They must be those of whole rows. Every rank of the group takes part. Not together with `remember_frozen_layers`.

        Args:
            split: the columns of each rank.
            path: of the model, for the message.

        Raises:
            UserError: they are not.
        """
        apart = self.check.layout == "alone" or self.check.longest_together is not None
        if apart or not splits(self, split):
            raise UserError(
                f"sequence_parallel {split.size}: a {self.check.family} model ({path}) computes something else where ranks "
                "share a row; expected 1"
            )

    def replay_routing(self, path: str) -> None:
        """Force the experts of the positions; see `rayrlhf.models.routing_replay`."""
        replay_routing(self.model, path)
        self.replays_routing = True

    def read(self, samples: Sequence[Tensor], layout: Layout | Literal["shared"]) -> Tensor:
        """Return the final hidden states of samples in one layout.

        Samples are int64 [L] each, states [sum of L, H].
        """
        lengths = [len(sample) for sample in samples]
        if layout == "shared":
            tree = prefix_tree([sample.cpu().numpy() for sample in samples])
            row = torch.from_numpy(tree.token_ids)[None].to(samples[0].device)
            states = self._trunk_states(row, tree.lengths, packed=True, parents=tree.parents)[0]
            return torch.cat([states[torch.from_numpy(places).to(states.device)] for places in tree.places])
        if layout == "alone":
            return torch.cat([self._trunk_states(sample[None], [len(sample)], packed=False)[0] for sample in samples])
        if layout == "packed":
            rows = torch.cat(list(samples))[None]
        else:
            rows = torch.stack([pad(sample, (0, max(lengths) - len(sample))) for sample in samples])
        states = self._trunk_states(rows, lengths, packed=layout == "packed")
        if self.row_split is not None:
            states = self.row_split.gather(states, rows.shape[1])
        if layout == "packed":
            return states[0]
        return torch.cat([row[:length] for row, length in zip(states, lengths, strict=True)])

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
        split, part = self.row_split, None
        if split is not None:
            part = split.part(positions, teacher, input_ids.shape[1])
            positions, teacher = part.positions, part.teacher
        forced = forced_experts(self, input_ids, positions.experts, record="experts" in outputs)
        self._load = RouterLoad(self.model.config, split) if "load" in outputs else None
        hidden = self._hidden(input_ids, positions, forced)
        logprobs = entropy = values = predicting = apart = None
        if outputs & {"logprobs", "entropy", "hidden", "divergence"}:
            predicting = hidden.index_select(0, positions.predictors)
            predicting = predicting if self.check.logits.scale == 1.0 else predicting * self.check.logits.scale
        if predicting is not None and outputs & {"logprobs", "entropy"}:
            head = self.model.get_output_embeddings()
            logprobs, entropy = logprobs_and_entropy(
                predicting, head.weight, head.bias, positions.targets, temperature=temperature, cap=self.check.logits.cap,
                entropy="entropy" in outputs, part=vocabulary_part(head), float32=self.float32_head,
            )  # fmt: skip
        if predicting is not None and teacher is not None and "divergence" in outputs:
            apart = divergence_from(predicting, whole_layer(self.model.get_output_embeddings()), teacher, self.teacher_layer)
        if "values" in outputs and self.v_head is not None:
            values = self.v_head(hidden.index_select(0, positions.values))
        output = NetworkOutput(
            logprobs if "logprobs" in outputs else None,
            entropy if "entropy" in outputs else None,
            values,
            predicting if "hidden" in outputs else None,
            apart,
            differing(forced, positions.predictors) if "routing" in outputs else None,
            forced.ids if forced is not None and "experts" in outputs else None,
        )
        output = output if split is None or part is None else split.join(output, part)
        load, self._load = self._load, None
        return output if load is None else output._replace(load=load.total())

    def _hidden(self, input_ids: Tensor, positions: Positions, forced: ForcedExperts | None) -> Tensor:
        """Return the final hidden states of a batch, [B * L, H], undefined at padding.

        They are [B * columns, H] where ranks share rows.
        """
        lengths, packed, limit = positions.lengths, positions.packed, self.check.longest_together
        if positions.parents is not None:
            if not self.check.shares_prefixes:
                raise ValueError(f"a {self.check.family} model cannot share prefixes: expected samples in rows of their own")
            return self._trunk_states(
                input_ids, lengths, packed=True, parents=positions.parents, places=positions.places
            ).flatten(0, 1)
        apart = self.check.layout == "alone" or (packed and self.check.layout != "packed")
        if self.row_split is not None or len(lengths) == 1 or not (apart or (limit is not None and max(lengths) > limit)):
            states = self._trunk_states(input_ids, lengths, packed=packed, places=positions.places, forced=forced)
            return states.flatten(0, 1)
        rows = (
            torch.split(input_ids[0], lengths)
            if packed
            else [row[:length] for row, length in zip(input_ids, lengths, strict=True)]
        )
        width = 0 if packed else input_ids.shape[1]
        shares = zip(rows, parts(forced, lengths, width), strict=True)
        found = [self._trunk_states(row[None], [len(row)], packed=False, forced=part)[0] for row, part in shares]
        return torch.cat([pad(state, (0, 0, 0, max(0, width - len(state)))) for state in found])

    def _trunk_states(
        self,
        input_ids: Tensor,
        lengths: list[int],
        *,
        packed: bool,
        parents: list[int] | None = None,
        places: Sequence[NDArray[np.int64]] = (),
        forced: ForcedExperts | None = None,
    ) -> Tensor:
        """Run the trunk on [B, L] tokens, from cached layers if `places` are given.

        Returns [B, L, H], or this rank's columns of them.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids}
        segments = Segments.of(lengths, parents, input_ids.device) if packed else None
        if segments is not None:
            inputs["position_ids"] = segments.positions(input_ids.device)
        if self.by_segments:
            inputs["segments"] = segments
        if forced is not None:
            inputs[ARGUMENT] = forced
        if self.row_split is not None:
            inputs = self.row_split.inputs(input_ids, lengths, packed=packed)
        if self.noise_alpha is not None and torch.is_grad_enabled():
            embedded = self.trunk.get_input_embeddings()(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = embedded + self._noise(embedded, lengths, self.noise_alpha, packed=packed)
        elif self.prefix is not None and places:
            return self.prefix.run(inputs.pop("input_ids"), places, **inputs)
        if self._load is not None:
            inputs["output_router_logits"] = True
        output = self.trunk(**inputs, use_cache=False)
        if self._load is not None:
            self._load.add(output.router_logits, input_ids, lengths, packed=packed)
        states: Tensor = output.last_hidden_state
        return states

    def _noise(self, embedded: Tensor, lengths: list[int], alpha: float, *, packed: bool) -> Tensor:
        """Return NEFTune noise [B, T, H], uniform in +-alpha / sqrt(L x H).

        L counts the sample's own tokens (Jain et al. 2023, section 2.1).
        """
        counts = torch.tensor(lengths, dtype=embedded.dtype, device=embedded.device)
        tokens = counts.repeat_interleave(counts.long())[None, :, None] if packed else counts[:, None, None]
        if packed and self.row_split is not None:
            tokens = self.row_split.own(tokens).clamp(min=1)
        return torch.empty_like(embedded).uniform_(-1, 1) * (alpha / (tokens * embedded.shape[-1]).sqrt())

    def _check(self, outputs: frozenset[OutputName]) -> None:
        if "values" in outputs and self.v_head is None:
            raise ValueError("values requested from a network without a value head")
        if outputs & {"logprobs", "entropy", "divergence"} and not self.has_lm_head:
            raise ValueError("log-probs requested from a network without an output layer")
        if outputs & {"hidden", "divergence"} and self.check.logits.cap is not None:
            raise UserError(
                f"a {self.check.family} model caps its logits: distillation and KL over the whole vocabulary are not supported"
            )


def build_network(
    model: ModelSection,
    heads: frozenset[Head],
    head_init: HeadInit,
    seed: int,
    *,
    head_bias: bool = True,
    frozen: bool = False,
    shards: WeightShards | None = None,
    outputs: Mapping[str, float] | None = None,
    head: ValueHead | None = None,
) -> Network:
    """Load a role's network without dropout, on the CPU or in shards.

    As in TRL, dropout is off because log-probs must be deterministic. Weights to train are float32; frozen ones, the base of
    adapters included, keep the dtype of their checkpoint (`rayrlhf.models.held_weights`).

    Args:
        model: initial weights, and adapters.
        heads: {"lm"} a policy or reference, {"lm", "value"} a policy with the critic on its trunk, {"value"} a separate critic.
        head_init: initialization of a value head that the checkpoint does not hold.
        seed: for the head and the adapters; equal on every rank.
        head_bias: a new value head has a bias.
        frozen: nothing is trained.
        shards: keep this rank's part of each weight; every rank takes part.
        outputs: of a classifier whose weighted sum is the value, see `find_head`.
        head: value head in place of the one that `find_head` reads.

    Raises:
        UserError: the model cannot be loaded, its value head has another width, or its log-probs are not those of trunk and
            output layer (`rayrlhf.models.load_check`).
        ValueError: `heads` is empty.
    """
    if not heads:
        raise ValueError("a network needs at least one head")
    load, v_head = load_causal_model if "lm" in heads else load_trunk, None
    backbone: PreTrainedModel = load(model, frozen=frozen or model.lora is not None, shards=shards)
    if "value" in heads:
        try:
            stored = find_head(model_folder(model), outputs)
            v_head = head or make_head(backbone.config.hidden_size, stored, head_init, seed, bias=head_bias)
        except ValueError as error:
            raise UserError(f"model.path {model.path!r}: {error}") from error
        used = v_head.stored_names if stored is not None or head is not None else ()
        backbone.unused_weights = [name for name in backbone.unused_weights if not name.startswith(used)]
    disable_dropout(backbone)
    network = Network(backbone, v_head, float32_head=model.head_dtype == "float32")
    with attention_on_cpu(backbone), nullcontext() if shards is None else shards.in_use(backbone):
        if model.lora is not None:
            add_lora(backbone, model.lora, seed)
        try:
            network.check = check_network(network, model.path)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            place = f"model.path {model.path!r}: not computed as trunk and output layer ({network.check.family})"
            raise UserError(f"{place}: {one_line_reason(error)}") from error
        if model.gradient_checkpointing:
            # Recomputing needs training mode; dropout is 0 everywhere, so nothing else changes.
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            check_training_mode(backbone, model.path)
    return network.requires_grad_(False) if frozen else network
