"""Checkpoints on another storage: a real S3 server, a folder, and fsspec's memory behave alike."""

import subprocess
import sys
import time

import boto3
import pytest
from botocore.config import Config

from rayrlhf.errors import UserError
from rayrlhf.storage.manifest import Manifest, verify, write_hashed, write_manifest
from rayrlhf.storage.mirror import Mirror
from tests.engines.training import free_port


@pytest.fixture(scope="module")
def bucket():
    """A local S3 server; the URI of an empty bucket on it. A process of its own: vLLM trips over Flask in this one."""
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", address.partition(":")[2]]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            retries = Config(retries={"total_max_attempts": 30})
            boto3.client("s3", endpoint_url=f"http://{address}", config=retries).create_bucket(Bucket="runs")
            yield lambda path: f"s3://runs/{path}?endpoint_override={address}&scheme=http"
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(params=["s3", "file", "memory"])
def uri(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("bucket")(tmp_path.name)
    return f"file://{tmp_path}/elsewhere" if request.param == "file" else f"memory://{tmp_path.name}"


def checkpoint(folder, step, content=b"weights"):
    path = folder / f"step-{step:06d}"
    (path / "policy").mkdir(parents=True)
    files = {"policy/rank.pt": write_hashed(path / "policy" / "rank.pt", content * 1000)}
    write_manifest(path, Manifest(step, {"model": "tiny"}, files))
    return path


def same(stored, wanted):
    return [] if stored == wanted else [f"run.seed: {stored} -> {wanted}"]


def test_a_checkpoint_comes_back_whole_and_only_those_to_keep_stay(uri, tmp_path):
    mirror = Mirror(uri, "run")
    mirror.claim("a", same, resume=True)
    for step in (2, 4, 6):
        mirror.push(checkpoint(tmp_path / "one", step), keep=[f"step-{step - 2:06d}"])
    assert mirror.wait() is None
    mirror.close()
    other = Mirror(uri, "run")
    assert other.names() == ["step-000004", "step-000006"]
    other.fetch("step-000006", tmp_path / "two" / "step-000006")
    assert verify(tmp_path / "two" / "step-000006").step == 6


def test_pushing_a_step_again_replaces_it(uri, tmp_path):
    mirror = Mirror(uri, "run")
    mirror.push(checkpoint(tmp_path / "one", 2, b"old and longer"), [])
    mirror.push(checkpoint(tmp_path / "two", 2, b"new"), [])
    assert mirror.wait() is None
    mirror.fetch("step-000002", tmp_path / "back")
    verify(tmp_path / "back")
    assert (tmp_path / "back" / "policy" / "rank.pt").read_bytes() == b"new" * 1000


def test_a_folder_of_another_run_is_refused_with_the_difference(uri):
    Mirror(uri, "run").claim("1", same, resume=True)
    Mirror(uri, "run").claim("1", same, resume=True)
    with pytest.raises(UserError, match=r"holds a run with another configuration \(run\.seed: 1 -> 2\)"):
        Mirror(uri, "run").claim("2", same, resume=True)
    with pytest.raises(UserError, match=r"run\.resume is 'never'"):
        Mirror(uri, "run").claim("1", same, resume=False)


def test_a_copy_without_manifest_does_not_count(tmp_path):
    mirror = Mirror(f"file://{tmp_path}", "elsewhere")
    mirror.push(checkpoint(tmp_path, 2), [])
    assert mirror.wait() is None
    (tmp_path / "elsewhere" / "step-000002" / "manifest.json").unlink()
    assert mirror.names() == []


def test_a_storage_that_refuses_a_copy_is_one_line_and_forgiven_after_the_next(tmp_path):
    mirror = Mirror(f"file://{tmp_path}", "elsewhere")
    (tmp_path / "elsewhere").write_text("in the way")
    mirror.push(checkpoint(tmp_path, 2), [])
    assert mirror.wait().startswith(f"cannot write file://{tmp_path}/elsewhere: ")
    assert "\n" not in mirror.wait()
    (tmp_path / "elsewhere").unlink()
    mirror.push(tmp_path / "step-000002", [])
    assert mirror.wait() is None


def test_a_failed_copy_is_told_once_and_without_waiting_for_the_next(tmp_path):
    mirror = Mirror(f"file://{tmp_path}", "elsewhere")
    (tmp_path / "elsewhere").write_text("in the way")
    mirror.push(checkpoint(tmp_path, 2), [])
    end, told = time.monotonic() + 10, []
    while not told and time.monotonic() < end:
        told = mirror.failures()
    assert len(told) == 1
    assert told[0].startswith(f"cannot write file://{tmp_path}/elsewhere: ")
    assert mirror.failures() == []
    mirror.push(tmp_path / "step-000002", [])
    mirror.push(tmp_path / "step-000002", [])
    assert len(mirror.failures()) >= 1


@pytest.mark.parametrize("uri", ["elsewhere", "nowhere://runs/x"])
def test_a_storage_that_is_none_is_the_users_one_line(uri):
    with pytest.raises(UserError, match=r"checkpoint\.mirror") as caught:
        Mirror(uri, "run")
    assert "\n" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_the_users_one_line(bucket):
    uri = bucket("x").replace("s3://runs/", "s3://other/")
    with pytest.raises(UserError, match=r"cannot write s3://other/x/run: .*other") as caught:
        Mirror(uri, "run").claim("1", same, resume=True)
    assert "\n" not in str(caught.value)
