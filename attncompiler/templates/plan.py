"""The kernel that makes a tile plan on the device, for masks that read tensors: one program for each row of tiles.

A tile's bounds come from the smallest and largest value that each part of the predicate takes along each axis; `sure` and `may`
say whether the predicate holds everywhere and whether it may hold somewhere. Rows come in the order of launch.
"""

KERNEL = """
@triton.jit
def {name}({parameters}):
    row = tl.load(Order + tl.program_id(0))
    b = tl.program_id(1) // PLAN_H
    h = tl.program_id(1) % PLAN_H
    {row_axis} = tl.minimum(row * ROW_BLOCK + tl.arange(0, ROW_BLOCK), {row_size} - 1)  # a short tile repeats its last position
    {row_axis}_lo = row * ROW_BLOCK
    {row_axis}_hi = tl.minimum(row * ROW_BLOCK + ROW_BLOCK, {row_size}) - 1
    {row_values}
    tile = tl.arange(0, TILES)
    {column_axis}_lo = tile * COLUMN_BLOCK
    {column_axis}_hi = tl.minimum(tile * COLUMN_BLOCK + COLUMN_BLOCK, {column_size}) - 1
    {column_start}
    {column_loop}
    {column_end}
    {bounds}
    coverage = {may}.to(tl.int32) + {sure}.to(tl.int32)  # 0 empty, 1 partial, 2 full
    {short_tile}
    {empty_rows}
    tiles = tl.cdiv({column_size}, COLUMN_BLOCK)
    coverage = tl.where(tile < tiles, coverage, 0)
    plan_row = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    before = tl.where(tile > 0, tl.gather(coverage, tl.maximum(tile - 1, 0), 0), 0)
    after = tl.where(tile < TILES - 1, tl.gather(coverage, tl.minimum(tile + 1, TILES - 1), 0), 0)
    {ranges}
    tl.store(NextRow + tl.arange(0, 2), 0)  # of the kernel that is planned: it takes its rows in turn
"""

# Runs of one kind of tile: where they begin and end, in order.
RANGES = """
begins = ((coverage == {kind}) & (before != {kind})).to(tl.int32)
ends = ((coverage == {kind}) & (after != {kind})).to(tl.int32)
tl.store({name}Count + plan_row, tl.sum(begins, 0))
tl.store({name}Begin + plan_row * RANGES + tl.cumsum(begins, 0) - 1, tile, mask=begins > 0)
tl.store({name}End + plan_row * RANGES + tl.cumsum(ends, 0) - 1, tile + 1, mask=ends > 0)
"""

# What depends on the columns' axis alone: its smallest and largest value in every tile of the row.
COLUMN_LOOP = """
for step in tl.static_range(0, COLUMN_BLOCK, COLUMNS):  # unrolled: the loads go out together
    {column_axis} = tl.minimum(tile[:, None] * COLUMN_BLOCK + step + tl.arange(0, COLUMNS)[None, :], {column_size} - 1)
    {column_values}
"""
