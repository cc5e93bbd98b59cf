"""The forward kernel of the softmax family for Hopper, in Gluon: one warp loads, two groups of four warps compute.

The loading warp brings K and V tiles by TMA into two rings, in the order of the plan: partial tiles, then full ones. Each group
owns 64 query rows. The scores of a tile and the values of the one before are in flight together, then comes the softmax: so one
group's softmax runs while the other group's products do.
"""

KERNEL = '''
@gluon.jit
def _next_slot(slot, phase):
    """The next place of a ring, and the parity that its barriers then have."""
    wraps = slot + 1 == {stages}
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _row_sums(p):
    """What each thread holds of a row; summed across threads only at the end."""
    return gl.sum(p.reshape([64, BLOCK_N // 8, 8]), 1)


@gluon.jit
def _first(begin, r, empty):
    """Where range r begins. A row with no tile visits tile 0, of which it keeps nothing."""
    return gl.where(empty, 0, gl.load(begin + r))


@gluon.jit
def _last(end, r, empty):
    return gl.where(empty, 1, gl.load(end + r))


@gluon.jit
def _load_tile({K}, {V}, rings, barriers, at, slot, phase):
    b, h, tile = at
    k_ring, v_ring = rings
    k_ready, k_free, v_ready, v_free = barriers
    mbarrier.wait(k_free.index(slot), phase)
    mbarrier.expect(k_ready.index(slot), {K}.block_type.nbytes)
    tma.async_copy_global_to_shared({K}, [b, {k_head}, tile * BLOCK_N, 0], k_ready.index(slot), k_ring.index(slot))
    mbarrier.wait(v_free.index(slot), phase)
    mbarrier.expect(v_ready.index(slot), {V}.block_type.nbytes)
    tma.async_copy_global_to_shared({V}, [b, {v_head}, tile * BLOCK_N, 0], v_ready.index(slot), v_ring.index(slot))
    return _next_slot(slot, phase)


@gluon.jit
def _loads({Q}, {K}, {V}, q_buffers, q_ready, rings, barriers, plan, sizes):
    empty, full_count, full_begin, full_end, partial_count, partial_begin, partial_end = plan
    q_tile, b, h = sizes
    for group in gl.static_range(2):
        mbarrier.expect(q_ready.index(group), {Q}.block_type.nbytes)
        tma.async_copy_global_to_shared({Q}, [b, h, q_tile * BLOCK_M + group * 64, 0], q_ready.index(group), q_buffers.index(group))
    slot = 0
    phase = 1  # a fresh barrier counts as having completed phase 1: the first waits fall through
    for r in range(partial_count):
        for tile in range(_first(partial_begin, r, empty), _last(partial_end, r, empty)):
            slot, phase = _load_tile({K}, {V}, rings, barriers, (b, h, tile), slot, phase)
    for r in range(full_count):
        for tile in range(gl.load(full_begin + r), gl.load(full_end + r)):
            slot, phase = _load_tile({K}, {V}, rings, barriers, (b, h, tile), slot, phase)


@gluon.jit
def _rows(O, Lse, q_buffers, q_ready, rings, barriers, plan, sizes, operands, GROUP: gl.constexpr):
    empty, full_count, full_begin, full_end, partial_count, partial_begin, partial_end = plan
    q_tile, b, h = sizes
    ({operands}) = operands
    k_ring, v_ring = rings
    k_ready, k_free, v_ready, v_free = barriers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {d}, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    q_idx = q_tile * BLOCK_M + GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
    keys = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    nothing = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    q_buffer = q_buffers.index(GROUP)
    m_i = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, SCORES))  # finite: a row without keys yet makes no NaN
    acc = gl.zeros([64, {d}], gl.float32, OUTPUT)
    {before}
    mbarrier.wait(q_ready.index(GROUP), 0)
    q = q_buffer.reshape([64, {d}]).load(gl.DotOperandLayout(0, SCORES, 2))
    k_slot = 0
    k_phase = 0
    v_slot = 0
    v_phase = 0
    # the first tile has no values before it; it is masked whether or not it must be
    first = gl.where(partial_count > 0, _first(partial_begin, 0, empty), gl.load(full_begin))
    kv_idx = first * BLOCK_N + keys
    mbarrier.wait(k_ready.index(k_slot), k_phase)
    qk = warpgroup_mma(q, k_ring.index(k_slot).reshape([BLOCK_N, {d}]).permute((1, 0)), nothing, use_acc=False, is_async=True)
    qk = warpgroup_mma_wait(0, (qk,))
    mbarrier.arrive(k_free.index(k_slot))
    k_slot, k_phase = _next_slot(k_slot, k_phase)
    {masked_scores}
    m_i = gl.maximum(m_i, gl.max(scores, 1){masked_scale})
    p = _exp2(scores{masked_scale} - m_i[:, None])
    l_i = _row_sums(p)
    weights = gl.convert_layout(p.to({dtype}), WEIGHTS)
    # tiles at an edge of the mask or of the tensors
    for r in range(partial_count):
        for tile in range(_first(partial_begin, r, empty) + (r == 0).to(gl.int32), _last(partial_end, r, empty)):
            {partial_tile}
    # tiles whose every pair is kept
    skip = (partial_count == 0).to(gl.int32)
    for r in range(full_count):
        for tile in range(gl.load(full_begin + r) + skip * (r == 0).to(gl.int32), gl.load(full_end + r)):
            {full_tile}
    mbarrier.wait(v_ready.index(v_slot), v_phase)
    acc = warpgroup_mma(weights, v_ring.index(v_slot).reshape([BLOCK_N, {d}]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, (acc,))
    l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, SCORES))
    {extra_scores}
    rcp = 1.0 / {denominator}
    out = acc * gl.expand_dims(gl.convert_layout(rcp, gl.SliceLayout(1, OUTPUT)), 1)
    q_buffer.reshape([64, {d}]).store(out.to({dtype}))
    fence_async_shared()
    tma.async_copy_shared_to_global(O, [b, h, q_tile * BLOCK_M + GROUP * 64, 0], q_buffer)
    gl.store(Lse + (b.to(gl.int64) * H + h) * M + q_idx, (m_i + gl.log2(l_i)) * {ln2}, mask=q_idx < M)
    tma.store_wait(0)


@gluon.jit
def attention_forward({parameters}):
    q_tile = gl.load(Order + gl.program_id(0))
    b = gl.program_id(1) // H
    h = gl.program_id(1) % H
    plan_row = {plan_row}
    full_count = gl.load(FullCount + plan_row)
    partial_count = gl.load(PartialCount + plan_row)
    empty = full_count + partial_count == 0
    partial_count = gl.where(empty, 1, partial_count)
    q_buffers = gl.allocate_shared_memory({dtype}, [2, 1, 1, 64, {d}], {Q}.layout)
    k_ring = gl.allocate_shared_memory({dtype}, [{stages}, 1, 1, BLOCK_N, {d}], {K}.layout)
    v_ring = gl.allocate_shared_memory({dtype}, [{stages}, 1, 1, BLOCK_N, {d}], {V}.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [{stages}, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [{stages}, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [{stages}, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [{stages}, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
    for i in gl.static_range({stages}):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    rings = (k_ring, v_ring)
    barriers = (k_ready, k_free, v_ready, v_free)
    full_at = plan_row * Full_ranges
    partial_at = plan_row * Partial_ranges
    partial = (partial_count, PartialBegin + partial_at, PartialEnd + partial_at)
    plan = (empty, full_count, FullBegin + full_at, FullEnd + full_at) + partial
    sizes = (q_tile, b, h)
    operands = ({operands})
    gl.warp_specialize(
        [
            (_rows, (O, Lse, q_buffers, q_ready, rings, barriers, plan, sizes, operands, 0)),
            (_rows, (O, Lse, q_buffers, q_ready, rings, barriers, plan, sizes, operands, 1)),
            (_loads, ({Q}, {K}, {V}, q_buffers, q_ready, rings, barriers, plan, sizes)),
        ],
        [4, 1],
        [240, 24],
    )
'''

TILE = """
kv_idx = tile * BLOCK_N + keys
mbarrier.wait(k_ready.index(k_slot), k_phase)
qk = warpgroup_mma(q, k_ring.index(k_slot).reshape([BLOCK_N, {d}]).permute((1, 0)), nothing, use_acc=False, is_async=True)
mbarrier.wait(v_ready.index(v_slot), v_phase)
moved = warpgroup_mma(weights, v_ring.index(v_slot).reshape([BLOCK_N, {d}]), acc, is_async=True)
qk = warpgroup_mma_wait(1, (qk,))
mbarrier.arrive(k_free.index(k_slot))
k_slot, k_phase = _next_slot(k_slot, k_phase)
{scores}
m_new = gl.maximum(m_i, gl.max(scores, 1){scale})
p = _exp2(scores{scale} - m_new[:, None])
alpha = _exp2(m_i - m_new)
l_i = l_i * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout)), 1) + _row_sums(p)
m_i = m_new
acc = warpgroup_mma_wait(0, (moved,))
mbarrier.arrive(v_free.index(v_slot))
v_slot, v_phase = _next_slot(v_slot, v_phase)
acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, OUTPUT)), 1)
weights = gl.convert_layout(p.to({dtype}), WEIGHTS)
"""

IMPORTS = """from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
"""
