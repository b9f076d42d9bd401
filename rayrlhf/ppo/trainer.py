"""Public trainer of a PPO run, for the built-in loop and custom loops."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.fault_tolerance import FaultTolerance
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.section import GIB
from rayrlhf.data.messages import Message
from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.data.records import Prompt, Rollout, RolloutRequest, SampleKey
from rayrlhf.data.seeds import sample_seed
from rayrlhf.errors import UserError
from rayrlhf.ppo.evaluation import Evaluation, OwnReward
from rayrlhf.ppo.run_loop import RunLoop
from rayrlhf.ppo.run_prompts import chat_prompt_ids
from rayrlhf.ppo.run_recorder import Recorder
from rayrlhf.ppo.scoring import OwnRewards, ScoredRollouts
from rayrlhf.ppo.step_driver import StepDriver

CHAT_PROMPT = 2**40
"""Prompt id of chat requests; no dataset has so many rows."""


class PPOTrainer:
    """One PPO run on running actors. Open it with `rayrlhf.open_trainer`.

    A loop of your own, which leaves the same run folder as `rayrlhf ppo`::

        with rayrlhf.open_trainer("run.yaml") as trainer:
            for step in trainer.steps():
                with trainer.recovering():
                    prompts = trainer.prompts()
                    rollouts = trainer.generate(prompts)
                    scored = trainer.score(prompts, rollouts)
                    trainer.step(scored, rewards=[my_reward(rollout.text) for rollout in scored.rollouts])
            trainer.export()

    Sizes: B rollouts, P prompt tokens, R response tokens of a rollout. Log-probs and KL are in nats, times in seconds.
    """

    def __init__(self, driver: StepDriver, loop: RunLoop, recorder: Recorder) -> None:
        self._driver = driver
        self._loop = loop
        self._recorder = recorder
        self._chats = 0

    @property
    def config(self) -> PPOConfig:
        """The resolved configuration."""
        return self._driver.config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._recorder.folder.path

    @property
    def steps_done(self) -> int:
        """PPO steps completed, those before a resume included."""
        return self._driver.steps_done

    @property
    def weight_version(self) -> int:
        """Weight version that the rollout replicas serve; 0 until the first sync."""
        return self._driver.weight_version

    @property
    def stop_requested(self) -> bool:
        """True after SIGTERM or Ctrl-C. `steps` acts on it; other loops check it."""
        return self._loop.stop_requested

    @property
    def peak_gib(self) -> float:
        """Peak memory of all processes of the run, GiB; shared pages count once."""
        return self._recorder.memory.peak_bytes / GIB

    @property
    def sampler(self) -> PromptSampler:
        """The stream of training prompts."""
        return self._driver.sampler

    @property
    def evaluation_prompts(self) -> tuple[Prompt, ...]:
        """The held-out prompts; empty without `data.evaluation`."""
        return self._driver.evaluation_prompts

    @property
    def actor_groups(self) -> ActorGroups:
        """The actors by role."""
        return self._driver.actor_groups

    @property
    def fault_tolerance(self) -> FaultTolerance:
        """The heartbeat monitor, the replica pool and the restarter of lost actors."""
        return self._driver.fault_tolerance

    def steps(self) -> Iterator[int]:
        """Iterate until `run.steps` steps are done; yields the number of steps done so far.

        Before each step and after the last one it does the configured work: the SFT warm-up, evaluations
        (where a reward is configured), checkpoints, scaling of replicas. A body without a `step` gets the same number again.

        Raises:
            StoppedError: SIGTERM or Ctrl-C requested a stop; a checkpoint of the last step is complete.
            ActorLostError: recovery failed too often in a row, or too few replicas are left.
        """
        return self._loop.steps()

    def recovering(self) -> AbstractContextManager[None]:
        """Repair the loss of a policy or critic rank inside the block.

        The block ends early, and the run goes back to its last committed state (`recovery.snapshot`). `steps_done` may then be
        lower than before. Lost rollout, reward and reference processes are replaced without it.
        """
        return self._loop.recovering()

    def prompts(self, count: int | None = None) -> list[Prompt]:
        """Draw the next training prompts.

        The next `step` marks all prompts drawn since the previous one as used. An interrupted run draws them again first.

        Args:
            count: how many; `rollout.prompts_per_step` when not given. With `async.max_staleness` above 0 it must not be given:
                the responses are being sampled already, and `generate` collects them.
        """
        return self._driver.prompts(count)

    def generate(self, prompts: Sequence[Prompt], *, temperature: float | None = None) -> list[Rollout]:
        """Sample `rollout.samples_per_prompt` responses per prompt with the current weights.

        Args:
            prompts: from `prompts`, or of your own with distinct ids. A prompt that is passed again in the same step gets
                other samples.
            temperature: `rollout.temperature` when not given; 0 is greedy.

        Returns:
            The rollouts in the order of their keys, each with int32 `response_ids` [R], float32 `logprobs` [R] and `text`.
        """
        return self._driver.generate(prompts, temperature=temperature)

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> ScoredRollouts:
        """Compute rewards, reference log-probs, values and the policy's log-probs of rollouts.

        Args:
            prompts: of the rollouts.
            rollouts: any number, for example after dropping some.

        Returns:
            Scored rollouts in the order of their keys: float32 rewards [B], log-probs [R] in nats, values [R + 1]. An agent
            that began a second conversation adds further rollouts (`Rollout.extra_segments`).
        """
        return self._driver.score(prompts, rollouts)

    def generate_and_score(self, prompts: Sequence[Prompt]) -> ScoredRollouts:
        """Generate and score; scoring starts as rollouts finish where roles have own devices."""
        return self._driver.generate_and_score(prompts)

    def step(self, scored: ScoredRollouts, rewards: OwnRewards | None = None) -> dict[str, float]:
        """Run one PPO step: advantages, all epochs of updates, weight sync.

        Args:
            scored: from `score`; whole groups where the estimator compares the responses to a prompt.
            rewards: your own rewards, one number per rollout of `scored.rollouts` [B], or a list of R numbers for each (one per
                response token, 0 on tokens that the policy did not sample). They replace the configured reward; add
                `scored.rewards.scores` to keep it. The KL penalty and the penalties of `algorithm.shaping` still apply.
                Required with `reward.given_by_loop`.

        Returns:
            The metrics of the step, which are also in `metrics.jsonl`.

        Raises:
            UserError: wrong number or kind of rewards.
            AlarmError: trainer and rollout engine disagree on log-probs under the same weights by more than
                `rollout.mismatch_alarm`; or `observe.on_alarm` is `stop` and there was an alarm.
            ActorLostError: a process was lost that only `recovering` repairs.
        """
        return self._driver.step(scored, rewards)

    def train_step(self) -> dict[str, float]:
        """Run the built-in step, with `rollout.refill_rounds` or `rollout.overissue`."""
        return self._driver.train_step()

    def evaluate(self, reward: OwnReward | None = None) -> Evaluation:
        """Answer and score the held-out prompts, one response each at `evaluation.temperature`.

        Args:
            reward: (prompts [B], rollouts [B]) -> scores [B], in place of the configured reward.

        Raises:
            UserError: there are no held-out prompts, or neither a configured reward nor one of your own.
        """
        if not self.evaluation_prompts:
            raise UserError("evaluate: no held-out prompts; expected data.evaluation in the configuration")
        return self._driver.evaluate(reward)

    def save(self) -> Path:
        """Write a checkpoint of the current step and wait for it; returns its folder.

        Raises:
            UserError: the step was interrupted halfway, or the folder cannot be written.
        """
        return self._loop.save()

    def export(self, folder: Path | str | None = None) -> Path:
        """Write the policy as a Hugging Face folder, adapters merged; returns the folder.

        Args:
            folder: `export/` in the run folder when not given.
        """
        target = self._recorder.folder.export if folder is None else Path(folder)
        self._loop.export(target)
        return target

    def chat(self, prompt: str | Sequence[Message], *, temperature: float = 0.0) -> str:
        """Answer a prompt with the current policy, in at most `rollout.max_new_tokens` tokens.

        Args:
            prompt: text, or {role, content} messages that end with the user's; chat template and system prompt are added.
            temperature: 0 is greedy.

        Raises:
            UserError: the prompt is empty or too long, or the run has an environment.
        """
        if self.config.environment is not None:
            raise UserError("chat: the replicas of a run with an environment play episodes; use `rayrlhf chat` on the export")
        key = SampleKey(self.steps_done, CHAT_PROMPT, self._chats)
        self._chats += 1
        request = RolloutRequest(key, chat_prompt_ids(self.config, prompt), sample_seed(self.config.run.seed, *key))
        (rollout,) = self._driver.sample([request], temperature)
        return rollout.text
