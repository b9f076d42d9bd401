"""Another process on the same device: it reads free memory, holds some, or receives tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

ANSWER_SECONDS = 60.0
MIB = 2**20


class Neighbor:
    """Another process on the same GPU: reads its free memory, or holds some."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def free_mib(self) -> float:
        """Return the free MiB of the device, as that process reads them."""
        return float(self._ask("free"))

    def hold(self, mib: float) -> None:
        """Let it fill its allocator's cache with so many MiB, and keep that."""
        self._ask("hold", mib)

    def give_back(self) -> None:
        """Let it empty its cache."""
        self._ask("give back")

    def _ask(self, *command: object) -> Any:
        self._connection.send(command)
        if not self._connection.poll(ANSWER_SECONDS):
            raise TimeoutError(f"the neighbor did not reply to {command[0]} within {ANSWER_SECONDS:g} s")
        return self._connection.recv()


@contextmanager
def neighbor(device: torch.device) -> Iterator[Neighbor]:
    """Start a process on the same device for the duration of the block."""
    with running(be_neighbor, device) as connection:
        yield Neighbor(connection)


@contextmanager
def running(function: Callable[[Connection, str], None], device: torch.device) -> Iterator[Connection]:
    """Start a process that follows a connection for the duration of the block."""
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(theirs, str(device)), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(5)
        process.kill()


def be_neighbor(connection: Connection, device: str) -> None:
    """Follow the commands of `Neighbor`; a CPU always has 0 MiB."""
    cuda = torch.device(device).type == "cuda"
    try:
        while True:
            command, *arguments = connection.recv()
            if command == "free":
                connection.send(torch.cuda.mem_get_info()[0] / MIB if cuda else 0.0)
                continue
            if cuda and command == "hold":
                torch.empty(int(arguments[0] * MIB), dtype=torch.uint8, device=device)  # freed into the cache at once
            elif cuda:
                torch.cuda.empty_cache()
            connection.send(True)
    except EOFError:
        return


def receive(connection: Connection, device: str) -> None:
    """Acknowledge each tensor, and then send the sum of its bits."""
    try:
        while True:
            tensor = connection.recv()
            connection.send(True)
            if tensor is not None:
                connection.send(bits(tensor))
            del tensor
    except EOFError:
        return


def bits(tensor: Tensor) -> int:
    """Return the sum of a bfloat16 tensor's bit patterns."""
    return int(tensor.view(torch.int16).long().sum())
