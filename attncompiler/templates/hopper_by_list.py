"""Parts of the Hopper forward kernel for queries that a list names: taken from where they lie, and put back there, times a gain.

A second warp brings the queries of each row of tiles: TMA can't gather rows on Hopper, so its threads copy them, 16 bytes at a time,
and leave in shared memory where each belongs and its gain. Between rows it writes what queries give that are in no list: O = 0 and
lse = -inf, for which memory has time while the groups compute. Its loops must not be unrolled, or their code pushes that of the
groups out of the cache of instructions: num_programs(2), which is 1, is not known to the compiler. Groups store O by rows of 16
bytes a thread, from the buffer that the products of its queries have left.
"""

TAKING_WARP = '''
@gluon.jit
def _write_unlisted(O, Lse, Place, unlisted, tile, sizes, strides):
    """O and lse of those of 128 queries that are in no list."""
    H, M = sizes
    stride_b, stride_h, stride_m = strides
    PLACES: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // {d}, {d} // 8], [1, 1], [1, 0])
    tiles = gl.cdiv(M, 128)
    pair = tile // tiles
    start = tile % tiles * 128
    query = start + gl.arange(0, 128, PLACES)
    place = gl.load(Place + pair.to(gl.int64) * M + query, mask=query < M, other=0)
    gl.store(Lse + pair.to(gl.int64) * M + query, gl.full([128], float("-inf"), gl.float32, PLACES), mask=place < 0)
    unlisted.store(place)
    channels = gl.arange(0, {d}, gl.SliceLayout(0, ROWS))[None, :]
    rows = O + (pair // H).to(gl.int64) * stride_b + (pair % H).to(gl.int64) * stride_h + channels
    nothing = gl.zeros([8, {d}], {dtype}, ROWS)
    eights = unlisted._reinterpret(gl.int32, [16, 8], unlisted.layout)
    for eight in range(16 * gl.num_programs(2)):
        absent = eights.index(eight).load(gl.SliceLayout(1, ROWS)) < 0
        row = start + eight * 8 + gl.arange(0, 8, gl.SliceLayout(1, ROWS))
        gl.store(rows + row.to(gl.int64)[:, None] * stride_m, nothing, mask=absent[:, None])


@gluon.jit
def _takes({Q}, O, Lse, queries, lists, sizes, strides, output_strides):
    """The queries of each row of tiles."""
    H, M, all_tiles = sizes
    stride_b, stride_h, stride_row = strides
    Index, Place, Count, listed, unlisted{gain_names} = lists
    q_buffers, q_ready, q_free, words_of, row_ready, row_free = queries
    PLACES: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, 64], {dtype})
    pieces = q_buffers._reinterpret({dtype}, [4 * {d} // 8, 8, 64], SWIZZLED)  # of each buffer the first 64 channels come first
    eights = listed._reinterpret(gl.int32, [2 * BLOCK_M // 8, 8], listed.layout)
    channels = gl.arange(0, 64, gl.SliceLayout(0, ROWS))
    tile = gl.program_id(0)
    turn = 0
    {first_words}
    while _word(words, places, 0) >= 0:
        b = _word(words, places, 0)
        h = _word(words, places, 1)
        q_tile = _word(words, places, 2)
        mbarrier.arrive(row_free.index(turn % 2))
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
        for _ in range(2):
            if tile < all_tiles:
                _write_unlisted(O, Lse, Place, unlisted, tile, (H, M), output_strides)
            tile += gl.num_programs(0)
        turn += 1
        {next_words}
    while tile < all_tiles:
        _write_unlisted(O, Lse, Place, unlisted, tile, (H, M), output_strides)
        tile += gl.num_programs(0)
'''

TAKE_GAINS = """
gain = gl.load(Gain + b.to(gl.int64) * gain_b + h.to(gl.int64) * gain_h + query.to(gl.int64) * gain_m, mask=query >= 0, other=0.0)
gains.index(turn % 2).store(gain.to(gl.float32))
"""

STORE = """
listed{outputs}, stride_o_b, stride_o_h, stride_o_m = by_list
{store_sums}
BY_ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // {d}, {d} // 8], [4, 1], [1, 0])
query = listed.index(turn % 2).slice(GROUP * 64, 64).load(gl.SliceLayout(1, BY_ROWS))
out_rows = q_buffer.reshape([64, {d}]).load(BY_ROWS)
{scale}
at_rows = O + b.to(gl.int64) * stride_o_b + h.to(gl.int64) * stride_o_h + query.to(gl.int64)[:, None] * stride_o_m
at_rows += gl.arange(0, {d}, gl.SliceLayout(0, BY_ROWS))[None, :]
gl.store(at_rows, out_rows, mask=(query >= 0)[:, None])
query = listed.index(turn % 2).slice(GROUP * 64, 64).load(gl.SliceLayout(1, SCORES))
gl.store(Lse + (b.to(gl.int64) * H + h) * M + query, lse, mask=query >= 0)
"""

SCALE = """
gain = gains.index(turn % 2).slice(GROUP * 64, 64).load(gl.SliceLayout(1, BY_ROWS))
out_rows = (out_rows.to(gl.float32) * gain[:, None]).to({dtype})
"""

STORE_SUMS = """
fence_async_shared()
tma.async_copy_shared_to_global(Summed, [{o_at}, 0], q_buffer)
"""

BUFFERS = """
listed = gl.allocate_shared_memory(gl.int32, [2, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
unlisted = gl.allocate_shared_memory(gl.int32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
{gains}
"""

GAINS = "gains = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))"
