"""The backward kernels of the softmax family for Hopper, in Gluon: one warp tells rows, one loads, two groups of four warps
compute, one warp sends.

A row is a tile of 128 tokens of one side, 64 for each group, which stays while tiles of 64 tokens of the other side stream past it
through a ring. In the kernel for the gradients of keys, whose groups have no register to spare, K and V stay in shared memory (`held`),
in two places, so that the next row's loads run under the end of the last; gradients go out through the place of what was held. In the
one for those of queries Q and dO stay in registers, so products read one operand less from shared memory and the ring is twice as
long: they come through it before a row's first tile, and so does O, of which delta is made and left to the other kernel.
A warp of its own waits until gradients have left, for a group that waits multiplies nothing.
With each tile the loading warp leaves its number and which group needs it: groups neither follow the plan nor look at bounds.
Scores have the held side on rows: weights and their gradients then go from the registers of one product into the next, and no tile
is transposed. One loop serves masked tiles and others: of two loops that share what is held, ptxas (of CUDA 12.8) computes the
address in the first alone, also where that is skipped. The mathematics is that of softmax_backward.py.
"""

LOADS = '''
@gluon.jit
def _load_{side}({streamed}, stream, at, operands, slot, phase):
    """One tile of the side that streams."""
    b, h, {row_tile}, tile, masked, after{origin_names} = at
    first_ring, second_ring, labels, ready, free, statistics_ring, brought_ring = stream
    ({operands}) = operands
    {moving_positions}
    {find_needed}
    mbarrier.wait(free.index(slot), phase ^ 1)
    mbarrier.expect(ready.index(slot), {streamed_bytes})
    tma.async_copy_global_to_shared({first_streamed}, [{first_streamed_at}, 0], ready.index(slot), first_ring.index(slot))
    tma.async_copy_global_to_shared({second_streamed}, [{second_streamed_at}, 0], ready.index(slot), second_ring.index(slot))
    _label(tile, masked, needed, after, labels.index({label_at}))
    {copies}
    mbarrier.arrive(ready.index(slot))
    return _next_slot(slot, phase, {stages})


@gluon.jit
def _loads_{side}({held}, {streamed}{outputs}, held, stream, messages, tables, operands):
    {held_names} = held
    first_ring, second_ring, labels, ready, free, statistics_ring, brought_ring = stream
    words_of, row_ready, row_free = messages
    ({operands}) = operands
    FullBegin, FullEnd, PartialBegin, PartialEnd = tables[2], tables[3], tables[6], tables[7]
    slot = 0
    phase = 0  # a fresh barrier counts as having completed phase 1: the first waits for free places fall through
    turn = 0
    place = 0
    {first_words}
    while _is_row(words, places, {words}):
        {read_row}
        {read_ranges}
        if h % {members} == 0:
            {row_corner}
            {load_held}
            place += 1
        {has_no_tile}
        {every_tile}
        turn += 1
        {next_words}
'''

LOAD_TILE = """
{ends_soon}
{after}
slot, phase = _load_{side}({streamed}, stream, (b, h, {row_tile}, tile, masked, after{origin_names}), operands, slot, phase)
"""

# Which of the groups need a tile, a bit each; where the mask can say so, one leaves out what only the other's rows need.
FIND_NEEDED = """
needed = gl.to_tensor(3)
if masked:
    {row_corner}
    needed = gl.to_tensor(0)
    for part in gl.static_range(2):
        {bounds}
        needed |= ({may}).to(gl.int32) << part
"""

LOAD_HELD = """
mbarrier.wait(held_free.index(place % 2), (place // 2 + 1) % 2)
for part in gl.static_range(2):
    at = place % 2 * 2 + part
    loaded = held_ready.index(at)
    mbarrier.expect(loaded, {held_bytes})
    tma.async_copy_global_to_shared({first_held}, [{first_held_at}, 0], loaded, first_held.index(at))
    tma.async_copy_global_to_shared({second_held}, [{second_held_at}, 0], loaded, second_held.index(at))
"""

# What stays in registers comes through the ring: half in the place of either side.
LOAD_THROUGH_RING = """
mbarrier.wait(free.index(slot), phase ^ 1)
mbarrier.expect(ready.index(slot), 2 * {tensor}.block_type.nbytes)
first_half = first_ring.index(slot)._reinterpret({dtype}, [{held_box}], {tensor}.layout)
tma.async_copy_global_to_shared({tensor}, [{first_half_at}, 0], ready.index(slot), first_half)
second_half = second_ring.index(slot)._reinterpret({dtype}, [{held_box}], {tensor}.layout)
tma.async_copy_global_to_shared({tensor}, [{second_half_at}, 0], ready.index(slot), second_half)
{copied}
mbarrier.arrive(ready.index(slot))
slot, phase = _next_slot(slot, phase, {stages})
"""

# Half of each is a group's own. Delta goes through shared memory to the threads that need it, so then all hold what they read.
TAKE_FROM_RING = """
BY_ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // {d}, {d} // 8], [4, 1], [1, 0])
HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([{held_box}], {dtype})
if PART == 0:
    halves = first_ring._reinterpret({dtype}, [{stages}, {held_box}], HALF)
else:
    halves = second_ring._reinterpret({dtype}, [{stages}, {held_box}], HALF)
first_slot = slot
mbarrier.wait(ready.index(slot), phase)
first = halves.index(slot).reshape([64, {d}]).load(gl.DotOperandLayout(0, SCORES, 2))
slot, phase = _next_slot(slot, phase, {stages})
second_slot = slot
mbarrier.wait(ready.index(slot), phase)
second = halves.index(slot).reshape([64, {d}]).load(gl.DotOperandLayout(0, SCORES, 2))
second_rows = halves.index(slot).reshape([64, {d}]).load(BY_ROWS)
slot, phase = _next_slot(slot, phase, {stages})
mbarrier.wait(ready.index(slot), phase)
delta = gl.sum(halves.index(slot).reshape([64, {d}]).load(BY_ROWS).to(gl.float32) * second_rows.to(gl.float32), 1)
delta = gl.convert_layout(delta, gl.SliceLayout(1, SCORES))
fence_async_shared()
mbarrier.arrive(free.index(first_slot))
mbarrier.arrive(free.index(second_slot))
mbarrier.arrive(free.index(slot))
slot, phase = _next_slot(slot, phase, {stages})
{store_delta}
"""

# What the kernel for keys needs to know of each query comes beside the query's tile.
STATISTICS_AT = "rows = (b.to(gl.int64) * H + h) * M + q_idx"

# Copies that nothing waits for.
COPY_STATISTICS = """
async_copy.async_copy_global_to_shared(statistics_ring.index(slot * 2), Reference + rows)
async_copy.async_copy_global_to_shared(statistics_ring.index(slot * 2 + 1), Delta + rows)
"""

# A place that is no query's has an infinite reference, and so no weight.
COPY_STATISTICS_AT_EDGES = """
if {all_inside}:
    {copy}
else:
    statistics_ring.index(slot * 2).store(gl.load(Reference + rows, mask=q_idx < M, other=float("inf")))
    statistics_ring.index(slot * 2 + 1).store(gl.load(Delta + rows, mask=q_idx < M, other=0.0))
"""

ROWS = """
@gluon.jit
def _rows_{side}(held, stream, written, messages, operands, PART: gl.constexpr):
    {held_names} = held
    first_ring, second_ring, labels, ready, free, statistics_ring, brought_ring = stream
    words_of, row_ready, row_free = messages
    ({operands}) = operands
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {streamed_rows}, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {d}, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    within = gl.arange(0, {streamed_rows}, gl.SliceLayout(0, SCORES))
    nothing = gl.zeros([64, {streamed_rows}], gl.float32, SCORES)
    no_sums = gl.zeros([64, {d}], gl.float32, SUMS)
    {no_sums}
    slot = 0
    phase = 0
    turn = 0
    place = 0
    {first_words}
    while _is_row(words, places, {row_words}):
        {row_heard}
        {read_row}
        {row_positions}
        at = place % {places} * 2 + PART
        {start}
        {before}
        after = ranges
        while after > 0:
            {tile}
        {settle}
        {finish}
        turn += 1
        {next_words}
"""

# The gradients of each row go out when a group has left them in shared memory; then the place of what it held is free again.
SENDS = """
@gluon.jit
def _sends_{side}({sent}, held, written, messages, H):
    {held_names} = held
    words_of, row_ready, row_free = messages
    turn = 0
    place = 0
    {first_words}
    while _is_row(words, places, 3):
        b = _word(words, places, 0)
        h = _word(words, places, 1)
        {row_tile} = _word(words, places, 2)
        {row_heard}
        {send_row}
        turn += 1
        {next_words}
"""

SEND_ROW = """
{row_corner}
for part in gl.static_range(2):
    at = place % {places} * 2 + part
    mbarrier.wait(written.index(at), place // {places} % 2)
    {send}
tma.store_wait(0)
mbarrier.arrive(held_free.index(place % {places}))
place += 1
"""

# Of several heads the last leaves what they have summed.
SEND_LAST = """
if h % {members} == {members} - 1:
    {send_row}
"""

TILE = """
mbarrier.wait(ready.index(slot), phase)
{read_label}
{products}
{free}
slot, phase = _next_slot(slot, phase, {stages})
"""

FREE = "mbarrier.arrive(free.index(slot))"

# Without a last product nothing has needed the statistics yet.
FREE_WHEN_READ = "fence_async_shared()\nmbarrier.arrive(free.index(slot))"

PRODUCTS = """
{moving_positions}
{reads}
{left} = first_ring.index(slot).reshape([{streamed_rows}, {d}])
{right} = second_ring.index(slot).reshape([{streamed_rows}, {d}])
qk = warpgroup_mma(first, {left}.permute((1, 0)), nothing, use_acc=False, is_async=True)
dp = warpgroup_mma(second, {right}.permute((1, 0)), nothing, use_acc=False, is_async=True)
{carried}
{streamed_reference}
qk = warpgroup_mma_wait({behind_scores}, (qk,))
{weights}
{values}
dp = warpgroup_mma_wait({behind_slopes}, (dp,))
{streamed_delta}
ds = p * (dp - delta{along})
{gradients}
"""

WHERE_NEEDED = """
if ((needed >> PART) & 1) > 0:
    {products}
{otherwise}
"""

# The gradient of queries runs a tile behind: what the tile `before` adds is multiplied after the first products of the next one, so a
# group does not wait for it, and the keys of that tile keep their place so long. A row's first tile adds what is carried then: nothing.
NOTHING_CARRIED = """
carried = nothing
before = gl.to_tensor(-1)
"""

CARRIED = """
keys_before = first_ring.index(gl.where(before < 0, slot, before)).reshape([{streamed_rows}, {d}])
moved = warpgroup_mma(gl.convert_layout(carried.to({dtype}), WEIGHTS), keys_before, {sum}, is_async=True)
"""

CARRY = """
{sum}, carried = warpgroup_mma_wait(0, (moved, slopes_of_queries))
mbarrier.arrive(free.index(gl.maximum(before, 0)), pred=before >= 0)
before = slot
"""

ADD_CARRIED = """
slopes = gl.convert_layout(carried.to({dtype}), WEIGHTS)
{sum} = warpgroup_mma(slopes, first_ring.index(before).reshape([{streamed_rows}, {d}]), {sum}, is_async=True)
{sum} = warpgroup_mma_wait(0, ({sum},))
mbarrier.arrive(free.index(before))
"""

SETTLE = """
if before >= 0:
    {add_carried}
"""

# A place must not be kept while so many tiles pass that the next one to wait for comes into it.
PASS_OVER = """
else:
    if before == _next_slot(slot, phase, {stages})[0]:
        {add_carried}
        {nothing_carried}
    mbarrier.arrive(free.index(slot))
"""

WEIGHTS = """
{scores}
p = _exp2(scores{scale} - reference{along})
"""

KERNEL = """
@gluon.jit
def {kernel}({parameters}):
    {held_places}
    first_ring = gl.allocate_shared_memory({dtype}, [{stages}, {streamed_box}], {first_streamed}.layout)
    second_ring = gl.allocate_shared_memory({dtype}, [{stages}, {streamed_box}], {second_streamed}.layout)
    {rings}
    labels = gl.allocate_shared_memory(gl.int32, [{label_places}, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    words = gl.allocate_shared_memory(gl.int32, [{messages}, {message}], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    held_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    row_ready = gl.allocate_shared_memory(gl.int64, [{messages}, 1], mbarrier.MBarrierLayout())
    row_free = gl.allocate_shared_memory(gl.int64, [{messages}, 1], mbarrier.MBarrierLayout())
    written = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [{stages}, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [{stages}, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(written.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(held_free.index(i), count={freeing})
    for i in gl.static_range({messages}):
        mbarrier.init(row_ready.index(i), count=1)
        mbarrier.init(row_free.index(i), count={row_readers})
    for i in gl.static_range({stages}):
        mbarrier.init(ready.index(i), count={ready_count})
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    held = ({held_passed})
    stream = (first_ring, second_ring, labels, ready, free, {rings_passed})
    messages = (words, row_ready, row_free)
    full = (FullCount, FullBegin, FullEnd, Full_ranges)
    tables = (Order,) + full + (PartialCount, PartialBegin, PartialEnd, Partial_ranges{Origins})
    operands = ({operands})
    gl.warp_specialize(
        [
            (_rows_{side}, (held, stream, written, messages, operands, 0)),
            (_rows_{side}, (held, stream, written, messages, operands, 1)),
            (_loads_{side}, ({held}, {streamed}{outputs}, held, stream, messages, tables, operands)),
            (_tells_{side}, (messages, tables, ({shares}{Queue}), {sizes})),
            {sends}
        ],
        [{workers}],
        [{registers}],
    )
"""

# Two places for each group.
HELD_PLACES = """
first_held = gl.allocate_shared_memory({dtype}, [4, {held_box}], {first_held}.layout)
second_held = gl.allocate_shared_memory({dtype}, [4, {held_box}], {second_held}.layout)
held_ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
for i in gl.static_range(4):
    mbarrier.init(held_ready.index(i), count=1)
"""

LEAVING = "leaving_held = gl.allocate_shared_memory({dtype}, [2, {held_box}], {first_held}.layout)"

LEFT = "mbarrier.wait(held_free.index(0), (place + 1) % 2)  # what went out before"

STORE_TILE = """
{place}_held.index(at).reshape([64, {d}]).store(({value}).to({dtype}))
"""

SEND_TILE = """
tma.async_copy_shared_to_global(Grad_{name}, [{at}, 0], {place}_held.index(at))
"""

# Or from registers, in the strides that their tensor has.
STORE = """
at_rows = gl.convert_layout({axis}, gl.SliceLayout(1, SUMS))
grad_rows = Grad_{name} + b.to(gl.int64) * stride_grad_{name}_b + {head}.to(gl.int64) * stride_grad_{name}_h
grad_rows += at_rows.to(gl.int64)[:, None] * stride_grad_{name}_row
grad_at = grad_rows + gl.arange(0, {d}, gl.SliceLayout(0, SUMS))[None, :] * stride_grad_{name}_channel
gl.store(grad_at, ({value}).to(Grad_{name}.dtype.element_ty), mask=at_rows[:, None] < {end})
"""
