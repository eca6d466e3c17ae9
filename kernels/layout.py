"""Argument blocks of the compiled steps: which int64 slot of a step's row holds what.

A step is one row of `ROW` int64 slots in memory; kernels take its address. Addresses are absolute (a row belongs to one bound
instance), offset tables are int32 and relative to the base address beside them. Activations are u8, NHWC, each pixel `pitch` bytes
(1, 4, or a multiple of 16); weights are s8, packed for one instruction set.
"""

from __future__ import annotations

ROW = 32  # int64 slots of a row
PIXELS = 48  # offset tables are padded to a multiple of this many pixels by repeating the last pixel
SLACK = 4096  # readable and writable bytes kept before and behind every arena: kernels may touch whole vectors

# dense convolution and GEMM: output pixel m, channel n = requantise(comp[n] + sum_k input[in + pixel[m] + k_offset[k]] * w[n, k])
CONV_INPUT = 1  # address that the pixel table is relative to
CONV_PIXELS = 2  # int32 [M padded to PIXELS]: offset of each output pixel's first tap
CONV_K = 3  # int32 [groups]: offset of each group of 4 input bytes (AMX: of 64)
CONV_GROUPS = 4  # groups of 4 bytes, even (AMX: groups of 64)
CONV_WEIGHTS = 5  # packed weights, 64-byte aligned
CONV_PANEL = 6  # bytes of one panel of 16 output channels
CONV_OUTPUT = 7  # address that the output table is relative to
CONV_OUT_PIXELS = 8  # int32 [M padded]: offset of each output pixel, in bytes
CONV_COMP = 9  # int32 [panels * 16]: bias - zero point * sum of weights (and what the instruction set needs)
CONV_SCALE = 10  # float32 [panels * 16]: (scale x * scale w) / scale y; float output: scale x * scale w
CONV_ZERO = 11  # zero point of the requantised value, before a residual sum
CONV_M = 12  # output pixels
CONV_PANELS = 13  # panels of 16 output channels
CONV_BLOCK = 14  # pixels (multiple of PIXELS) that are run through all panels before the next ones: their input stays in L2
CONV_MODE = 15  # MODE_*
CONV_RESIDUAL = 16  # address that the residual table is relative to (u8)
CONV_RES_PIXELS = 17  # int32 [M padded]
CONV_SUM = 18  # float32 [3]: ra, rb, fx of sum = lrint(fma(r, rb, fma(q, ra, fx))), q clamped to u8 first
CONV_LOW = 19  # u8 clamp of the final value
CONV_HIGH = 20
CONV_BIAS = 21  # float32 [panels * 16], added to float output; 0 where there is none
CONV_CHANNELS = 22  # real output channels (float output writes no more than these)
CONV_ROW_PITCH = 23  # AMX: bytes between the input pixels of one tile row
CONV_TILES = 24  # AMX: int32 [pairs * 2]: base offset of each tile of 16 pixels
CONV_SCRATCH = 25  # AMX: 64-byte aligned scratch of the executing thread: 3 * 4096 bytes
CONV_FIRSTS = 26  # windows: int32 [panels * 3 + 1], the first group of each section; CONV_K is int32 [groups][2]: offset, indices
CONV_QUADS = 27  # windows: 1 where these panels are of 4 channels, four times CONV_PANELS, with weights s8 [groups][4][4]

MODE_U8 = 0  # u8 output
MODE_SUM = 1  # u8 output after a residual sum
MODE_F32 = 2  # float32 output: float(acc) * scale + bias

# depthwise convolution, 3x3 or 5x5, stride 1 or 2, whole rows of OW * C bytes; input, output pitch == C == multiple of 16
DW_INPUT = 1  # address of the first tap of output pixel (0, 0)
DW_ROW = 2  # bytes of an input row
DW_C = 3  # channels (the pitch of both tensors)
DW_WEIGHTS = 4
DW_OUTPUT = 5
DW_OUT_ROW = 6
DW_OH = 7
DW_OW = 8
DW_COMP = 9
DW_SCALE = 10
DW_ZERO = 11
DW_KERNEL = 12  # 3 or 5
DW_STRIDE = 13  # 1 or 2, of rows
DW_LOW = 14
DW_HIGH = 15
DW_ACROSS = 16  # stride of columns: 1, or as that of rows
