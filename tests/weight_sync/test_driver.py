"""The configuration chooses the transfer."""

import pytest

from rayrlhf.config.rollout import RolloutSection
from rayrlhf.weight_sync.driver import make_transfer
from rayrlhf.weight_sync.object_store import ObjectStoreTransfer
from rayrlhf.weight_sync.vllm_device import VLLMDeviceTransfer


def test_weights_go_through_the_object_store_by_default():
    section = RolloutSection.model_construct(weight_transfer="shared_memory", tensor_parallel_size=1)
    assert make_transfer(section, "float32", 9.0) == ObjectStoreTransfer("float32", 9.0)


@pytest.mark.parametrize("transfer", ["nccl", "ipc"])
def test_a_device_transfer_has_as_many_workers_as_a_replica_has_gpus(transfer):
    section = RolloutSection.model_construct(weight_transfer=transfer, tensor_parallel_size=2)
    assert make_transfer(section, "bfloat16", 9.0) == VLLMDeviceTransfer(transfer, 2, "bfloat16", 9.0)
