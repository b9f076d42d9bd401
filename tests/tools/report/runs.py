"""Run folders to report on, written by the sinks that real runs use."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from rayrlhf.observe.metrics import MetricsSink
from rayrlhf.observe.samples import Sample, SampleSink
from rayrlhf.observe.trace import TraceWriter

HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'> \u202eRTL\u202c \0 \u2028 & <b>bold</b>"
)
START = 1_800_000_000.0
PHASES = {
    "generate": 2.0,
    "reward": 0.5,
    "reference": 0.5,
    "policy": 0.5,
    "assemble": 0.1,
    "update_policy": 3.0,
    "weight_sync": 0.4,
}


def config(name: str, steps: int, **changes: object) -> dict[str, object]:
    return {
        "run": {"name": name, "steps": steps},
        "model": {"path": "builtin:tiny"},
        "data": {"train": {"path": "builtin:sums"}},
        "algorithm": {"kl": {"coefficient": 0.1}},
        **changes,
    }


def metrics(step: int, steps: int, chance: random.Random) -> dict[str, float]:
    done = step / steps
    shares = {f"time/{name}": seconds for name, seconds in PHASES.items()}
    return {
        "objective/scores": done + chance.gauss(0, 0.05),
        "objective/kl": 2 * done,
        "objective/kl_coef": 0.1,
        "policy/entropy_avg": 2 - done,
        "policy/clipfrac_avg": 0.1 * chance.random(),
        "policy/approxkl_avg": 0.01,
        "policy/grad_norm": 1 + chance.random(),
        "tokens/responses_len_mean": 20 + 5 * done,
        "ppo/val/var_explained": done,
        "loss/value_avg": 1 - done,
        "sampling/sampling_logp_difference/mean": 1e-6,
        "sync/version": step + 1,
        "sync/seconds": 0.4,
        "episode": 40 * step,
        "reward/sums": done,
        "memory/peak_gib": 2 + done,
        "time/step": sum(PHASES.values()),
        **shares,
    }


def sample(step: int, number: int, chance: random.Random, **changes: object) -> Sample:
    kl = [chance.gauss(0, 0.6) for _ in range(3)]
    values: dict[str, object] = {
        "prompt_id": number,
        "sample": 0,
        "prompt": f"{step}+{number}=",
        "response": f"answer {step + number}",
        "score": chance.random(),
        "length": 3,
        "finish_reason": "stop",
        "version": step,
        "kl": sum(kl),
        "parts": {"sums": 1.0},
        "tokens": ["answer", f" {step}", f"+{number}"],
        "token_kl": kl,
    }
    return Sample(**{**values, **changes})  # type: ignore[arg-type]


def write_run(
    folder: Path, *, name: str = "first", steps: int = 20, samples: int = 4, hostile: bool = False, seed: int = 0
) -> Path:
    """A finished PPO run."""
    folder.mkdir(parents=True)
    chance = random.Random(seed)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(name, steps, note=HOSTILE if hostile else "plain")))
    text = {"prompt": HOSTILE, "response": HOSTILE, "tokens": [HOSTILE, "a", "b"]} if hostile else {}
    sink, rollouts, held_out, trace = (
        MetricsSink(folder),
        SampleSink(folder / "samples"),
        SampleSink(folder / "evaluation"),
        TraceWriter(folder),
    )
    now = START
    for step in range(1, steps + 1):
        row = metrics(step, steps, chance)
        sink.write(step, row | ({f"reward/{HOSTILE}": 1.0} if hostile else {}))
        rollouts.write(step, [sample(step, number, chance, **text) for number in range(samples)])
        for phase, seconds in PHASES.items():
            trace.span(phase, "driver", now, seconds, arguments={"step": step})
            now += seconds
    for step in (0, steps):
        held_out.write(step, [sample(step, number, chance, **text) for number in range(8)])
        sink.write(step, {"evaluation/score": step / steps})
    sink.close()
    trace.close()
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "processor": HOSTILE if hostile else "a processor"}))
    (folder / "export").mkdir()
    return folder
