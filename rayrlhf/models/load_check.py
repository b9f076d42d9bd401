"""Check of a loaded model on 32 random tokens, before anything is trained or scored.

The log-probs of two short samples are computed by the model's own forward pass, and by trunk and output layer in the layouts
of batches: padded, packed into one row, and with shared prefixes. A scale or a soft cap behind the output layer is recognized
and applied. Layouts in which samples influence each other are not used. Any other difference is an error. A model that passes
at once takes four forward passes of the trunk.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from rayrlhf.errors import UserError
from rayrlhf.library_types import PretrainedConfig, PreTrainedModel
from rayrlhf.models.direct_load import WeightShards
from rayrlhf.models.packed_attention import SegmentsError, attend_within_segments
from rayrlhf.models.sequence_parallel import RowSplit, split_attention
from rayrlhf.models.tensor_parallel import WeightSplit, whole_shape

if TYPE_CHECKING:
    from rayrlhf.models.network import Network

Layout = Literal["alone", "padded", "packed"]
"""Samples in one forward: one per forward, one per row, or end to end in one row."""

LENGTHS = (20, 12)
TOLERANCE = 1e-3
"""Allowed difference of log-probs in nats, and of hidden states relative to the largest.

Rounding gave up to 3e-5 nats with SmolLM2 in float32; the smallest fault of the tried families was 0.065 nats.
"""


class LogitMap(NamedTuple):
    """Function from the output layer's product to the logits.

    logits = cap x tanh(scale x product / cap).

    Attributes:
        scale: factor of the product.
        cap: bound of the logits; None applies no bound.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """Return the logits of any shape."""
        scaled = product if self.scale == 1 else product * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


IDENTITY = LogitMap()


@dataclass(frozen=True)
class LoadCheck:
    """Outcome of the check.

    Attributes:
        family: `model_type` of the configuration.
        logits: map behind the output layer.
        gap: largest difference to the model's own log-probs, nats; None for a trunk without output layer.
        layout: the densest layout that keeps samples independent.
        longest_together: samples beyond this many tokens are computed alone; None without such a limit.
        shares_prefixes: tokens that several samples begin with may be computed once.
        unshared: the setting because of which they are computed again all the same; empty for none.
        unused: tensors of the files that the model does not have.
    """

    family: str
    logits: LogitMap = IDENTITY
    gap: float | None = None
    layout: Layout = "padded"
    longest_together: int | None = None
    shares_prefixes: bool = False
    unshared: str = ""
    unused: tuple[str, ...] = ()

    def line(self) -> str:
        """Return the outcome in words."""
        parts = [self.family]
        if self.gap is not None:
            parts.append(f"log-probs within {max(self.gap, 1e-6):.0e} nats of the model's own on {sum(LENGTHS)} random tokens")
        if self.logits.scale != 1:
            parts.append(f"logits scaled by {self.logits.scale:g}")
        if self.logits.cap is not None:
            parts.append(f"logits capped at {self.logits.cap:g}")
        shares = f" {'and' if self.shares_prefixes else 'but do not'} share prefixes"
        rows = {
            "packed": f"samples may be packed{'' if self.unshared else shares}",
            "padded": "samples are padded, not packed",
            "alone": "samples are computed one by one, because neighbors in a batch would influence each other",
        }
        parts.append(rows[self.layout])
        if self.unshared:
            parts.append(f"prefixes are not shared: {self.unshared}")
        if self.longest_together is not None:
            parts.append(f"beyond {self.longest_together} tokens one by one, because LongRoPE depends on the longest")
        if self.unused:
            parts.append(
                f"not used of its files: {self.unused[0]}{f' and {len(self.unused) - 1} more' if self.unused[1:] else ''}"
            )
        return ", ".join(parts)


@torch.no_grad()
def check_network(network: "Network", path: str) -> LoadCheck:
    """Compare log-probs with the model's own, and layouts with each other.

    Args:
        network: in evaluation mode, on the CPU, without changed adapters.
        path: of the model, for the message.

    Raises:
        UserError: the log-probs differ, so the model would be trained on another objective.
    """
    model = network.model
    text = model.config.get_text_config()
    unused = tuple(getattr(model, "unused_weights", ()))
    check = LoadCheck(str(model.config.model_type), longest_together=rope_limit(text), unused=unused)
    samples = probe_samples(model)
    network.probed = network.read([*samples, _branch(*samples)], "padded")
    padded = network.probed[: sum(LENGTHS)]
    if not network.has_lm_head:
        if _equal(padded, network.read(samples, "alone")):
            return check
        _check_causal(network, samples[0], path)
        return replace(check, layout="alone")
    own = torch.cat([model(input_ids=sample[None], use_cache=False).logits[0].float() for sample in samples])
    logits, gap = _match(own, _product(model, padded), samples, text)
    if not gap <= _allowed(own):  # NaN, too
        _check_causal(network, samples[0], path)
        check = replace(check, layout="alone")
        logits, gap = _match(own, _product(model, network.read(samples, "alone")), samples, text)
    if not gap <= _allowed(own):
        raise UserError(
            f"model.path {path!r}: the log-probs of a {check.family} model differ by up to {gap:.1g} nats from trunk and "
            "output layer, because it computes more behind them; such models are not supported"
        )
    return replace(check, logits=logits, gap=gap)


def _check_causal(network: "Network", sample: Tensor, path: str) -> None:
    """Check that tokens do not see later ones.

    Needed only where padding on the right changes something.

    Raises:
        UserError: they do.
    """
    half = sample[: len(sample) // 2]
    if not _equal(network.read([half], "alone"), network.read([sample], "alone")[: len(half)]):
        raise UserError(
            f"model.path {path!r}: its tokens see later ones ({network.check.family}), expected a causal language model"
        )


@torch.no_grad()
def densest_layout(network: "Network", probed: Tensor | None, *, share: bool) -> tuple[Layout, bool]:
    """Return the densest layout with the states of padded samples; True if prefixes are shared.

    A row with shared prefixes has packed samples in it, so packed ones are only read apart where that row is wrong.

    Args:
        network: computes padded samples rightly.
        probed: padded states of `check_network`; None reads them.
        share: prefixes may be shared.
    """
    text = network.model.config.get_text_config()
    if getattr(text, "attention_chunk_size", None) is not None:  # chunks count from the start of the row
        return "padded", False
    first, second = probe_samples(network.model)
    samples = [first, second, _branch(first, second)]
    wanted = network.read(samples, "padded") if probed is None else probed
    if share and network.by_segments and rope_limit(text) is None:
        beginning = first[:7]
        row = network.read([*samples, beginning], "shared")
        if _equal(row, torch.cat([wanted, wanted[: len(beginning)]])):
            return "packed", True
    packed = _equal(network.read([first, second], "packed"), wanted[: sum(LENGTHS)])
    return "packed" if packed else "padded", False


@torch.no_grad()
def splits(network: "Network", split: RowSplit) -> bool:
    """Split a network's rows over ranks; return True if the results are unchanged.

    All ranks return the same. Every rank of the group takes part.
    """
    samples = probe_samples(network.model)
    fits = False
    try:
        with attention_on_cpu(network.trunk):
            wanted = network.read(samples, "padded")
        network.by_segments = network.by_segments or attend_within_segments(network.trunk)
        if network.by_segments:
            split_attention(network.trunk)
            network.row_split = split
            # Every rank reads both: one that stopped at the first difference would leave the others waiting.
            padded, packed = network.read(samples, "padded"), network.read(samples, "packed")
            fits = _equal(padded, wanted) and _equal(packed, wanted)
    except SegmentsError:
        fits = False
    return split.agree(fits, samples[0].device)


def split_weights(
    network: "Network", split: WeightSplit, path: str, device: torch.device, shards: WeightShards | None = None
) -> None:
    """Cut a network's weights, move it to its device, and check it.

    Hidden states must be those of whole weights, and so must the gradients of norms and biases: those of a layer that reads
    the features of one rank only would miss the other ranks' part. Every rank of the group takes part.

    Args:
        network: whole, on the CPU; or divided by `shards`, and in use.
        split: the part of each rank.
        path: of the model, for the message.
        device: of this rank.
        shards: divide each part over the ranks that hold the same one.

    Raises:
        UserError: the weights cannot be cut, or the ranks compute something else.
    """
    reason = split.obstacle(network.model)
    if reason is None:
        vectors = [one for one in network.trunk.parameters() if one.requires_grad and len(whole_shape(one)) == 1]
        with attention_on_cpu(network.trunk):
            wanted = _states_and_gradients(network, vectors)
        split.cut(network.model, shards)
        network.to(device)
        try:
            states, *gradients = _states_and_gradients(network, vectors)
        except RuntimeError:  # a shape that counts on all heads
            fits = False
        else:
            found = [states, *(split.whole(*both) for both in zip(vectors, gradients, strict=True))]
            floor = 1e-5 * max((float(one.abs().max()) for one in wanted[1:]), default=0.0)
            fits = all(_equal(*both, floor=floor) for both in zip(found, (one.to(device) for one in wanted), strict=True))
        if not split.agree(fits, device):
            reason = f"computes something else where ranks share its {split.shared}; expected 1"
    if reason is not None:
        raise UserError(f"{split.key} {split.size}: a {network.check.family} model ({path}) {reason}")
    network.weight_split = split


@torch.enable_grad()
def _states_and_gradients(network: "Network", parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the states of the probe and the gradients of a sum of them."""
    states = network.read(probe_samples(network.model), "padded")
    if not parameters:
        return [states.detach()]
    signs = torch.arange(states.numel(), device=states.device).cos().view_as(states)
    gradients = torch.autograd.grad((states * signs).sum(), list(parameters), allow_unused=True)
    return [states.detach(), *(states.new_zeros(1) if one is None else one for one in gradients)]


@torch.no_grad()
def reads_embeddings(trunk: PreTrainedModel) -> bool:
    """Return True if a trunk computes the same from embeddings as from tokens.

    The embeddings are changed a little.
    Some scale embeddings, or look up which tokens they are of.
    """
    sample = probe_samples(trunk)[0][None]
    try:
        almost = trunk.get_input_embeddings()(sample) * (1 + 1e-6)
        embedded = trunk(inputs_embeds=almost, use_cache=False).last_hidden_state
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
    return _equal(embedded, trunk(input_ids=sample, use_cache=False).last_hidden_state)


def probe_samples(model: PreTrainedModel) -> list[Tensor]:
    """Return `probe_tokens` of a model's vocabulary, on its device."""
    device = next(model.parameters()).device
    return [sample.to(device) for sample in probe_tokens(int(model.config.get_text_config().vocab_size))]


def probe_tokens(vocabulary: int) -> list[Tensor]:
    """Return two samples of random tokens, int64 [20] and [12]."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(3, vocabulary - 1), vocabulary, (sum(LENGTHS),), generator=generator)
    return list(torch.split(tokens, list(LENGTHS)))


def _branch(first: Tensor, second: Tensor) -> Tensor:
    """Return a sample that branches off the first one after 15 of its tokens."""
    return torch.cat([first[:15], second[:4]])


def _product(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Apply the output layer: float32 [L, V] from [L, H]."""
    head = model.get_output_embeddings()
    return torch.nn.functional.linear(hidden, head.weight.to(hidden.dtype), head.bias).float()


def _match(own: Tensor, product: Tensor, samples: Sequence[Tensor], text: PretrainedConfig) -> tuple[LogitMap, float]:
    """Return the map that gives the model's own logits [L, V], and its gap."""
    wanted = _logprobs(own, samples)

    def measured(candidate: LogitMap) -> tuple[float, LogitMap]:
        return float((_logprobs(candidate(product), samples) - wanted).abs().max()), candidate

    plain, _ = measured(IDENTITY)
    caps = [float(cap) for name, cap in text.to_dict().items() if "cap" in name and _positive(cap)]
    gap, best = min([(plain, IDENTITY), *(measured(LogitMap(1.0, cap)) for cap in caps)], key=itemgetter(0))
    if plain <= 10 * gap:  # caps of attention scores leave small logits as they are, too
        gap, best = plain, IDENTITY
    if gap > _allowed(own):
        gap, best = measured(LogitMap(_round(float((own.double() * product).sum() / (product.double() ** 2).sum()))))
    return best, gap


def _round(scale: float) -> float:
    """Remove the error of measurement: a scale or its inverse has few digits."""
    near = (float(f"{scale:.6g}"), 1 / float(f"{1 / scale:.6g}")) if scale else (scale,)
    return min(near, key=lambda value: abs(value - scale))


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _allowed(logits: Tensor) -> float:
    """Return the tolerance in nats; large logits have larger rounding errors."""
    return TOLERANCE * max(1.0, float(logits.abs().max()) / 30)


def _logprobs(logits: Tensor, samples: Sequence[Tensor]) -> Tensor:
    """Return the log-prob of each next token, [L - samples]."""
    parts = torch.split(logits.log_softmax(-1), [len(sample) for sample in samples])
    return torch.cat([part[:-1].gather(-1, sample[1:, None])[:, 0] for part, sample in zip(parts, samples, strict=True)])


def _equal(found: Tensor, wanted: Tensor, floor: float = 0.0) -> bool:
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max() + floor)


def rope_limit(text: PretrainedConfig) -> int | None:
    """Return the length from which LongRoPE changes its frequencies, or None."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if parameters.get("rope_type") == "longrope":
            limit = parameters.get("original_max_position_embeddings") or text.max_position_embeddings
            return int(getattr(text, "original_max_position_embeddings", None) or limit)
    return None


def check_training_mode(model: PreTrainedModel, path: str) -> None:
    """Check that training mode has the same results as evaluation mode.

    Gradients are compared too. The model is left in training mode.

    Raises:
        UserError: they differ, because some noise cannot be switched off.
    """
    text = model.config.get_text_config()
    sample = probe_samples(model)[0][None]
    # Noise of a router shows only on tokens near a tie between experts.
    noisy = any("jitter" in name and _positive(value) for name, value in text.to_dict().items())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad][:2]
    found: list[list[Tensor]] = []
    for training in (False, True):
        model.train(training)
        output = model(input_ids=sample, use_cache=False)[0].float()
        gradients = torch.autograd.grad(output.square().mean(), trained, allow_unused=True)
        found.append([output.detach(), *(gradient for gradient in gradients if gradient is not None)])
    if noisy or not all(_equal(*both) for both in zip(found[1], found[0], strict=True)):
        raise UserError(
            f"model.gradient_checkpointing: a {model.config.model_type} model ({path}) computes something else in training "
            "mode, which recomputing activations needs; expected false"
        )


@contextmanager
def attention_on_cpu(model: PreTrainedModel) -> Iterator[None]:
    """Replace FlashAttention, which only GPUs have, inside the block."""
    own = model.config._attn_implementation
    flash = own is not None and own.startswith("flash")
    if flash:
        model.set_attn_implementation("sdpa")
    yield
    if flash:
        model.set_attn_implementation(own)
