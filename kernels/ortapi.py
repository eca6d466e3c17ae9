"""Where onnxruntime's C interface keeps its functions.

`OrtApi` is a table of function pointers to which releases only append: a slot of a *released* header never moves. The numbers were
taken from the headers of 1.17 and later (`offsetof(OrtApi, Name) / 8`).
"""

from __future__ import annotations

API_VERSION = 17  # of OrtCustomOp's layout below, and the oldest onnxruntime that has all of these slots but the last
ELEMENT_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7}  # ONNX's tensor element types

# byte offsets into OrtApi
CREATE_STATUS = 8 * 0
CREATE_CUSTOM_OP_DOMAIN = 8 * 26
CUSTOM_OP_DOMAIN_ADD = 8 * 27
ADD_CUSTOM_OP_DOMAIN = 8 * 28
GET_TENSOR_MUTABLE_DATA = 8 * 51
GET_TENSOR_ELEMENT_TYPE = 8 * 60
GET_DIMENSIONS_COUNT = 8 * 61
GET_DIMENSIONS = 8 * 62
GET_TENSOR_TYPE_AND_SHAPE = 8 * 65
KERNEL_INFO_GET_ATTRIBUTE_INT64 = 8 * 86
KERNEL_CONTEXT_GET_INPUT = 8 * 90
KERNEL_CONTEXT_GET_OUTPUT = 8 * 91
RELEASE_STATUS = 8 * 93
RELEASE_TENSOR_TYPE_AND_SHAPE = 8 * 99
GET_ATTRIBUTE_FLOATS = 8 * 162
GET_ATTRIBUTE_INTS = 8 * 163
KERNEL_INFO_GET_INPUT_COUNT = 8 * 230
KERNEL_INFO_GET_OUTPUT_COUNT = 8 * 231
KERNEL_INFO_GET_NODE_NAME = 8 * 244
KERNEL_INFO_GET_CONSTANT_INPUT = 8 * 249
KERNEL_CONTEXT_PARALLEL_FOR = 8 * 274
GET_TYPE_AND_SHAPE_REFERENCE = 8 * 414  # since 1.24: shape and type of a tensor without an allocation
REFERENCE_SINCE = 24

FAIL = 1  # OrtErrorCode
INVALID_ARGUMENT = 2

# int64 words of OrtCustomOp, version 17
OP_VERSION = 0
OP_GET_NAME = 2
OP_GET_PROVIDER = 3
OP_INPUT_TYPE = 4
OP_INPUT_COUNT = 5
OP_OUTPUT_TYPE = 6
OP_OUTPUT_COUNT = 7
OP_DESTROY = 9
OP_INPUT_KIND = 10
OP_OUTPUT_KIND = 11
OP_MEMORY_TYPE = 12
OP_MIN_INPUTS = 13
OP_SAME_INPUTS = 14
OP_MIN_OUTPUTS = 15
OP_SAME_OUTPUTS = 16
OP_CREATE = 17
OP_COMPUTE = 18
OP_SIZE = 26  # the words after it are ours, as the members of a derived class are

# a tensor as the engine sees it: int64 [RECORD]
RECORD = 12
RECORD_DATA = 0  # byte offsets
RECORD_NDIM = 8
RECORD_TYPE = 16
RECORD_DIMS = 24
MAX_DIMS = 8
