"""A sampler whose samples are played by agents: programs that ask for completions over HTTP as they would of any model.

It is a `RolloutEngine` like the one for environments. Each sample gets a session at the endpoint, and an agent that is told
where it is. Requests are sampled by the engine inside as they come, many agents' at a time; what was sampled is recorded as it
was sampled, and the agent's final word is the reward of all of it. With `lockstep` a batch is sampled when every agent waits,
so that batches do not depend on which agent was faster.
"""

import math
import queue
import time
from collections.abc import Collection, Sequence
from concurrent.futures import CancelledError
from typing import NamedTuple

import numpy as np

from rayrlhf.config.library_types import Tokenizer
from rayrlhf.config.rollout import EnvironmentSection
from rayrlhf.data.records import Rollout, RolloutRequest, SampleKey
from rayrlhf.data.seeds import turn_seed
from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.environments.agent import Agent, AgentLoop, Endpoint, run_agent
from rayrlhf.environments.chat_server import MODEL, Call, ChatServer, Refusal
from rayrlhf.environments.chat_tokens import ChatTokens
from rayrlhf.environments.lookup_table import told
from rayrlhf.environments.players.agent_session import Segment, Session, answered, refuse
from rayrlhf.environments.players.wrapper import WrappedEngine
from rayrlhf.environments.transcript import failed_rollout
from rayrlhf.errors import UserError

SLICE_SECONDS = 0.05
"""Longest decoding until new requests are let in."""
BLOCKED_SECONDS = 0.5
"""How long the agents' event loop may take to answer."""


class _Ended(NamedTuple):
    """An agent has said its last word; stands among the calls, behind all of its own."""

    token: str


class AgentEngine(WrappedEngine):
    """Plays samples with agents. See `RolloutEngine` for the protocol; `max_new_tokens` bounds each conversation's answers.

    Args:
        engine: samples single turns.
        agent: see `rayrlhf.environments.agent`.
        section: the limits.
        tokenizer: the policy's; has a chat template.
        stop: stop strings of the engine.
        lockstep: see the module's docstring.
        continues: weights may change while samples are being played.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        agent: Agent,
        section: EnvironmentSection,
        tokenizer: Tokenizer,
        *,
        stop: Collection[str] = (),
        lockstep: bool = False,
        continues: bool = False,
    ) -> None:
        super().__init__(engine, continues=continues)
        self._agent = agent
        self._section = section
        self._tokenizer = tokenizer
        self._lockstep = lockstep
        self._chat = ChatTokens(tokenizer)
        self._server = ChatServer(stop)
        self._loop = AgentLoop()
        self._limits: dict[SampleKey, tuple[float, int]] = {}
        self._sessions: dict[str, Session] = {}
        self._asked: list[Call] = []
        self._speaking: dict[SampleKey, tuple[Session, Segment, int]] = {}
        self._finished: list[Rollout] = []

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
            self._begin(request, attempt=0)

    def poll(self, minimum: int, seconds: float | None = None) -> list[Rollout]:
        """Answer agents until at least `minimum` requests are finished, none is left, or `seconds` are over.

        Returns:
            All that finished since the last poll.

        Raises:
            UserError: an agent raised one, or its reward is no finite number.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        while self._sessions and len(self._finished) < minimum and time.monotonic() < end:
            self._listen(end)
            if not self._lockstep or all(self._has_asked(session) for session in self._sessions.values()):
                calls, self._asked = self._asked, []
                for call in sorted(calls, key=self._place):
                    self._sample(call)
            if self._engine.unfinished:
                turns = self._engine.poll(*((self._engine.unfinished,) if self._lockstep else (1, SLICE_SECONDS)))
                for turn in sorted(turns, key=lambda turn: turn.key):
                    self._spoke(turn)
        finished, self._finished = self._finished, []
        return finished

    def cancel(self) -> None:
        """Drop all unfinished requests, and give up their agents."""
        self._engine.cancel()
        for session in self._sessions.values():
            self._dismiss(session)
        self._sessions.clear()
        self._limits.clear()
        self._speaking.clear()
        self._finished.clear()
        self._drain()

    def close(self) -> None:
        """Free the sampler, give up the agents and listen no more."""
        self.cancel()
        self._server.close()
        self._drain()
        self._loop.close()
        self._engine.close()

    def _begin(self, request: RolloutRequest, attempt: int) -> None:
        if request.prompt is None:
            raise ValueError(f"request {request.key} brings no prompt for its agent")
        token = self._server.admit()
        endpoint = Endpoint(self._server.url, token, MODEL, request.seed)
        run = self._loop.start(run_agent(self._agent, request.prompt, endpoint))
        limits, tokens = self._section, self._limits[request.key][1]
        self._sessions[token] = Session(
            request, tokens, limits.max_turns, limits.max_turn_tokens, attempt, token, run, time.monotonic()
        )
        run.add_done_callback(lambda _: self._server.calls.put(_Ended(token)))

    def _listen(self, end: float) -> None:
        """Take in what has come; waits for something, or the next time-out, where nothing is being decoded."""
        wait, patience = not self._engine.unfinished, self._section.timeout_seconds
        due = min((session.since + patience for session in self._sessions.values() if self._is_busy(session)), default=math.inf)
        left = min(due, end) - time.monotonic()
        try:
            event = self._server.calls.get(wait, max(min(left, 1.0), 0.0) if wait else None)
            while True:
                self._heard(event)
                event = self._server.calls.get_nowait()
        except queue.Empty:
            pass
        now = time.monotonic()
        for session in self._sessions.values():
            if self._is_busy(session) and now - session.since > patience:
                session.overdue = f"no request and no end within {patience:g} s (environment.timeout_seconds)"
                session.run.cancel()  # Its end comes among the calls, as any other.
                if self._loop.is_blocked(BLOCKED_SECONDS):
                    self._loop = AgentLoop()  # The old one is left behind in its thread.

    def _heard(self, event: Call | _Ended) -> None:
        session = self._sessions.get(event.token)
        if isinstance(event, Call):
            if session is None or session.run.done():
                refuse([event], "the sample is over")
            else:
                self._asked.append(event)
        elif session is not None and not session.waiting:
            self._end(session)

    def _is_busy(self, session: Session) -> bool:
        """Whether it is the agent that is waited for."""
        return not (self._has_asked(session) or session.run.done())

    def _has_asked(self, session: Session) -> bool:
        return session.waiting or any(call.token == session.token for call in self._asked)

    def _place(self, call: Call) -> SampleKey:
        return self._sessions[call.token].request.key

    def _sample(self, call: Call) -> None:
        """Give a request to the engine, or tell the agent why not."""
        session = self._sessions[call.token]
        temperature = self._limits[session.request.key][0]
        try:
            segment, limit = session.turn(call, self._chat)
        except Refusal as refusal:
            session.since = time.monotonic()
            call.reply.set_exception(refusal)
            return
        context = np.concatenate([segment.transcript.token_ids, segment.heard])
        seed = turn_seed(session.request.seed, session.turns)
        key = segment.transcript.request.key
        try:
            self._engine.submit([RolloutRequest(key, context, seed)], temperature=temperature, max_new_tokens=limit)
        except UserError as error:  # The model's context is full.
            segment.call = None
            call.reply.set_exception(session.full(error))
            return
        session.sampled(segment)
        self._speaking[key] = (session, segment, self.version)

    def _spoke(self, turn: Rollout) -> None:
        session, segment, version = self._speaking.pop(turn.key)
        session.since = time.monotonic()
        if not session.run.done():
            answered(segment, turn, version)
            return
        segment.call = None  # Nobody is there to read it.
        if not session.waiting:
            self._end(session)

    def _end(self, session: Session) -> None:
        """Take an agent's last word: a reward, or a failure, which is no reward."""
        request = session.request
        self._dismiss(session)
        del self._sessions[session.token]
        reward, failure = self._last_word(session)
        rollout = None if failure and not session.refused else session.rollout(reward, self._tokenizer)
        if rollout is None and session.attempt < self._section.retries:
            self._begin(request, session.attempt + 1)
            return
        del self._limits[request.key]
        self._finished.append(rollout or failed_rollout(request, failure or "the agent asked the policy nothing"))

    def _last_word(self, session: Session) -> tuple[float, str]:
        """The reward, or 0 and what went wrong."""
        try:
            said = session.run.result()
        except UserError:
            raise
        except CancelledError:
            return 0.0, session.overdue or "the agent was cancelled"
        except Exception as error:  # noqa: BLE001 - the boundary to other people's code
            return 0.0, told(error)
        if not isinstance(said, int | float) or not math.isfinite(said):
            raise UserError(f"agent {self._section.name!r} returned {said!r}, expected a finite number, the reward")
        return float(said), ""

    def _dismiss(self, session: Session) -> None:
        self._server.dismiss(session.token)
        session.run.cancel()
        over = [call for call in self._asked if call.token == session.token]
        self._asked = [call for call in self._asked if call.token != session.token]
        refuse([*over, *(segment.call for segment in session.segments if segment.call)], "the sample is over")

    def _drain(self) -> None:
        """Refuse what came in meanwhile."""
        while not self._server.calls.empty():
            event = self._server.calls.get_nowait()
            if isinstance(event, Call):
                refuse([event], "the sampler is closed")
