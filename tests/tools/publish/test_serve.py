"""A run's model or adapters reach vLLM's OpenAI server under the run's name; mistakes are one line before it starts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.errors import UserError
from rayrlhf.models.adapter_folder import adapter_parameters, merge_adapters, save_adapters
from rayrlhf.models.load import load_causal_model, load_tokenizer
from rayrlhf.models.lora import add_lora
from rayrlhf.models.model_path import resolve_path
from rayrlhf.tools.publish import serve_command
from tests.engines.training import free_port

TINY = ModelSection(path="builtin:tiny?layers=2&hidden=64&context=64", dtype="float32", lora=LoraSection(rank=2))
PPO = "{model: {path: x, trust_remote_code: true, dtype: float32}, algorithm: {}, data: {system_prompt: be brief}}"
SFT = "{model: {path: x, dtype: float32}, workers: {}, train: {}}"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(PPO)
    return folder


def write_model(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\0")


def write_adapters(folder, rank=2):
    folder.mkdir()
    note = {"r": rank, "base_model_name_or_path": "owner/base", "revision": "v1"}
    (folder / "adapter_config.json").write_text(json.dumps(note))


def serve(*arguments):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def started(monkeypatch, *arguments):
    """The words and environment with which the command would become vLLM's server, and what it prints."""
    found = []
    monkeypatch.setattr(os, "execve", lambda *call: found.append(call))
    result = serve(*arguments)
    assert len(found) == 1, result.exception
    ((program, words, environment),) = found
    assert program == words[0] == sys.executable
    return words[1:], environment, result.stderr


def after(words, name):
    return words[words.index(name) + 1]


def test_a_whole_model_is_served_on_this_machine_alone_under_the_name_of_its_run(run, monkeypatch):
    write_model(run / "export")
    port = free_port()
    words, environment, shown = started(monkeypatch, run, "--port", port, "--", "--max-model-len", "32")
    assert words[:2] == ["-m", serve_command.MODULE]
    assert (after(words, "--host"), after(words, "--port")) == ("127.0.0.1", str(port))
    assert (after(words, "--model"), after(words, "--served-model-name")) == (str(run / "export"), "small")
    assert "--trust-remote-code" in words
    assert words[-2:] == ["--max-model-len", "32"]
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert f"small: http://127.0.0.1:{port}/v1" in shown
    assert "data.system_prompt" in shown
    assert "be brief" not in words


@pytest.mark.parametrize("folder", ["export", "export-adapters"])
def test_adapters_are_served_next_to_their_base_model_which_has_a_name_of_its_own(run, monkeypatch, folder):
    if folder == "export-adapters":
        write_model(run / "export")
    write_adapters(run / folder, rank=12)
    words, _, _ = started(monkeypatch, run, "--port", free_port())
    assert (after(words, "--model"), after(words, "--revision")) == ("owner/base", "v1")
    assert after(words, "--served-model-name") == "small-base"
    assert after(words, "--tokenizer") == str(run / folder)
    adapter = {"name": "small", "path": str(run / folder), "base_model_name": "small-base"}
    assert json.loads(after(words, "--lora-modules")) == adapter
    assert after(words, "--max-lora-rank") == "16"  # the next one that vLLM allocates for


def test_vllm_reads_the_arguments(run):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    write_adapters(run / "export")
    words = serve_command.server_arguments(run, "127.0.0.1", 8123, ["--max-model-len", "32"])
    found = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    validate_parsed_serve_args(found)
    assert (found.model, found.served_model_name, found.host) == ("owner/base", ["small-base"], "127.0.0.1")
    assert [(one.name, one.path) for one in found.lora_modules] == [("small", str(run / "export"))]
    assert found.dtype == "float32"
    assert (found.max_lora_rank, found.max_model_len, found.enable_lora, found.trust_remote_code) == (8, 32, True, True)


def test_merged_adapters_and_a_model_folder_are_served_as_they_are(run, monkeypatch):
    write_adapters(run / "export")
    write_model(run / "export-merged")
    for given in (run, run / "export-merged"):
        words, _, _ = started(monkeypatch, given, "--port", free_port())
        assert after(words, "--model") == str(run / "export-merged")
        assert "--enable-lora" not in words


def test_a_run_without_a_model_names_the_command_that_exports_it(run):
    config = run / "config.yaml"
    line = f"serve {run}: no model in export/; `rayrlhf ppo {config}` finishes the run and exports it"
    assert str(serve(run).exception) == line
    for step in (10, 20):
        (run / "checkpoints" / f"step-{step:06}").mkdir(parents=True)
    newest = f"; `rayrlhf ppo {config} run.steps=20` exports its newest checkpoint"
    assert str(serve(run).exception) == line + newest
    config.write_text(SFT)
    assert f"`rayrlhf sft {config}` finishes" in str(serve(run).exception)


def test_mistakes_are_one_line_before_the_server_starts(run, tmp_path, monkeypatch):
    monkeypatch.setattr(serve_command, "_become", lambda words: pytest.fail("started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (run / "config.yaml").write_text("{model: {path: x}, export_anyway: false}")
        reward_model = serve(run)
        (run / "config.yaml").write_text(SFT)
        write_adapters(run / "export", rank=10**6)
        found = {
            "which generates no text": reward_model,
            "no such folder": serve(tmp_path / "none"),
            "--model=x after `--`: expected RUN": serve(run, "--", "--model=x"),
            f"merge them with `rayrlhf export {run} --merge`": serve(run),
            "choose another --port or --host": serve(write_adapters(tmp_path / "two") or tmp_path / "two", "--port", port),
        }
    for text, result in found.items():
        assert isinstance(result.exception, UserError), result
        assert text in str(result.exception)
        assert "\n" not in str(result.exception)


def answer(url, body=None):
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def wait_for(server, url, seconds=400.0):
    end = time.monotonic() + seconds
    while True:
        try:
            return answer(url)
        except (urllib.error.URLError, ConnectionError):
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < end
            time.sleep(0.2)


def of_session(session):
    """Living processes of a session."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(process.name)
    return found


@pytest.mark.slow
def test_the_server_answers_with_the_adapters_and_ends_with_all_its_processes(run):
    (run / "config.yaml").write_text(SFT)
    adapted = load_causal_model(TINY)
    add_lora(adapted, TINY.lora, seed=0)
    state = {name: torch.full_like(parameter, 0.05) for name, parameter in adapter_parameters(adapted)}
    save_adapters(adapted, TINY, state, load_tokenizer(TINY), run / "export")
    merge_adapters(run / "export", run / "other")
    port, log = free_port(), run / "server.log"
    command = [sys.executable, "-m", "rayrlhf.cli", "serve", str(run), "--port", str(port)]
    with log.open("wb") as lines:
        server = subprocess.Popen(command, stdout=lines, stderr=lines, start_new_session=True)
    try:
        models = wait_for(server, f"http://127.0.0.1:{port}/v1/models")
        assert [one["id"] for one in models["data"]] == ["small-base", "small"]
        turns = [{"role": "user", "content": "say 1"}]
        body = {"messages": turns, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        for name, folder in (("small", run / "other"), ("small-base", Path(resolve_path(TINY)))):
            found = answer(url, {"model": name, **body})["choices"][0]["token_ids"]
            assert found == greedy(folder, turns, len(found)), name
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        end = time.monotonic() + 20  # multiprocessing's resource tracker ends when it sees that its pipe is closed
        while left := of_session(server.pid):
            assert time.monotonic() < end, left
            time.sleep(0.1)
    except BaseException:
        print(log.read_text()[-4000:])
        raise
    finally:
        for process in of_session(server.pid):
            os.kill(int(process), signal.SIGKILL)


def greedy(folder, turns, length):
    """The most likely tokens after a conversation, by transformers."""
    section = ModelSection(path=str(folder), dtype="float32")
    model, tokenizer = load_causal_model(section), load_tokenizer(section)
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    for _ in range(length):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, -length:].tolist()
