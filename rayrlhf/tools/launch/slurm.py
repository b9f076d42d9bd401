"""Batch script for Slurm: `ray symmetric-run` on each node starts Ray and runs the command.

Nodes are exclusive, because `ray symmetric-run` finally stops every Ray process on its node. The token is a file of mode 0600
in the user's home, visible on all nodes. Before the time limit Slurm signals the run, which writes a checkpoint.
"""

import shlex

from rayrlhf.tools.launch.launch_spec import Launch, header

SIGNAL_SECONDS = 600
"""Seconds before the time limit at which the run is signaled to stop."""


def slurm_script(launch: Launch, source: str) -> str:
    """Return the script for `sbatch`."""
    cluster, nodes, slurm = launch.cluster, launch.cluster.nodes, launch.cluster.slurm
    options = [
        f"--job-name={cluster.name}",
        f"--nodes={nodes.count}",
        "--ntasks-per-node=1",
        "--exclusive",
        f"--cpus-per-task={nodes.cpus}",
        f"--mem={int(nodes.main_memory_gib)}G",
        *([f"--gpus-per-node={nodes.gpus}"] if nodes.gpus else []),
        *([f"--partition={slurm.partition}"] if slurm.partition else []),
        f"--time={slurm.time}",
        f"--signal=B:TERM@{SIGNAL_SECONDS}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
    ]
    gpus = f" --num-gpus={nodes.gpus}" if nodes.gpus else ""
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        header("Batch script for `sbatch`. See cluster/README.md first.", launch, "slurm", source).rstrip(),
        *_BODY_START,
        *(f"export {name}={shlex.quote(value)}" for name, value in launch.environment.items()),
        "# shellcheck disable=SC1091",
        f"source {shlex.quote(slurm.environment)}/bin/activate",
        *_BODY_ADDRESS,
        'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 \\',
        '  ray symmetric-run --address "$head_address:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \\',
        f"  --num-cpus={nodes.cpus}{gpus} -- \\",
        f"  {shlex.join(launch.command)} &",
        *_BODY_END,
    ]
    return "\n".join(lines) + "\n"


_BODY_START = [
    "set -euo pipefail",
    "umask 077",
    "# Without a token, every user of the nodes' network could use this Ray.",
    "export RAY_AUTH_MODE=token",
    'export RAY_AUTH_TOKEN_PATH="$HOME/.ray/auth_token"',
    'if [[ ! -s "$RAY_AUTH_TOKEN_PATH" ]]; then',
    '  echo "no token in $RAY_AUTH_TOKEN_PATH: run  ray get-auth-token --generate > /dev/null  once" >&2',
    "  exit 2",
    "fi",
    "# Nodes start cold: the default of 30 seconds is too short for the last one.",
    "export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600",
]
_BODY_ADDRESS = [
    'head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk "NR == 1")',
    "head_address=$(srun --nodes=1 --ntasks=1 --nodelist=\"$head_node\" hostname -I | awk '{print $1}')",
]
_BODY_END = [
    "run=$!",
    "# Signal the driver only: its checkpoint needs all actors, which must not end before it.",
    "# shellcheck disable=SC2329",
    "ask_to_stop() {",
    "  interrupted=1",
    '  srun --overlap --nodes=1 --ntasks=1 --nodelist="$head_node" pkill -TERM -u "$USER" -f "bin/rayrlhf ppo" || true',
    "}",
    "trap ask_to_stop TERM",
    "# A signal ends `wait` early; wait again for the run's own status.",
    "interrupted=1",
    'while [[ "$interrupted" == 1 ]]; do',
    "  interrupted=0",
    "  status=0",
    '  wait "$run" || status=$?',
    "done",
    "# 75: the run was stopped and can be resumed by the same command.",
    'if [[ "$status" == 75 ]]; then',
    '  scontrol requeue "$SLURM_JOB_ID"',
    "fi",
    'exit "$status"',
]
