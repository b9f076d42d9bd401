"""Player of environments: a rollout engine with multi-turn samples around a single-turn engine.

It is a `RolloutEngine` itself, so no other part of the system handles turns: a lost replica costs whole samples, which are
requested again by their keys and repeat with the same seeds. While some samples wait for their environments, others are
decoded. With `lockstep` every turn is sampled in one batch of all unfinished samples, so that batches do not depend on the
speed of the environments.
"""

import math
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from rayrlhf.config.rollout import EnvironmentSection
from rayrlhf.data.records import Int32, Rollout, RolloutRequest, SampleKey
from rayrlhf.data.seeds import turn_seed
from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.environments.environment_loop import EnvironmentLoop, Failed
from rayrlhf.environments.players.base import Player
from rayrlhf.environments.protocol import Action, Answer, Environment
from rayrlhf.environments.registry import environment_maker
from rayrlhf.environments.transcript import Transcript, failed_rollout
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer


class _Limits(NamedTuple):
    """Limits of one request: temperature, and maximum tokens of the whole response."""

    temperature: float
    tokens: int


class _Episode:
    """State of one unfinished sample."""

    def __init__(self, request: RolloutRequest, limits: _Limits, environment: Environment, attempt: int) -> None:
        self.transcript = Transcript(request)
        self.limits = limits
        self.environment = environment
        self.attempt = attempt


class EpisodePlayer(Player):
    """Plays multi-turn samples; see `RolloutEngine` for the protocol.

    `max_new_tokens` limits whole responses.

    Args:
        section: the environment and its limits.
        tokenizer: tokenizer of the policy.
        lockstep: see the module's docstring.
        continues: weights may change while samples are unfinished.
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
        self._loop: EnvironmentLoop[SampleKey] = EnvironmentLoop(section.timeout_seconds)
        self._episodes: dict[SampleKey, _Episode] = {}
        self._finished: list[Rollout] = []

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        return len(self._episodes) + len(self._finished)

    def submit(self, requests: Sequence[RolloutRequest], *, temperature: float, max_new_tokens: int) -> None:
        """Start the environments of requests.

        Raises:
            ValueError: a request that is already queued.
        """
        for request in requests:
            if request.key in self._episodes:
                raise ValueError(f"request {request.key} is already queued")
            self._start(request, _Limits(temperature, max_new_tokens), attempt=0)

    def poll(self, minimum: int, seconds: float | None = None) -> list[Rollout]:
        """Play until `minimum` requests are finished, none is left, or `seconds` are over.

        Returns:
            All rollouts finished since the last poll.

        Raises:
            UserError: an environment raised one, or returned an invalid answer.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        while self._episodes and len(self._finished) < minimum and time.monotonic() < end:
            decoding = self._engine.unfinished
            if decoding and not (self._lockstep and len(self._loop)):
                turns = self._engine.poll(decoding if self._lockstep else 1, seconds)
                for turn in sorted(turns, key=lambda turn: turn.key):
                    self._handle_turn(turn)
            block = self._lockstep or not self._engine.unfinished
            answers = self._loop.results(block=block, all_calls=self._lockstep, seconds=max(end - time.monotonic(), 0.0))
            for key in sorted(answers):
                self._handle_answer(self._episodes[key], answers[key])
        finished, self._finished = self._finished, []
        return finished

    def cancel(self) -> int:
        """Drop all unfinished requests and their environments; returns the tokens of their turns."""
        ended = sum(len(rollout.response_ids) for rollout in self._finished)
        tokens = ended + sum(len(episode.transcript) for episode in self._episodes.values()) + self._engine.cancel()
        self._drop_episodes()
        return tokens

    def close(self) -> None:
        """Free the engine and close the environments."""
        try:
            self._drop_episodes()
            self._loop.close()
        finally:
            self._engine.close()

    def _drop_episodes(self) -> None:
        self._loop.cancel()
        for episode in self._episodes.values():
            self._loop.close_environment(episode.environment)
        self._episodes.clear()
        self._finished.clear()

    def _start(self, request: RolloutRequest, limits: _Limits, attempt: int) -> None:
        if request.prompt is None:
            raise ValueError(f"request {request.key} has no prompt for its environment")
        prompt = request.prompt
        episode = _Episode(request, limits, self._make(), attempt)
        self._episodes[request.key] = episode
        self._loop.start(request.key, lambda: episode.environment.reset(prompt, request.seed))

    def _handle_turn(self, turn: Rollout) -> None:
        """Pass a turn to the environment, unless it used up the response's space."""
        episode = self._episodes[turn.key]
        episode.transcript.append_turn(turn)
        cut = turn.finish_reason == "length"
        if cut and (self._space(episode) < 1 or len(turn.response_ids) < self._turn_limit(episode, len(turn.response_ids))):
            self._end(episode, "length")
            return
        action = Action(turn.text, turn.response_ids, cut)
        self._loop.start(turn.key, lambda: episode.environment.step(action))

    def _handle_answer(self, episode: _Episode, answer: object) -> None:
        """Handle the opening text, an answer to a turn, or a failure."""
        request = episode.transcript.request
        answer = _encodable(answer)
        if isinstance(answer, Failed):
            self._loop.close_environment(episode.environment)
            if episode.attempt < self._section.retries:
                self._start(request, episode.limits, episode.attempt + 1)
            else:
                self._episodes.pop(request.key)
                self._finished.append(failed_rollout(request, answer.reason))
            return
        observation = self._checked(episode, answer)
        if observation is None:
            self._end(episode, "stop")
            return
        # The opening text continues the prompt's own turn; without one the first turn is sampled as without an environment.
        tokens = self._framed(observation) if episode.transcript.turns else self._encode(observation)
        if episode.transcript.turns >= self._section.max_turns or len(tokens) >= self._space(episode):
            self._end(episode, "length")
            return
        space = self._space(episode) - len(tokens)
        context = np.concatenate([episode.transcript.token_ids, tokens])
        turn = RolloutRequest(request.key, context, turn_seed(request.seed, episode.transcript.turns))
        limit = min(space, self._section.max_turn_tokens or space)
        try:
            self._engine.submit([turn], temperature=episode.limits.temperature, max_new_tokens=limit)
        except UserError:  # The model's context is full; a prompt that alone is too long is a user error.
            if not episode.transcript.turns:
                raise
            self._end(episode, "length")
            return
        episode.transcript.append_observation(tokens, self.version)

    def _checked(self, episode: _Episode, answer: object) -> str | None:
        """Return the observation, or None when done; records the reward of the turn."""
        if episode.transcript.turns == 0 and isinstance(answer, str):
            return answer
        name = self._section.name
        if not isinstance(answer, Answer) or not isinstance(answer.observation, str):
            raise UserError(f"environment {name!r} returned {type(answer).__name__}, expected text from reset, else an Answer")
        if not isinstance(answer.reward, int | float) or not math.isfinite(answer.reward):
            raise UserError(f"environment {name!r} returned reward {answer.reward!r}, expected a finite number")
        episode.transcript.add_reward(float(answer.reward))
        return None if answer.done else answer.observation

    def _end(self, episode: _Episode, reason: Literal["stop", "length"]) -> None:
        key = episode.transcript.request.key
        if not episode.transcript.turns:
            raise UserError(
                f"prompt {key.prompt}: the environment's opening text leaves no space for a turn: raise rollout.max_new_tokens"
            )
        self._episodes.pop(key)
        self._loop.close_environment(episode.environment)
        self._finished.append(episode.transcript.rollout(reason, self._tokenizer))

    def _space(self, episode: _Episode) -> int:
        return episode.limits.tokens - len(episode.transcript)

    def _turn_limit(self, episode: _Episode, sampled: int) -> int:
        """Return the token limit of the last turn; fewer tokens mean a full model context."""
        space = self._space(episode) + sampled
        return min(space, self._section.max_turn_tokens or space)

    def _framed(self, observation: str) -> Int32:
        """Return the tokens of an observation in its template, without special tokens from its text."""
        inner = self._tokenizer.encode(observation, add_special_tokens=False, split_special_tokens=True) if observation else []
        return np.concatenate([self._before, np.asarray(inner, np.int32), self._after])

    def _encode(self, text: str) -> Int32:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False) if text else [], np.int32)


def _encodable(answer: object) -> object:
    """Return an answer, or a failure if its text cannot be encoded."""
    text = answer.observation if isinstance(answer, Answer) else answer
    try:
        if isinstance(text, str):
            text.encode()
    except UnicodeEncodeError as error:
        return Failed(f"the observation has a lone surrogate at character {error.start + 1}")
    return answer
