"""vLLM's own nccl and ipc transfers, both ends of them, with the device taken away: what we send is what the sampler then says.

The classes, their messages and the order of calls are vLLM's. A communicator that hands tensors over in this process stands in
for NCCL, and a table of tensors for CUDA's memory handles.
"""

import itertools
import queue
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing import reductions
from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

from rayrlhf.weight_sync.vllm_sender import DeviceSender, EngineSource
from tests.engines.rollout_cases import gap, load_network, make_requests, sample, start

MEETING = ("127.0.0.1", 4321)


class Wire:
    """A communicator between the two ends in this process."""

    def __init__(self):
        self.tensors, self.closed = queue.Queue(), False

    def sender(self):
        return SimpleNamespace(broadcast=lambda tensor, src, stream: self.tensors.put(tensor.clone()), destroy=self.destroy)

    def receiver(self):
        receive = self.tensors.get
        return SimpleNamespace(broadcast=lambda tensor, src, stream: tensor.copy_(receive(timeout=60)), destroy=lambda: None)

    def destroy(self):
        self.closed = True


@pytest.fixture
def wires(monkeypatch):
    """The groups that were opened, with what each end asked for."""
    opened = []

    def trainer(info):
        opened.append((Wire(), info))
        return opened[-1][0].sender()

    def worker(info, parallel):
        while not opened or opened[-1][1].master_port != info.master_port:
            pass
        opened[-1][0].worker = info
        return opened[-1][0].receiver()

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", trainer)
    monkeypatch.setattr(nccl_engine, "worker_init_process_group", worker)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return opened


@pytest.fixture
def memory(monkeypatch):
    """Device memory that is only lent: it is overwritten when the sender goes on."""
    handles = {}

    def lend(tensor):
        handles[len(handles)] = tensor
        return None, (len(handles) - 1, *[None] * 7)

    empty = torch.empty

    def on_the_cpu(*size, device=None, **settings):
        return empty(*size, device="cpu" if device == "cuda" else device, **settings)

    monkeypatch.setattr(torch, "empty", on_the_cpu)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="GPU-0"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(packed_tensor, "reduce_tensor", lend)
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda handle, *rest: handles[handle])
    return handles


@pytest.fixture(scope="module")
def engine(request):
    """A sampler for one of the transfers, tied or not."""
    transfer, tie = request.param
    engine = start("vllm", tie=tie, weight_transfer=transfer)
    yield engine
    engine.close()


class Client:
    """The engine's own client between a version's brackets, as the actor of a replica calls it."""

    def __init__(self, engine, version):
        self.engine, self.version = engine, version

    def init_weight_transfer_engine(self, info):
        self.engine.weight_client.init_weight_transfer_engine(info)

    def start_weight_update(self):
        self.engine.begin_weights(self.version)

    def update_weights(self, info):
        self.engine.weight_client.update_weights(info)

    def finish_weight_update(self, weight_version=None):
        self.engine.finish_weights()


class Trainer:
    """A model that changes with every update, and its merged weights."""

    def __init__(self, tie):
        self.network = load_network(tie=tie)

    @torch.no_grad()
    def update(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)

    def weights(self):
        for name, parameter in self.network.named_parameters():
            yield name, parameter.detach()


@pytest.mark.parametrize(("engine", "tie"), [(("nccl", True), True), (("nccl", False), False)], indirect=["engine"])
def test_nccl_brings_new_weights_in_every_update_and_opens_a_new_group_for_other_replicas(wires, engine, tie):
    trainer = Trainer(tie)
    ports = itertools.count(5000)
    sender = DeviceSender("nccl", 0, EngineSource(trainer.weights))
    for version, members in enumerate([("a",), ("a",), ("b",)], start=1):
        trainer.update(version)
        sender.send(Client(engine, version), members, 1, lambda: (MEETING[0], next(ports)))
        rollouts = sample(engine, make_requests(2)).values()
        assert gap(trainer.network, rollouts) < 2e-5
        assert {int(one) for rollout in rollouts for one in rollout.versions} == {version}
    assert [(info.master_address, info.master_port, info.world_size) for _, info in wires] == [
        (MEETING[0], 5000, 2),
        (MEETING[0], 5001, 2),
    ]
    assert [wire.closed for wire, _ in wires] == [True, False]
    assert [wire.worker.rank_offset for wire, _ in wires] == [1, 1]


@pytest.mark.parametrize(("engine", "least"), [(("ipc", True), 1), (("ipc", False), 300_000)], indirect=["engine"])
def test_ipc_brings_new_weights_in_every_update_through_one_buffer_that_holds_the_largest_tensor(
    memory, monkeypatch, engine, least
):
    monkeypatch.setattr("rayrlhf.weight_sync.vllm_sender.BUFFER_BYTES", least)
    trainer = Trainer(tie=least == 1)
    sender = DeviceSender("ipc", 0, EngineSource(trainer.weights))
    for version in (1, 2):
        trainer.update(version)
        sender.send(Client(engine, version), ("a",), 1, lambda: MEETING)
        assert gap(trainer.network, sample(engine, make_requests(2)).values()) < 2e-5
    largest = max(parameter.nbytes for parameter in trainer.network.parameters())
    assert [buffer.nbytes for buffer in memory.values()] == [max(least, largest)] * 2


@pytest.mark.parametrize("engine", [("nccl", True)], indirect=True)
def test_a_transfer_that_failed_is_opened_again_by_the_next(wires, engine):
    trainer, ports = Trainer(tie=True), itertools.count(5000)
    sender = DeviceSender("nccl", 0, EngineSource(trainer.weights))
    sender.send(Client(engine, 1), ("a",), 1, lambda: (MEETING[0], next(ports)))
    broken = Client(engine, 2)
    broken.start_weight_update = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        sender.send(broken, ("a",), 1, lambda: (MEETING[0], next(ports)))
    trainer.update(3)
    sender.send(Client(engine, 3), ("a",), 1, lambda: (MEETING[0], next(ports)))
    assert len(wires) == 2
    assert gap(trainer.network, sample(engine, make_requests(1)).values()) < 2e-5


def test_ranks_that_do_not_send_take_part_in_gathering_all_the_same():
    trainer, passes = Trainer(tie=True), []

    def weights():
        passes.append(0)
        for pair in trainer.weights():
            passes[-1] += 1
            yield pair

    sender = DeviceSender("nccl", 1, EngineSource(weights))
    sender.send(None, ("a",), 1, lambda: MEETING)
    sender.send(None, ("a",), 1, lambda: MEETING)
    assert passes == [len(list(trainer.network.parameters()))] * 3  # once more, for names and shapes
