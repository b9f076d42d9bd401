"""Prompts for the built-in environments, each with the transcript of a weak player.

A model fine-tuned on the transcripts knows the form of a turn and no more, which is the starting point for RL. A `completion`
is a whole sample, the environment's text included. `calculations` are sums, rounded to the nearest ten or, for `calls` percent
of them, computed with `calculator`: `41+25=` and `70`, or `[41+25] 66 66`. `guesses` are games of `guessing`: `game 12: ` and
`7<3>4`, by a player that uses the feedback in `listens` percent of the guesses. With `chat=1` they are conversations, for
agents; those of `calculations` call tools, and some may ask for a record: `code N-417=`.
"""

import random
from functools import cache
from typing import Any

from rayrlhf.data.toy.sums import Split, split_of

LARGEST_GAME, LARGEST_NUMBER = 1_000_000, 9
MAX_DIGITS, MAX_ROWS = 9, 1_000_000
LONGEST_GAME = 4
"""Maximum turns of a game: as many as bisecting the ten numbers takes."""


TOOL_SCHEMA = {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]}
TOOLS = {
    name: {"type": "function", "function": {"name": name, "description": description, "parameters": TOOL_SCHEMA}}
    for name, description in (("add", "Add numbers: 12+34"), ("get", "Get the record of a code: N-567"))
}
"""Tools of conversations by name. Names and arguments have the same lengths, which makes the arguments easier to copy."""
CODES = range(100, 1000)


def record(code: int) -> str:
    """Return the record of a code: two digits that cannot be guessed from it."""
    return str(random.Random(f"record {code}").randrange(10, 100))


def calculations(
    seed: int, count: int, split: Split, calls: int = 0, digits: int = 0, chat: int = 0, lookups: int = 0
) -> list[dict[str, Any]]:
    """Return rows with `prompt`, `completion` and the right `answer`.

    Args:
        seed: random seed; equal arguments give equal rows, and a smaller count the first of them.
        count: number of rows; sums may repeat.
        split: side of the hash of `rayrlhf.data.toy.sums`.
        calls: percent of the rows whose completion calls the calculator.
        digits: of each number; 0 is two.
        chat: with 1 the transcript is a conversation with tool calls in `messages` and `tools`, and there is no `completion`.
        lookups: percent of the rows about a record, whose transcript guesses it, or looks it up in a conversation.
    """
    draw, habits = random.Random(f"calculations {seed} {split}"), random.Random(f"calls {seed} {split}")
    smallest = 10 ** ((digits or 2) - 1)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        if lookups and draw.random() * 100 < lookups:
            rows.append(_lookup(draw, split, chat, asks=habits.random() * 100 < calls))
            continue
        left, right = _numbers(draw, smallest, split)
        answer, rounded = left + right, (left + right + 5) // 10 * 10
        asks = habits.random() * 100 < calls
        prompt = f"{left}+{right}="
        said = f"[{left}+{right}] {answer} {answer}" if asks else str(rounded)
        final, tool = str(answer if asks else rounded), "add" if asks else ""
        transcript = _tool_use(prompt, final, tool, list(TOOLS)[: 2 if lookups else 1]) if chat else {"completion": said}
        rows.append({"prompt": prompt, "answer": str(answer)} | transcript)
    return rows


def _numbers(draw: random.Random, smallest: int, split: Split) -> tuple[int, int]:
    """Return the numbers of a sum of the split."""
    while True:
        left, right = (draw.randrange(smallest, 10 * smallest) for _ in range(2))
        if split_of(left, right) == split:
            return left, right


@cache
def _codes(split: Split) -> list[int]:
    """Return the codes of a split, by the hash that divides sums."""
    return [code for code in CODES if split_of(code, 0) == split]


def _lookup(draw: random.Random, split: Split, chat: int, *, asks: bool) -> dict[str, Any]:
    """Return a row about a record; a fifth of the codes is for evaluation."""
    code = draw.choice(_codes(split))
    said = record(code) if asks else str(draw.randrange(1, 10) * 10)
    prompt = f"code N-{code}="
    transcript = _tool_use(prompt, said, "get" if asks else "", list(TOOLS)) if chat else {"completion": said}
    return {"prompt": prompt, "answer": record(code)} | transcript


def _tool_use(prompt: str, said: str, tool: str, known: list[str]) -> dict[str, Any]:
    """Return a conversation that ends with an answer, of the tool if it names one."""
    call = {"type": "function", "function": {"name": tool, "arguments": {"s": prompt.removeprefix("code ").removesuffix("=")}}}
    used = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": said}] if tool else []
    messages = [{"role": "user", "content": prompt}, *used, {"role": "assistant", "content": said}]
    return {"messages": messages, "tools": [TOOLS[name] for name in known]}


def guesses(seed: int, count: int, split: Split, chat: int = 0, listens: int = 0) -> list[dict[str, Any]]:
    """Return rows with `prompt`, `completion` and the `hidden` number.

    The number of the game is independent of the hidden number.

    Args:
        chat: with 1 the transcript is a conversation in `messages`, and there is no `completion`.
        listens: percent of the guesses that are among the numbers still possible.
    """
    draw = random.Random(f"guesses {seed} {split}")
    rows = []
    for _ in range(count):
        game = draw.randrange(LARGEST_GAME // 5) * 5 + (0 if split == "evaluation" else draw.randrange(1, 5))
        hidden = draw.randint(0, LARGEST_NUMBER)
        said = _played(hidden, draw, listens)
        rows.append({"prompt": f"game {game}: ", "hidden": str(hidden)} | _transcript(f"game {game}: ", said, chat))
    return rows


def _played(hidden: int, draw: random.Random, listens: int) -> list[str]:
    """Play a game; return guesses and replies alternately."""
    said: list[str] = []
    low, high = 0, LARGEST_NUMBER
    for _ in range(LONGEST_GAME):
        heeds = listens > 0 and draw.random() * 100 < listens
        guess = draw.randint(low, high) if heeds else draw.randint(0, LARGEST_NUMBER)
        said.append(str(guess))
        if guess == hidden:
            break
        said.append("<" if hidden < guess else ">")
        low, high = (low, min(high, guess - 1)) if hidden < guess else (max(low, guess + 1), high)
    return said


def _transcript(prompt: str, said: list[str], chat: int) -> dict[str, Any]:
    """Return a game as one text, or as messages that end with a guess."""
    if not chat:
        return {"completion": "".join(said)}
    turns = [prompt, *said][: 2 * ((len(said) + 1) // 2)]
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]}
