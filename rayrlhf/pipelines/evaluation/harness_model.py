"""Model of a run for lm-evaluation-harness; importing it needs the package `lm_eval`."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.data.records import RolloutRequest, SampleKey
from rayrlhf.data.seeds import sample_seed
from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.engines.rollout.common import RolloutSpec, context_length
from rayrlhf.engines.rollout.factory import build_rollout_engine
from rayrlhf.engines.scoring.frozen import training_device
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_architecture, load_causal_model, load_tokenizer, resolve_dtype

BATCH = 16
"""Sequences of one forward for log-likelihoods."""


class HarnessModel(HFLM):  # type: ignore[misc]  # the package has no types, and may be missing
    """The harness's transformers model, whose responses come from a rollout engine."""

    def __init__(self, model: ModelSection, rollout: RolloutSection) -> None:
        """Load the model; the rollout engine starts with the first response.

        Raises:
            UserError: the model cannot be loaded.
        """
        self._section, self._rollout = model, rollout
        self._engine: RolloutEngine | None = None
        network = load_causal_model(model).to(training_device(), resolve_dtype(model.dtype))
        length = context_length(rollout, load_architecture(model))
        super().__init__(network, tokenizer=load_tokenizer(model), batch_size=BATCH, max_length=length)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a response to each request, without its stop strings."""
        groups: dict[tuple[float, int], list[RolloutRequest]] = defaultdict(list)
        settings = [self._settings(request.args[1]) for request in requests]
        for index, (request, given) in enumerate(zip(requests, settings, strict=True)):
            ids = self.tok_encode(request.args[0], left_truncate_len=self.max_length - given["max_gen_toks"])
            stop, seed = tuple(filter(None, given["until"])), sample_seed(0, 0, index, 0)
            prompt = RolloutRequest(SampleKey(0, index, 0), np.asarray(ids, np.int32), seed, stop=stop)
            groups[given["temperature"], given["max_gen_toks"]].append(prompt)
        engine = self._engine or build_rollout_engine(RolloutSpec(self._section, self._rollout, 0, logprobs=False))
        self._engine, texts = engine, dict[int, str]()
        for (temperature, longest), group in groups.items():
            engine.submit(group, temperature=temperature, max_new_tokens=longest)
            while engine.unfinished:
                texts |= {one.key.prompt: one.text for one in engine.poll(engine.unfinished)}
        return [postprocess_generated_text(texts[index], given["until"], None) for index, given in enumerate(settings)]

    def close(self) -> None:
        """End the rollout engine, if it was started."""
        if self._engine is not None:
            self._engine.close()

    def _settings(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a task's generation.

        Raises:
            UserError: the rollout engine does not have one of them, or the context no room for the response.
        """
        given = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        given.setdefault("temperature", 1.0 if given["do_sample"] else 0.0)
        unread = ("top_p", "top_k") if given["temperature"] == 0 else ()
        for name in sorted(given.keys() - {"do_sample", "until", "max_gen_toks", "temperature", *unread}):
            raise UserError(f"evaluate --harness: generation_kwargs {name} of a task has no effect here; remove it there")
        if given["max_gen_toks"] >= self.max_length:
            raise UserError(
                f"evaluate --harness: a task asks for {given['max_gen_toks']} tokens, more than the model's context of "
                f"{self.max_length} has room for"
            )
        return given
