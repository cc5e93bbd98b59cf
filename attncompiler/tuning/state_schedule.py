"""How the kernels of a recurrence are cut up: chunks, slices of channels, segments of the sequence."""

from __future__ import annotations

from dataclasses import dataclass

from attncompiler.tuning.target import Target

SEGMENT_STEPS = 128  # a segment is made of whole chunks of every kernel
_SHORT = 512  # a sequence up to this many steps is one segment


@dataclass(frozen=True, slots=True)
class ChunkSchedule:
    """One kernel: BLOCK_N steps at a time, BLOCK_Z channels of z a program."""

    block_n: int
    block_z: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class StateSchedule:
    """`states` makes the state of a segment, `walk` its results; `float32` is how products of float32 keep their precision."""

    states: ChunkSchedule
    walk: ChunkSchedule
    float32: str


def padded(channels: int) -> int:
    """A tile's size for a number of channels."""
    return max(16, 1 << (channels - 1).bit_length())


def choose_state_schedule(channels: int, element: int, target: Target) -> StateSchedule:
    """For states of up to `channels` features and channels, and operands of `element` bytes.

    The state stays in registers, features times BLOCK_Z of them: 64 channels of 128 features are 64 registers in each of 128 threads, which
    leaves room for the scores and results of 64 steps, and for a second program on the multiprocessor, whose products run while the
    first one waits for its loads."""
    width = padded(channels)
    S = ChunkSchedule
    if element == 4:
        one = S(32, 32 if width <= 128 else 16, 4, 1)
        return StateSchedule(one, one, target.float32)
    if width <= 64:
        return StateSchedule(S(64, 64, 4, 3), S(64, 64, 4, 3), target.float32)
    if width <= 128:
        return StateSchedule(S(64, 128, 8, 3), S(64, 64, 4, 2), target.float32)
    return StateSchedule(S(64, 64, 8, 2), S(64, 64, 8, 1), target.float32)


def segment_length(n: int, heads: int, slices: int, target: Target) -> int:
    """Steps of a segment, so that `heads` (over all batches) times segments times slices are two programs a multiprocessor."""
    wanted = max(2 * target.multiprocessors // max(heads * slices, 1), 1)
    if n <= _SHORT:
        wanted = 1
    steps = -(-n // wanted)
    return max(-(-steps // SEGMENT_STEPS), 1) * SEGMENT_STEPS
