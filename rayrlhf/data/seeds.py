"""Sampling seeds derived from the request, so that retried and resumed requests repeat exactly."""

import hashlib
import struct


def sample_seed(run_seed: int, step: int, prompt: int, sample: int) -> int:
    """Return the seed of one response, in [0, 2**63).

    The seed is a BLAKE2b hash of the four numbers: the same on every machine and version. Neighboring requests differ in all
    bits, so truncation to fewer bits is safe. Two of a million responses share a seed with probability 5e-8.

    Args:
        step: PPO step.

    Raises:
        struct.error: a number does not fit into 64 bits.
    """
    return _hashed("<4q", run_seed, step, prompt, sample)


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of a turn; turn 0 has the sample's own seed."""
    return _hashed("<2q", seed, turn) if turn else seed


def _hashed(layout: str, *numbers: int) -> int:
    digest = hashlib.blake2b(struct.pack(layout, *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
