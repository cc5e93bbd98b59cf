"""What the Hopper kernels share: rings of buffers, and the warp that tells all others which row of tiles comes next.

Ticket, order, row and its ranges each say where the next of these numbers lies. A warp of its own follows them while others load and
compute: the loading warp, when it did so itself, came late with the first tiles of each row.

What threads have read of shared memory must be in their registers before a group says that its place is free. The barrier of a group
waits for no load, and while products keep shared memory busy one can take longer than the next tile takes to arrive (that was seen:
single rows of delta made of the tile that came next). So a group frees a place when something, a branch or a product, needed all that
it read there; what may still be under way then (labels that nothing branches on before, what the mask reads in the forward) has a place
for each of two passes of the ring.
"""

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
def _place(item, tiles, heads, IN_TURN: gl.constexpr):
    """The head, of all batches, and the rank of its row: some heads take turns. So long rows come first and short ones last, and
    rows that read the same tiles still run together."""
    first = item // (tiles * IN_TURN) * IN_TURN
    turns = gl.minimum(heads - first, IN_TURN)
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
    ranges = partials, full_at, full_first, full_last, partial_at, partial_first, partial_last
    return (b, h, row_tile, fulls + partials{origin_names}) + ranges


@gluon.jit
def _post(row, message, COUNT: gl.constexpr):
    """Write the numbers of a row where the groups read them."""
    WORDS: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    places = gl.arange(0, message.shape[0], WORDS)
    words = gl.full([message.shape[0]], row[0], gl.int32, WORDS)
    for i in gl.static_range(1, COUNT):
        words = gl.where(places == i, row[i], words)
    message.store(words)


@gluon.jit
def _label(tile, masked, needed, after, label):
    """Write what groups know of a tile: its number, whether it is masked, which groups need it, a bit each, and the kind of the tile
    after it in the row: 0 none, 1 masked, 2 full. There are fewer than 2^26 tiles."""
    packed = (tile << 5) + (masked.to(gl.int32) << 4) + (needed << 2) + after
    label.store(gl.full([1], packed, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def _word(words, places, i: gl.constexpr):
    return gl.sum(gl.where(places == i, words, 0), 0)


@gluon.jit
def _heard(words):
    """The words of a message, read once. LLVM reads a word of a vector anew where it is used, and the message may be free by then."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _is_row(words, places, COUNT: gl.constexpr):
    """False for what comes behind the last row: all words are -1. A branch on it needs all words that are read of a message, so behind
    that branch the message is free."""
    all_of_them = _word(words, places, 0)
    for i in gl.static_range(1, COUNT):
        all_of_them &= _word(words, places, i)
    return all_of_them >= 0
'''

# How a warp or a group hears of its first row, and of each that follows.
FIRST_WORDS = """
EVERYWHERE: gl.constexpr = gl.BlockedLayout([{message}], [32], [4], [0])  # each thread holds all words
places = gl.arange(0, {message}, EVERYWHERE)
mbarrier.wait(row_ready.index(0), 0)
words = _heard(words_of.index(0).load(EVERYWHERE))
"""

NEXT_WORDS = """
mbarrier.wait(row_ready.index(turn % {messages}), turn // {messages} % 2)
words = _heard(words_of.index(turn % {messages}).load(EVERYWHERE))
"""

READ_ROW = """
b = _word(words, places, 0)
h = _word(words, places, 1)
{row_tile} = _word(words, places, 2)
ranges = _word(words, places, 3)
{origin_words}
"""

READ_RANGES = """
partials = _word(words, places, {ranges_at})
full_at = _word(words, places, {ranges_at} + 1)
full_first = _word(words, places, {ranges_at} + 2)
full_last = _word(words, places, {ranges_at} + 3)
partial_at = _word(words, places, {ranges_at} + 4)
partial_first = _word(words, places, {ranges_at} + 5)
partial_last = _word(words, places, {ranges_at} + 6)
"""

ROW_HEARD = "mbarrier.arrive(row_free.index(turn % {messages}))"

TELLS = '''
@gluon.jit
def _tells_{side}(messages, tables, items, sizes):
    """Which row comes next, and then that there is none. What `members` heads sum in one place are rows in turn."""
    words_of, row_ready, row_free = messages
    shares{queue} = items
    {sizes} = sizes
    tiles = {row_tiles}
    last = {rows_to_take}
    item = {first_item}
    turn = 0
    taken = 1
    while item < last:
        {place}
        held_head = head % {held_heads}
        for member in range({members}):
            row = _row(head // {held_heads}, held_head * {members} + member, rank, tiles, H, tables, {at_least_one})
            _post(row, words_of.index(turn % {messages}), {words})
            mbarrier.arrive(row_ready.index(turn % {messages}))
            turn += 1
            mbarrier.wait(row_free.index(turn % {messages}), (turn // {messages} + 1) % 2)
        {next_item}
        taken += 1
    _post({no_more}, words_of.index(turn % {messages}), {words})
    mbarrier.arrive(row_ready.index(turn % {messages}))
'''

NEXT_SHARE = "item = gl.load(shares + taken * gl.num_programs(0))"

# Rows differ in length: programs take tickets, and late, for who has a ticket early takes that row from one that is done before. So
# there is one message, and the loading warp frees it when its row ends soon.
NEXT_TICKET = "item = gl.atomic_add(shares, 1) + gl.num_programs(0)"

ENDS_SOON = """
if (r == ranges - 1) & (tile == gl.maximum(first_tile, last_tile - 2)):
    {row_heard}
"""

HAS_NO_TILE = """
if ranges == 0:
    {row_heard}
"""

# A group learns of a tile from its label. It does not follow the plan itself: while it waited for a number of that it would multiply
# nothing.
READ_LABEL = """
about = gl.sum(labels.index({label_at}).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
tile = about >> 5
masked = (about & 16) > 0
needed = (about >> 2) & 3
after = about & 3
"""

WHERE_MASKED = """
if masked:
    {masked}
else:
    {kept}
"""

# All tiles of a row: those at an edge of the mask or of the tensors, `masked`, then those whose every pair is kept.
EVERY_TILE = """
for r in range(ranges):
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

# The kind of the next tile; no range of a plan is empty.
AFTER = """
after = gl.where(r + 1 < partials, 1, gl.where(r + 1 < ranges, 2, 0))
after = gl.where(tile + 1 < last_tile, gl.where(masked, 1, 2), after)
"""

# What the mask reads of each token that moves comes with its tile; past the end it is 0.
BRING = """
async_copy.async_copy_global_to_shared(brought_ring.index({place}), {pointer}, mask={axis} < {end})
"""

# How the threads of the loading warp share the tokens of such a copy.
COPIED_POSITIONS = """
SHARED: gl.constexpr = gl.BlockedLayout([{tokens} // 32], [32], [1], [0])
{positions}
"""

COPIED = "async_copy.mbarrier_arrive({ready}.index(slot), increment_count=False)"

BRING_RING = "brought_ring = gl.allocate_shared_memory(gl.int32, [{places}, {tokens}], gl.SwizzledSharedLayout(1, 1, 1, [0]))"

IMPORTS = """from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
"""
