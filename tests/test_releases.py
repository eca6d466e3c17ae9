"""Releases: what is in them, going back, damage, other writers, and processes killed at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import graphopt
from graphopt import release_files as store
from graphopt.errors import CheckError, DataError, GraphoptError, ModelError, OptionError
from graphopt.release_files import Release, events, names
from graphopt.releases import release, rollback, verify

Run = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def model(digits: Path) -> Path:
    return digits / "digits.onnx"


def test_a_release_holds_what_is_needed_to_trust_it(model: Path, digits: Path, tmp_path: Path) -> None:
    result = graphopt.optimize(str(model), "fold, quantize", calibration=str(digits / "digits_calib.npz"))
    files = result.save(tmp_path / "int8.onnx")
    result.report.after = result.report.after.model_copy(update={"file_bytes": files[0].stat().st_size})
    (tmp_path / "report.json").write_text(result.report.model_dump_json())
    made = release(
        tmp_path / "int8.onnx", tmp_path / "registry", name="digits", report=tmp_path / "report.json",
        data=str(digits / "digits_eval.npz"), base=model, requirements=["value=0.9"], notes="for the door camera",
    )  # fmt: skip
    assert made.event.version == 1
    r = made.release
    assert r.lineage.pipeline == "fold, quantize"
    assert r.lineage.source_sha256 == store.sha256(model)
    assert "quantize" in [p["name"] for p in r.lineage.passes]
    assert r.figures["evaluation"]["rows"] == 540
    assert set(r.files) == {"int8.onnx", "gold.npz", "report.json", "evaluation.json", "CARD.md", "CHANGES.md"}
    card = (made.folder / "CARD.md").read_text()
    assert "for the door camera" in card
    assert "top1, 540 rows" in card
    stamped = {p.key: p.value for p in onnx.load(made.folder / "int8.onnx").metadata_props}
    assert stamped["graphopt.pipeline"] == "fold, quantize"
    assert verify(tmp_path / "registry", data=str(digits / "digits_eval.npz"))[0].endswith("value=0.9 met")
    with pytest.raises(DataError, match="is of another model"):
        release(model, tmp_path / "registry", report=tmp_path / "report.json")


def test_versions_changes_and_going_back(model: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    first = release(model, registry)
    smaller = graphopt.optimize(str(model), "fold")
    smaller.save(tmp_path / "digits.onnx")
    second = release(tmp_path / "digits.onnx", registry)
    assert (first.event.version, second.event.version, second.release.previous) == (1, 2, 1)
    assert any(line.startswith("nodes: 38 -> ") for line in second.release.changes)
    assert any("-9 BatchNormalization" in line for line in second.release.changes)
    assert rollback(registry, "digits").version == 1
    assert store.find(registry, "digits")[1] == first.folder
    assert store.find(registry, "digits@2")[1] == second.folder
    assert rollback(registry, "digits").version == 2  # and forward again
    assert rollback(registry, "digits", 1, note="it was slower").version == 1
    third = release(model, registry)
    assert (third.event.version, third.release.previous) == (3, 1)
    assert [e.kind for e in events(registry, "digits")] == ["release", "release", "rollback", "rollback", "rollback", "release"]
    assert len(verify(registry)) == 3


def test_what_cannot_be_released_or_rolled_back(model: Path, digits: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    with pytest.raises(CheckError, match="required at least 0.9999"):
        release(model, registry, data=str(digits / "digits_eval.npz"), requirements=["value=0.9999"])
    assert names(registry) == []
    for options, error, message in (
        ({"name": "../up"}, OptionError, "is no name"),
        ({"requirements": ["value=1"]}, OptionError, "need rows"),
        ({"evidence": [model]}, OptionError, "two files of the release would be named digits.onnx"),
        ({"report": digits / "digits_eval.npz"}, DataError, "is not JSON"),
    ):
        with pytest.raises(error, match=message):
            release(model, registry, **options)
    with pytest.raises(ModelError, match="no such file"):
        release(tmp_path / "gone.onnx", registry)
    with pytest.raises(OptionError, match="has no 'digits'; it has nothing"):
        rollback(registry, "digits")
    release(model, registry)
    with pytest.raises(OptionError, match="no version to go back to"):
        rollback(registry, "digits")
    with pytest.raises(OptionError, match="has no version 7; it has 1"):
        rollback(registry, "digits", 7)
    assert not list((registry / "objects").glob(".writing-*"))


def test_every_gate_is_evaluated_again(model: Path, digits: Path, tmp_path: Path) -> None:
    registry, rows = tmp_path / "registry", str(digits / "digits_eval.npz")
    graphopt.optimize(str(model), "fold, prune-channels ratio=0.5").save(tmp_path / "small.onnx")
    gates = ["value=0.1", "drop=0.9", "gold=0.04"]
    gold = _gold(tmp_path / "small.onnx", tmp_path)
    made = release(tmp_path / "small.onnx", registry, data=rows, base=model, requirements=gates, gold=gold).release
    assert made.requirements == gates
    line = verify(registry)[0]
    assert line.endswith("NOT evaluated without rows: value=0.1, drop=0.9")
    line = verify(registry, data=rows)[0]  # the base is not there: its figure was stored with the digest of the rows
    assert line.endswith("on the rows of the release, value=0.1, drop=0.9, gold=0.04 met")
    with np.load(rows) as file:
        images = file["image"].astype(np.float32)
    right, wrong = (graphopt.session(p).run(None, {"image": images})[0].argmax(1) for p in (model, tmp_path / "small.onnx"))
    differ = right != wrong
    assert differ.any()
    hard = {"image": images[differ], "labels": right[differ]}
    with pytest.raises(OptionError, match="drop cannot be evaluated on other rows than those of the release without --base"):
        verify(registry, data=hard)
    with pytest.raises(CheckError, match="value is 0, required at least 0.1; drop is 1, required at most 0.9"):
        verify(registry, data=hard, base=model)


def test_the_gold_gate_holds_without_rows(model: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt import gold

    rows = str(digits / "digits_eval.npz")
    with pytest.raises(OptionError, match="gold=0.01: that was not measured"):
        release(model, tmp_path / "registry", data=rows, requirements=["gold=0.01"])
    release(model, tmp_path / "registry", data=rows, requirements=["gold=0.01"], gold=_gold(model, tmp_path))
    assert verify(tmp_path / "registry")[0].endswith("gold set within 0")
    real = gold.against_gold

    def elsewhere(model: Path, path: Path) -> gold.GoldRow:  # as another CPU would round
        return real(model, path).model_copy(update={"relative_error": 0.02})

    monkeypatch.setattr(gold, "against_gold", elsewhere)
    with pytest.raises(CheckError, match="outputs are 0.02 of their scale from the gold set, allowed 0.01"):
        verify(tmp_path / "registry")


def test_a_release_without_evaluation_has_no_gates(model: Path, digits: Path, tmp_path: Path) -> None:
    release(model, tmp_path / "registry")
    assert verify(tmp_path / "registry", data=str(digits / "digits_eval.npz"))[0].endswith("was released without evaluation")


def test_rows_prepared_in_another_way_are_found(model: Path, digits: Path, tmp_path: Path) -> None:
    made = release(model, tmp_path / "registry", data=str(digits / "digits_eval.npz"))
    folder, release_file = made.folder, made.release
    altered = release_file.model_copy(update={"lineage": release_file.lineage.model_copy(update={"preprocessing": "0" * 64})})
    from graphopt.releases import _gates

    assert "rows of the release" in _gates(folder, altered, str(digits / "digits_eval.npz"), None)  # the same values all the same
    with np.load(digits / "digits_eval.npz") as file:
        other = {"image": file["image"].astype(np.float32) / 2, "labels": file["labels"]}
    with pytest.raises(CheckError, match="preprocessed in another way"):
        _gates(folder, altered, other, None)


@pytest.mark.parametrize("name", ["digits.onnx", "gold.npz", "release.json", "CARD.md"])
def test_every_damage_is_found(model: Path, tmp_path: Path, name: str) -> None:
    folder = release(model, tmp_path / "registry").folder
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckError, match="changed"):
        verify(tmp_path / "registry")
    path.unlink()
    with pytest.raises(CheckError, match="missing"):
        verify(tmp_path / "registry")


def test_a_file_too_many_is_found(model: Path, tmp_path: Path) -> None:
    folder = release(model, tmp_path / "registry").folder
    (folder / "extra.txt").write_text("x")
    with pytest.raises(CheckError, match="extra.txt does not belong to it"):
        verify(tmp_path / "registry", run=False)


def test_outputs_off_the_gold_set_are_found(model: Path, tmp_path: Path) -> None:
    with np.load(_gold(model, tmp_path)) as file:
        held = {k: v + (5 if k.startswith("output") else 0) for k, v in file.items()}
    np.savez(tmp_path / "moved.npz", **held)
    with pytest.raises(CheckError, match="from the gold set, allowed 0.05"):
        release(model, tmp_path / "registry", gold=tmp_path / "moved.npz")
    assert names(tmp_path / "registry") == []


def _gold(model: Path, folder: Path) -> Path:
    from graphopt.gold import write_gold

    write_gold(model, {"image": np.zeros((2, 1, 8, 8), np.float32)}, folder / "gold.npz")
    return folder / "gold.npz"


class FakeClient:
    """Records what is logged; `broken` is the name of a method that fails."""

    broken = ""

    def __init__(self, tracking_uri: str) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        FakeClient.last = self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def method(*args: Any, **options: Any) -> Any:
            if name == self.broken:
                raise ValueError("no space\nleft")
            self.calls.append((name, args))
            return None if name == "get_experiment_by_name" else SimpleNamespace(info=SimpleNamespace(run_id="run1"))

        return method

    last: FakeClient


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    monkeypatch.setattr(FakeClient, "broken", "")
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=FakeClient))
    return FakeClient


def test_a_release_is_logged_to_mlflow(model: Path, digits: Path, tmp_path: Path, mlflow: type[FakeClient]) -> None:
    made = release(model, tmp_path / "r", data=str(digits / "digits_eval.npz"), requirements=["value=0.9"], mlflow="http://there")
    calls = mlflow.last.calls
    assert ("log_param", ("run1", "requirements", "value=0.9")) in calls
    logged = {args[1]: args[2] for name, args in calls if name == "log_metric"}
    assert (logged["nodes"], logged["quality_rows"]) == (38.0, 540.0)
    assert logged["quality"] > 0.99
    assert ("log_artifacts", ("run1", str(made.folder))) in calls
    assert calls[-1] == ("set_terminated", ("run1", "FINISHED"))


def test_mlflow_that_fails(
    model: Path, tmp_path: Path, mlflow: type[FakeClient], monkeypatch: pytest.MonkeyPatch, cli: Run
) -> None:
    registry = tmp_path / "r"
    monkeypatch.setattr(mlflow, "broken", "log_artifacts")
    with pytest.raises(GraphoptError, match="released as digits@1, but not logged to MLflow: no space left"):
        release(model, registry, mlflow="http://there")
    assert mlflow.last.calls[-1] == ("set_terminated", ("run1", "FAILED"))
    assert len(events(registry, "digits")) == 1
    monkeypatch.setattr(mlflow, "broken", "search_experiments")
    with pytest.raises(OptionError, match="MLflow at http://there cannot be used: no space left"):
        release(model, registry, mlflow="http://there")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    code, _, err = cli("release", model, "--to", registry, "--mlflow", "http://there")
    assert (code, "needs the package mlflow: pip install 'graphopt[mlflow]'" in err) == (1, True)
    assert len(events(registry, "digits")) == 1


def test_the_real_mlflow(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    made = release(model, tmp_path / "r", mlflow=uri)
    client = real.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.metrics["nodes"]) == ("digits@1", "FINISHED", 38)
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {*made.release.files, "release.json"}


LOOP = """
import sys
from graphopt.releases import release, rollback
model, registry, kind = sys.argv[1:]
print("ready", flush=True)
while True:
    release(model, registry) if kind == "release" else rollback(registry, "digits")
"""


def killed(model: Path, registry: Path, kind: str, delay: float) -> None:
    """Run releases or rollbacks without end, and kill the process after `delay` seconds of them."""
    process = subprocess.Popen([sys.executable, "-c", LOOP, str(model), str(registry), kind], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def survive(model: Path, registry: Path, kills: int) -> None:
    release(model, registry)
    release(model, registry)
    dice = random.Random(kills)
    for number in range(kills):
        before = events(registry, "digits")
        kind = "rollback" if number % 2 else "release"
        killed(model, registry, kind, dice.uniform(0, 1.2 if kind == "release" else 0.3))
        after = events(registry, "digits")
        assert after[: len(before)] == before
        assert [e.number for e in after] == list(range(1, len(after) + 1))
        assert after[-1].version in store.versions(after)
        assert len(verify(registry, run=False)) == len(store.versions(after))
    assert verify(registry, "digits")
    assert release(model, registry).event.version == max(store.versions(events(registry, "digits")))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill a process in the middle")
def test_killed_at_random_moments(model: Path, tmp_path: Path) -> None:
    survive(model, tmp_path / "registry", 6)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill a process in the middle")
def test_killed_two_hundred_times(model: Path, tmp_path: Path) -> None:
    survive(model, tmp_path / "registry", 200)


def test_writers_at_the_same_time_all_land(model: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    program = (
        "import sys; from graphopt.releases import release\nfor _ in range(3): release(sys.argv[1], sys.argv[2], notes=sys.argv[3])"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, str(model), str(registry), f"writer {n}"]) for n in range(2)]
    assert [p.wait(timeout=200) for p in running] == [0, 0]
    history = events(registry, "digits")
    assert [e.version for e in history] == [1, 2, 3, 4, 5, 6]
    assert sorted(e.note for e in history) == ["writer 0"] * 3 + ["writer 1"] * 3
    assert len(verify(registry, run=False)) == 6


def test_what_a_killed_process_left_goes_after_a_day(model: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    release(model, registry)
    old, new = registry / "objects" / ".writing-old", registry / "objects" / ".writing-new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    release(model, registry)
    assert (old.exists(), new.exists()) == (False, True)


def test_the_command_line(cli: Run, model: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    code, out, err = cli("release", model, "--to", registry, "--notes", "one")
    assert (code, err) == (0, "")
    assert "released: digits@1" in out
    code, out, _ = cli("release", model, "--to", registry, "--json")
    assert json.loads(out)["version"] == 2
    assert cli("rollback", registry, "digits")[1] == "current: digits@1\n"
    code, out, _ = cli("log", registry)
    assert code == 0
    assert out.splitlines()[0].startswith("* digits@1")
    assert out.splitlines()[-1] == "current: digits@1"
    assert "# digits" in cli("show", registry, "digits@2")[1]
    assert Release.model_validate_json(cli("show", registry, "digits", "--json")[1]).notes == "one"
    assert cli("verify", registry)[0] == 0
    (store.find(registry, "digits")[1] / "CARD.md").write_text("changed")
    code, _, err = cli("verify", registry, "digits", "--no-run")
    assert code == 2
    assert "CARD.md is missing or was changed" in err
    assert cli("log", registry, "dogs")[0] == 1


def test_the_schema_is_published() -> None:
    published = Path(__file__).parent.parent / "docs" / "release.schema.json"
    assert json.loads(published.read_text()) == Release.model_json_schema()
