"""Forward passes without gradient: log-probs, entropies, values and hidden states.

Sequences are scored in micro-batches of similar length. `score_sequences` is the only forward path; the train engine uses it
for old log-probs and values, `FrozenEngine` for the reference. Both apply the compute dtype by autocast to float32 norms and
residuals, so equal weights give equal bits and the KL of an untouched policy is exactly 0, in bfloat16 too. With shared
prefixes it is 0 up to rounding (1.4e-6 nats in float32).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import UNSHARED, SharePrefixes
from rayrlhf.data.batching import micro_batches
from rayrlhf.data.expert_ids import compact
from rayrlhf.data.prefix_tree import in_prefix_order
from rayrlhf.data.records import Float32, TokenScores, TokenSequence
from rayrlhf.engines.scoring.offload import move_to_device
from rayrlhf.engines.train.collate import collate
from rayrlhf.engines.train.supervised_batches import IDS, LOGPROBS
from rayrlhf.errors import UserError
from rayrlhf.models.distillation import most_likely
from rayrlhf.models.load import load_tokenizer, resolve_dtype
from rayrlhf.models.network import Network, build_network
from rayrlhf.models.network_io import NetworkOutput, OutputName

Forward = Callable[..., NetworkOutput]
Layer = tuple[Tensor, Tensor | None]
"""Weight [V, H] and bias [V] of an output layer."""


@torch.no_grad()
def score_sequences(
    forward: Forward,
    sequences: Sequence[TokenSequence],
    outputs: frozenset[OutputName],
    *,
    temperature: float,
    token_budget: int,
    device: torch.device,
    shares_prefixes: bool = False,
    finish: Callable[[TokenScores], TokenScores] = lambda record: record,
) -> list[TokenScores]:
    """Run a network over sequences without gradient.

    Args:
        forward: the network, or a wrapper of it.
        sequences: in any order of lengths.
        outputs: fields of `TokenScores` to fill.
        temperature: divides the logits of log-probs and entropies.
        token_budget: maximum tokens of one forward, padding included.
        device: device of the network.
        shares_prefixes: compute common beginnings once, where that pays; the network's check must allow it.
        finish: changes each record before the next micro-batch, so that large outputs of all sequences never exist at once.

    Returns:
        One record per sequence, in input order.
    """
    scores: list[TokenScores | None] = [None] * len(sequences)
    lengths = [len(sequence.token_ids) for sequence in sequences]
    order = in_prefix_order([sequence.token_ids for sequence in sequences]) if shares_prefixes else None
    shared = order is not None and order.pays
    if order is not None and shared:
        batches = order.micro_batches(range(len(sequences)), token_budget)
    else:
        batches = micro_batches(lengths, token_budget)
    for batch in batches:
        members = [sequences[index] for index in batch]
        responses = [sequence.response_length for sequence in members]
        collated = collate(members, max(responses) + 1, device, shared=shared)
        output = forward(collated.input_ids, collated.positions, outputs, temperature)
        for index, record in zip(batch, _records(output, responses, collated.positions.places), strict=True):
            scores[index] = finish(record)
    return [record for record in scores if record is not None]


class FrozenEngine:
    """Model without training: the reference, or any checkpoint to compare with.

    Linear weights are kept in the compute dtype (half the memory in bfloat16), to which autocast would round them in every use.
    Weights that are 16 bits in the checkpoint stay so. The results equal those of a train engine with the same weights.
    """

    def __init__(
        self,
        model: ModelSection,
        batch_tokens: int,
        *,
        offload: bool = False,
        share_prefixes: SharePrefixes = "auto",
        vocabulary: int | None = None,
    ) -> None:
        """Load the model on this process's GPU, if it has one, else on the CPU.

        Args:
            model: model to load, without adapters.
            batch_tokens: token budget of one forward.
            offload: keep its weights in main memory between calls of `score`.
            share_prefixes: `train.share_prefixes`.
            vocabulary: return that many most likely tokens in place of hidden states.

        Raises:
            UserError: the model cannot be loaded.
        """
        self._device = training_device()
        self._dtype = resolve_dtype(model.dtype)
        self._batch_tokens = batch_tokens
        network = build_network(
            model.model_copy(update={"lora": None, "gradient_checkpointing": False}), frozenset({"lm"}), "zero", 0, frozen=True
        )
        network.accept_packed_rows(packing=False, unshared=UNSHARED[share_prefixes])
        hold_linear_weights_in(network, self._dtype)
        self._network: Network = network
        self._path, self._rows = model.path, int(network.model.config.get_text_config().vocab_size)
        self.load_check, self.shares_prefixes = network.check.line(), network.check.shares_prefixes
        self._offload = move_to_device(network, self._device, offload=offload)
        self._vocabulary = vocabulary
        # Output layers are padded to different widths even within a family.
        self._tokens = len(load_tokenizer(model)) if vocabulary is not None else 0

    def score(
        self,
        sequences: Sequence[TokenSequence],
        outputs: frozenset[OutputName],
        *,
        temperature: float = 1.0,
        reference: bool = False,
    ) -> list[TokenScores]:
        """Score sequences, in input order; `reference` has no effect.

        Raises:
            UserError: one has a token beyond the model's vocabulary.
        """
        largest = max((int(sequence.token_ids.max(initial=0)) for sequence in sequences), default=0)
        if largest >= self._rows:
            raise UserError(
                f"reference or teacher {self._path!r}: token {largest} to score, expected at most {self._rows - 1}, the last"
                " of the model"
            )
        with self._offload.in_place(), autocast(self._device, self._dtype):
            return score_sequences(
                self._network,
                sequences,
                outputs,
                temperature=temperature,
                token_budget=self._batch_tokens,
                device=self._device,
                shares_prefixes=self.shares_prefixes,
                finish=self._with_most_likely,
            )

    def _with_most_likely(self, scores: TokenScores) -> TokenScores:
        """Replace hidden states by the most likely tokens of the tokenizer, where that is wanted."""
        if self._vocabulary is None or scores.hidden is None:
            return scores
        weight, bias = self.output_layer()
        layer = weight[: self._tokens], None if bias is None else bias[: self._tokens]
        return replace(scores, hidden=None, **stored_signal(scores.hidden, layer, self._vocabulary))

    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """Return weight [V, H] and bias of the output layer."""
        head = self._network.model.get_output_embeddings()
        return head.weight.detach(), None if head.bias is None else head.bias.detach()


def stored_signal(hidden: Float32, layer: Layer, vocabulary: int) -> dict[str, np.ndarray]:
    """Return the stored form of a teacher's hidden states [N, H]; see `DistillationSample`."""
    ids, logprobs = most_likely(torch.from_numpy(hidden).to(layer[0].device), *layer, vocabulary)
    return {IDS: ids.cpu().numpy().astype(np.int32), LOGPROBS: logprobs.cpu().numpy()}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the autocast context of a compute dtype; it does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def training_device() -> torch.device:
    """Return this process's GPU, which Ray makes the only visible one, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def hold_linear_weights_in(network: Network, dtype: torch.dtype) -> None:
    """Round the linear weights once instead of in every forward.

    The output layer may be tied to the embedding, and a value head computes in float32, so both stay as they are. So do weights
    that are held in the checkpoint's 16 bits.
    """
    output_layer = network.model.get_output_embeddings()
    for module in network.model.modules():
        if isinstance(module, nn.Linear) and module is not output_layer and module.weight.dtype == torch.float32:
            module.to(dtype)


def _records(output: NetworkOutput, responses: Sequence[int], places: Sequence[NDArray[np.int64]]) -> list[TokenScores]:
    """Split flat outputs into one record per sequence.

    Values have one entry more than there are response tokens. Experts are those of all tokens, which are at `places`.
    """
    ends, value_ends = np.cumsum(responses)[:-1], np.cumsum([length + 1 for length in responses])[:-1]

    def split(flat: Tensor | None, at: NDArray[np.int64]) -> list[NDArray[np.float32]] | list[None]:
        return [None] * len(responses) if flat is None else np.split(flat.float().cpu().numpy(), at)

    parts = (
        split(output.logprobs, ends),
        split(output.entropy, ends),
        split(output.values, value_ends),
        split(output.hidden, ends),
    )
    records = [TokenScores(*fields) for fields in zip(*parts, strict=True)]
    if output.experts is None:
        return records
    ids = output.experts.cpu().numpy()
    experts = (compact([(0, ids[own])], len(own), int(ids.max()) + 1) for own in places)
    return [replace(record, experts=own) for record, own in zip(records, experts, strict=True)]
