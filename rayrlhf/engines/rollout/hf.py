"""Rollout engine in plain PyTorch on a transformers model.

It serves machines without vLLM, and tests as vLLM's oracle. Requests are decoded in batches of `max_concurrent` with a KV
cache; a finished one leaves its batch at once. Every request has a generator of its own, so its noise does not depend on the
other requests. Sampling is Gumbel-max: the argmax of log p - log E with E standard exponential is a draw from p (Gumbel 1954;
-log E is Gumbel noise). A check on load compares cached decoding of two padded rows with whole forward passes; models that fail
it decode one request at a time, or are refused.

Requests with a `reference_share` are sampled from a frozen reference, or from its geometric mixture with the policy. Both
models then decode every batch.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from rayrlhf.algorithms.opponents import mixture_logits
from rayrlhf.data.expert_ids import compact
from rayrlhf.data.records import Float32, Int32, Rollout, RolloutRequest, SampleKey
from rayrlhf.engines.rollout.common import (
    START_VERSION,
    RolloutSpec,
    check_new,
    context_length,
    make_rollout,
    new_token_limits,
    stop_token_ids,
)
from rayrlhf.errors import UserError
from rayrlhf.library_types import PreTrainedModel
from rayrlhf.models.load import load_causal_model, load_tokenizer, resolve_dtype
from rayrlhf.models.load_check import TOLERANCE, attention_on_cpu, probe_tokens, rope_limit
from rayrlhf.models.routing_replay import RoutingRecorder
from rayrlhf.weight_sync.buckets import WeightBucket

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Row:
    """Unfinished request."""

    request: RolloutRequest
    temperature: float
    limit: int
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    experts: list[tuple[int, NDArray[Any]]] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


class TransformersRolloutEngine:
    """One replica on transformers, on the GPU if there is one.

    See `RolloutEngine` for the protocol.
    """

    def __init__(self, spec: RolloutSpec) -> None:
        """Load the model.

        Raises:
            UserError: the model cannot be loaded or decoded with a cache, or the context is longer than the model's.
        """
        self.version = START_VERSION
        self._incoming: int | None = None
        self._continues = spec.continues
        self._missing: set[str] = set()
        self._stop = tuple(spec.rollout.stop)
        self._concurrent = spec.rollout.max_concurrent
        self._tokenizer = load_tokenizer(spec.model)
        self._stop_ids = frozenset(stop_token_ids(spec.model, self._tokenizer))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network: PreTrainedModel = load_causal_model(spec.model)
        self._max_length = context_length(spec.rollout, network.config)
        self._vocabulary = int(network.config.vocab_size)
        # LongRoPE depends on the longest row: rows are decoded alone, and from the start again beyond its limit.
        limit = rope_limit(network.config)
        self._limit = limit if limit is not None and limit < self._max_length else None
        if not _decodes_together(network) or self._limit is not None:
            self._concurrent = 1
            _logger.warning("%s: responses are decoded one by one, as rows of a batch influence each other", spec.model.path)
        self._network = network.to(device, resolve_dtype(spec.model.dtype))
        self._routing = RoutingRecorder(network, spec.model.path) if spec.rollout.captures_routing else None
        self._reference: list[PreTrainedModel] = []
        if spec.reference is not None:
            self._reference.append(load_causal_model(spec.reference).to(device, resolve_dtype(spec.model.dtype)))
        if spec.model.head_dtype == "float32":
            for one in self._networks:
                _widen_head(one)
        self._waiting: deque[_Row] = deque()
        self._batch: _Batch | None = None

    def submit(self, requests: Sequence[RolloutRequest], *, temperature: float, max_new_tokens: int) -> None:
        """Queue requests.

        Raises:
            UserError: a prompt leaves no room for a response.
            ValueError: a request is already queued, or asks for a reference that the engine does not have.
            RuntimeError: a weight update is unfinished.
        """
        if self._incoming is not None:
            raise RuntimeError(f"weight version {self._incoming} is still being loaded")
        if not self._reference and any(request.reference_share for request in requests):
            raise ValueError("a request has a reference_share, and the engine has no reference")
        limits = new_token_limits(requests, max_new_tokens, self._max_length, self._vocabulary)
        check_new(requests, (row.request for row in (*self._waiting, *(self._batch.rows if self._batch else ()))))
        for request, limit in zip(requests, limits, strict=True):
            self._waiting.append(_Row(request, temperature, limit, torch.Generator().manual_seed(request.seed)))

    @torch.no_grad()
    def poll(self, minimum: int, seconds: float | None = None) -> list[Rollout]:
        """Decode until at least `minimum` requests are finished, none is left, or time is over.

        Returns:
            All requests finished since the last poll.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        finished: list[Rollout] = []
        while self.unfinished and len(finished) < minimum and time.monotonic() < end:
            if self._batch is None:
                rows = [self._waiting.popleft() for _ in range(min(self._concurrent, len(self._waiting)))]
                self._batch = _Batch(self._networks, rows, self._routing)
            for row in self._batch.sample():
                row.versions.append(self.version)
                row.finish_reason = self._finish_reason(row)
            finished.extend(self._rollout(row) for row in self._batch.rows if row.finish_reason)
            self._batch = self._batch.advance()
            if self._batch is not None and self._batch.length - 1 == self._limit:
                self._restart()
        return finished

    @torch.no_grad()
    def next_logprobs(self, prompts: Sequence[Int32], tokens: Sequence[int]) -> Float32:
        """Return the log-probs of `tokens` right after each prompt, float32 [B, K].

        See `LabelEngine`.
        """
        found = []
        for start in range(0, len(prompts), self._concurrent):
            batch = _Batch([self._network], [_bare_row(prompt) for prompt in prompts[start : start + self._concurrent]])
            found.append(torch.log_softmax(batch.logits, dim=-1)[:, list(tokens)])
        return np.asarray(torch.cat(found).numpy() if found else np.zeros((0, len(tokens))), dtype=np.float32)

    def cancel(self) -> int:
        """Drop all unfinished requests; returns the tokens that were sampled for them."""
        tokens = sum(len(row.tokens) for row in self._batch.rows) if self._batch else 0
        self._waiting.clear()
        self._batch = None
        return tokens

    def sleep(self) -> None:
        """Do nothing: no memory is used for generation only."""

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        return len(self._waiting) + (len(self._batch.rows) if self._batch else 0)

    def begin_weights(self, version: int) -> None:
        """Start receiving a new weight version.

        Raises:
            RuntimeError: requests are unfinished and the spec does not let them continue with two versions.
        """
        if self.unfinished and not self._continues:
            raise RuntimeError(f"weights cannot change while {self.unfinished} requests are unfinished")
        self._incoming = version
        self._missing = {name for name, _ in self._network.named_parameters()}

    @torch.no_grad()
    def receive_weights(self, bucket: WeightBucket) -> None:
        """Copy and cast one bucket of weights by Hugging Face name.

        Raises:
            KeyError: a name that the model does not have.
        """
        own = self._network.state_dict(keep_vars=True)  # persistent buffers are weights too
        for name, tensor in bucket:
            own[name].copy_(tensor)
            self._missing.discard(name)

    @torch.no_grad()
    def finish_weights(self) -> None:
        """Activate the new version, and recompute the KV cache of unfinished requests.

        Raises:
            ValueError: a weight is missing; the engine refuses to generate from then on.
        """
        if self._incoming is None:
            raise RuntimeError("finish_weights without begin_weights")
        if self._missing:
            raise ValueError(
                f"weight update ended without {len(self._missing)} weights: {', '.join(sorted(self._missing)[:3])}"
            )
        self.version, self._incoming = self._incoming, None
        self._restart()

    def _restart(self) -> None:
        """Recompute the cache of the current batch."""
        if self._batch is not None:
            self._batch = _Batch(self._networks, self._batch.rows, self._routing)

    @property
    def _networks(self) -> list[PreTrainedModel]:
        return [self._network, *self._reference]

    def close(self) -> None:
        """Free the models. The engine cannot be used afterwards."""
        self._network = self._batch = None
        self._reference.clear()
        self._waiting.clear()

    def _finish_reason(self, row: _Row) -> Literal["stop", "length"] | None:
        if row.tokens[-1] in self._stop_ids:
            return "stop"
        stops = (*self._stop, *row.request.stop)
        if stops:
            # Decode the whole text for every token: quadratic, but exact.
            text = self._tokenizer.decode(row.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if any(stop in text for stop in stops):
                return "stop"
        return "length" if len(row.tokens) == row.limit else None

    def _rollout(self, row: _Row) -> Rollout:
        assert row.finish_reason is not None
        rollout = make_rollout(row.request, row.tokens, row.logprobs, row.versions, row.finish_reason, self._tokenizer)
        if self._routing is None:
            return rollout
        length = len(row.request.prompt_ids) + len(row.tokens)
        return replace(rollout, experts=compact(row.experts, length, self._routing.experts))


class _Batch:
    """Requests decoded together: prompts are left-padded, each step adds a token to each.

    Args:
        networks: the policy, and the reference if any.
        routing: records the experts of the policy.

    Attributes:
        rows: the requests.
        logits: float32 [rows, V] of each row's next token, on the CPU.
    """

    def __init__(self, networks: Sequence[PreTrainedModel], rows: list[_Row], routing: RoutingRecorder | None = None) -> None:
        self.rows, self._routing = rows, routing
        self._networks, device = networks, networks[0].device
        contexts = [torch.tensor([*row.request.prompt_ids.tolist(), *row.tokens]) for row in rows]
        longest = max(len(context) for context in contexts)
        tokens = torch.zeros((len(rows), longest), dtype=torch.long)  # padding is masked, and any token will do
        self._mask = torch.zeros((len(rows), longest), dtype=torch.long, device=device)
        for index, context in enumerate(contexts):
            start = longest - len(context)
            tokens[index, start:] = context
            self._mask[index, start:] = 1
        positions = (self._mask.cumsum(-1) - 1).clamp_min(0)
        self._caches: list[Any] = [None] * len(networks)
        self._forward(tokens.to(device), positions)

    @property
    def length(self) -> int:
        """Tokens of a row, padding included."""
        return self._mask.shape[1]

    def sample(self) -> list[_Row]:
        """Sample the next token and log-prob of every row; returns the rows.

        Log-probs are at the row's temperature; at 1 when greedy.
        """
        scale = torch.tensor([row.temperature or 1.0 for row in self.rows])
        logprobs = torch.log_softmax(self.logits / scale[:, None], dim=-1)
        for row, candidates in zip(self.rows, logprobs, strict=True):
            score = candidates
            if row.temperature:
                score = candidates - torch.empty_like(candidates).exponential_(generator=row.generator).log()
            token = int(score.argmax())
            row.tokens.append(token)
            row.logprobs.append(float(candidates[token]))
        return self.rows

    def advance(self) -> "_Batch | None":
        """Drop finished rows and compute the others' next logits; None when no row is left."""
        kept = [index for index, row in enumerate(self.rows) if row.finish_reason is None]
        if not kept:
            return None
        device = self._mask.device
        if len(kept) < len(self.rows):
            self.rows = [self.rows[index] for index in kept]
            self._mask = self._mask[kept]
            for cache in self._caches:
                cache.reorder_cache(torch.tensor(kept, device=device))
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(kept), 1)], dim=1)
        tokens = torch.tensor([[row.tokens[-1]] for row in self.rows], device=device)
        self._forward(tokens, self._mask.sum(-1, keepdim=True) - 1)
        return self

    def _forward(self, tokens: Tensor, positions: Tensor) -> None:
        found = []
        for index, network in enumerate(self._networks):
            output = network(
                input_ids=tokens,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._caches[index],
                use_cache=True,
                logits_to_keep=1,
            )
            self._caches[index] = output.past_key_values
            found.append(output.logits[:, -1].float().cpu())
        if self._routing is not None:
            self._record(self._routing, positions.cpu().numpy())
        share = torch.tensor([row.request.reference_share for row in self.rows])
        self.logits = found[0] if len(found) == 1 else mixture_logits(found[0], found[1], share)

    def _record(self, routing: RoutingRecorder, positions: NDArray[np.int64]) -> None:
        """Add the experts of the last forward to the rows."""
        width = positions.shape[1]
        real = self._mask[:, -width:].bool().cpu().numpy()
        for row, ids, own, places in zip(self.rows, routing.ids(len(positions)), real, positions, strict=True):
            row.experts.append((int(places[own][0]), ids[own]))


def _widen_head(network: PreTrainedModel) -> None:
    """Compute the output layer of a network in float32; its weights keep their dtype."""
    head = network.get_output_embeddings()

    def product(hidden: Tensor) -> Tensor:
        return linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())

    head.forward = product


def _decodes_together(network: PreTrainedModel) -> bool:
    """Return True if rows may be decoded together, False if alone.

    Raises:
        UserError: neither gives the logits of whole forward passes.
    """
    with attention_on_cpu(network):
        if _decodes(network, together=True):
            return True
        if _decodes(network, together=False):
            return False
    raise UserError(
        f"rollout.backend transformers: decoding a {network.config.model_type} model with its cache gives other logits than "
        "its forward pass; expected backend vllm"
    )


@torch.no_grad()
def _decodes(network: PreTrainedModel, *, together: bool) -> bool:
    """Return True if decoding with a cache gives the logits of whole forward passes.

    Args:
        network: in float32 on the CPU.
        together: decode two rows of different lengths as one batch, of which one ends first.
    """
    samples = probe_tokens(int(network.config.vocab_size))
    wanted = [network(input_ids=sample[None], use_cache=False).logits[0].float() for sample in samples]
    steps = (4, 2)
    for group in [(0, 1)] if together else [(0,), (1,)]:
        rows = {index: _bare_row(samples[index][: -steps[index]].numpy()) for index in group}
        try:
            batch: _Batch | None = _Batch([network], list(rows.values()))
            while batch is not None:
                left = [index for index, row in rows.items() if row.finish_reason is None]
                for index, logits in zip(left, batch.logits, strict=True):
                    place = len(samples[index]) - steps[index] + len(rows[index].tokens)
                    expected = wanted[index][place - 1]
                    if not (logits - expected).abs().max() <= TOLERANCE * expected.abs().max():
                        return False
                    rows[index].tokens.append(int(samples[index][place]))
                    rows[index].finish_reason = "length" if len(rows[index].tokens) == steps[index] else None
                batch = batch.advance()
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):  # its cache has another interface
            return False
    return True


def _bare_row(prompt: Int32) -> _Row:
    """Return the row of a prompt that is not sampled from."""
    request = RolloutRequest(SampleKey(0, 0, 0), prompt.astype(np.int32), 0)
    return _Row(request, 0.0, len(prompt), torch.Generator())
