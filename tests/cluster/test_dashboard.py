"""The Grafana dashboard and the alert rules use names that runs really export."""

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
import ray
import yaml

from rayrlhf.actors.actor_metrics import COUNTERS, GAUGES
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.cluster_metrics import OTHER_GAUGES, STEP_GAUGES, ClusterMetrics
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config

FOLDER = Path(__file__).parent.parent.parent / "cluster" / "grafana"
NAME = re.compile(r"\bray_(rayrlhf_\w+)")


def used(path):
    return set(NAME.findall(path.read_text()))


def test_the_dashboard_and_the_alerts_use_only_names_that_exist_and_every_name_is_shown():
    exported = {*STEP_GAUGES, *OTHER_GAUGES, *GAUGES, *(f"{name}_total" for name in COUNTERS)}
    assert used(FOLDER / "dashboard.json") == exported
    assert used(FOLDER / "alerts.yaml") <= exported


def test_gauges_take_a_step_and_leave_out_what_it_did_not_measure():
    metrics = ClusterMetrics("run")
    shown = {}
    metrics._set = lambda name, value: shown.__setitem__(name, value)
    metrics.on_step_end(3, {"objective/scores": 0.5, "time/step": 2.0, "something/else": 1.0}, None)
    assert shown.pop("rayrlhf_last_step_timestamp_seconds") > 1e9
    assert shown == {"rayrlhf_score": 0.5, "rayrlhf_step_seconds": 2.0, "rayrlhf_step": 3}


def test_panels_do_not_overlap_and_every_alert_says_what_to_do():
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    cells = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(cells)) == len(cells)
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]:
        assert {"summary", "action"} <= set(rule["annotations"])


def test_promtool_accepts_scrape_configuration_and_rules():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    checked = subprocess.run([promtool, "check", "config", FOLDER / "prometheus.yaml"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "4 rules found" in checked.stdout + checked.stderr


def test_alerts_fire_for_their_trouble_and_not_for_a_healthy_run(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    cases = Path(__file__).with_name("alerts.test.yaml").read_text().replace("ALERTS", str(FOLDER / "alerts.yaml"))
    (tmp_path / "cases.yaml").write_text(cases)
    tested = subprocess.run([promtool, "test", "rules", tmp_path / "cases.yaml"], capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.slow
def test_a_nodes_metrics_port_shows_the_gauges_with_the_runs_name(tmp_path):
    import time

    from ray._common.network_utils import find_free_port

    port = find_free_port()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _metrics_export_port=port)
    try:
        metrics = ClusterMetrics("my-run")
        step = {key: 0.5 for key, _ in STEP_GAUGES.values()}
        metrics.on_step_end(7, step, None)
        end, text = time.monotonic() + 40, ""
        while "rayrlhf_step" not in text and time.monotonic() < end:
            time.sleep(1)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
                text = reply.read().decode()
        shown = {match for match in NAME.findall(text) if 'run="my-run"' in text}
        assert {*STEP_GAUGES, "rayrlhf_step", "rayrlhf_last_step_timestamp_seconds"} <= shown
        (line,) = [line for line in text.splitlines() if line.startswith("ray_rayrlhf_step{")]
        assert 'run="my-run"' in line
        assert line.endswith(" 7.0")
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_prometheus_scrapes_a_real_run_and_answers_every_query_of_the_dashboard(tmp_path):
    import time
    import urllib.parse

    from ray._common.network_utils import find_free_port

    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("prometheus is not installed (Debian: apt install prometheus)")
    port, own = find_free_port(), find_free_port()
    settings = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    settings["rule_files"] = [str(FOLDER / "alerts.yaml")]
    settings["scrape_configs"][0].pop("file_sd_configs")
    settings["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(settings))

    def ask(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{own}/api/v1/{path}", timeout=10) as reply:
            return json.load(reply)["data"]

    def query(expression):
        return ask(f"query?query={urllib.parse.quote(expression)}")["result"]

    command = [prometheus, f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]
    server = subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{own}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _metrics_export_port=port)
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    asked = {}

    class Ask(Callback):
        """Asks while the job is there, after its last step."""

        def on_end(self, trainer):
            end, found = time.monotonic() + 60, []
            while (not found or found[0]["value"][1] != "3") and time.monotonic() < end:
                time.sleep(1)
                try:
                    found = query('ray_rayrlhf_step{run="ppo"}')
                except OSError:
                    continue  # not up yet
            asked["step"] = found
            while (waiting := [one for one in expressions if not asked.get(one)]) and time.monotonic() < end:
                asked.update({expression: query(expression.replace("$run", "ppo")) for expression in waiting})
                time.sleep(1)  # a rate needs two scrapes
            asked["rules"] = [rule["health"] for group in ask("rules")["groups"] for rule in group["rules"]]

    try:
        train_ppo(run_config(tmp_path, "rollout.backend=transformers", "run.steps=3"), [Ask()])
    finally:
        server.terminate()
        server.wait(30)
        ray.shutdown()
    assert asked["step"][0]["value"][1] == "3"
    assert expressions
    assert [expression for expression in expressions if not asked[expression]] == []
    assert asked["rules"] == ["ok"] * 4
