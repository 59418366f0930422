"""Sizes and counts that both sides keep to."""

PROTOCOL = 1
"""This release's revision of the protocol."""

OLDEST_PROTOCOL = 1
"""The oldest revision that this release serves."""

MESSAGE_BYTES = 4 * 1024 * 1024
"""gRPC's own limit on a message, which farstep keeps."""

CHUNK_BYTES = 1024 * 1024 - 4096
"""Payload of one frame at most. The whole frame, with the header that gRPC and protobuf add, stays within 1 MiB.

Measured for 102 MB there and back: frames of 2 MiB are no faster, and cost both sides some 15 MiB more of buffers.
"""

INLINE_TENSOR_BYTES = 64 * 1024
"""A tensor among hyperparameters may be no larger than this."""

HEADER_BYTES = 1024 * 1024
"""The part of a frame that is not payload may be no larger than this."""

NAME_BYTES = 255
"""A hosted optimizer's name, in UTF-8."""

WORKER_BYTES = 64
"""A worker's id, in UTF-8."""

LAYOUT_BYTES = 256 * 1024 * 1024
"""A serialized layout."""

MAX_PARAMETERS = 1_000_000
"""Parameters of one hosted optimizer."""

MAX_DIMENSIONS = 64
"""Dimensions of one tensor, which is also torch's own limit."""

VALUE_DEPTH = 32
"""Nesting of a value."""

LOAD_BYTES = 16 * 1024**3
"""A client may ask LinkService for no more at a time."""
