"""Calls of a bare vLLM engine: a try-out, log-probs of next tokens, uncompiled steps."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from rayrlhf.data.records import Float32, Int32


def uncompiled() -> AbstractContextManager[Any]:
    """Disable compilation on CPUs.

    vLLM decorates a helper of its log-probs, and compiling it takes longer than it saves. On GPUs vLLM compiles the model
    itself, which must stay enabled.
    """
    return nullcontext() if torch.cuda.is_available() else torch.compiler.set_stance("force_eager")


def try_out(engine: Any, parameters: Any = None) -> None:
    """Compute one token: some kernels refuse a model's sizes or dtype only when they run.

    Args:
        engine: an `LLMEngine`.
        parameters: of the request; default: generate one token.

    Raises:
        NotImplementedError: a kernel does not support the model.
    """
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    engine.add_request("try-out", tokens_input([1]), parameters or SamplingParams(max_tokens=1, detokenize=False))
    try:
        with uncompiled():
            while engine.has_unfinished_requests():
                engine.step()
    except RuntimeError as error:
        if "nsupported" not in str(error):
            raise
        raise NotImplementedError(str(error)) from error


def next_logprobs(engine: Any, prompts: Sequence[Int32], tokens: Sequence[int]) -> Float32:
    """Return the log-probs of `tokens` right after each prompt, float32 [B, K]; see `LabelEngine`."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    parameters = SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=list(tokens), detokenize=False)
    engine.reset_prefix_cache()
    for index, prompt in enumerate(prompts):
        engine.add_request(f"label-{index}", tokens_input(prompt.tolist()), parameters)
    found, left = np.empty((len(prompts), len(tokens)), np.float32), len(prompts)
    with uncompiled():
        while left:
            for output in engine.step():
                if output.finished:
                    (known,) = output.outputs[0].logprobs
                    found[int(output.request_id.removeprefix("label-"))] = [known[token].logprob for token in tokens]
                    left -= 1
    return found
