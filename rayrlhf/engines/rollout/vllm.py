"""vLLM rollout engine in this process: `submit` queues requests, `poll` returns finished rollouts.

The engine core runs in-process, so weights are passed by reference and a start takes seconds. Its settings make rollouts agree
with the trainer: log-probs are those of the sampled distribution (after temperature; no top-p or top-k, which would cut it),
every request has a seed of its own, and the prefix cache starts empty in every generation, so that the same batch always gives
the same bits. The version of every token is vLLM's own label of the weights that sampled it.

A replica of several devices adds one worker process per device, which vLLM starts and which ends with this one. If a worker
dies, this process ends, so that the replica is lost as a whole: calls to the other workers would wait forever.

On CPUs nothing is compiled: compilation would cost more than a short run gains. On GPUs `gpu_memory_utilization` and `sleep`
apply; that path has never been run (`examples/gpu/`).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rayrlhf.data.records import Float32, Int32, Rollout, RolloutRequest
from rayrlhf.engines.rollout.common import (
    START_VERSION,
    RolloutSpec,
    check_new,
    make_rollout,
    new_token_limits,
    stop_token_ids,
)
from rayrlhf.engines.rollout.vllm_calls import next_logprobs, uncompiled
from rayrlhf.engines.rollout.vllm_lora import AdapterSlot
from rayrlhf.engines.rollout.vllm_routing import RoutingCapture
from rayrlhf.engines.rollout.vllm_start import start_engine
from rayrlhf.models.load import load_tokenizer
from rayrlhf.weight_sync.buckets import WeightBucket


class VLLMRolloutEngine:
    """One replica on vLLM. See `RolloutEngine` for the protocol."""

    constrains = True

    def __init__(self, spec: RolloutSpec) -> None:
        """Load the model and allocate the KV cache.

        Raises:
            UserError: vLLM refuses the settings, or is the build for GPUs and finds none.
        """
        self.version = START_VERSION
        self._incoming: int | None = None
        self._asleep = False
        self._continues = spec.continues
        self._requests: dict[str, RolloutRequest] = {}
        self._stop = list(spec.rollout.stop)
        self._logprobs = spec.logprobs
        self._tokenizer = load_tokenizer(spec.model)
        self._stop_ids = stop_token_ids(spec.model, self._tokenizer)
        self._engine = start_engine(spec)
        self._adapter = AdapterSlot(self._engine, spec.model) if spec.adapters else None
        self._routing = RoutingCapture(self._engine, spec.model.path) if spec.rollout.captures_routing else None
        self._engine.set_weight_version(str(self.version))
        self._max_length: int = self._engine.model_config.max_model_len
        self._vocabulary: int = self._engine.model_config.get_vocab_size()
        from rayrlhf.weight_sync.vllm_receiver import WeightSyncClient

        self.weight_client = WeightSyncClient(self._engine)

    def submit(self, requests: Sequence[RolloutRequest], *, temperature: float, max_new_tokens: int) -> None:
        """Queue requests; samples of one prompt share its keys and values.

        Raises:
            UserError: a prompt leaves no room for a response.
            ValueError: a request is already queued.
            RuntimeError: a weight update is unfinished, or the engine sleeps and has no weights.
        """
        from vllm.inputs import tokens_input

        if self._incoming is not None:
            raise RuntimeError(f"weight version {self._incoming} is still being loaded")
        if self._asleep:
            raise RuntimeError("the engine sleeps and holds no weights; a weight update wakes it")
        limits = new_token_limits(requests, max_new_tokens, self._max_length, self._vocabulary)
        check_new(requests, self._requests.values())
        if not self._requests:
            # Cached prefixes change how a prompt's sums are split: an empty cache makes a batch's bits reproducible.
            self._engine.reset_prefix_cache()
        adapter = self._adapter.request if self._adapter else None
        for request, limit in zip(requests, limits, strict=True):
            name = "-".join(map(str, request.key))
            parameters = self._sampling_parameters(request, temperature, limit)
            self._engine.add_request(name, tokens_input(request.prompt_ids.tolist()), parameters, lora_request=adapter)
            self._requests[name] = request

    def poll(self, minimum: int, seconds: float | None = None) -> list[Rollout]:
        """Decode until at least `minimum` requests are finished, none is left, or time is over.

        Returns:
            All requests finished since the last poll.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        finished: list[Rollout] = []
        with uncompiled():
            while self._requests and len(finished) < minimum and time.monotonic() < end:
                finished.extend(self._rollout(output) for output in self._engine.step() if output.finished)
        return finished

    def next_logprobs(self, prompts: Sequence[Int32], tokens: Sequence[int]) -> Float32:
        """Return the log-probs of `tokens` right after each prompt, float32 [B, K]; see `LabelEngine`."""
        return next_logprobs(self._engine, prompts, tokens)

    def cancel(self) -> int:
        """Drop all unfinished requests; returns the tokens that were sampled for them."""
        tokens: int = sum(one.detokenizer.num_output_tokens() for one in self._engine.output_processor.request_states.values())
        self._engine.abort_request(list(self._requests))
        self._requests.clear()
        if self._routing is not None:
            self._routing.clear()
        return tokens

    def sleep(self) -> None:
        """Free the device memory of weights and KV cache until new weights arrive.

        No effect if the engine sleeps already.

        Raises:
            RuntimeError: requests are unfinished.
        """
        if self._requests:
            raise RuntimeError(f"the engine cannot sleep while {len(self._requests)} requests are unfinished")
        if not self._asleep:
            # Level 2 keeps no copy of the weights: all of them are replaced on wake-up, but for those under an adapter.
            self._engine.sleep(level=1 if self._adapter else 2)
            self._asleep = True

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        return len(self._requests)

    @property
    def model(self) -> torch.nn.Module:
        """VLLM's model, in an engine without worker processes."""
        found: list[torch.nn.Module] = self._engine.apply_model(lambda model: model)
        return found[0]

    def begin_weights(self, version: int) -> None:
        """Start receiving a new weight version.

        Raises:
            RuntimeError: requests are unfinished and the spec does not let them continue with two versions.
        """
        if self._requests and not self._continues:
            raise RuntimeError(f"weights cannot change while {len(self._requests)} requests are unfinished")
        self._incoming = version
        if self._asleep:
            self._engine.wake_up(["weights"])
        if self._adapter is None:
            self.weight_client.start_weight_update()

    def receive_weights(self, bucket: WeightBucket) -> None:
        """Load one bucket of weights by Hugging Face name, or of the adapter.

        Any float dtype is accepted and cast. No reference is kept.
        """
        if self._adapter is not None:
            self._adapter.receive(bucket)
            return
        self.weight_client.update_weights({"bucket": bucket})

    def finish_weights(self) -> None:
        """Activate the new version.

        Raises:
            ValueError: a layer is missing weights; the engine refuses to generate from then on.
        """
        if self._incoming is None:
            raise RuntimeError("finish_weights without begin_weights")
        if self._adapter is None:
            self.weight_client.finish_weight_update(str(self._incoming))
        else:
            self._adapter.load()
            self.weight_client.activate(str(self._incoming))
        if self._asleep:
            # Last, because until here the cache's memory is free for weights in transit.
            self._engine.wake_up(["kv_cache"])
            self._asleep = False
        self.version, self._incoming = self._incoming, None

    def close(self) -> None:
        """Free the model, the KV cache and vLLM's process groups.

        The engine cannot be used afterwards.
        """
        if self._engine is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        del self.weight_client
        self._engine = None
        self._requests.clear()
        cleanup_dist_env_and_memory()

    def _sampling_parameters(self, request: RolloutRequest, temperature: float, limit: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        stop = [*self._stop, *request.stop]
        return SamplingParams(
            temperature=temperature,
            seed=request.seed,
            max_tokens=limit,
            stop=stop,
            stop_token_ids=self._stop_ids,
            detokenize=bool(stop),
            logprobs=0 if self._logprobs else None,
            flat_logprobs=True,
            structured_outputs=StructuredOutputsParams(**request.constraint) if request.constraint else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _rollout(self, output: Any) -> Rollout:
        request = self._requests.pop(output.request_id)
        (sample,) = output.outputs
        if sample.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"request {request.key}: vLLM ended it with {sample.finish_reason!r}")
        versions = np.empty(len(sample.token_ids), dtype=np.int32)
        for span in sample.weight_versions:
            versions[span.start : span.end] = int(span.version)
        logprobs = sample.logprobs.logprobs if self._logprobs else [math.nan] * len(sample.token_ids)
        rollout = make_rollout(request, sample.token_ids, logprobs, versions, sample.finish_reason, self._tokenizer)
        experts = None if self._routing is None else self._routing.take(output)
        cached = output.num_cached_tokens or 0
        return replace(rollout, read_tokens=len(request.prompt_ids), cached_tokens=cached, experts=experts)
