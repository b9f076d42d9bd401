"""All that `rayrlhf debug` collects about a run, without secrets."""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rayrlhf.config.section import GIB
from rayrlhf.observe.host_facts import describe_environment
from rayrlhf.observe.journal import FILE_NAME as JOURNAL
from rayrlhf.observe.memory import memory_limit_bytes
from rayrlhf.observe.metrics import FILE_NAME as METRICS
from rayrlhf.observe.stacks import FOLDER as STACKS
from rayrlhf.observe.user_output import FILE_NAME as USER_OUTPUT
from rayrlhf.observe.vitals import FILE_NAME as VITALS
from rayrlhf.observe.vitals import machine_memory
from rayrlhf.tools.debug.processes import LiveProcess, driver_pid, environments, live_processes, log_tails, tail
from rayrlhf.tools.debug.redact import known_secrets, redacted, redacted_tree
from rayrlhf.tools.report.run_files import read_lines
from rayrlhf.tools.report.run_view import RunView, read_run


@dataclass(frozen=True, slots=True)
class DebugFacts:
    """One run at one moment, or after its end.

    Attributes:
        view: the run as the report reads it, without samples.
        vitals: lines of `vitals.jsonl`, oldest first.
        processes: of the run on this machine; empty when it has ended.
        machine: this machine now.
        files: name in the archive -> text.
    """

    view: RunView
    vitals: Sequence[Mapping[str, Any]]
    processes: Sequence[LiveProcess]
    machine: Mapping[str, Any]
    files: Mapping[str, str]

    @property
    def last(self) -> Mapping[str, Any]:
        """The newest line of `vitals.jsonl`; empty without any."""
        return self.vitals[-1] if self.vitals else {}

    @property
    def stacks(self) -> dict[str, str]:
        """File name -> stacks of live processes, and those kept of hung ones."""
        return {name.partition("/")[2]: text for name, text in self.files.items() if name.startswith(f"{STACKS}/")}

    @property
    def logs(self) -> dict[str, str]:
        """File name -> last lines of each log."""
        return {name.partition("/")[2]: text for name, text in self.files.items() if name.startswith("logs/")}


def collect(folder: Path) -> DebugFacts:
    """Read a run folder, and the run's processes if they are on this machine.

    Raises:
        UserError: the folder holds no run.
    """
    view = read_run(folder, max_rollouts=0)
    vitals = [row for row in read_lines(folder / VITALS) if isinstance(row.get("time"), int | float)]
    actors = _actors(vitals[-1]) if vitals else {}
    driver = driver_pid(folder)
    processes = [] if driver is None else live_processes(driver, actors)
    secrets = known_secrets(environments([process.pid for process in processes]))
    pids = {name: row["pid"] for line in vitals for name, row in _actors(line).items() if isinstance(row.get("pid"), int)}
    pids |= {process.name: process.pid for process in processes}
    texts = {name: (folder / name).read_text(encoding="utf-8", errors="replace") for name in _whole(folder)}
    texts |= {name: tail(folder / name) for name in (METRICS, USER_OUTPUT) if (folder / name).is_file()}
    texts |= {f"{STACKS}/{path.name}": tail(path, 2**18) for path in sorted((folder / STACKS).glob("*.txt"))}
    texts |= {
        f"{STACKS}/now-{process.name.replace('/', '-')[:80]}-{process.pid}.txt": process.stacks
        for process in processes
        if process.stacks
    }
    texts |= {f"logs/{name}": text for name, text in log_tails(pids, _begun(folder, vitals)).items()}
    machine = _machine(folder)
    texts["machine.json"] = json.dumps(machine, indent=1)
    return DebugFacts(
        _without_secrets(view, secrets, texts.get("config.yaml", "")),
        redacted_tree(vitals, secrets),
        [replace(process, name=redacted(process.name, secrets), stacks="") for process in processes],
        redacted_tree(machine, secrets),
        {name: _redacted_file(name, text, secrets) for name, text in texts.items()},
    )


def _redacted_file(name: str, text: str, secrets: set[str]) -> str:
    """Return a file of the archive without secrets.

    Settings and records go by the names of their keys.
    """
    try:
        if name.endswith(".yaml"):
            return yaml.safe_dump(redacted_tree(yaml.safe_load(text), secrets), sort_keys=False, allow_unicode=True)
        if name.endswith(".jsonl"):
            rows = (json.loads(line) for line in text.splitlines() if line.strip())
            return "".join(json.dumps(redacted_tree(row, secrets), ensure_ascii=False) + "\n" for row in rows)
    except (ValueError, yaml.YAMLError, RecursionError):
        pass  # damaged, or its last line is incomplete
    return redacted(text, secrets)


def _whole(folder: Path) -> list[str]:
    return [name for name in ("config.yaml", "environment.json", JOURNAL, VITALS) if (folder / name).is_file()]


def _actors(line: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    actors = line.get("actors")
    return {name: row for name, row in actors.items() if isinstance(row, dict)} if isinstance(actors, dict) else {}


def _begun(folder: Path, vitals: Sequence[Mapping[str, Any]]) -> float:
    """Return a time before which no log of the run was written."""
    times = [row["time"] for row in vitals[:1]]
    with suppress(OSError):
        times.append((folder / "environment.json").stat().st_mtime)
    return min(times, default=0.0) - 60.0


def _without_secrets(view: RunView, secrets: set[str], config_text: str) -> RunView:
    return replace(
        view,
        config_text=_redacted_file("config.yaml", config_text, secrets) if config_text else "",
        config=redacted_tree(view.config, secrets),
        environment=redacted_tree(view.environment, secrets),
        recovery=redacted_tree(view.recovery, secrets),
        before=(),
        after=(),
    )


def _machine(folder: Path) -> dict[str, Any]:
    """Return facts about this machine, without user names and environment variables."""
    found = describe_environment() | machine_memory() | {"memory_limit_gib": round(memory_limit_bytes() / GIB, 1)}
    found["time"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    with suppress(OSError):
        found["load"] = list(os.getloadavg())
        found["run_folder_free_gib"] = round(shutil.disk_usage(folder).free / GIB, 1)
    return found
