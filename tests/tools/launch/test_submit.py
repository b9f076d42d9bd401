"""Submission: what is sent, how a job is followed, tried again and stopped, and how refusals read. Needs no cluster."""

import http.server
import os
import sys
import threading
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from rayrlhf.cli import app, main
from rayrlhf.errors import ActorLostError, StoppedError, UserError
from rayrlhf.tools.launch import submit
from rayrlhf.tools.launch.submit import JobRequest
from tests.tools.launch.models import ppo


class Client:
    """A job server that plays back statuses and a growing log."""

    def __init__(self, *endings, log=("a\n", "a\nb\nhalf", "a\nb\nhalf a line"), without_agent=0):
        self.endings, self.log, self.submitted, self.looks = list(endings), log, [], 0
        self.without_agent = without_agent

    def submit_job(self, **job):
        if self.without_agent:
            self.without_agent -= 1
            raise RuntimeError("Request failed with status code 500: No available agent to submit job, please try again later.")
        if job["submission_id"] in [other["submission_id"] for other in self.submitted]:
            raise RuntimeError("Request failed with status code 500: already exists\nTraceback ...")
        self.submitted.append(job)
        self.looks = 0
        return job["submission_id"]

    def get_job_status(self, name):
        self.looks += 1
        status = "RUNNING" if self.looks < len(self.log) else self.endings[len(self.submitted) - 1]
        return SimpleNamespace(value=status)

    def get_job_logs(self, name):
        return self.log[min(self.looks, len(self.log)) - 1]

    def get_job_info(self, name):
        return SimpleNamespace(message="driver died\ntraceback")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.0)


@pytest.fixture
def request_of(tmp_path):
    path = tmp_path / "run.yaml"
    path.touch()
    return JobRequest.of(ppo("builtin:tiny"), path, ["run.steps=3", "run.name=a b"], tmp_path)


def run(client, request, **settings):
    said = []
    name = submit.run_job(client, request, "job", said.append, **({"wait": True, "retries": 0} | settings))
    return name, said


def test_the_log_is_handed_on_in_whole_lines_each_once(request_of):
    name, said = run(Client("SUCCEEDED"), request_of)
    assert (name, said) == ("job", ["submitted job", "a", "b", "half a line"])


def test_a_failed_job_is_submitted_again_under_a_name_of_its_own_to_resume(request_of):
    client = Client("FAILED", "FAILED", "SUCCEEDED")
    name, said = run(client, request_of, retries=2)
    assert name == "job-retry-2"
    assert [job["submission_id"] for job in client.submitted] == ["job", "job-retry-1", "job-retry-2"]
    assert {job["entrypoint"] for job in client.submitted} == {request_of.entrypoint}
    assert said.count("job job failed: driver died") == 1


def test_tries_are_bounded_and_then_named(request_of):
    client = Client("FAILED", "FAILED")
    with pytest.raises(ActorLostError, match="failed 2 times"):
        run(client, request_of, retries=1)
    assert len(client.submitted) == 2


def test_a_job_that_someone_stopped_is_not_tried_again(request_of):
    client = Client("STOPPED", "SUCCEEDED")
    with pytest.raises(StoppedError, match="resume"):
        run(client, request_of, retries=3)
    assert len(client.submitted) == 1


def test_a_taken_name_is_one_line(request_of):
    client = Client("SUCCEEDED")
    run(client, request_of)
    with pytest.raises(UserError) as error:
        run(client, request_of)
    assert "\n" not in str(error.value)


def test_without_waiting_the_job_is_left_alone(request_of):
    client = Client("FAILED")
    assert run(client, request_of, wait=False) == ("job", ["submitted job"])
    assert client.looks == 0


def test_what_is_sent_has_time_to_stop_and_neither_runs_nor_secrets(request_of, tmp_path):
    environment = request_of.runtime_env
    assert environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "600"
    assert {".git/", "runs/", ".env", "auth_token"} <= set(environment["excludes"])
    assert request_of.entrypoint == "rayrlhf ppo run.yaml run.steps=3 'run.name=a b'"
    assert "token" not in str(environment["env_vars"]).lower()


@pytest.mark.parametrize("override", ["reward.api_key=abc", "x.auth_token=abc", "a.password=abc"])
def test_a_secret_on_the_command_line_is_refused_without_being_repeated(tmp_path, override):
    path = tmp_path / "run.yaml"
    path.touch()
    with pytest.raises(UserError) as error:
        JobRequest.of(ppo("builtin:tiny"), path, [override], tmp_path)
    assert "abc" not in str(error.value)


def test_settings_that_count_tokens_are_no_secrets(tmp_path):
    path = tmp_path / "run.yaml"
    path.touch()
    assert JobRequest.of(ppo("builtin:tiny"), path, ["train.micro_batch_tokens=512"], tmp_path)


def test_a_file_outside_of_what_is_uploaded_is_refused(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "run.yaml").touch()
    with pytest.raises(UserError, match="outside of --working-dir"):
        JobRequest.of(ppo("builtin:tiny"), tmp_path / "run.yaml", [], tmp_path / "work")


@pytest.fixture
def answering():
    """A web server that answers everything with one status."""
    servers = []

    def start(status):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"no")

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "401: the cluster needs a token"), (403, "403: the token is not the cluster's"), (404, "404")],
)
def test_a_refusal_is_one_line_that_says_what_to_do(answering, status, words):
    with pytest.raises(UserError, match=words) as error:
        submit.connect(answering(status))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "words"), [("http://127.0.0.1:1", "no response"), ("cluster:8265", "expected the dashboard")]
)
def test_an_address_where_no_one_answers_is_told(address, words):
    with pytest.raises(UserError, match=words):
        submit.connect(address)


def test_no_address_at_all_is_told(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(UserError, match="RAY_API_SERVER_ADDRESS"):
        submit.connect(None)


def test_the_command_line_plans_and_says_what_does_not_fit_with_exit_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(
        "model: {path: 'builtin:tiny'}\nreward: {functions: [{name: length}]}\ndata: {train: {path: prompts.jsonl}}\n"
    )
    fine = CliRunner().invoke(app, ["plan", str(tmp_path / "run.yaml"), "--cpus-per-node", "2", "--node-memory", "24"])
    assert fine.exit_code == 0
    assert fine.stdout.endswith("everything fits\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "argv", ["rayrlhf", "plan", "run.yaml", "--cpus-per-node", "2", "--node-memory", "2"])
    with pytest.raises(SystemExit) as end:
        main()
    tight = capsys.readouterr()
    assert end.value.code == 2
    assert "does not fit: node 0" in tight.out
    assert "Traceback" not in tight.err


def test_a_cluster_whose_job_agents_still_start_is_waited_for(request_of):
    client = Client("SUCCEEDED", without_agent=2)
    assert run(client, request_of)[0] == "job"
    assert len(client.submitted) == 1


def test_a_cluster_without_a_job_agent_is_named_after_a_bounded_wait(request_of, monkeypatch):
    monkeypatch.setattr(submit, "AGENT_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"job job was rejected: .*No available agent"):
        run(Client("SUCCEEDED", without_agent=9), request_of)
