"""Parts of the Hopper forward kernel for queries that a list names: taken from where they lie, and put back there, times a gain.

A second warp brings the queries of each row of tiles: TMA can't gather rows on Hopper, so its threads copy them, 16 bytes at a time,
and leave in shared memory where each belongs and its gain. What it does slows the groups, whatever it is, for their code has to share
the cache of instructions: so its loops are not unrolled (num_programs(2), which is 1, is not known to the compiler), and what queries
give that are in no list is written by the kernel that makes the lists. Groups store O where it belongs from their registers.
"""

TAKING_WARP = '''
@gluon.jit
def _takes({Q}, queries, messages, lists, sizes, strides):
    """The queries of each row of tiles."""
    H, M = sizes
    stride_b, stride_h, stride_row = strides
    Index, Count, listed{gain_names} = lists
    q_buffers, q_ready, q_free = queries
    words_of, row_ready, row_free = messages
    PLACES: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, 64], {dtype})
    pieces = q_buffers._reinterpret({dtype}, [4 * {d} // 8, 8, 64], SWIZZLED)  # of each buffer the first 64 channels come first
    eights = listed._reinterpret(gl.int32, [2 * BLOCK_M // 8, 8], listed.layout)
    channels = gl.arange(0, 64, gl.SliceLayout(0, ROWS))
    turn = 0
    {first_words}
    while _is_row(words, places, 3):
        b = _word(words, places, 0)
        h = _word(words, places, 1)
        q_tile = _word(words, places, 2)
        mbarrier.arrive(row_free.index(turn % {messages}))
        pair = b.to(gl.int64) * H + h
        place = q_tile * BLOCK_M + gl.arange(0, BLOCK_M, PLACES)
        query = gl.load(Index + pair * M + place, mask=place < M, other=0)
        query = gl.where(place < gl.load(Count + pair), query, -1)
        for group in gl.static_range(2):
            mbarrier.wait(q_free.index(turn % 2 * 2 + group), (turn // 2 + 1) % 2)
        listed.index(turn % 2).store(query)
        vectors = {Q} + b.to(gl.int64) * stride_b + h.to(gl.int64) * stride_h + channels[None, :]
        for group in gl.static_range(2):
            at = turn % 2 * 2 + group
            for piece in range({d} // 8 * gl.num_programs(2)):
                eight = turn % 2 * (BLOCK_M // 8) + group * 8 + piece % 8
                row = gl.maximum(eights.index(eight).load(gl.SliceLayout(1, ROWS)), 0)
                source = vectors + row.to(gl.int64)[:, None] * stride_row + piece // 8 * 64
                async_copy.async_copy_global_to_shared(pieces.index(at * ({d} // 8) + piece), source)
            async_copy.mbarrier_arrive(q_ready.index(at), increment_count=False)
        {take_gains}
        for group in gl.static_range(2):
            mbarrier.arrive(q_ready.index(turn % 2 * 2 + group))
        turn += 1
        {next_words}
'''

TAKE_GAINS = """
gain = gl.load(Gain + b.to(gl.int64) * gain_b + h.to(gl.int64) * gain_h + query.to(gl.int64) * gain_m, mask=query >= 0, other=0.0)
gains.index(turn % 2).store(gain.to(gl.float32))
"""

STORE = """
listed{outputs}, stride_o_b, stride_o_h, stride_o_m = by_list
{store_sums}
query = listed.index(turn % 2).slice(GROUP * 64, 64).load(gl.SliceLayout(1, OUTPUT))
{scale}
at_rows = O + b.to(gl.int64) * stride_o_b + h.to(gl.int64) * stride_o_h + query.to(gl.int64)[:, None] * stride_o_m
at_rows += gl.arange(0, {d}, gl.SliceLayout(0, OUTPUT))[None, :]
gl.store(at_rows, out.to({dtype}), mask=(query >= 0)[:, None])
query = listed.index(turn % 2).slice(GROUP * 64, 64).load(gl.SliceLayout(1, SCORES))
gl.store(Lse + (b.to(gl.int64) * H + h) * M + query, lse, mask=query >= 0)
"""

SCALE = "out = out * gains.index(turn % 2).slice(GROUP * 64, 64).load(gl.SliceLayout(1, OUTPUT))[:, None]"

STORE_SUMS = """
q_buffer.reshape([64, {d}]).store(out.to({dtype}))
fence_async_shared()
tma.async_copy_shared_to_global(Summed, [{o_at}, 0], q_buffer)
"""

BUFFERS = """
listed = gl.allocate_shared_memory(gl.int32, [2, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
{gains}
"""

GAINS = "gains = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))"
