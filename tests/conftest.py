"""What all tests share: no network, no telemetry, and Ray as a user's machine would run it, but without a token in HOME."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Two test processes must not find each other's clusters: a run joins the one that Ray's folder names, and ends with it.
if "PYTEST_XDIST_WORKER" in os.environ or "RAY_TMPDIR" not in os.environ:
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="r", dir="/tmp")
    atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

# A deadline of milliseconds fails for nothing on a machine that does something else at the same time. In CI the same examples
# are drawn every time, so that a change is judged by what it changes; elsewhere every run looks at new ones.
settings.register_profile("rayrlhf", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("rayrlhf")

# A shell that runs the tests in the background lets them ignore Ctrl-C, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

LONGEST = (
    "chaos/test_kills", "test_road", "tuning/test_train_model", "tuning/test_direct_preference", "ppo/test_episode_run",
    "ppo/test_async_run", "tuning/test_recovery", "pipelines/presft/test_kill", "ppo/test_mirror", "ppo/test_gang_recovery",
    "ppo/test_train_ppo", "cluster/test_jobs", "ppo/test_replica_scaling", "models/test_families", "ppo/test_open_trainer",
    "ppo/test_parallel_training", "ppo/test_shared_prefix_run", "pipelines/presft/test_presft_steps", "ppo/test_alarms",
    "pipelines/icl/test_evaluate_icl", "ppo/test_adapter_run", "chaos/test_leaks", "ppo/test_distillation_run",
    "pipelines/icl/test_build_dataset", "tools/watch/test_in_browser", "engines/train/test_train_distributed", "test_docs",
    "ppo/test_sleep_run", "ppo/test_group_run", "data/test_row_reader_fuzz", "engines/train/test_sequence_parallel",
    "engines/train/test_tensor_parallel", "engines/train/test_expert_parallel",
    "actors/test_waiting", "tuning/test_ray_data_reader", "ppo/test_demonstrations_run", "tools/launch/test_launch_plan",
    "weight_sync/test_vllm_device", "weight_sync/test_buckets", "engines/rollout/test_common", "rewards/test_escapes",
    "actors/test_own_cluster", "engines/rollout/test_vllm", "tools/gpu_check/test_steps",
    "tools/doctor/test_machine_checks", "ppo/test_judge_run", "ppo/test_replay_run",
)  # fmt: skip
"""Files of more than about 15 s, the longest of the default and the slow tests first."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that both workers end at about the same time."""
    folder = Path(__file__).parent
    places = {folder / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="module")
def cluster():
    """One local Ray for all runs of a module; workers start in it much faster than a cluster does."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def alone():
    """A process group of one."""
    from tests.engines.training import join_alone

    join_alone()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Folder of a random Llama."""
    from tests.engines.training import write_llama

    return str(write_llama(tmp_path_factory.mktemp("model") / "llama"))
