#!/bin/bash
# Runs before a pod terminates (preStop), within its grace period. The token comes from the environment, as for all Ray processes.
#   before-stop.sh head    signals every running job to stop and waits until it has written its checkpoint
#   before-stop.sh worker  waits until the head is gone, because the checkpoint needs the actors on this node
set -u
case "${1:-}" in
  head)
    export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
    ray job list 2> /dev/null | grep -oE "submission_id='[^']+'" | cut -d "'" -f 2 | sort -u | while read -r job; do
      case "$(ray job status "$job" 2> /dev/null)" in
        *RUNNING*) ray job stop "$job" ;;
      esac
    done
    ;;
  worker)
    # KubeRay sets the head's name in every worker.
    while timeout 5 bash -c "exec 3<> /dev/tcp/${FQ_RAY_IP:?}/6379" 2> /dev/null; do
      sleep 5
    done
    ;;
  *)
    echo "usage: before-stop.sh head|worker" >&2
    exit 2
    ;;
esac
exit 0
