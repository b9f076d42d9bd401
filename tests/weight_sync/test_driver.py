"""The configuration chooses the transfer."""

import pytest

from rayrlhf.weight_sync.driver import make_transfer
from rayrlhf.weight_sync.object_store import ObjectStoreTransfer
from rayrlhf.weight_sync.vllm_device import VLLMDeviceTransfer


def test_shared_memory_is_the_object_store():
    assert make_transfer("shared_memory", 1, "float32", 9.0) == ObjectStoreTransfer("float32", 9.0)


@pytest.mark.parametrize("transfer", ["nccl", "ipc"])
def test_a_device_transfer_has_as_many_workers_as_a_replica_has_gpus(transfer):
    assert make_transfer(transfer, 2, "bfloat16", 9.0) == VLLMDeviceTransfer(transfer, 2, "bfloat16", 9.0)
