"""The same rows as metrics.jsonl, for those who watch with TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from intarsia.base.errors import IntarsiaError

Send = Callable[[int, Mapping[str, float]], None]  # step, figures


def trackers(names: tuple[str, ...], run: Path, recipe: Mapping[str, Any]) -> list[Send]:
    """What each named tracker wants to be told. Raises `IntarsiaError` for one that is not installed."""
    return [_MAKERS[name](run, recipe) for name in names]


def _tensorboard(run: Path, recipe: Mapping[str, Any]) -> Send:
    writer = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(run / "tensorboard"))

    def send(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send


def _wandb(run: Path, recipe: Mapping[str, Any]) -> Send:
    wandb = _package("wandb", "wandb")
    begun = wandb.init(project="intarsia", name=run.name, id=run.name, resume="allow", dir=str(run), config=recipe)
    return lambda step, figures: begun.log(dict(figures), step=step)


def _mlflow(run: Path, recipe: Mapping[str, Any]) -> Send:
    mlflow = _package("mlflow", "mlflow")
    mlflow.set_experiment("intarsia")
    mlflow.start_run(run_name=run.name)
    tables = {name: values if isinstance(values, Mapping) else {"": values} for name, values in recipe.items()}
    flat = {f"{name}.{key}".rstrip("."): value for name, values in tables.items() for key, value in values.items()}
    mlflow.log_params(flat)
    return lambda step, figures: mlflow.log_metrics(dict(figures), step=step)


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise IntarsiaError(
            f"the tracker {name} is not installed: pip install {name}, or leave it out of trackers. Everything is in "
            "metrics.jsonl either way."
        ) from error


_MAKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
