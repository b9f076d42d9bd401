"""Forward passes without gradient: log-probs, entropies, values and hidden states.

Sequences are scored in micro-batches of similar length. `score_sequences` is the only forward path; the train engine uses it
for old log-probs and values, `FrozenEngine` for the reference. Both apply the compute dtype by autocast to float32 norms and
residuals, so equal weights give equal bits and the KL of an untouched policy is exactly 0, in bfloat16 too.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayrlhf.config.model import ModelSection
from rayrlhf.data.batching import micro_batches
from rayrlhf.data.records import TokenScores, TokenSequence
from rayrlhf.engines.scoring.offload import move_to_device
from rayrlhf.engines.train.collate import collate
from rayrlhf.models.load import resolve_dtype
from rayrlhf.models.network import Network, NetworkOutput, OutputName, build_network

Forward = Callable[..., NetworkOutput]


@torch.no_grad()
def score_sequences(
    forward: Forward,
    sequences: Sequence[TokenSequence],
    outputs: frozenset[OutputName],
    *,
    temperature: float,
    token_budget: int,
    device: torch.device,
) -> list[TokenScores]:
    """Run a network over sequences without gradient.

    Args:
        forward: the network, or a wrapper of it.
        sequences: in any order of lengths.
        outputs: fields of `TokenScores` to fill.
        temperature: divides the logits of log-probs and entropies.
        token_budget: maximum tokens of one forward, padding included.
        device: device of the network.

    Returns:
        One record per sequence, in input order.
    """
    scores: list[TokenScores | None] = [None] * len(sequences)
    lengths = [len(sequence.token_ids) for sequence in sequences]
    for batch in micro_batches(lengths, token_budget):
        members = [sequences[index] for index in batch]
        responses = [sequence.response_length for sequence in members]
        padded = collate(members, max(responses) + 1, device)
        output = forward(padded.input_ids, padded.positions, outputs, temperature)
        for index, record in zip(batch, _records(output, responses), strict=True):
            scores[index] = record
    return [record for record in scores if record is not None]


class FrozenEngine:
    """Model without training: the reference, or any checkpoint to compare with.

    Linear weights are kept in the compute dtype (half the memory in bfloat16), everything else in float32; autocast would round
    the linear weights in the same way, so the results are those of a train engine with the same weights.
    """

    def __init__(self, model: ModelSection, batch_tokens: int, *, offload: bool = False) -> None:
        """Load the model on this process's GPU, if it has one, else on the CPU.

        Args:
            model: model to load, without adapters.
            batch_tokens: token budget of one forward.
            offload: keep its weights in main memory between calls of `score`.

        Raises:
            UserError: the model cannot be loaded.
        """
        self._device = training_device()
        self._dtype = resolve_dtype(model.dtype)
        self._batch_tokens = batch_tokens
        network = build_network(
            model.model_copy(update={"lora": None, "gradient_checkpointing": False}), frozenset({"lm"}), "zero", 0
        )
        network.requires_grad_(False)
        hold_linear_weights_in(network, self._dtype)
        self._network: Network = network
        self.load_check = network.check.line()
        self._offload = move_to_device(network, self._device, offload=offload)

    def score(
        self,
        sequences: Sequence[TokenSequence],
        outputs: frozenset[OutputName],
        *,
        temperature: float = 1.0,
        reference: bool = False,
    ) -> list[TokenScores]:
        """Score sequences, in input order; `reference` has no effect."""
        with self._offload.in_place(), autocast(self._device, self._dtype):
            return score_sequences(
                self._network,
                sequences,
                outputs,
                temperature=temperature,
                token_budget=self._batch_tokens,
                device=self._device,
            )

    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """Return weight [V, H] and bias of the output layer."""
        head = self._network.model.get_output_embeddings()
        return head.weight.detach(), None if head.bias is None else head.bias.detach()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the autocast context of a compute dtype; it does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def training_device() -> torch.device:
    """Return this process's GPU, which Ray makes the only visible one, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def hold_linear_weights_in(network: Network, dtype: torch.dtype) -> None:
    """Round the linear weights once instead of in every forward.

    The output layer may be tied to the embedding, and a value head computes in float32, so both stay in float32.
    """
    output_layer = network.model.get_output_embeddings()
    for module in network.model.modules():
        if isinstance(module, nn.Linear) and module is not output_layer:
            module.to(dtype)


def _records(output: NetworkOutput, responses: Sequence[int]) -> list[TokenScores]:
    """Split flat outputs into one record per sequence.

    Values have one entry more than there are response tokens.
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
    return [TokenScores(*fields) for fields in zip(*parts, strict=True)]
