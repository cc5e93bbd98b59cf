"""The forward kernel of the softmax family for Hopper, in Gluon: one warp tells rows, one loads, two groups of four warps compute.

The loading warp brings K and V tiles by TMA into two rings, in the order of the plan: partial tiles, then full ones, each with its
label. Each group owns 64 query rows. The scores of a tile and the values of the one before are in flight together, then comes the
softmax: so one group's softmax runs while the other group's products do. Programs go on to another row of query tiles, so that the
loads of the next row run under the end of the last: to the next of its share or, where only the device knows how long rows are, to the
next that no other has taken. Tiles that are boxes of a grid come through descriptors of the grid; the numbers of a row then also say
where the box of its keys begins. Where queries come and outputs go by list, a second warp brings queries (hopper_by_list.py).
"""

LOAD_TILE = """
@gluon.jit
def _load_tile({K}, {V}, rings, barriers, operands, at, slot, phase):
    b, h, tile, masked, after{origin_names} = at
    ({operands}) = operands
    {key_corner}
    {copied_positions}
    k_ring, v_ring, labels, brought_ring = rings
    k_ready, k_free, v_ready, v_free = barriers
    mbarrier.wait(k_free.index(slot), phase ^ 1)
    mbarrier.expect(k_ready.index(slot), {K}.block_type.nbytes)
    tma.async_copy_global_to_shared({K}, [{k_at}, 0], k_ready.index(slot), k_ring.index(slot))
    _label(tile, masked, 3, after, labels.index(slot + phase * {stages}))
    {copies}
    mbarrier.arrive(k_ready.index(slot))
    mbarrier.wait(v_free.index(slot), phase ^ 1)
    mbarrier.expect(v_ready.index(slot), {V}.block_type.nbytes)
    tma.async_copy_global_to_shared({V}, [{v_at}, 0], v_ready.index(slot), v_ring.index(slot))
    return _next_slot(slot, phase, {stages})
"""

# Two tiles wait for one another; the last of a row may be alone, and is loaded twice then: what lies in shared memory is multiplied.
LOAD_PAIR = '''
@gluon.jit
def _load_pair({K}, {V}, rings, barriers, operands, at, waiting, slot, phase):
    b, h, tile, masked, after = at
    ({operands}) = operands
    k_ring, v_ring, labels, brought_ring = rings
    k_ready, k_free, v_ready, v_free = barriers
    kind = masked.to(gl.int32)
    alone = (waiting < 0) & (after == 0)
    is_whole = (waiting >= 0) | alone
    if is_whole:
        first = gl.where(alone, tile, waiting >> 1)
        mbarrier.wait(k_free.index(slot), phase ^ 1)
        mbarrier.expect(k_ready.index(slot), {whole_bytes})
        _load_halves({K}, b, {k_head}, first, tile, k_ready.index(slot), k_ring.index(slot))
        _label(first, alone | ((kind | (waiting & 1)) > 0), 3, after, labels.index((slot + phase * {stages}) * 2))
        _label_second(gl.where(alone, -1, tile), labels.index((slot + phase * {stages}) * 2 + 1))
        mbarrier.arrive(k_ready.index(slot))
        mbarrier.wait(v_free.index(slot), phase ^ 1)
        mbarrier.expect(v_ready.index(slot), {whole_bytes})
        _load_halves({V}, b, {v_head}, first, tile, v_ready.index(slot), v_ring.index(slot))
        slot, phase = _next_slot(slot, phase, {stages})
    return gl.where(is_whole, -1, tile * 2 + kind), slot, phase


@gluon.jit
def _label_second(tile, label):
    """The number of the second tile of a pair, -1 for none."""
    label.store(gl.full([1], tile, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def _load_halves(x, b, head, first, second, ready, place):
    halves = place.slice(0, {half}, 2), place.slice({half}, {half}, 2)
    for channel in gl.static_range(0, {d}, {panel}):
        tma.async_copy_global_to_shared(x, [b, head, first * {half}, channel], ready, halves[0].slice(channel, {panel}, 3))
        tma.async_copy_global_to_shared(x, [b, head, second * {half}, channel], ready, halves[1].slice(channel, {panel}, 3))
'''

# Where the keys of a pair lie. Where there is no second tile its place has the first again, also in what a score reads of keys, and the
# mask leaves it out.
PAIR_POSITIONS = """
second = gl.sum(labels.index({label_at} + 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
kv_start = tile * {half}
second_start = gl.where(second >= 0, second, tile) * {half}
kv_idx = gl.where(keys < {half}, kv_start + keys, second_start + (keys - {half}))
"""

KERNEL = '''
@gluon.jit
def _row_sums(p):
    """What each thread holds of a row; summed across threads only at the end."""
    return gl.sum(p.reshape([64, BLOCK_N // 8, 8]), 1)


{load_tile}


{loads}

{taking_warp}

@gluon.jit
def _rows(O, Lse, queries, rings, barriers, messages, operands{by_list}, GROUP: gl.constexpr):
    q_buffers, q_ready, q_free = queries
    words_of, row_ready, row_free = messages
    ({operands}) = operands
    k_ring, v_ring, labels, brought_ring = rings
    k_ready, k_free, v_ready, v_free = barriers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {d}, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    keys = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    nothing = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    k_slot = 0
    k_phase = 0
    v_slot = 0
    v_phase = 0
    turn = 0
    {first_words}
    while _is_row(words, places, {row_words}):
        {row_heard}
        {read_row}
        {query_positions}
        q_at = turn % 2 * 2 + GROUP
        q_buffer = q_buffers.index(q_at)
        m_i = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, SCORES))  # finite: a row without keys yet makes no NaN
        acc = gl.zeros([64, {d}], gl.float32, OUTPUT)
        {before}
        mbarrier.wait(q_ready.index(q_at), turn // 2 % 2)
        {after_queries}
        q = q_buffer.reshape([64, {d}]){of_queries}
        # the first tile has no values before it; it is masked whether or not it must be
        mbarrier.wait(k_ready.index(k_slot), k_phase)
        qk = warpgroup_mma(q, k_ring.index(k_slot).reshape([BLOCK_N, {d}]).permute((1, 0)), nothing, use_acc=False, is_async=True)
        {read_label}
        {key_positions}
        {reads}
        tma.store_wait(0)  # of the row before, which went out through the other buffer
        mbarrier.arrive(q_free.index((turn + 1) % 2 * 2 + GROUP), pred=turn > 0)
        qk = warpgroup_mma_wait(0, (qk,))
        mbarrier.arrive(k_free.index(k_slot))
        {masked_scores}
        k_slot, k_phase = _next_slot(k_slot, k_phase, {stages})
        m_i = gl.maximum(m_i, gl.max(scores, 1){scale})
        p = _exp2(scores{scale} - m_i[:, None])
        l_i = _row_sums(p)
        weights = gl.convert_layout(p.to({dtype}), WEIGHTS)
        {every_tile}
        mbarrier.wait(v_ready.index(v_slot), v_phase)
        acc = warpgroup_mma(weights, v_ring.index(v_slot).reshape([BLOCK_N, {d}]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(v_free.index(v_slot))
        v_slot, v_phase = _next_slot(v_slot, v_phase, {stages})
        l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, SCORES))
        {extra_scores}
        rcp = 1.0 / {denominator}
        out = acc * gl.expand_dims(gl.convert_layout(rcp, gl.SliceLayout(1, OUTPUT)), 1)
        lse = (m_i + gl.log2(l_i)) * {ln2}
        {store}
        turn += 1
        {next_words}
    tma.store_wait(0)


@gluon.jit
def attention_forward({parameters}):
    q_buffers = gl.allocate_shared_memory({dtype}, [4, {q_box}], {K}.layout)  # two for each group
    k_ring = gl.allocate_shared_memory({dtype}, [{stages}, {k_box}], {K}.layout)
    v_ring = gl.allocate_shared_memory({dtype}, [{stages}, {k_box}], {V}.layout)
    {brought_ring}
    labels = gl.allocate_shared_memory(gl.int32, [{label_words} * {stages}, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    {list_buffers}
    words = gl.allocate_shared_memory(gl.int32, [{messages}, {message}], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    row_ready = gl.allocate_shared_memory(gl.int64, [{messages}, 1], mbarrier.MBarrierLayout())
    row_free = gl.allocate_shared_memory(gl.int64, [{messages}, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [{stages}, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [{stages}, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [{stages}, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [{stages}, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(q_ready.index(i), count={q_arrivals})
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range({messages}):
        mbarrier.init(row_ready.index(i), count=1)
        mbarrier.init(row_free.index(i), count={row_readers})
    for i in gl.static_range({stages}):
        mbarrier.init(k_ready.index(i), count={k_arrivals})
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    queries = (q_buffers, q_ready, q_free)
    messages = (words, row_ready, row_free)
    rings = (k_ring, v_ring, labels, {brought_passed})
    barriers = (k_ready, k_free, v_ready, v_free)
    full = (FullCount, FullBegin, FullEnd, Full_ranges)
    tables = (Order,) + full + (PartialCount, PartialBegin, PartialEnd, Partial_ranges{Origins})
    operands = ({operands})
    gl.warp_specialize(
        [
            (_rows, (O, Lse, queries, rings, barriers, messages, operands{list_passed}, 0)),
            (_rows, (O, Lse, queries, rings, barriers, messages, operands{list_passed}, 1)),
            (_loads, ({Q}, {K}, {V}, queries, rings, barriers, messages, tables, operands)),
            (_tells_{side}, (messages, tables, ({shares}{Queue}), {sizes})),
            {takes}
        ],
        [{workers}],
        [{registers}],
    )
'''

EVERY_TILE = """
while after > 0:
    {tile}
"""

# Masked tiles, then full ones; the outer loop turns once: without it LLVM takes the packed weights apart in the second, 64 instructions.
EVERY_TILE_APART = """
while after > 0:
    while after == 1:
        {masked_tile}
    while after == 2:
        {full_tile}
"""

TILE = """
mbarrier.wait(k_ready.index(k_slot), k_phase)
qk = warpgroup_mma(q, k_ring.index(k_slot).reshape([BLOCK_N, {d}]).permute((1, 0)), nothing, use_acc=False, is_async=True)
{read_label}
{key_positions}
{reads}
mbarrier.wait(v_ready.index(v_slot), v_phase)
moved = warpgroup_mma(weights, v_ring.index(v_slot).reshape([BLOCK_N, {d}]), acc, is_async=True)
qk = warpgroup_mma_wait(1, (qk,))
mbarrier.arrive(k_free.index(k_slot))
{scores}
k_slot, k_phase = _next_slot(k_slot, k_phase, {stages})
m_new = gl.maximum(m_i, gl.max(scores, 1){scale})
p = _exp2(scores{scale} - m_new[:, None])
alpha = _exp2(m_i - m_new)
l_i = l_i * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout)), 1) + _row_sums(p)
m_i = m_new
acc = warpgroup_mma_wait(0, (moved,))
mbarrier.arrive(v_free.index(v_slot))
v_slot, v_phase = _next_slot(v_slot, v_phase, {stages})
acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, OUTPUT)), 1)
weights = gl.convert_layout(p.to({dtype}), WEIGHTS)
"""

LOADS = """
@gluon.jit
def _loads({Q}, {K}, {V}, queries, rings, barriers, messages, tables, operands):
    q_buffers, q_ready, q_free = queries
    words_of, row_ready, row_free = messages
    ({operands}) = operands
    FullBegin, FullEnd, PartialBegin, PartialEnd = tables[2], tables[3], tables[6], tables[7]
    slot = 0
    phase = 0  # a fresh barrier counts as having completed phase 1: the first waits for free places fall through
    turn = 0
    {first_words}
    while _is_row(words, places, {words}):
        {read_row}
        {read_ranges}
        {heard_early}
        {query_corner}
        {load_queries}
        {every_tile}
        turn += 1
        {next_words}
"""

LOAD_QUERIES = """
for group in gl.static_range(2):
    at = turn % 2 * 2 + group
    mbarrier.wait(q_free.index(at), (turn // 2 + 1) % 2)
    mbarrier.expect(q_ready.index(at), {Q}.block_type.nbytes)
    tma.async_copy_global_to_shared({Q}, [{q_at}, 0], q_ready.index(at), q_buffers.index(at))
"""

STORE = """
q_buffer.reshape([64, {d}]).store(out.to({dtype}))
fence_async_shared()
tma.async_copy_shared_to_global(O, [{o_at}, 0], q_buffer)
gl.store(Lse + (b.to(gl.int64) * H + h) * M + q_idx, lse, mask=q_idx < M)
"""
