"""Page of `rayrlhf debug`: state and history of a run's processes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rayrlhf.observe.html.charts import lines
from rayrlhf.observe.html.page import Block, Chart, DataTable, Heading, Paragraph, Tiles
from rayrlhf.observe.progress import duration
from rayrlhf.tools.debug.debug_facts import DebugFacts
from rayrlhf.tools.report.run_blocks import Folded, Notice
from rayrlhf.tools.report.run_page import findings_section, recovery_section, state_notice, what_ran

MEMORY: Sequence[tuple[str, Callable[[Mapping[str, Any]], Any]]] = (
    ("processes of the run, resident", lambda row: row.get("resident_gib")),
    ("available on the driver's machine", lambda row: _machine_of(row).get("available_gib")),
    ("object store and other shared memory", lambda row: _machine_of(row).get("object_store_gib")),
    ("swap", lambda row: _machine_of(row).get("swap_gib")),
)
"""Curves of memory, in GiB, from a line of vitals."""


def page_of(facts: DebugFacts) -> tuple[str, str, list[Block]]:
    """Return title, subtitle and blocks."""
    blocks: list[Block] = [state_notice(facts.view), *_last_signs(facts), Tiles(_figures(facts))]
    blocks += _processes(facts)
    blocks += _texts("Stacks", facts.stacks, "No stacks: the run has ended, and no process of it hung while it was watched.")
    blocks += _memory(facts.vitals)
    blocks += _queues(facts.vitals)
    blocks += recovery_section(facts.view)
    blocks += findings_section(facts.view)
    logs = facts.logs | {name: facts.files[name] for name in ("user_output.log",) if name in facts.files}
    blocks += _texts(
        "Last lines of each log", logs, "No logs on this machine: they are in Ray's folder of the machine that ran."
    )
    blocks += [
        Heading("This machine now"),
        DataTable(["fact", "value"], [(name, str(value)) for name, value in facts.machine.items()]),
    ]
    blocks += what_ran(facts.view)
    return f"Debug: {facts.view.name}", "Tokens, keys, passwords and environment variables are removed", blocks


def _last_signs(facts: DebugFacts) -> Iterator[Block]:
    """Yield the newest events and open waits."""
    signs = [f"{event.get('actor')}: {event.get('event')}: {event.get('reason')}" for event in facts.view.recovery[-3:]]
    waits = facts.last.get("waits")
    if isinstance(waits, dict):
        signs += [f"the driver waits for {what}, called {duration(float(age))} before" for what, age in waits.items()]
    if facts.vitals:
        age = time.time() - float(facts.last["time"])
        signs.append(f"newest line of vitals.jsonl: {duration(max(age, 0.0))} ago")
    if signs:
        yield Notice("info", "Last signs", signs)


def _figures(facts: DebugFacts) -> list[tuple[str, str]]:
    requests = facts.last.get("requests")
    figures = [("steps done", f"{facts.view.state.step:,}"), ("processes here", str(len(facts.processes)))]
    if isinstance(requests, dict):
        figures.append(("open requests", f"{requests.get('open', 0):,}"))
    for label, read in MEMORY[:2]:
        value = read(facts.last)
        if isinstance(value, int | float):
            figures.append((f"GiB: {label}", f"{value:.3g}"))
    return [*figures, ("processes lost", str(sum(event.get("event") == "lost" for event in facts.view.recovery)))]


def _processes(facts: DebugFacts) -> Iterator[Block]:
    yield Heading("Processes")
    if facts.processes:
        yield Paragraph("On this machine now.")
        rows = [(process.name, process.pid, process.state, process.gib) for process in facts.processes]
        yield DataTable(["process", "number", "state", "GiB resident"], rows)
    actors = facts.last.get("actors")
    if not isinstance(actors, dict) or not actors:
        yield Paragraph("No actors in vitals.jsonl: runs write it while they train.")
        return
    yield Paragraph("Actors at the newest line of vitals.jsonl, with the age of their heartbeats.")
    columns = ("state", "pid", "node", "age", "peak_gib", "call")
    table = [(name, *(row.get(column) for column in columns)) for name, row in actors.items()]
    yield DataTable(["actor", "health", "number", "node", "heartbeat, s ago", "GiB at the peak", "open call"], table)


def _memory(vitals: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    if len(vitals) < 2:
        return
    yield Heading("Memory")
    series = {}
    for label, read in MEMORY:
        points = [(float(row["time"]) - float(vitals[-1]["time"]), read(row)) for row in vitals]
        known = [(at, float(value)) for at, value in points if isinstance(value, int | float)]
        if known:
            series[label] = ([at for at, _ in known], [value for _, value in known])
    figure = lines(series, title="Memory", x="seconds before the newest line", y="GiB")
    yield Chart(figure, "Resident memory counts pages that processes share once for each of them.")


def _queues(vitals: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    requests = [(float(row["time"]), row["requests"]) for row in vitals if isinstance(row.get("requests"), dict)]
    if len(requests) < 2:
        return
    yield Heading("Requests")
    times = [at - requests[-1][0] for at, _ in requests]
    flights = [sum(state.get("in_flight", {}).values()) for _, state in requests]
    series = {"unfinished": (times, [float(state.get("open", 0)) for _, state in requests]), "in flight": (times, flights)}
    yield Chart(
        lines(series, title="Rollout requests", x="seconds before the newest line", y="requests"),
        "Requests of the step, and of those issued ahead, without a response.",
    )
    ranks = requests[-1][1].get("in_flight", {})
    yield DataTable(["replica", "in flight"], [(f"rollout/{rank}", count) for rank, count in ranks.items()])


def _texts(heading: str, texts: Mapping[str, str], without: str) -> Iterator[Block]:
    yield Heading(heading)
    for name, text in texts.items():
        yield Folded(name, text)
    if not texts:
        yield Paragraph(without)


def _machine_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    machine = row.get("machine")
    return machine if isinstance(machine, dict) else {}
