"""A reward function that does harm to the process it runs in: once in the life of a run, at a given call, and never again."""

import time
from pathlib import Path

import numpy as np

CHUNK = 128 * 2**20


def hindered(responses, folder, harm, at_call=3, most_gib=8):
    """Scores by length. `harm` is "none", "slow" (an answer that does not come) or "memory" (all that there is)."""
    calls = Path(folder)
    calls.mkdir(parents=True, exist_ok=True)
    (calls / f"{time.time_ns()}").touch()
    if harm != "none" and len(list(calls.iterdir())) == at_call:
        {"slow": _sleep, "memory": _eat}[harm](most_gib)
    return [len(text) / 100 for text in responses]


def _sleep(_):
    time.sleep(3600)


def _eat(most_gib):
    """Take memory until the process is ended; gives up at `most_gib`, so that a machine without a guard survives the test."""
    taken = []
    while len(taken) * CHUNK < most_gib * 2**30:
        taken.append(np.ones(CHUNK // 8))
        time.sleep(0.02)
    raise MemoryError("nobody ended a process that took all memory it could get")
