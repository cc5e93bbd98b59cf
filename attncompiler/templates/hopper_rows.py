"""What the Hopper kernels share: rings of buffers, and how the loading warp tells the groups which row of tiles comes next."""

HELPERS = '''
@gluon.jit
def _next_slot(slot, phase, STAGES: gl.constexpr):
    """The next place of a ring, and the parity that its barriers then have."""
    wraps = slot + 1 == STAGES
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _place(item, tiles, heads):
    """The head, of all batches, and the rank of its row: eight heads take turns. So long rows come first and short ones last, and
    rows that read the same tiles still run together."""
    first = item // (tiles * 8) * 8
    turns = gl.minimum(heads - first, 8)
    return first + (item - first * tiles) % turns, (item - first * tiles) // turns


@gluon.jit
def _row(b, h, rank, tiles, H, tables, AT_LEAST_ONE: gl.constexpr):
    """One row of tiles: where it lies, and the first range of either kind of tile; all is read at once. A row that has no tile may
    have to visit one, of which it keeps nothing."""
    order, full_count, full_begin, full_end, full_ranges = tables[:5]
    partial_count, partial_begin, partial_end, partial_ranges{Origins} = tables[5:]
    plan_row = {plan_row}
    full_at = plan_row * full_ranges
    partial_at = plan_row * partial_ranges
    row_tile = gl.load(order + rank)
    fulls = gl.load(full_count + plan_row)
    partials = gl.load(partial_count + plan_row)
    full_first = gl.load(full_begin + full_at)
    full_last = gl.load(full_end + full_at)
    partial_first = gl.load(partial_begin + partial_at)
    partial_last = gl.load(partial_end + partial_at)
    if AT_LEAST_ONE:
        empty = fulls + partials == 0
        partials = gl.where(empty, 1, partials)
        partial_first = gl.where(empty, 0, partial_first)
        partial_last = gl.where(empty, 1, partial_last)
    {origins}
    return b, h, row_tile, fulls, full_at, full_first, full_last, partials, partial_at, partial_first, partial_last{origin_names}


@gluon.jit
def _post(row, message):
    """Write the numbers of a row where the groups read them."""
    WORDS: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    places = gl.arange(0, 16, WORDS)
    words = gl.full([16], row[0], gl.int32, WORDS)
    for i in gl.static_range(1, {words}):
        words = gl.where(places == i, row[i], words)
    message.store(words)


@gluon.jit
def _word(words, places, i: gl.constexpr):
    return gl.sum(gl.where(places == i, words, 0), 0)
'''

# How a group hears of its first row, and of each that follows; a negative batch ends them.
FIRST_WORDS = """
EVERYWHERE: gl.constexpr = gl.BlockedLayout([16], [32], [4], [0])  # each thread holds all words
places = gl.arange(0, 16, EVERYWHERE)
mbarrier.wait(row_ready.index(0), 0)
words = words_of.index(0).load(EVERYWHERE)
"""

NEXT_WORDS = """
mbarrier.wait(row_ready.index(turn % 2), turn // 2 % 2)
words = words_of.index(turn % 2).load(EVERYWHERE)
"""

# The numbers of a row, as the groups read them from a message; what it lay in may then be written again.
READ_ROW = """
b = _word(words, places, 0)
h = _word(words, places, 1)
{row_tile} = _word(words, places, 2)
fulls = _word(words, places, 3)
full_at = _word(words, places, 4)
full_first = _word(words, places, 5)
full_last = _word(words, places, 6)
partials = _word(words, places, 7)
partial_at = _word(words, places, 8)
partial_first = _word(words, places, 9)
partial_last = _word(words, places, 10)
{origin_words}
mbarrier.arrive(row_free.index(turn % 2))
"""

# All tiles of a row: those at an edge of the mask or of the tensors, `masked`, then those whose every pair is kept.
EVERY_TILE = """
for r in range(partials + fulls):
    masked = r < partials
    first_tile = gl.where(masked, partial_first, full_first)
    last_tile = gl.where(masked, partial_last, full_last)
    if masked & (r > 0):
        first_tile = gl.load(PartialBegin + partial_at + r)
        last_tile = gl.load(PartialEnd + partial_at + r)
    if r > partials:
        first_tile = gl.load(FullBegin + full_at + r - partials)
        last_tile = gl.load(FullEnd + full_at + r - partials)
    for tile in range(first_tile, last_tile):
        {tile}
"""

IMPORTS = """from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
"""
