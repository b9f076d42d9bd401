"""What becomes of a pair, and why: one pure rule from its score, its candidates and the configured choices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rayrlhf.config.presft import RelabelSection
from rayrlhf.presft.choices import best

Action = Literal["keep", "replace", "mix", "drop"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One response that may replace an original.

    Attributes:
        text: the response.
        score: what the method says of it, higher is better.
        refusal: why the guard refuses it; None when it does not.
    """

    text: str
    score: float
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a pair.

    Attributes:
        action: `keep` trains on the original, `replace` on the new response, `mix` on both, `drop` on neither.
        reason: in words, for the provenance.
        chosen: index of the candidate that became (or would have become) the new response; None without one.
        guarded: whether the guard refused all candidates.
    """

    action: Action
    reason: str
    chosen: int | None = None
    guarded: bool = False


LEARNED = Decision("keep", "learned: its score is above the cut")


def needs_candidates(section: RelabelSection) -> bool:
    """Whether the configured choice reads new responses at all."""
    return section.struggling in ("replace", "mix")


def decide(section: RelabelSection, original: str, candidates: Sequence[Candidate]) -> Decision:
    """Return the decision on a struggling pair.

    Args:
        section: the choices.
        original: the dataset's response.
        candidates: of the prompt; not looked at when the choice is `keep` or `drop`.

    Raises:
        ValueError: the choice needs candidates and there are none.
    """
    if not needs_candidates(section):
        action: Action = "drop" if section.struggling == "drop" else "keep"
        return Decision(action, f"struggling: relabel.struggling is {action}")
    if not candidates:
        raise ValueError("a struggling pair without candidates")
    chosen = best([candidate.score for candidate in candidates], [candidate.refusal is None for candidate in candidates])
    if chosen is None:
        reasons = ", ".join(dict.fromkeys(candidate.refusal or "" for candidate in candidates))
        return Decision(section.guarded, f"guarded: {reasons}", guarded=True)
    if candidates[chosen].text.strip() == original.strip():
        return Decision("keep", "struggling: the new response is the original", chosen)
    action = "mix" if section.struggling == "mix" else "replace"
    return Decision(action, f"struggling: {action} by {section.method}", chosen)
