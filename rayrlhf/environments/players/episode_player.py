"""A sampler whose samples have several turns: any other sampler, with an environment that answers between the turns.

It is a `RolloutEngine` itself, so that nothing else of the system knows of turns: a replica that is lost costs whole samples,
which are asked for again by their keys and play with the same seeds. While some samples wait for their environments, others
are decoded. With `lockstep` every turn is sampled in one batch of all samples that are still playing, so that batches do not
depend on which environment was faster.
"""

import math
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from rayrlhf.config.library_types import Tokenizer
from rayrlhf.config.rollout import EnvironmentSection
from rayrlhf.data.records import Int32, Rollout, RolloutRequest, SampleKey
from rayrlhf.data.seeds import turn_seed
from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.environments.lookup_table import Failed, Table
from rayrlhf.environments.players.wrapper import WrappedEngine
from rayrlhf.environments.protocol import Action, Answer, Environment
from rayrlhf.environments.registry import environment_maker
from rayrlhf.environments.transcript import Transcript, failed_rollout
from rayrlhf.errors import UserError


class _Limits(NamedTuple):
    """Of one request: its temperature, and the tokens of its whole response."""

    temperature: float
    tokens: int


class _Episode:
    """One sample being played."""

    def __init__(self, request: RolloutRequest, limits: _Limits, environment: Environment, attempt: int) -> None:
        self.transcript = Transcript(request)
        self.limits = limits
        self.environment = environment
        self.attempt = attempt


class EpisodeEngine(WrappedEngine):
    """Plays samples with several turns. See `RolloutEngine` for the protocol; `max_new_tokens` bounds whole responses.

    Args:
        engine: samples single turns.
        section: the environment and its limits.
        tokenizer: the policy's.
        lockstep: see the module's docstring.
        continues: weights may change while samples are being played.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        section: EnvironmentSection,
        tokenizer: Tokenizer,
        *,
        lockstep: bool = False,
        continues: bool = False,
    ) -> None:
        super().__init__(engine, continues=continues)
        self._section = section
        self._tokenizer = tokenizer
        self._lockstep = lockstep
        self._make = environment_maker(section)
        self._before, self._after = (self._encode(part) for part in section.template.split("{observation}"))
        self._table: Table[SampleKey] = Table(section.timeout_seconds)
        self._episodes: dict[SampleKey, _Episode] = {}
        self._finished: list[Rollout] = []

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        return len(self._episodes) + len(self._finished)

    def submit(self, requests: Sequence[RolloutRequest], *, temperature: float, max_new_tokens: int) -> None:
        """Begin to play requests.

        Raises:
            ValueError: a request that is already queued.
        """
        for request in requests:
            if request.key in self._episodes:
                raise ValueError(f"request {request.key} is already queued")
            self._begin(request, _Limits(temperature, max_new_tokens), attempt=0)

    def poll(self, minimum: int, seconds: float | None = None) -> list[Rollout]:
        """Play until at least `minimum` requests are finished, none is left, or `seconds` are over.

        Returns:
            All that finished since the last poll.

        Raises:
            UserError: an environment raised one, or answered something that is no finite reward.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        while self._episodes and len(self._finished) < minimum and time.monotonic() < end:
            decoding = self._engine.unfinished
            if decoding and not (self._lockstep and len(self._table)):
                turns = self._engine.poll(decoding if self._lockstep else 1, seconds)
                for turn in sorted(turns, key=lambda turn: turn.key):
                    self._spoke(turn)
            block = self._lockstep or not self._engine.unfinished
            answers = self._table.answers(block=block, all_of_them=self._lockstep, seconds=max(end - time.monotonic(), 0.0))
            for key in sorted(answers):
                self._answered(self._episodes[key], answers[key])
        finished, self._finished = self._finished, []
        return finished

    def cancel(self) -> None:
        """Drop all unfinished requests, and leave their environments."""
        self._engine.cancel()
        self._table.drop()
        self._episodes.clear()
        self._finished.clear()

    def close(self) -> None:
        """Free the sampler and leave the environments."""
        self._table.close()
        self._engine.close()

    def _begin(self, request: RolloutRequest, limits: _Limits, attempt: int) -> None:
        if request.prompt is None:
            raise ValueError(f"request {request.key} brings no prompt for its environment")
        prompt = request.prompt
        episode = _Episode(request, limits, self._make(), attempt)
        self._episodes[request.key] = episode
        self._table.ask(request.key, lambda: episode.environment.reset(prompt, request.seed))

    def _spoke(self, turn: Rollout) -> None:
        """Take a turn of the policy; one that used up the response's room is not answered any more."""
        episode = self._episodes[turn.key]
        episode.transcript.say(turn)
        cut = turn.finish_reason == "length"
        if cut and (self._room(episode) < 1 or len(turn.response_ids) < self._turn_limit(episode, len(turn.response_ids))):
            self._end(episode, "length")
            return
        action = Action(turn.text, turn.response_ids, cut)
        self._table.ask(turn.key, lambda: episode.environment.step(action))

    def _answered(self, episode: _Episode, answer: object) -> None:
        """Take what the environment said: the first words, an answer to a turn, or a failure."""
        request = episode.transcript.request
        if isinstance(answer, Failed):
            if episode.attempt < self._section.retries:
                self._begin(request, episode.limits, episode.attempt + 1)
            else:
                self._episodes.pop(request.key)
                self._finished.append(failed_rollout(request, answer.reason))
            return
        observation = self._checked(episode, answer)
        if observation is None:
            self._end(episode, "stop")
            return
        # First words stand in the prompt's own turn; without any the first turn is sampled as if there were no environment.
        heard = self._framed(observation) if episode.transcript.turns else self._encode(observation)
        if episode.transcript.turns >= self._section.max_turns or len(heard) >= self._room(episode):
            self._end(episode, "length")
            return
        room = self._room(episode) - len(heard)
        context = np.concatenate([episode.transcript.token_ids, heard])
        turn = RolloutRequest(request.key, context, turn_seed(request.seed, episode.transcript.turns))
        limit = min(room, self._section.max_turn_tokens or room)
        try:
            self._engine.submit([turn], temperature=episode.limits.temperature, max_new_tokens=limit)
        except UserError:  # The model's context is full; a prompt that alone is too long is the user's to mend.
            if not episode.transcript.turns:
                raise
            self._end(episode, "length")
            return
        episode.transcript.hear(heard, self.version)

    def _checked(self, episode: _Episode, answer: object) -> str | None:
        """The words for the policy, None when it is over; pays the reward of the turn."""
        if episode.transcript.turns == 0 and isinstance(answer, str):
            return answer
        name = self._section.name
        if not isinstance(answer, Answer) or not isinstance(answer.observation, str):
            raise UserError(f"environment {name!r} answered {type(answer).__name__}, expected text from reset, else an Answer")
        if not isinstance(answer.reward, int | float) or not math.isfinite(answer.reward):
            raise UserError(f"environment {name!r} paid {answer.reward!r}, expected a finite number")
        episode.transcript.earn(float(answer.reward))
        return None if answer.done else answer.observation

    def _end(self, episode: _Episode, reason: Literal["stop", "length"]) -> None:
        key = episode.transcript.request.key
        if not episode.transcript.turns:
            raise UserError(
                f"prompt {key.prompt}: the environment's first words leave no room for a turn: raise rollout.max_new_tokens"
            )
        self._episodes.pop(key)
        self._finished.append(episode.transcript.rollout(reason, self._tokenizer))

    def _room(self, episode: _Episode) -> int:
        return episode.limits.tokens - len(episode.transcript)

    def _turn_limit(self, episode: _Episode, spoken: int) -> int:
        """Tokens that the last turn was allowed; fewer were sampled only where the model's context was full."""
        room = self._room(episode) + spoken
        return min(room, self._section.max_turn_tokens or room)

    def _framed(self, observation: str) -> Int32:
        """Tokens of an observation in its template; nothing in it counts as a special token, whatever it looks like."""
        words = self._tokenizer.encode(observation, add_special_tokens=False, split_special_tokens=True) if observation else []
        return np.concatenate([self._before, np.asarray(words, np.int32), self._after])

    def _encode(self, text: str) -> Int32:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False) if text else [], np.int32)
