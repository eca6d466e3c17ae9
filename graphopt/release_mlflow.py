"""A release as a run of MLflow: parameters, metrics and the whole folder as artifacts. The registry stays what counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError, OptionError

if TYPE_CHECKING:
    from graphopt.releases import Released

_LONGEST = 500  # characters of a parameter that every MLflow takes; the artifacts hold the rest


def connect(uri: str) -> Any:
    """A client of the tracking server. OptionError where mlflow is not installed or the server does not answer."""
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise OptionError("logging to MLflow needs the package mlflow: pip install 'graphopt[mlflow]'") from error
    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # of mlflow, requests, databases: no common base class
        raise OptionError(f"MLflow at {uri} cannot be used: {_line(error)}") from error
    return client


def log_release(client: Any, released: Released) -> str:
    """Log the release under an experiment of its name; returns the run's id. GraphoptError where that fails: it stays released."""
    name, version = released.release.name, released.event.version
    run_id = None
    try:
        experiment = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if experiment is None else experiment.experiment_id
        tags = {"graphopt.object": released.event.object, "graphopt.version": str(version)}
        run_id = client.create_run(number, run_name=f"{name}@{version}", tags=tags).info.run_id
        for key, value in parameters(released).items():
            client.log_param(run_id, key, value)
        for key, number in metrics(released).items():
            client.log_metric(run_id, key, number)
        client.log_artifacts(run_id, str(released.folder))
        client.set_terminated(run_id, "FINISHED")
    except Exception as error:  # as above
        if run_id is not None:
            _failed(client, run_id)
        raise GraphoptError(f"released as {name}@{version}, but not logged to MLflow: {_line(error)}") from error
    return str(run_id)


def _failed(client: Any, run_id: str) -> None:
    """Mark the run as failed; where even that fails, what failed first is what the user must know."""
    try:
        client.set_terminated(run_id, "FAILED")
    except Exception:
        return


def parameters(released: Released) -> dict[str, str]:
    """How the model was made, as far as that is known."""
    r = released.release
    found: Mapping[str, Any] = {**r.lineage.model_dump(exclude={"passes", "made_with"}), "metric": r.metric, "notes": r.notes}
    requirements = {"requirements": ", ".join(r.requirements)} if r.requirements else {}
    return {k: str(v)[:_LONGEST] for k, v in {**found, **requirements}.items() if v}


def metrics(released: Released) -> dict[str, float]:
    """What was measured."""
    r = released.release
    found: dict[str, Any] = r.facts.model_dump(include={"file_bytes", "nodes", "parameters", "macs"})
    found["speedup"] = r.figures.get("speedup")
    found["latency_p50_ms"] = ((r.figures.get("after") or {}).get("latency") or {}).get("p50_ms")
    evaluation = r.figures.get("evaluation") or {}
    found |= {"quality": evaluation.get("value"), "quality_base": evaluation.get("base"), "quality_rows": evaluation.get("rows")}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
