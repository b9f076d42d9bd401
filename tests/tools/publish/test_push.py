"""A run's model and card arrive at a stand-in for the hub; mistakes are one line."""

import base64
import json

import pytest
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.errors import UserError
from rayrlhf.tools.publish.model_card import without_folders
from tests.rewards.servers import Server

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "small"
    (folder / "export").mkdir(parents=True)
    (folder / "export" / "config.json").write_text("{}")
    (folder / "export" / "model.safetensors").write_bytes(b"\0" * 100)
    config = {
        "run": {"root": str(tmp_path / "runs"), "name": "small"},
        "model": {"path": "owner/base"},
        "data": {"train": {"path": str(tmp_path / "secret place" / "prompts.jsonl")}},
        "reward": {"functions": [{"name": "remote", "arguments": {"token": SECRET}}]},
        "algorithm": {},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": step, "evaluation/score": score} for step, score in ((0, 0.25), (10, 0.75))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "environment.json").write_text(json.dumps({"packages": {"rayrlhf": "0.2.0"}}))
    return folder


class Hub:
    """Takes a repository and one commit; weights are uploaded by LFS, other files are regular.

    Attributes:
        status: of the first answer that is refused.
        refused: end of the path from which on requests are refused; the default refuses none with 200, all with others.
        private: whether the repository is private; None if it does not exist before.
    """

    def __init__(self, monkeypatch, status=200, refused="", private=None):
        self.status, self.refused, self.private = status, refused, private
        self.files, self.uploads = {}, {}
        self.server = Server(self.answer, read=lambda body: body)
        monkeypatch.setattr(constants, "ENDPOINT", self.server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", SECRET)

    def answer(self, number, body):
        path = self.server.paths[number]
        if self.status != 200 and self.refused in path:
            return self.status, b'{"error": "not yours"}'
        if path.startswith("/lfs/"):
            self.uploads[path.removeprefix("/lfs/")] = body
            return 200, b""
        status, found = self.found(path, body)
        return status, json.dumps(found).encode()

    def found(self, path, body):
        if path.endswith("/preupload/main"):
            wanted = [one["path"] for one in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in wanted}
            return 200, {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]}
        if path.endswith("/objects/batch"):
            upload = f"{self.server.url}/lfs/"
            objects = json.loads(body)["objects"]
            return 200, {"objects": [one | {"actions": {"upload": {"href": upload + one["oid"]}}} for one in objects]}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.uploads[value["oid"]]
            return 200, {"commitUrl": f"{self.server.url}/owner/small/commit/1", "commitOid": "1"}
        if path.endswith("/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/api/models/"):
            return 200, {"id": "owner/small", "private": self.private}
        if path != "/api/repos/create":  # such as `/api/agent-harnesses`, which the hub's library reads
            return 404, {}
        exists, self.created = self.private is not None, json.loads(body)
        if not exists:
            self.private = self.created["visibility"] == "private"
        return 409 if exists else 200, {"url": f"{self.server.url}/owner/small"}


def push(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def test_the_model_arrives_with_a_card_of_its_data_figures_configuration_and_versions(run, monkeypatch):
    hub = Hub(monkeypatch)
    result = push(run, "--to", "owner/small")
    hub.server.stop()
    assert result.stdout.strip() == f"model: {hub.server.url}/owner/small/commit/1", result.exception
    assert hub.created["visibility"] == "private"
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors"}
    assert hub.files["model.safetensors"] == b"\0" * 100
    card = hub.files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["rayrlhf", "ppo"], "base_model": "owner/base"}
    assert "- train: `prompts.jsonl`" in card
    assert "held-out score: 0.250 at step 0, 0.750 at step 10" in card
    assert "- rayrlhf 0.2.0" in card
    assert SECRET not in card
    assert "secret place" not in card


def test_a_dry_run_prints_the_card_and_sends_nothing(run):
    output = push(run, "--to", "owner/small", "--dry-run").output
    assert "# small" in output
    assert "model.safetensors: 100 bytes" in output


def test_mistakes_are_one_line(run, tmp_path, monkeypatch):
    hub = Hub(monkeypatch, status=403)
    found = [push(run, "--to", "owner/small"), push(run, "--to", "a/b/c"), push(tmp_path, "--to", "owner/small")]
    hub.server.stop()
    assert all(isinstance(one.exception, UserError) and "\n" not in str(one.exception) for one in found), found
    assert "403" in str(found[0].exception)
    assert str(found[1].exception).startswith("--to 'a/b/c': ")
    (run / "export").rename(run / "other")
    assert str(push(run, "--to", "owner/small").exception) == f"{run}: no export/; expected the folder of a finished run"


def test_a_public_repository_takes_no_model_without_public(run, monkeypatch):
    hub = Hub(monkeypatch, private=False)
    refused = push(run, "--to", "owner/small")
    before = dict(hub.files)
    result = push(run, "--to", "owner/small", "--public")
    hub.server.stop()
    assert str(refused.exception) == "--to owner/small: exists and is public; pass --public, or choose another"
    assert before == {}
    assert result.exit_code == 0
    assert "model.safetensors" in hub.files


def test_an_existing_private_repository_takes_the_model(run, monkeypatch):
    hub = Hub(monkeypatch, private=True)
    result = push(run, "--to", "owner/small")
    hub.server.stop()
    assert result.exit_code == 0
    assert "model.safetensors" in hub.files


def test_no_token_is_one_line_before_anything_is_sent(run, tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    result = push(run, "--to", "owner/small")
    hub.server.stop()
    assert str(result.exception) == "push: no token of the Hugging Face hub; run `hf auth login`, or set HF_TOKEN"
    assert hub.server.paths == []


@pytest.mark.parametrize(("status", "refused"), [(500, "/lfs/"), (403, "/lfs/"), (500, "/objects/batch")])
def test_failed_uploads_of_weights_are_one_line(run, monkeypatch, status, refused):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's library waits 23 s in all
    hub = Hub(monkeypatch, status, refused)
    error = push(run, "--to", "owner/small").exception
    hub.server.stop()
    assert isinstance(error, UserError), error
    assert str(error).startswith("push: owner/small: ")
    assert str(error).endswith("; push again once that is mended")
    assert str(status) in str(error)
    assert "\n" not in str(error)
    assert hub.files == {}


def test_a_hub_that_cannot_be_reached_is_one_line(run, monkeypatch):
    hub = Hub(monkeypatch)
    hub.server.stop()
    error = push(run, "--to", "owner/small").exception
    assert isinstance(error, UserError), error
    assert str(error).startswith("push: owner/small: ")


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("/home/alice/secret place/prompts.jsonl", "prompts.jsonl"),
        ("python /home/alice/judge.py --data=/data/alice/x.json", "python judge.py --data=x.json"),
        ("rules:/home/alice/rules.py", "rules:rules.py"),
        ("See '/home/alice/a.md'.\nThen /home/alice/b.md", "See 'a.md'.\nThen b.md"),
        ("~/models/mine", "mine"),
        ("~alice/model", "model"),
        ("file:///home/alice/model", "file://model"),
        ("https://one:8000/score/a", "https://one:8000/score/a"),
        ("owner/base", "owner/base"),
        ("./rewards/mine.py", "./rewards/mine.py"),
        ("</think></answer> and/or 1 / 2 / 3", "</think></answer> and/or 1 / 2 / 3"),
    ],
)
def test_folders_are_cut_out_of_every_text(text, cut):
    assert without_folders({"a": [text], text: 1}) == {"a": [cut], cut: 1}


def test_a_base_model_in_a_folder_is_no_repository_of_the_hub(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "base").mkdir(parents=True)
    assert "base_model:" not in push(run, "--to", "owner/small", "--dry-run").output
