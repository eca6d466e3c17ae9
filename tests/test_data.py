"""Datasets: every form gives the same feeds, a batch at a time, and what does not fit is refused in one line."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt.data import Dataset, Feed, InputSpec, check_feed, fixed_batch, generated, input_specs, open_dataset, padded
from graphopt.errors import DataError

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
IMAGE = (InputSpec("x", F32, ("N", 3, 4)),)
TEXT = (InputSpec("ids", I64, ("batch", "length")), InputSpec("mask", I64, ("batch", "length")))
ROWS = np.arange(7 * 12, dtype=np.float32).reshape(7, 3, 4)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def joined(dataset: Dataset, batch: int = 3) -> dict[str, np.ndarray]:
    feeds = list(dataset.batches(batch))
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def folder_of_rows(folder: Path) -> Path:
    folder.mkdir()
    for number, row in enumerate(ROWS):
        np.save(folder / f"{number:02}.npy", row)
    (folder / "README.txt").write_text("not data")
    return folder


def folder_of_blocks(folder: Path) -> Path:
    folder.mkdir()
    save(folder / "b.npz", x=ROWS[5:])
    save(folder / "a.npz", x=ROWS[:5])
    return folder


def module_of_feeds(folder: Path) -> str:
    folder.mkdir()
    code = "import numpy as np\nROWS = np.arange(7 * 12, dtype=np.float32).reshape(7, 3, 4)\n"
    (folder / "feeds_of_test.py").write_text(code + "def rows():\n    for row in ROWS:\n        yield {'x': row[None]}\n")
    return f"{folder / 'feeds_of_test.py'}:rows"


def stored(path: Path) -> Path:
    return save(path.with_suffix(".npz"), x=ROWS)


def deflated(path: Path) -> Path:
    np.savez_compressed(path.with_suffix(".npz"), x=ROWS)
    return path.with_suffix(".npz")


FORMS: dict[str, Any] = {
    "npz": stored,
    "deflated npz": deflated,
    "folder of rows": folder_of_rows,
    "folder of npz": folder_of_blocks,
    "function of a file": module_of_feeds,
    "dict": lambda _: {"x": ROWS},
    "fortran dict": lambda _: {"x": np.asfortranarray(ROWS)},
    "list of feeds": lambda _: [{"x": ROWS[:2]}, {"x": ROWS[2:]}],
    "function": lambda _: lambda: ({"x": row[None]} for row in ROWS),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows_again_and_again(form: str, tmp_path: Path) -> None:
    dataset = open_dataset(FORMS[form](tmp_path / "data"), IMAGE)
    for batch in (1, 3, 100):
        np.testing.assert_array_equal(joined(dataset, batch)["x"], ROWS)
    assert dataset.digest() == open_dataset({"x": ROWS}, IMAGE).digest()
    assert dataset.digest() != open_dataset({"x": ROWS[::-1]}, IMAGE).digest()
    assert dataset.rows in (7, None)
    assert dataset.labels is None


def test_arrays_are_split_and_feeds_come_as_given() -> None:
    def sizes(dataset: Dataset, batch: int) -> list[int]:
        return [len(feed["x"]) for feed in dataset.batches(batch)]

    feeds = [{"x": ROWS[:2]}, {"x": ROWS[2:]}]
    assert sizes(open_dataset({"x": ROWS}, IMAGE), 3) == [3, 3, 1]
    assert sizes(open_dataset(feeds, IMAGE), 3) == [2, 5]
    fixed = (InputSpec("x", F32, (4, 3, 4)),)
    assert fixed_batch(fixed) == 4
    assert sizes(open_dataset({"x": ROWS}, fixed), 1) == [4, 3]
    assert sizes(open_dataset(feeds, fixed), 1) == [4, 3]


def test_batches_join_files_of_equal_row_shapes_only(tmp_path: Path) -> None:
    for name, rows, length in (("a", 3, 5), ("b", 2, 5), ("c", 2, 9)):
        save(tmp_path / f"{name}.npz", ids=np.ones((rows, length), np.int32), mask=np.ones((rows, length), bool))
    shapes = [(feed["ids"].shape, feed["mask"].dtype) for feed in open_dataset(tmp_path, TEXT).batches(4)]
    assert shapes == [((4, 5), I64), ((1, 5), I64), ((2, 9), I64)]


def test_labels_and_constants(tmp_path: Path) -> None:
    inputs = (*IMAGE, InputSpec("rate", I64, ()))
    path = save(tmp_path / "a.npz", x=ROWS, rate=np.array(16000), labels=np.arange(7))
    dataset = open_dataset(path, inputs)
    assert dataset.labels is not None
    np.testing.assert_array_equal(dataset.labels, np.arange(7))
    assert [int(feed["rate"]) for feed in dataset.batches(4)] == [16000, 16000]
    assert open_dataset([{"x": ROWS[:1], "labels": 4}, {"x": ROWS[:1], "labels": 2}], IMAGE).labels == pytest.approx([4, 2])


def test_a_function_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module_of_feeds(tmp_path / "code")
    monkeypatch.chdir(tmp_path / "code")
    np.testing.assert_array_equal(joined(open_dataset("feeds_of_test:rows", IMAGE))["x"], ROWS)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [("f8", "f4"), ("f2", "f4"), ("f4", "f2"), ("u1", "f4"), ("i4", "i8"), (">f4", "f4"), ("?", "i8"), ("U3", "O")],
)
def test_safe_casts(found: str, wanted: str) -> None:
    values = np.array([[1, 0]]).astype(found)
    converted = check_feed([InputSpec("x", np.dtype(wanted), (None, 2))], {"x": values}, "here")["x"]
    assert converted.dtype == np.dtype(wanted)
    assert converted.tolist() == values.tolist()


@pytest.mark.parametrize(
    ("found", "wanted"), [("f4", "i8"), ("i8", "f4"), ("i8", "i4"), ("i8", "u1"), ("u1", "?"), ("U3", "f4"), ("c8", "f4")]
)
def test_other_casts_are_refused(found: str, wanted: str) -> None:
    with pytest.raises(DataError, match=rf"data here key 'x': expected {np.dtype(wanted)}, found .* without loss"):
        check_feed([InputSpec("x", np.dtype(wanted), (1,))], {"x": np.array([1]).astype(found)}, "here")


def nan_at(row: int) -> np.ndarray:
    values: np.ndarray = ROWS.copy()
    values[row, 1, 2] = np.nan
    return values


BAD: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "rank": ({"x": ROWS[0]}, r"key 'x': expected float32 \[N, 3, 4\], found float32 \[3, 4\]"),
    "shape": ({"x": ROWS.reshape(7, 4, 3)}, r"key 'x': expected float32 \[N, 3, 4\], found float32 \[7, 4, 3\]"),
    "dtype": ({"x": ROWS.astype(np.int64)}, r"key 'x': expected float32, found int64"),
    "name": ({"X": ROWS}, r"input 'x' is missing; expected 'x', found 'X'"),
    "missing": ({"labels": np.arange(7)}, r"input 'x' is missing; expected 'x', found nothing"),
    "empty": ({"x": ROWS[:0]}, r"has no rows"),
    "labels": ({"x": ROWS, "labels": np.arange(6)}, r"row counts differ: .*key 'x' has 7, .*key 'labels' has 6"),
    "nan": ({"x": nan_at(4)}, r"key 'x': row 4 holds NaN or Inf"),
    "overflow": ({"x": ROWS.astype(np.float64) * 1e300}, r"key 'x': row 0 holds NaN or Inf as float32"),
}


@pytest.mark.parametrize("form", ["npz", "dict"])
@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line(case: str, form: str, tmp_path: Path) -> None:
    arrays, message = BAD[case]
    source = save(tmp_path / "bad.npz", **arrays) if form == "npz" else arrays
    place = r"'bad\.npz'" if form == "npz" else "'arrays'"
    with pytest.raises(DataError, match=rf"^data {place}.*{message}") as error:
        list(open_dataset(source, IMAGE).batches(3))
    assert "\n" not in str(error.value)


def test_keys_that_are_no_inputs_are_left_unread_and_named() -> None:
    data = open_dataset({"x": ROWS, "token_type_ids": np.zeros(3)}, IMAGE)
    assert data.unused == ["token_type_ids"]
    assert [set(feed) for feed in data.batches(4)] == [{"x"}, {"x"}]


def object_array(path: Path) -> None:
    np.savez(path, x=np.array([None, 1], object))


def fortran(path: Path) -> None:
    np.savez(path, x=np.asfortranarray(ROWS))


def truncated_zip(path: Path) -> None:
    save(path, x=ROWS)
    path.write_bytes(path.read_bytes()[:-40])


def flipped_byte(path: Path) -> None:
    save(path, x=ROWS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def short_member(path: Path) -> None:
    np.save(path.with_suffix(".npy"), ROWS)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", path.with_suffix(".npy").read_bytes()[:-8])
    path.with_suffix(".npy").unlink()


def not_an_array(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.txt", "hello")


def bad_header(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': import ")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (object_array, r"'a\.npz' key 'x': holds Python objects"),
        (fortran, r"'a\.npz' key 'x': is in Fortran order"),
        (truncated_zip, r"'a\.npz': cannot be read"),
        (flipped_byte, r"'a\.npz' key 'x': cannot be read: Bad CRC"),
        (short_member, r"'a\.npz' key 'x': \[7, 3, 4\] float32 takes \d+ bytes, found \d+"),
        (not_an_array, r"'a\.npz' key 'x\.txt': is not a \.npy array"),
        (bad_header, r"'a\.npz' key 'x': cannot be read"),
        (lambda path: path.write_bytes(b""), r"'a\.npz': cannot be read"),
    ],
)
def test_damaged_files_are_one_line(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "a.npz")
    with pytest.raises(DataError, match=f"^data {message}") as error:
        list(open_dataset(tmp_path / "a.npz", IMAGE).batches(3))
    assert "\n" not in str(error.value)


def raises() -> Iterator[Feed]:
    yield {"x": ROWS[:1]}
    raise ValueError("the camera\nis off")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.npz", "'nowhere.npz': no such file or folder"),
        ("nowhere:rows", "'nowhere:rows': raised ModuleNotFoundError: No module named 'nowhere'"),
        ("math:nothing", "'math:nothing': 'math' has no function 'nothing'"),
        (__file__, "expected a .npz or .npy file"),
        (str(Path(__file__).parent), "the folder holds no .npz or .npy file"),
        (({"x": row} for row in ROWS), "a generator can be read only once"),
        (raises, "'raises': raised ValueError: the camera is off"),
        ([ROWS], "feed 0 is a ndarray, not a dict"),
        ([{"x": ROWS}, {"y": ROWS}], "'feeds' feed 1: input 'x' is missing; expected 'x', found 'y'"),
        ([{"x": ROWS[:0]}], "'feeds' feed 0: has no rows"),
        ([], "'feeds': has no rows"),
        (7, "cannot read rows from a int"),
    ],
)
def test_sources_that_are_none(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=f".*{message.replace('.', '[.]')}") as error:
        list(open_dataset(source, IMAGE).batches(2))
    assert "\n" not in str(error.value)


def test_npy_needs_a_single_input(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    with pytest.raises(DataError, match=r"'a\.npy': a \.npy has no keys, and the model 2 inputs"):
        open_dataset(tmp_path / "a.npy", TEXT)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_reading_holds_no_more_than_two_batches(write: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.npz", x=np.zeros((400, 10_000), np.float32))  # 16 MB, rows of 40 kB
    dataset = open_dataset(tmp_path / "a.npz", (InputSpec("x", F32, (None, 10_000)),))
    tracemalloc.start()
    count = sum(len(feed["x"]) for feed in dataset.batches(10))
    dataset.digest()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 400
    assert peak < 3.5e6  # 1 MB of file at a time on its way through zipfile, and the batches


def test_feeds_whose_first_axes_are_not_rows_pass_unchanged() -> None:
    inputs = (InputSpec("x", F32, ("N", 4)), InputSpec("state", F32, (2, "N", 3)))
    feeds = [{"x": np.ones((5, 4), np.float32), "state": np.ones((2, 5, 3), np.float32)}] * 2
    for dataset in (open_dataset(feeds, inputs), generated(inputs, 4)):
        shapes = {feed["state"].shape[0] for feed in dataset.batches(1)}
        assert shapes == {2}
    assert [len(feed["x"]) for feed in open_dataset(feeds, inputs).batches(1)] == [5, 5]


def test_input_specs_leave_initializers_out() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,?,2] x, int64 k, float[2] w) => (float[N,3,?,2] y)'
        "<float[2] w = {1,2}> { y = Add(x, w) }"
    )
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -1  # PaddlePaddle's exporter writes dynamic axes so
    assert input_specs(model) == (InputSpec("x", F32, ("N", None, None, 2)), InputSpec("k", I64, ()))


def test_padding_repeats_the_last_row() -> None:
    np.testing.assert_array_equal(padded({"x": ROWS[:2]}, 4)["x"], ROWS[[0, 1, 1, 1]])
    assert padded({"x": ROWS}, 7)["x"] is ROWS


def test_generated_rows_do_not_depend_on_the_batch() -> None:
    inputs = (*IMAGE, *TEXT, InputSpec("flag", np.dtype(bool), (None, 2)), InputSpec("image", F32, (None, None, None, "w")))
    dataset = generated(inputs, 5, seed=3)
    one, four = joined(dataset, 1), joined(dataset, 4)
    for name, values in one.items():
        np.testing.assert_array_equal(values, four[name])
    assert one["x"].shape == (5, 3, 4)
    assert one["ids"].shape == one["mask"].shape == (5, 8)
    assert one["image"].shape == (5, 3, 64, 64)
    assert set(np.unique(one["ids"])) == {0, 1}
    assert one["flag"].dtype == bool
    assert 0.8 < one["image"].std() < 1.2
    assert dataset.digest() != generated(inputs, 5, seed=4).digest()
    fixed = generated([InputSpec("x", F32, (2, 3))], 3)
    assert [len(feed["x"]) for feed in fixed.batches(1)] == [2, 2]
    assert fixed.rows == 4
    with pytest.raises(DataError, match="cannot generate float32 of any shape"):
        list(generated([InputSpec("x", F32, None)], 1).batches(1))
