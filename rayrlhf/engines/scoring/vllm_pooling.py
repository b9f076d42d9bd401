"""Reward model in vLLM's pooling mode, which reads the head at the last token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayrlhf.config.reward import RewardModelSection
from rayrlhf.data.records import Float32, TokenSequence
from rayrlhf.engines.rollout.token_counts import bound_kernels
from rayrlhf.engines.rollout.vllm_calls import try_out
from rayrlhf.engines.rollout.vllm_start import (
    KV_BLOCK_TOKENS,
    explained,
    out_of_sight,
    prepare_process,
    register_model_class,
)
from rayrlhf.library_types import PretrainedConfig
from rayrlhf.models.load import resolve_dtype
from rayrlhf.models.value_head import output_weights

PREFILL_TOKENS = 8192
"""Tokens of one forward pass; more if one text is longer, because texts are not cut."""


class PooledReward:
    """Reward of token sequences by vLLM, in this process."""

    load_check = "computed by vLLM"
    shares_prefixes = True
    """Its prefix cache keeps common beginnings, so that sequences with one are best scored by the same process."""

    def __init__(self, section: RewardModelSection, config: PretrainedConfig, longest: int, folder: Path) -> None:
        """Load the model.

        Args:
            section: names the model, its outputs' weights and the size of the KV cache.
            config: of the model.
            longest: maximum tokens of a sequence.
            folder: path of the model's files.

        Raises:
            UserError: vLLM refuses the model, or is the build for GPUs and finds none.
        """
        prepare_process("reward.model.backend")
        from vllm import PoolingParams
        from vllm.v1.engine.llm_engine import LLMEngine

        self._parameters = PoolingParams(task="classify", use_activation=False)
        self._weights = None
        if section.outputs is not None:
            self._weights = output_weights(folder, section.outputs, config.num_labels).numpy()
        self._requests = 0
        if not torch.cuda.is_available():
            register_model_class(config)
            bound_kernels()
        with explained("reward.model", section.model.path), out_of_sight():
            self._engine: Any = LLMEngine.from_engine_args(_engine_arguments(section, longest, folder))
            try_out(self._engine, self._parameters)

    def rewards(self, sequences: Sequence[TokenSequence]) -> Float32:
        """Return one reward per sequence, float32 [B].

        It is the model's only output, or the weighted sum of its outputs.
        """
        first = self._requests
        self._requests += len(sequences)
        for number, sequence in enumerate(sequences, first):
            self._engine.add_request(str(number), {"prompt_token_ids": sequence.token_ids.tolist()}, self._parameters)
        found: dict[int, Float32] = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                found[int(output.request_id) - first] = output.outputs.data.float().numpy()
        rows = [found[index] for index in range(len(sequences))]
        values = [row[0] if self._weights is None else self._weights @ row for row in rows]
        return np.array(values, dtype=np.float32)


def _engine_arguments(section: RewardModelSection, longest: int, folder: Path) -> Any:
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import EngineArgs

    cpu = {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": KV_BLOCK_TOKENS}
    return EngineArgs(
        model=str(folder),
        trust_remote_code=section.model.trust_remote_code,
        skip_tokenizer_init=True,
        runner="pooling",
        convert="classify",
        pooler_config=PoolerConfig(use_activation=False),
        dtype=str(resolve_dtype(section.model.dtype)).removeprefix("torch."),
        max_model_len=longest,
        max_num_batched_tokens=max(PREFILL_TOKENS, longest),
        kv_cache_memory_bytes=section.cache_bytes,
        enable_prefix_caching=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **({} if torch.cuda.is_available() else cpu),
    )
