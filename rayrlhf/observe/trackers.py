"""TensorBoard event files, and experiment trackers: wandb, MLflow and trackio.

A tracker gets a run's name, configuration and metrics. Its destination and credentials come from its own environment variables
(`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`, ...). A resumed run continues under the same name. The packages are optional:
pip install 'rayrlhf[trackers]'.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, SupportsFloat

from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import writing

TrackerName = Literal["wandb", "mlflow", "trackio"]
PROJECT = "rayrlhf"


class Tracker(Protocol):
    """Destination of a run's metrics."""

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Send one step's metrics, without non-finite values."""

    def close(self) -> None:
        """Send pending metrics and end the run."""


def check_trackers(names: Iterable[TrackerName]) -> None:
    """Check that the packages of the trackers are installed, before any model loads.

    Raises:
        UserError: names the first missing one.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"observe.trackers: {name} is not installed; expected `pip install 'rayrlhf[trackers]'`")


def open_tracker(name: TrackerName, run_name: str, config: Mapping[str, Any]) -> Tracker:
    """Start a tracker's run, or continue the one of this name.

    Args:
        config: its configuration, as plain values.

    Raises:
        UserError: the package is not installed.
    """
    check_trackers([name])
    return _OPEN[name](run_name, config)


class _Wandb:
    def __init__(self, run_name: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project=PROJECT, name=run_name, id=run_name, resume="allow", config=dict(config))

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        self._run.log(_finite(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, run_name: str, config: Mapping[str, Any]) -> None:
        import mlflow

        mlflow.set_experiment(PROJECT)
        found = mlflow.search_runs(filter_string=f"attributes.run_name = '{run_name}'", output_format="list", max_results=1)
        self._mlflow = mlflow
        mlflow.start_run(run_id=found[0].info.run_id if found else None, run_name=run_name)
        if not found:
            mlflow.log_dict(dict(config), "config.json")

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        self._mlflow.log_metrics({_plain(name): value for name, value in _finite(metrics).items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    def __init__(self, run_name: str, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=PROJECT, name=run_name, config=dict(config), resume="allow", embed=False)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        self._trackio.log(_finite(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


_OPEN: Mapping[str, Callable[[str, Mapping[str, Any]], Tracker]] = {"wandb": _Wandb, "mlflow": _MLflow, "trackio": _Trackio}


def _finite(metrics: Mapping[str, SupportsFloat]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(float(value))}


def _plain(name: str) -> str:
    """Replace characters that MLflow does not allow in names."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)


class TensorBoardSink:
    """Writes scalars; TensorBoard itself is imported when the first sink is made."""

    def __init__(self, folder: Path, *, resumed_after: int | None = None) -> None:
        """Open an event file in `folder`.

        Args:
            folder: usually `run_folder/tensorboard`.
            resumed_after: last valid step of a resumed run; TensorBoard hides events of later steps.

        Raises:
            UserError: the folder cannot be written.
        """
        from torch.utils.tensorboard.writer import SummaryWriter

        self.folder = folder
        with writing(folder):
            self._writer = SummaryWriter(str(folder), purge_step=None if resumed_after is None else resumed_after + 1)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Write one step's finite numbers and flush.

        Raises:
            UserError: the file cannot be written.
        """
        with writing(self.folder):
            for name, value in metrics.items():
                if math.isfinite(number := float(value)):
                    self._writer.add_scalar(name, number, step)
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file.

        Raises:
            UserError: the file cannot be written.
        """
        with writing(self.folder):
            self._writer.close()
