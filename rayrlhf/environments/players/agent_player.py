"""Player of agents: a rollout engine whose samples are driven by agents.

Agents request completions over HTTP. Each sample gets a session at the endpoint and an agent with its address. The inner engine
samples the requests of many agents as they arrive. Sampled tokens are recorded unchanged, and the agent's return value is their
reward. With `lockstep` a batch is sampled only when every agent waits, so that batches do not depend on the
speed of the agents.
"""

import logging
import math
import queue
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

from rayrlhf.config.rollout import EnvironmentSection
from rayrlhf.data.records import Rollout, RolloutRequest, SampleKey
from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.environments.agent import Agent, AgentLoop, Endpoint, run_agent
from rayrlhf.environments.endpoint.call import MODEL, Call, Refusal, invalid, resolve
from rayrlhf.environments.endpoint.server import ChatServer
from rayrlhf.environments.environment_loop import error_line
from rayrlhf.environments.players.agent_session import Pending, Session, Texts, refuse
from rayrlhf.environments.players.base import Player
from rayrlhf.environments.transcript import failed_rollout
from rayrlhf.errors import UserError

_logger = logging.getLogger(__name__)

SLICE_SECONDS = 0.05
"""Maximum time of decoding before new requests are accepted."""
CHECK_SECONDS = 0.1
"""Time between checks for agents that take too long. With 512 sessions a check of all takes about 0.3 ms."""
BLOCKED_SECONDS = 0.5
"""Time after which an unresponsive event loop of the agents counts as blocked."""


class _Ended(NamedTuple):
    """Event of an agent's end, queued after all of its calls."""

    token: str


class AgentPlayer(Player):
    """Plays samples with agents; see `RolloutEngine` for the protocol.

    `max_new_tokens` limits each conversation.

    Args:
        agent: see `rayrlhf.environments.agent`.
        texts: tokenizer, chat template and parsers of the policy.
        lockstep: see the module's docstring.
        continues: weights may change while samples are unfinished.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        agent: Agent,
        section: EnvironmentSection,
        texts: Texts,
        *,
        lockstep: bool = False,
        continues: bool = False,
    ) -> None:
        super().__init__(engine, continues=continues)
        self._agent = agent
        self._section = section
        self._lockstep = lockstep
        self._texts = texts
        self._server = ChatServer()
        self._loop = AgentLoop()
        self._limits: dict[SampleKey, tuple[float, int]] = {}
        self._sessions: dict[str, Session] = {}
        self._waiting_calls: list[Call] = []
        self._sampling: dict[SampleKey, tuple[Session, Pending, int]] = {}
        self._finished: list[Rollout] = []
        self._unused_paths: set[str] = set()
        self._next_check = 0.0

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        return len(self._sessions) + len(self._finished)

    def submit(self, requests: Sequence[RolloutRequest], *, temperature: float, max_new_tokens: int) -> None:
        """Start the agents of requests.

        Raises:
            ValueError: a request that is already queued.
        """
        for request in requests:
            if request.key in self._limits:
                raise ValueError(f"request {request.key} is already queued")
            self._limits[request.key] = (temperature, max_new_tokens)
            self._start(request, attempt=0)

    def poll(self, minimum: int, seconds: float | None = None) -> list[Rollout]:
        """Serve agents until `minimum` requests are finished, none is left, or `seconds` are over.

        Returns:
            All rollouts finished since the last poll.

        Raises:
            UserError: an agent raised one, or its reward is not a finite number.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        while self._sessions and len(self._finished) < minimum and time.monotonic() < end:
            self._receive(end)
            if not self._lockstep or self._all_wait():
                calls, self._waiting_calls = self._waiting_calls, []
                for call in sorted(calls, key=self._sample_key):
                    self._sample(call)
            if self._engine.unfinished:
                turns = self._engine.poll(*((self._engine.unfinished,) if self._lockstep else (1, SLICE_SECONDS)))
                for turn in sorted(turns, key=lambda turn: turn.key):
                    self._completed(turn)
        finished, self._finished = self._finished, []
        return finished

    def cancel(self) -> int:
        """Drop all unfinished requests and cancel their agents; returns the tokens of their completions."""
        ended = sum(len(part.response_ids) for one in self._finished for part in (one, *one.extra_segments))
        tokens = ended + sum(session.sampled for session in self._sessions.values()) + self._engine.cancel()
        self._drop_sessions()
        return tokens

    def _drop_sessions(self) -> None:
        for session in self._sessions.values():
            self._dismiss(session)
        self._sessions.clear()
        self._limits.clear()
        self._sampling.clear()
        self._finished.clear()
        self._drain()

    def close(self) -> None:
        """Free the engine, cancel the agents and stop listening."""
        try:
            self._drop_sessions()
            self._server.close()
            self._drain()
            self._loop.close()
        finally:
            self._engine.close()

    def _start(self, request: RolloutRequest, attempt: int) -> None:
        if request.prompt is None:
            raise ValueError(f"request {request.key} has no prompt for its agent")
        token = self._server.admit()
        endpoint = Endpoint(self._server.url, token, MODEL, request.seed)
        run = self._loop.start(run_agent(self._agent, request.prompt, endpoint))
        limits, tokens = self._section, self._limits[request.key][1]
        self._sessions[token] = Session(
            request,
            tokens,
            limits.max_turns,
            limits.max_turn_tokens,
            limits.max_sampled_tokens,
            attempt,
            token,
            run,
            endpoint.rewards,
            time.monotonic(),
        )
        run.add_done_callback(lambda _: self._server.calls.put(_Ended(token)))

    def _receive(self, end: float) -> None:
        """Handle queued events; waits for one when nothing is being decoded."""
        wait, left = not self._engine.unfinished, end - time.monotonic()
        try:
            event = self._server.calls.get(wait, max(min(left, CHECK_SECONDS), 0.0) if wait else None)
            while True:
                self._handle(event)
                event = self._server.calls.get_nowait()
        except queue.Empty:
            pass
        now = time.monotonic()
        for call in [call for call in self._waiting_calls if call.reply.cancelled()]:
            self._waiting_calls.remove(call)
            self._sessions[call.token].since = now
        if now >= self._next_check:
            self._next_check = now + CHECK_SECONDS
            self._cancel_overdue(now)

    def _cancel_overdue(self, now: float) -> None:
        patience = self._section.timeout_seconds
        for session in self._busy():
            if now - session.since > patience:
                session.overdue = f"no request and no end within {patience:g} s (environment.timeout_seconds)"
                session.run.cancel()  # Its end is queued like any other.
                if self._loop.is_blocked(BLOCKED_SECONDS):
                    self._loop = AgentLoop()  # The old one is abandoned in its thread.

    def _handle(self, event: Call | _Ended) -> None:
        session = self._sessions.get(event.token)
        if isinstance(event, Call):
            if session is None or session.run.done():
                refuse([event], "the sample is over")
            else:
                self._waiting_calls.append(event)
        elif session is not None and not session.waiting:
            self._end(session)

    @property
    def _calling(self) -> set[str]:
        """Tokens of the sessions whose requests are not being sampled yet."""
        return {call.token for call in self._waiting_calls}

    def _all_wait(self) -> bool:
        calling = self._calling
        return all(session.waiting or token in calling for token, session in self._sessions.items())

    def _busy(self) -> list[Session]:
        """Return the sessions whose agents the player waits for."""
        calling = self._calling
        return [
            session
            for token, session in self._sessions.items()
            if not (session.waiting or token in calling or session.run.done())
        ]

    def _sample_key(self, call: Call) -> SampleKey:
        return self._sessions[call.token].request.key

    def _sample(self, call: Call) -> None:
        """Submit a request to the engine, or refuse it."""
        session = self._sessions[call.token]
        temperature = self._limits[session.request.key][0]
        if call.reply.cancelled():
            session.since = time.monotonic()
            return
        try:
            self._check_constrains(call)
            places, limit = session.open(call, self._texts)
        except Refusal as refusal:
            session.since = time.monotonic()
            resolve(call, refusal)
            return
        requests = session.start(places)
        try:
            self._engine.submit(requests, temperature=temperature, max_new_tokens=limit)
        except UserError as error:  # The model's context is full.
            session.withdraw(places)
            session.since = time.monotonic()
            resolve(call, session.full(str(error)))
            return
        for request, place in zip(requests, places, strict=True):
            self._sampling[request.key] = (session, place, self.version)

    def _check_constrains(self, call: Call) -> None:
        if call.constrained and not getattr(self._engine, "constrains", False):
            field = "response_format" if call.forced is None else "tool_choice"
            raise invalid(field, f"{field} needs constrained decoding, which rollout.backend vllm has; expected text, or auto")

    def _completed(self, turn: Rollout) -> None:
        session, place, version = self._sampling.pop(turn.key)
        session.since = time.monotonic()
        if not session.run.done():
            session.complete(place, turn, version, self._texts)
            return
        session.drop(place)  # The agent has ended.
        if not session.waiting:
            self._end(session)

    def _end(self, session: Session) -> None:
        """Finish a sample with the agent's reward or failure; a failure is no reward."""
        request = session.request
        self._dismiss(session)
        del self._sessions[session.token]
        rewards, failure = self._rewards(session)
        rollout = None if failure and not session.refused else session.rollout(rewards, self._texts.tokenizer)
        if rollout is None and session.attempt < self._section.retries:
            self._start(request, session.attempt + 1)
            return
        del self._limits[request.key]
        self._finished.append(rollout or failed_rollout(request, failure or "the agent requested no completion"))

    def _rewards(self, session: Session) -> tuple[dict[str, float], str]:
        """Return the rewards by path, and the reason of a failure.

        Paths that a failed agent has not rewarded get 0.
        """
        failure = ""
        try:
            returned = session.run.result()
        except UserError:
            raise
        except CancelledError:
            returned, failure = 0.0, session.overdue or "the agent was cancelled"
        except Exception as error:  # noqa: BLE001 - the boundary to user code
            returned, failure = 0.0, error_line(error)
        shared = None if isinstance(returned, Mapping) else returned
        own = dict(session.rewards) | (dict(returned) if isinstance(returned, Mapping) else {})
        rewards: dict[str, Any] = dict.fromkeys(session.paths or ([] if own else [""]), shared) | own
        for path, reward in rewards.items():
            if not isinstance(path, str):
                raise UserError(f"agent {self._section.name!r} returned a reward for {path!r}, expected the text of a path")
            if not isinstance(reward, int | float) or not math.isfinite(reward):
                where = f" for path {path!r}" if own else ""
                raise UserError(
                    f"agent {self._section.name!r} returned {reward!r}{where}, expected a finite number, the reward"
                )
            if path and path not in session.paths | self._unused_paths:
                self._unused_paths.add(path)
                _logger.warning("an agent's reward for the path %r has no effect: its sample has no request of it", path[:100])
        return {path: float(reward) for path, reward in rewards.items()}, failure

    def _dismiss(self, session: Session) -> None:
        self._server.dismiss(session.token)
        session.run.cancel()
        ended = [call for call in self._waiting_calls if call.token == session.token]
        self._waiting_calls = [call for call in self._waiting_calls if call.token != session.token]
        refuse([*ended, *(place.call for place in session.pending)], "the sample is over")

    def _drain(self) -> None:
        """Refuse the requests that arrived in the meantime."""
        while not self._server.calls.empty():
            event = self._server.calls.get_nowait()
            if isinstance(event, Call):
                refuse([event], "the rollout engine is closed")
