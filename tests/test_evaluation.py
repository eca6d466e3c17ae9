"""`graphopt evaluate`: pairing, groups, hard and gold sets, declared preprocessing."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from graphopt.data import open_dataset
from graphopt.errors import CheckError, DataError, OptionError
from graphopt.evaluate import paired, score
from graphopt.evaluation import EvaluationReport, evaluate, require
from graphopt.feeds import input_specs
from graphopt.gold import against_gold, write_gold
from graphopt.runtime import session

Run = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """x and its negative: whatever one gets right, the other gets wrong."""
    for name, op in (("a", "Identity"), ("b", "Neg")):
        text = f'<ir_version: 8, opset_import: ["" : 17]> m (float[N,2] x) => (float[N,2] y) {{ y = {op}(x) }}'
        onnx.save(onnx.parser.parse_model(text), tmp_path / f"{name}.onnx")
    return tmp_path / "a.onnx", tmp_path / "b.onnx"


ROWS = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 1]], np.float32)
LABELS = np.array([0, 0, 1, 1, 1, 0])  # the identity gets the first four
DATA = {"x": ROWS, "labels": LABELS}


def test_lost_and_won_rows(two: tuple[Path, Path]) -> None:
    found = evaluate(two[1], DATA, base=two[0]).evaluation
    assert found.value == pytest.approx(2 / 6)
    assert found.paired is not None
    assert (found.paired.lost, found.paired.won) == ([0, 1, 2, 3], [4, 5])
    assert found.paired.value == pytest.approx(4 / 6)
    assert found.paired.difference == pytest.approx(-2 / 6)
    assert found.paired.low is not None
    assert found.paired.high is not None
    assert found.paired.low <= found.paired.difference <= found.paired.high
    assert found.paired.p_value == pytest.approx(paired(np.array([1, 1, 1, 1, 0, 0]), np.array([0, 0, 0, 0, 1, 1])).p_value)


def test_classes_groups_and_the_worst(two: tuple[Path, Path]) -> None:
    found = evaluate(two[0], DATA, groups=np.array(["day", "day", "day", "day", "night", "night"])).evaluation
    assert [(g.group, g.rows, g.value) for g in found.groups] == [("day", 4, 1.0), ("night", 2, 0.0)]
    assert found.worst is not None
    assert found.worst.group == "night"
    assert [(c.group, c.rows) for c in found.classes] == [("0", 3), ("1", 3)]
    with pytest.raises(DataError, match="2 values for 6 rows"):
        evaluate(two[0], DATA, groups=np.array([1, 2]))


def test_the_hard_set_is_scored_apart(two: tuple[Path, Path]) -> None:
    report = evaluate(two[0], DATA, hard={"x": ROWS[4:], "labels": LABELS[4:]})
    assert report.evaluation.value == pytest.approx(4 / 6)
    assert report.hard is not None
    assert (report.hard.rows, report.hard.value) == (2, 0.0)


def test_the_same_figures_as_the_row_metric(digits: Path) -> None:
    model = digits / "digits.onnx"
    data = open_dataset(str(digits / "digits_eval.npz"), input_specs(onnx.load(model)))
    report = evaluate(model, str(digits / "digits_eval.npz"))
    assert report.evaluation.value == pytest.approx(float(np.mean(score(session(model), data, "top1"))))
    assert report.evaluation.digest == data.digest()
    assert len(report.evaluation.classes) == 10


def test_the_gold_set(digits: Path, tmp_path: Path) -> None:
    model, gold = digits / "digits.onnx", tmp_path / "gold.npz"
    assert write_gold(model, str(digits / "digits_eval.npz"), gold, rows=5) == 5
    same = against_gold(model, gold)
    assert (same.rows, same.argmax_agreement) == (5, 1.0)
    assert same.relative_error < 1e-5
    moved = onnx.load(model)
    weight = next(t for t in moved.graph.initializer if len(t.dims) == 4)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.5), weight.name))
    onnx.save(moved, tmp_path / "moved.onnx")
    report = evaluate(tmp_path / "moved.onnx", str(digits / "digits_eval.npz"), gold=gold)
    assert report.gold is not None
    assert report.gold.relative_error > 0.01
    with pytest.raises(CheckError, match="gold is .* required at most 0.001"):
        require(report, ["gold=0.001"])
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(DataError, match="write it with"):
        against_gold(model, tmp_path / "other.npz")
    (tmp_path / "torn.npz").write_bytes(gold.read_bytes()[:400])
    with pytest.raises(DataError, match="cannot be read"):
        against_gold(model, tmp_path / "torn.npz")


def test_requirements(two: tuple[Path, Path]) -> None:
    report = evaluate(two[1], DATA, base=two[0])
    require(report, ["value=0.3", "drop=0.5"])
    with pytest.raises(CheckError, match="value is 0.3333, required at least 0.5; drop is 0.3333, required at most 0.1"):
        require(report, ["value=0.5", "drop=0.1"])
    with pytest.raises(OptionError, match="was not measured"):
        require(report, ["gold=1"])
    with pytest.raises(OptionError, match="expected one of value="):
        require(report, ["accuracy=1"])


# ---- declared preprocessing


def images(folder: Path) -> Path:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    for name, grey in (("cat", 10), ("dog", 250)):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(3):
            image.fromarray(np.full((6, 4, 3), grey + number, np.uint8)).save(folder / "photos" / name / f"{number}.png")
    path = folder / "photos.toml"
    path.write_text('kind = "images"\nfolder = "photos"\nsize = [4, 4]\nsubtract = [128, 128, 0]\ndivide = 2\n')
    return path


IMAGE = '<ir_version: 8, opset_import: ["" : 17]> m (float[N,3,4,4] x) => (float[N,3,4,4] y) { y = Identity(x) }'


def test_images_are_scaled_as_declared(tmp_path: Path) -> None:
    path = images(tmp_path)
    data = open_dataset(str(path), input_specs(onnx.parser.parse_model(IMAGE)))
    assert data.rows == 6
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    rows = np.concatenate([f["x"] for f in data.batches(4)])
    assert rows.shape == (6, 3, 4, 4)
    assert rows[:, 0, 0, 0].tolist() == [-59.0, -58.5, -58.0, 61.0, 61.5, 62.0]
    assert rows[0, 2, 0, 0] == 5.0
    (tmp_path / "labels.csv").write_text("cat/0.png,3\ndog/1.png,7\n")
    path.write_text(path.read_text() + 'labels = "labels.csv"\n')
    chosen = open_dataset(str(path), data.inputs)
    assert chosen.labels is not None
    assert chosen.labels.tolist() == [3, 7]
    assert chosen.preprocessing == data.preprocessing  # where the rows lie is not what is done to them
    path.write_text(path.read_text().replace("divide = 2", "divide = 3"))
    assert open_dataset(str(path), data.inputs).preprocessing != data.preprocessing


def test_other_preprocessing_of_the_hard_set_is_refused(tmp_path: Path) -> None:
    path = images(tmp_path)
    other = tmp_path / "other.toml"
    other.write_text(path.read_text().replace("divide = 2", "divide = 3"))
    flat = IMAGE.replace("y = Identity(x)", "y = ReduceMean<axes = [2, 3], keepdims = 0>(x)").replace(
        "(float[N,3,4,4] y)", "(float[N,3] y)"
    )
    onnx.save(onnx.parser.parse_model(flat), tmp_path / "m.onnx")
    report = evaluate(tmp_path / "m.onnx", str(path), hard=str(path))
    assert report.evaluation.preprocessing is not None
    with pytest.raises(DataError, match="preprocessed in another way"):
        evaluate(tmp_path / "m.onnx", str(path), hard=str(other))


def test_audio_is_cut_and_padded(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for name, count in (("a", 3), ("b", 6)):
        with wave.open(str(tmp_path / "clips" / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, count, "NONE", ""))
            file.writeframes(np.full(count, 16384, "<i2").tobytes())
    path = tmp_path / "clips.toml"
    path.write_text('kind = "audio"\nfolder = "clips"\nrate = 8000\nsamples = 4\n')
    specs = input_specs(onnx.parser.parse_model(IMAGE.replace("N,3,4,4", "N,4")))
    (feed,) = open_dataset(str(path), specs).batches(8)
    assert feed["x"].tolist() == [[0.5, 0.5, 0.5, 0.0], [0.5, 0.5, 0.5, 0.5]]
    path.write_text(path.read_text().replace("8000", "16000"))
    with pytest.raises(DataError, match="a.wav has 8000 Hz and 16 bits, expected 16000 Hz"):
        list(open_dataset(str(path), specs).batches(8))


def test_text_goes_through_the_tokenizer_file(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "good": 1, "bad": 2, "day": 3}, "[PAD]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "lines.tsv").write_text("good day\t1\nbad\t0\n")
    path = tmp_path / "lines.toml"
    path.write_text('kind = "text"\nfile = "lines.tsv"\ntokenizer = "tokenizer.json"\n')
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> m (int64[N,S] input_ids, int64[N,S] attention_mask) => (int64[N,S] y)'
        " { y = Add(input_ids, attention_mask) }"
    )
    data = open_dataset(str(path), input_specs(proto))
    (feed,) = data.batches(8)
    assert feed["input_ids"].tolist() == [[1, 3], [2, 0]]
    assert feed["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0]
    before = data.preprocessing
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text().replace('"day"', '"night"'))
    assert open_dataset(str(path), data.inputs).preprocessing != before


def test_functions_are_hashed_by_their_source(tmp_path: Path) -> None:
    (tmp_path / "prepare.py").write_text("import numpy as np\ndef rows():\n    yield {'x': np.ones((2, 3, 4, 4), np.float32)}\n")
    path = tmp_path / "rows.toml"
    path.write_text('kind = "function"\nfunction = "prepare.py:rows"\n')
    specs = input_specs(onnx.parser.parse_model(IMAGE))
    first = open_dataset(str(path), specs)
    assert next(iter(first.batches(2)))["x"].shape == (2, 3, 4, 4)
    (tmp_path / "prepare.py").write_text((tmp_path / "prepare.py").read_text() + "# changed\n")
    assert open_dataset(str(path), specs).preprocessing != first.preprocessing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind = 'smells'", "expected one of images"),
        ("kind = 'images'", "images needs folder"),
        ("kind = 'images'\nfolder = 'gone'", "does not exist"),
        ("kind = 'images'\nfolder = 3", "wrong type"),
        ("kind = 'images'\nfolder = '.'\nsizes = [1]", "unknown key 'sizes'"),
        ("kind = ", "is not TOML"),
    ],
)
def test_broken_declarations(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        open_dataset(str(path), input_specs(onnx.parser.parse_model(IMAGE)))


def test_the_command_line(cli: Run, digits: Path, tmp_path: Path) -> None:
    model, data, gold = digits / "digits.onnx", digits / "digits_eval.npz", tmp_path / "gold.npz"
    code, out, err = cli("evaluate", model, "--data", data, "--base", model, "--write-gold", gold, "--metric", "f1")
    assert (code, err) == (0, "")
    assert "lost 0: none; won 0: none; p = 1" in out
    code, out, _ = cli("evaluate", model, "--data", data, "--gold", gold, "--json", "--require", "gold=0.001")
    assert code == 0
    assert EvaluationReport.model_validate_json(out).gold is not None
    code, _, err = cli("evaluate", model, "--data", data, "--require", "value=0.9999")
    assert code == 2
    assert "required at least 0.9999" in err
    assert "spearman" in cli("evaluate", model, "--data", data, "--metric", "help")[1].split()


def test_the_schema_is_published() -> None:
    published = Path(__file__).parent.parent / "docs" / "evaluation.schema.json"
    assert json.loads(published.read_text()) == EvaluationReport.model_json_schema()
