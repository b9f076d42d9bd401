"""`rayrlhf bench ppo`: PPO step time of ours, TRL's PPOTrainer, and plain model calls.

All three sample from the same prompts, each with its own policy, critic, reference and reward models of one size, and take one
optimizer step per epoch. Each runs in its own process, alternately. A step is timed from the end of the previous one, with
everything in between; the first is left out. TRL's trainer is from its last release that had one, with its defaults except
gradient checkpointing, which is on by default and would make it slower. Responses end at the end token in all three. The plain
calls are vLLM's `LLM.generate` and torch forward and backward passes on padded batches, sequentially; there are none for
adapters.

Times of the phases are reported in seconds and as a share of the fastest matrix product of this machine.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayrlhf.config.model import ModelSection
from rayrlhf.engines.rollout.common import rollout_environment
from rayrlhf.errors import UserError
from rayrlhf.models.builtin import cache_folder, resolve_model
from rayrlhf.storage.atomic import folder_atomically
from rayrlhf.tools.bench.operations import Lengths, peak_operations, phase_operations, phase_table
from rayrlhf.tools.bench.paired import Comparison, compare, in_new_process
from rayrlhf.tools.bench.work import Critic, PPOWork
from rayrlhf.tools.launch.model_shape import read_shape

PLAIN = "plain torch and vLLM calls"
RELEASE = "1.12.0"
"""TRL's last release with a PPO trainer, installed in a folder of its own."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Times of one run of a contender.

    Attributes:
        step: seconds per step.
        phases: phase -> seconds in the last step.
        lengths: token counts of that step's prompts and responses.
    """

    step: float
    phases: dict[str, float]
    lengths: Lengths


@dataclass(frozen=True)
class PPOBench:
    """Speeds of all contenders, and phase times of the last round where available.

    Attributes:
        comparison: steps per hour.
        seconds: contender -> phase -> seconds.
        operations: contender -> phase -> floating-point operations; empty with adapters.
        peak: floating-point operations per second of this machine.
    """

    comparison: Comparison
    seconds: Mapping[str, Mapping[str, float]]
    operations: Mapping[str, Mapping[str, float]]
    peak: float

    def as_markdown(self) -> str:
        """Return both tables as Markdown."""
        return f"{self.comparison.as_markdown()}\n\n{phase_table(self.seconds, self.operations, self.peak)}"


def bench_ppo(
    work: PPOWork, *, critics: tuple[Critic, ...], rounds: int, progress: Callable[[str], None] = lambda _: None
) -> PPOBench:
    """Compare TRL, the plain calls and ours (for each kind of critic).

    Returns:
        Steps per hour, with TRL as the baseline, and phases.

    Raises:
        UserError: TRL's release cannot be installed.
    """
    release, folder = installed_trl(progress)
    last: dict[str, Measured] = {}

    def measured(name: str, run: Callable[..., Measured], *arguments: object) -> Callable[[], float]:
        def speed() -> float:
            last[name] = in_new_process(run, work, *arguments)
            return 3600 / last[name].step

        return speed

    contenders: dict[str, Callable[[], float]] = {f"TRL {release} PPOTrainer": lambda: run_trl(work, folder)}
    if not work.lora:
        contenders[PLAIN] = measured(PLAIN, _run_plain)
    for critic in critics:
        name = f"rayrlhf, {critic} critic"
        contenders[name] = measured(name, run_ours, critic)
    adapters = f", adapters of rank {work.lora}" if work.lora else ""
    title = (
        f"PPO step, {work.prompts} prompts x {work.new_tokens} new tokens x {work.epochs} epochs, {work.precision}{adapters}"
    )
    comparison = compare(title, "steps/h", contenders, rounds, progress)
    shape = read_shape(ModelSection(path=work.policy))
    operations = {name: {} if work.lora else phase_operations(shape, one.lengths, work.epochs) for name, one in last.items()}
    peak = in_new_process(peak_operations, work.precision)
    return PPOBench(comparison, {name: one.phases for name, one in last.items()}, operations, peak)


def write_reward_model(model: str, folder: Path) -> tuple[str, str]:
    """Write a sequence classifier with a random head; returns paths of model and classifier."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    policy = resolve_model(model)
    AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return policy, str(folder)


def run_ours(work: PPOWork, critic: Critic) -> Measured:
    """Run our PPO and time its steps."""
    from time import perf_counter

    from rayrlhf.ppo.callbacks import Callback
    from rayrlhf.ppo.train_ppo import train_ppo

    ends: list[float] = []
    last: dict[str, Any] = {}

    class Clock(Callback):
        def on_step_end(self, step: int, metrics: Mapping[str, float], scored: Any) -> None:
            ends.append(perf_counter())
            times = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
            last["phases"] = {name: value for name, value in times.items() if name != "step" and "/" not in name}
            prompts = [len(scored.prompts[rollout.key.prompt].token_ids) for rollout in scored.rollouts]
            last["lengths"] = Lengths(prompts, [len(rollout.response_ids) for rollout in scored.rollouts])

    with tempfile.TemporaryDirectory() as name:
        work.write_prompts(Path(name))
        train_ppo(work.config(critic, Path(name)), [Clock()])
    return Measured(float(np.median(np.diff(ends))), **last)


def _run_plain(work: PPOWork) -> Measured:
    # Must be set before vLLM is imported. The engine runs in this process, as in our actors.
    os.environ.update(rollout_environment(work.config("none", Path()).rollout, threads=os.cpu_count() or 1))
    from rayrlhf.tools.bench.plain_ppo import PlainPPO

    plain = PlainPPO(work)
    seconds = plain.seconds()
    return Measured(seconds, plain.parts, plain.lengths)


def installed_trl(progress: Callable[[str], None]) -> tuple[str, Path]:
    """Install the release if missing, without dependencies, so that both use the same torch.

    Returns:
        Its version, and its folder, for `PYTHONPATH`.

    Raises:
        UserError: pip could not install it.
    """
    folder = cache_folder() / "bench" / f"trl-{RELEASE}"
    if not folder.is_dir():
        progress(f"installing trl=={RELEASE} into {folder}")
        with folder_atomically(folder) as partial:
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(partial), f"trl=={RELEASE}"]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise UserError(f"bench ppo: pip could not install trl=={RELEASE}: {run.stderr.strip()[-300:]}")
    return RELEASE, folder


def run_trl(work: PPOWork, folder: Path) -> float:
    """Run TRL's trainer with its own release first on the path; returns steps per hour."""
    script = Path(__file__).with_name("trl_ppo.py")
    job = json.dumps(asdict(work) | {"token_ids": work.token_ids()})
    environment = os.environ | {"PYTHONPATH": str(folder), "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, str(script)], input=job, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"TRL's trainer ended with {run.returncode}: {run.stderr[-2000:]}")
    return 3600 / float(np.median(json.loads(run.stdout.splitlines()[-1])))
