"""Registration of this project's weight transfers with vLLM.

vLLM keeps a table of transfers in each process. The workers of a tensor-parallel replica are processes that vLLM starts. Each
calls `register_transfers` through the entry point `vllm.general_plugins` of the installed package, and imports `vllm_worker.py`
as the engine's `worker_extension_cls`. The second way also works where the package's metadata is missing or older: sources on
`PYTHONPATH`, an editable install before an update, `VLLM_PLUGINS` without this name.
"""

TRANSFERS = {"shared_memory": "BucketTransfer", "nccl": "NCCLTransfer", "ipc": "IPCTransfer"}
"""Classes of `rayrlhf.weight_sync.vllm_receiver` by `rollout.weight_transfer`."""


def transfer_name(transfer: str) -> str:
    """Return a transfer's name in a `WeightTransferConfig`.

    A run resolves `auto`; an engine outside of one takes buckets.
    """
    return f"rayrlhf_{'shared_memory' if transfer == 'auto' else transfer}"


def register_transfers() -> None:
    """Register all transfers in this process; a second call has no effect.

    Their module is imported when an engine uses one.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    for transfer, class_name in TRANSFERS.items():
        if transfer_name(transfer) not in WeightTransferEngineFactory._registry:
            module = "rayrlhf.weight_sync.vllm_receiver"
            WeightTransferEngineFactory.register_engine(transfer_name(transfer), module, class_name)
