"""Memory of the sparse engine: which int64 slot of its records holds what. The first slots are as in `engine_state`."""

from __future__ import annotations

# a handle: checked weights, arranged for this CPU. Slots 0, 3, 10, 11, 12 are engine_state's
H_PLAN = 1  # int64 [sparse_plan.PLAN]
H_STARTS = 4  # int32 [block rows * chunks + 1]
H_COLUMNS = 5  # int32 [count]: the column of each block of weights
H_VALUES = 6  # float32 [count][H_ROWS]
H_BIAS = 7  # float32 [outputs]
H_LIMITS = 8  # float32 low, high
H_COUNT = 9
H_ROWS = 13  # rows of a block as the kernels see it: 1 or 4
H_LANES = 14
H_CHUNKS = 15  # parts of the columns, each of few enough for their pixels to stay in the first-level cache
H_CHUNK = 16  # columns of a chunk
H_ZEROS = 17  # float32 [outputs]: the bias of all chunks but the first
H_OPEN = 18  # float32 [2]: the limits of all chunks but the last
H_SCALES = 19  # float32 [outputs]: what values of a bitmap are multiplied with
H_MASKS = 20  # bitmap: uint8 [outputs][H_GROUPS], then H_STARTS is int32 [outputs] and H_VALUES float32 or int8 [H_COUNT]
H_GROUPS = 21
H_TABLE = 22  # uint8 [256][8], and 8 more
H_SIZE = 24

# an instance: a handle bound to input shapes. Slots 0, 1, 2, 6, 7 are engine_state's
(I_MODE, I_IMAGES, I_TILES, I_TILE_COUNT, I_OFFSETS, I_DX, I_DY, I_SCRATCH, I_PITCH, I_H, I_W, I_OH, I_OW, I_PH, I_PW, I_PARTS,
 I_FLAGS, I_SLOT, I_LINES, I_COPIES, I_CHANNEL, I_DEPTHWISE, I_OVERLAP) = range(16, 39)  # fmt: skip
I_SIZE = 40

# how an instance reads its input
DIRECT = 0  # as it comes: pixels of a channel side by side
PADDED = 1  # copied into planes with their padding, one for each phase of the strides
FLAT = 2  # the same, all lines of an output channel as one: images narrower than a vector
TRANSPOSED = 3  # rows of features: tiles of rows are transposed
SINGLE = 4  # a few rows of features, one by one
BITMAP = 5  # rows of features, up to four at a time

TILE = 4  # int64 of a tile: bytes from the input's and from the output's begin, vectors, bytes to the last of them or -1
MAX_PARTS = 16
CHUNK = {1: 112, 4: 256}  # most columns of a chunk, by rows of a block
PART_WORK = 150_000  # multiplications that are worth a thread's while

# what a part of the work is given
(U_INSTANCE, U_INPUT, U_OUTPUT, U_RESIDUAL, U_PARTS, U_SOURCE) = range(6)
USER = 16
