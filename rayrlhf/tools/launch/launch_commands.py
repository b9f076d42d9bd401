"""The commands `plan` and `submit`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rayrlhf.errors import UserError

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file with a PPO configuration.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that replace those of the file: section.key=value ...")]


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    cluster: Annotated[Path | None, typer.Option(help="A YAML file with a cluster configuration.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="GPUs per node.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="Memory per GPU, in GiB.")] = None,
    cpus_per_node: Annotated[int | None, typer.Option(min=1, help="CPU cores per node.")] = None,
    node_memory: Annotated[float | None, typer.Option(help="Main memory per node, in GiB.")] = None,
    emit: Annotated[str | None, typer.Option(help="Print a manifest instead: kuberay, ray-up or slurm.")] = None,
    simulate: Annotated[
        Path | None, typer.Option(help="Simulate the run's steps instead, with the rates of this YAML file.")
    ] = None,
) -> None:
    """Show the placement and memory of a run on a cluster, without starting it."""
    from rayrlhf.config.launch import ClusterConfig
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.config.ppo import PPOConfig
    from rayrlhf.tools.launch.emit import emit_manifest

    given = {
        "count": nodes,
        "gpus": gpus_per_node,
        "gpu_memory_gib": gpu_memory,
        "cpus": cpus_per_node,
        "memory_gib": node_memory,
    }
    settings = [f"nodes.{key}={value}" for key, value in given.items() if value is not None]
    machines = load_config(ClusterConfig, cluster, settings)
    loaded = load_config(PPOConfig, config, overrides or [])
    if emit is not None:
        typer.echo(emit_manifest(emit, loaded, machines, config, overrides or []), nl=False)
        return
    if simulate is not None:
        _print_simulation(loaded, simulate)
        return
    _print_plan(loaded, machines.nodes)


def _print_plan(config: Any, nodes: Any) -> None:
    """Print the plan, and a remedy if it does not fit.

    Raises:
        UserError: it does not fit.
    """
    from rayrlhf.ppo.run_models import describe_checks
    from rayrlhf.tools.launch.launch_plan import plan_run
    from rayrlhf.tools.launch.remedy import advice

    try:
        planned = plan_run(config, nodes)
    except UserError as error:
        raise UserError(f"{error}\n{advice(config, nodes)}") from error
    for line in (*describe_checks(config), *planned.lines()):
        typer.echo(line)
    if planned.problems:
        raise UserError(f"the run does not fit: {len(planned.problems)} problems above; {advice(config, nodes)}")


def _print_simulation(config: Any, rates: Path) -> None:
    """Print the times of simulated steps."""
    from rayrlhf.config.launch import SimulationConfig
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.tools.launch.simulate import simulate

    settings, rollout = load_config(SimulationConfig, rates, []), config.rollout
    if settings.max_staleness is None:
        settings = settings.model_copy(update={"max_staleness": config.asynchronous.max_staleness})
    report = simulate(
        settings,
        samples=config.samples_per_step,
        replicas=settings.replicas or rollout.replicas,
        places=rollout.max_concurrent,
        longest=rollout.max_new_tokens,
    )
    for line in report.lines():
        typer.echo(line)


def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="URL of the cluster's dashboard; RAY_API_SERVER_ADDRESS if not given.")
    ] = None,
    working_dir: Annotated[Path, typer.Option(help="Folder that the job runs in; it is uploaded.")] = Path(),
    submission_id: Annotated[str | None, typer.Option(help="Name of the job; `rayrlhf-RUN-TIME` if not given.")] = None,
    entrypoint_cpus: Annotated[float, typer.Option(min=0.0, help="CPUs that the driver requests.")] = 0.0,
    stop_seconds: Annotated[int, typer.Option(min=3, help="Time for a stopped run to write its checkpoint.")] = 600,
    resubmit_on_failure: Annotated[
        int, typer.Option(min=0, help="Number of resubmissions after failures, which resume the run.")
    ] = 0,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return after submission, without following the log.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the job `--submission-id`; it can be resumed.")] = False,
) -> None:
    """Run `rayrlhf ppo CONFIG` as a Ray job and follow its log.

    Ctrl-C stops following, not the job.
    """
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.config.ppo import PPOConfig
    from rayrlhf.tools.launch.submit import JobRequest, connect, run_job, stop_job

    if resubmit_on_failure and no_wait:
        raise UserError("--resubmit-on-failure must wait for the job: leave --no-wait out")
    client = connect(address)
    if stop:
        if submission_id is None:
            raise UserError("--stop needs --submission-id")
        stop_job(client, submission_id, typer.echo, stop_seconds)
        return
    loaded = load_config(PPOConfig, config, overrides or [])
    request = JobRequest.of(loaded, config, overrides or [], working_dir, entrypoint_cpus, stop_seconds)
    run_job(client, request, submission_id, typer.echo, wait=not no_wait, retries=resubmit_on_failure)
