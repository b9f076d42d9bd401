"""Ledger of a step's samples: issued, sampled, rewarded, left out, in the batch. Pure.

Every sample of a step must reach its training batch once, with the tokens that were sampled and the reward that was computed
for it, or be left out for a known reason. The ledger is dropped at the end of its step, so its memory does not grow.

The built-in loop is `strict`. A user's loop may drop samples and add others, but not use one twice.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from rayrlhf.data.fingerprints import payment_fingerprint, response_fingerprint, reward_seal
from rayrlhf.data.records import Rollout, RolloutRequest, SampleKey
from rayrlhf.errors import AlarmError
from rayrlhf.ppo.experience import Experience
from rayrlhf.ppo.scoring import ScoredRollouts

Reason = Literal["failed", "zero_variance", "overissued", "dropped_by_loop", "untrained"]
"""Why a sample is not trained on; `untrained` are those masked as a whole, being cut off or rejected."""


class SampleLedger:
    """The samples of one step.

    Attributes:
        step: PPO steps done before it.
        strict: every sample must be accounted for.
    """

    def __init__(self, step: int = 0, *, strict: bool = False) -> None:
        self.step, self.strict = step, strict
        self._open: set[SampleKey] = set()
        self._issued: Counter[int] = Counter()
        self._sampled: dict[SampleKey, tuple[int, int]] = {}
        self._left_out: dict[SampleKey, Reason] = {}

    def issue(self, requests: Sequence[RolloutRequest]) -> None:
        """Enter the requests of the step.

        Raises:
            AlarmError: one is of another step, or was issued before.
        """
        for request in requests:
            key = request.key
            if key.step != self.step:
                raise fault(self.step, key, f"was issued for step {key.step + 1}")
            if key in self._open or key in self._sampled or key in self._left_out:
                raise fault(self.step, key, "was issued twice")
            self._open.add(key)
            self._issued[key.prompt] += 1

    def sampling(self, batches: Iterable[list[Rollout]]) -> Iterator[list[Rollout]]:
        """Enter finished rollouts as they pass.

        Raises:
            AlarmError: one was not issued, or comes twice.
        """
        for batch in batches:
            for rollout in batch:
                if rollout.key not in self._open:
                    known = rollout.key in self._sampled or rollout.key in self._left_out
                    raise fault(self.step, rollout.key, "was sampled twice" if known else "was sampled and never issued")
                self._open.discard(rollout.key)
                if rollout.failure:
                    self._left_out[rollout.key] = "failed"
                    continue
                for part in (rollout, *rollout.extra_segments):
                    self._sampled[part.key] = response_fingerprint(part), payment_fingerprint(part)
            yield batch

    def leave_out(self, rollouts: Iterable[Rollout], reason: Reason) -> None:
        """Enter samples that are not trained on.

        Raises:
            AlarmError: one is not known.
        """
        for rollout in rollouts:
            if self._sampled.pop(rollout.key, None) is None:
                raise fault(self.step, rollout.key, "was left out and never sampled")
            self._left_out[rollout.key] = reason

    def cancel(self, reason: Reason) -> None:
        """Enter the samples that are not sampled yet as left out."""
        self._left_out |= dict.fromkeys(self._open, reason)
        self._open.clear()

    def check_scored(self, scored: ScoredRollouts, drawn: Sequence[int], samples_per_prompt: int) -> None:
        """Compare scored rollouts with what was issued and sampled.

        Args:
            drawn: ids of the step's prompts.
            samples_per_prompt: samples issued for each.

        Raises:
            AlarmError: a sample is lost, doubled, foreign, changed, or has another one's reward.
        """
        seen: set[SampleKey] = set()
        for rollout in scored.rollouts:
            if rollout.key in seen:
                raise fault(self.step, rollout.key, "is in the batch twice")
            seen.add(rollout.key)
            self._check_known(rollout)
        self._check_complete(seen)
        self._check_rewards(scored)
        if self.strict:
            for prompt, count in Counter(drawn).items():
                if self._issued[prompt] != count * samples_per_prompt:
                    raise fault(
                        self.step,
                        SampleKey(self.step, prompt, 0),
                        f"belongs to a prompt with {self._issued[prompt]} samples, expected {count * samples_per_prompt}",
                    )

    def check_batch(self, experience: Experience, scored: ScoredRollouts) -> dict[str, float]:
        """Compare the training batch with the scored rollouts; returns counts of the ledger as metrics.

        Raises:
            AlarmError: a row has another sample's tokens or key, or trains on a token that the policy did not sample.
        """
        masks = experience.batch.arrays["action_mask"]
        if len(experience) != len(scored.rollouts):
            raise AlarmError(f"step {self.step + 1}: {len(scored.rollouts)} samples, but {len(experience)} rows in the batch")
        for rollout, key, sequence, mask in zip(
            scored.rollouts, experience.keys, experience.batch.sequences, masks, strict=True
        ):
            response = sequence.token_ids[sequence.prompt_length :]
            if key != rollout.key or not np.array_equal(response, rollout.response_ids):
                raise fault(self.step, rollout.key, "has another sample's row in the batch")
            sampled = rollout.action_mask[: len(mask)]
            if (mask[: len(sampled)] & ~sampled).any() or mask[len(sampled) :].any():
                raise fault(self.step, rollout.key, "is trained on tokens that the policy did not sample")
        trained = len(experience.learnable)
        reasons = Counter(self._left_out.values()) | Counter({"untrained": len(experience) - trained})
        counts = {f"ledger/{reason}": float(count) for reason, count in sorted(reasons.items()) if count}
        return {"ledger/issued": float(self._issued.total()), "ledger/trained": float(trained)} | counts

    def _check_known(self, rollout: Rollout) -> None:
        """Check one scored rollout against its entry."""
        key, entry = rollout.key, self._sampled.get(rollout.key)
        if entry is None:
            if not self.strict:
                return
            other = f"belongs to step {key.step + 1}" if key.step != self.step else "was never sampled in it"
            reason = self._left_out.get(key)
            raise fault(self.step, key, other if reason is None else f"was left out ({reason}) and is in the batch")
        if response_fingerprint(rollout) != entry[0]:
            raise fault(self.step, key, "has other tokens than were sampled")
        if rollout.rewards is not None and payment_fingerprint(rollout) != entry[1]:
            raise fault(self.step, key, "has other rewards than its environment paid")

    def _check_complete(self, seen: set[SampleKey]) -> None:
        for key in sorted(self._open):
            raise fault(self.step, key, "was issued and never sampled")
        lost = sorted(self._sampled.keys() - seen)
        if lost and self.strict:
            raise fault(self.step, lost[0], f"was sampled and is not in the batch{_more(len(lost))}")
        self._left_out |= dict.fromkeys(lost, "dropped_by_loop")

    def _check_rewards(self, scored: ScoredRollouts) -> None:
        rewards = scored.rewards
        if rewards.seals is not None:
            tokens = rewards.tokens or [None] * len(scored.rollouts)
            for rollout, score, share, seal in zip(scored.rollouts, rewards.scores, tokens, rewards.seals, strict=True):
                if reward_seal(rollout, float(score), share) != seal:
                    raise fault(self.step, rollout.key, f"has the reward {float(score):g}, which was computed for another one")
        if scored.greedy is not None:
            greedy = Counter(rollout.key.prompt for rollout in scored.greedy.rollouts)
            for rollout in scored.rollouts:
                if greedy[rollout.key.prompt] != 1:
                    found = greedy[rollout.key.prompt]
                    raise fault(self.step, rollout.key, f"is compared with {found} greedy responses, expected 1")


def fault(step: int, key: SampleKey, what: str) -> AlarmError:
    """Return the error of a sample, in one line.

    Args:
        step: PPO steps done before the one in which it was found.
    """
    return AlarmError(f"step {step + 1}: sample {key.sample} of prompt {key.prompt} {what}; its update was not kept")


def _more(count: int) -> str:
    return f", and {count - 1} more" if count > 1 else ""
