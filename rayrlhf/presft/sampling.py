"""Responses of a rollout engine to the rows of one part: the stage that costs the time.

A part is sampled as one batch that starts from an empty engine, and every request has a seed made of (run, pass, row, sample):
a part that is made again after a crash asks for the same things in the same company, and gets the same bytes.
"""

from collections.abc import Sequence
from typing import Any

from rayrlhf.data.records import Int32, Rollout, RolloutRequest, SampleKey
from rayrlhf.data.seeds import sample_seed
from rayrlhf.engines.interfaces import RolloutEngine
from rayrlhf.engines.rollout import RolloutSpec, build_rollout_engine
from rayrlhf.models.load import load_tokenizer
from rayrlhf.presft.prompts import encode_prompts
from rayrlhf.presft.sampling_plan import Response, SamplingPlan
from rayrlhf.presft.schema import storable


class Sampler:
    """A model that answers rows."""

    def __init__(self, plan: SamplingPlan) -> None:
        """Start the engine.

        Raises:
            UserError: backend or model cannot be used.
        """
        self._plan = plan
        self._engine: RolloutEngine = build_rollout_engine(RolloutSpec(plan.model, plan.rollout(), plan.seed, logprobs=False))
        self._tokenizer: Any = load_tokenizer(plan.model)

    def answer(self, rows: Sequence[dict[str, Any]]) -> list[list[Response]]:
        """Return `plan.samples` responses for each row of a part, in order."""
        prompts = encode_prompts(
            self._tokenizer,
            self._plan.data,
            [row["prompt"] for row in rows],
            [row["messages"] for row in rows],
            [row["source"] for row in rows],
        )
        requests = self._requests([row["row"] for row in rows], prompts)
        finished: dict[SampleKey, Rollout] = {}
        if requests:
            limit = self._plan.generate.max_new_tokens
            self._engine.submit(requests, temperature=self._plan.temperature, max_new_tokens=limit)
        while self._engine.unfinished:
            finished |= {rollout.key: rollout for rollout in self._engine.poll(self._engine.unfinished)}
        samples = range(self._plan.samples)
        keys = [[SampleKey(self._plan.step, row["row"], sample) for sample in samples] for row in rows]
        return [[_response(finished[key]) for key in group] for group in keys]

    def _requests(self, rows: Sequence[int], prompts: Sequence[Int32]) -> list[RolloutRequest]:
        plan = self._plan
        return [
            RolloutRequest(SampleKey(plan.step, row, sample), ids, sample_seed(plan.seed, plan.step, row, sample))
            for row, ids in zip(rows, prompts, strict=True)
            for sample in range(plan.samples)
        ]


def _response(rollout: Rollout) -> Response:
    return Response(storable(rollout.text), rollout.finish_reason, len(rollout.response_ids))
