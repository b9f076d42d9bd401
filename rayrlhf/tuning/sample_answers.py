"""Responses of the model in training to a few held-out prompts, in `samples/`."""

from pathlib import Path

import torch

from rayrlhf.config.rollout import RolloutSection
from rayrlhf.config.tuning import SFTConfig, TuningConfig
from rayrlhf.data.records import Rollout, RolloutRequest, SampleKey
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.rollout.hf import TransformersRolloutEngine
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.supervised_batches import supervised_sequence
from rayrlhf.models.load import load_tokenizer
from rayrlhf.observe.samples import Sample, SampleSink
from rayrlhf.tuning.sample_table import SampleTable, Table


class AnswerSampler:
    """Generates responses on the first worker with a copy of the gathered weights."""

    def __init__(self, config: TuningConfig, held_out: Table, folder: Path) -> None:
        """Choose the prompts: the first held-out samples up to their first target token.

        Only SFT generates responses.
        """
        self._requests: list[RolloutRequest] = []
        if not isinstance(config, SFTConfig) or not isinstance(held_out, SampleTable) or not config.evaluation.generations:
            return
        self._config, self._settings = config, config.evaluation
        for sample in held_out.take(range(min(len(held_out), self._settings.generations))):
            prompt = sample.token_ids[: supervised_sequence(sample).prompt_length]
            self._requests.append(RolloutRequest(SampleKey(0, sample.row, 0), prompt, config.run.seed))
        self._sink = SampleSink(folder / "samples")
        self._engine: TransformersRolloutEngine | None = None

    def write(self, step: int, engine: TrainEngine) -> None:
        """Generate and store responses to all prompts with the current weights.

        Every worker takes part.
        """
        if not self._requests:
            return
        first = torch.distributed.get_rank() == 0
        if first and self._engine is None:
            rollout = RolloutSection(backend="transformers", max_concurrent=len(self._requests))
            model = self._config.model.model_copy(update={"lora": None})
            self._engine = TransformersRolloutEngine(RolloutSpec(model, rollout, self._config.run.seed))
            self._tokenizer = load_tokenizer(self._config.model)
        if first and self._engine is not None:
            self._engine.begin_weights(step)
        for bucket in engine.weight_buckets():
            if first and self._engine is not None:
                self._engine.receive_weights(bucket)
        if first and self._engine is not None:
            self._engine.finish_weights()
            answers = self._answers(self._engine)
            self._sink.write(step, [Sample.of(one, self._tokenizer.decode(one.prompt_ids)) for one in answers])

    def _answers(self, engine: TransformersRolloutEngine) -> list[Rollout]:
        settings = self._settings
        engine.submit(self._requests, temperature=settings.temperature, max_new_tokens=settings.max_new_tokens)
        return sorted(engine.poll(len(self._requests)), key=lambda rollout: rollout.key)
