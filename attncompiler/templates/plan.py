"""The kernels that make a tile plan on the device, for masks that read tensors: one program for each row of tiles.

A tile's bounds come from the smallest and largest value that each part of the predicate takes along each axis; `sure` and `may`
say whether the predicate holds everywhere and whether it may hold somewhere. Rows come in the order of launch.

KERNEL looks at all tiles of a row at once, and at every position of the columns. LONG_ROWS looks at TILES runs of TILES tiles, and
then only into those that are not proved to be alike, or that differ from the tile before: of 8192 tiles it sees 128 runs and mostly
some 128 tiles. It reads the columns' bounds from tables that COLUMN_TABLES makes once for all rows.
"""

# What is proved of parts of a row: tiles, or runs of tiles.
COVER = '''
@triton.jit
def cover({parameters}):
    """What is proved of the columns [begin, end): 0 none is kept, 1 neither, 2 all are."""
    {column_axis}_lo = begin
    {column_axis}_hi = tl.minimum(end, {column_size}) - 1
    {bounds}
    coverage = {may}.to(tl.int32) + {sure}.to(tl.int32)
    {short_tile}
    {empty_rows}
    return tl.where(begin < {column_size}, coverage, 0)
'''

ROW = """
row = tl.load(Order + tl.program_id(0))
b = tl.program_id(1) // PLAN_H
h = tl.program_id(1) % PLAN_H
{row_axis} = tl.minimum(row * ROW_BLOCK + tl.arange(0, ROW_BLOCK), {row_size} - 1)  # a short tile repeats its last position
{row_axis}_lo = row * ROW_BLOCK
{row_axis}_hi = tl.minimum(row * ROW_BLOCK + ROW_BLOCK, {row_size}) - 1
{row_values}
plan_row = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
"""

KERNEL = """
@triton.jit
def {name}({parameters}):
    {row}
    tile = tl.arange(0, TILES)
    {column_start}
    {column_loop}
    {column_end}
    coverage = {cover}
    before = tl.where(tile > 0, tl.gather(coverage, tl.maximum(tile - 1, 0), 0), 0)
    after = tl.where(tile < TILES - 1, tl.gather(coverage, tl.minimum(tile + 1, TILES - 1), 0), 0)
    {ranges}
    tl.store(Work + plan_row, tl.sum((coverage > 0).to(tl.int32), 0))
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

# The same for a run of TILES tiles, one by one and together. A table holds TILES * TILES tiles, then TILES runs, for each plan.
COLUMN_TABLES = """
@triton.jit
def {name}({parameters}):
    b = tl.program_id(1) // PLAN_H
    h = tl.program_id(1) % PLAN_H
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    {column_start}
    {column_loop}
    {column_end}
    first = tl.program_id(1).to(tl.int64) * (TILES * TILES + TILES)
    {stores}
"""

TABLE_STORES = """
tl.store({table}Lo + first + tile, {name}_lo)
tl.store({table}Hi + first + tile, {name}_hi)
tl.store({table}Lo + first + TILES * TILES + tl.program_id(0), tl.min({name}_lo, 0))
tl.store({table}Hi + first + TILES * TILES + tl.program_id(0), tl.max({name}_hi, 0))
"""

TABLE_LOADS = """
{name}_lo = tl.load({table}Lo + first + {place})
{name}_hi = tl.load({table}Hi + first + {place})
"""

LONG_ROWS = '''
@triton.jit
def tile_before(coverage, lane, first):
    """What is proved of the tile before each; `first` before the first."""
    return tl.where(lane > 0, tl.gather(coverage, tl.maximum(lane - 1, 0), 0), first)


@triton.jit
def {name}({parameters}):
    {row}
    lane = tl.arange(0, TILES)
    first = tl.program_id(1).to(tl.int64) * (TILES * TILES + TILES)
    {run_loads}
    runs = {run_cover}
    tiles = tl.cdiv({column_size}, COLUMN_BLOCK)
    kind = 0  # of the tile before
    full = 0  # ranges begun
    partial = 0
    work = 0  # tiles that are visited
    run = tl.min(tl.where(runs != 0, lane, TILES), 0)
    while run < TILES:
        tile = run * TILES + lane
        {tile_loads}
        coverage = {tile_cover}
        before = tile_before(coverage, lane, kind)
        more_full = tl.sum(((coverage == 2) & (before != 2)).to(tl.int32), 0)
        more_partial = tl.sum(((coverage == 1) & (before != 1)).to(tl.int32), 0)
        # Without room for these and for one partial range in every other run that follows, this run is partial as a whole.
        crowded = (full + more_full > RANGES) | (partial + more_partial >= RANGES - (TILES - run) // 2)
        crowded = crowded & (tl.max(coverage, 0) > 0)
        coverage = tl.where(crowded & (tile * COLUMN_BLOCK < {column_size}), 1, coverage)
        before = tile_before(coverage, lane, kind)
        last = tl.minimum(tile, tiles)  # a run that is full may stick out
        turns = (coverage > 0) != (before > 0)
        work += tl.sum(tl.where(turns, tl.where(coverage > 0, -tile, last), 0), 0)
        {ranges}
        kind = tl.sum(tl.where(lane == TILES - 1, coverage, 0), 0)
        run = tl.min(tl.where((lane > run) & ((runs == 1) | (runs != kind)), lane, TILES), 0)
    {last_ranges}
    tl.store(Work + plan_row, work + tl.where(kind > 0, tiles, 0))
    tl.store(NextRow + tl.arange(0, 2), 0)  # of the kernel that is planned: it takes its rows in turn
'''

# Ranges of one kind that begin or end in a run of tiles; the one that was open before it ends first.
LONG_RANGES = """
begins = ((coverage == {kind}) & (before != {kind})).to(tl.int32)
ends = ((coverage != {kind}) & (before == {kind})).to(tl.int32)
tl.store({name}Begin + plan_row * RANGES + {count} + tl.cumsum(begins, 0) - 1, tile, mask=begins > 0)
tl.store({name}End + plan_row * RANGES + {count} - (kind == {kind}).to(tl.int32) + tl.cumsum(ends, 0) - 1, last, mask=ends > 0)
{count} += tl.sum(begins, 0)
"""

LAST_RANGES = """
tl.store({name}Count + plan_row, {count})
tl.store({name}End + plan_row * RANGES + {count} - 1, tiles, mask=kind == {kind})
"""
