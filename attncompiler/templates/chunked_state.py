"""The kernels of recurrences: the state of each segment of the sequence, a scan over segments, and a walk through each segment.

All results of a recurrence have one form. With x, y and z of one step each, a walk over steps computes

    out[i] = sum over the steps j that i sees of  decay(j to i) * (x[i] . y[j]) * z[j]

and keeps S = sum of decay * y[j] z[j]^T, from which out[i] reads what came before its own chunk of steps:

    results     x   y   z   steps
    O           q   k   v   forward      S = sum k v^T
    dQ          dO  v   k   forward      S^T
    dV          k   q   dO  backward     dS = sum q dO^T
    dK          v   dO  q   backward     dS^T

So one template is all four. y comes from memory as [channels, steps]: no tile in registers is transposed before a product (Triton
3.4 to 3.7.0 miscompiles that on Hopper). Exponents are differences of cumulated logarithms, from a step to a later one.

B * H alone rarely fills a GPU: a sequence is cut into segments. Their states come from a pass over y and z, a scan makes of these
what enters each segment, and every segment is walked by programs of its own, each with a slice of z's channels.
"""

STATES = """
@triton.jit
def {kernel}({parameters}):
    {which}
    b, h = bh // H, bh % H
    segment = tl.program_id(1)
    steps = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, {block_x})
    {place_y}
    {place_z}
    {before}
    state = tl.zeros([{block_x}, BLOCK_Z], dtype=tl.float32)
    first = segment * SEGMENT
    chunks = tl.cdiv(tl.minimum(SEGMENT, N - first), BLOCK_N)
    for chunk in range(chunks):
        start = first + {chunk} * BLOCK_N
        inside = steps < N - start
        {load_y}
        {load_z}
        {decays}
        {write}
    {store_total}
    at = (bh * SEGMENTS + segment) * {elements} + {state_offsets}
    tl.store({states} + at, state{state_mask})
"""

# The states of segments become those that enter them, in place; {last} is what is past all of them.
SCAN = """
@triton.jit
def {kernel}({parameters}):
    bh = tl.program_id(0).to(tl.int64)
    elements = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    inside = elements < {elements}
    {before}
    state = {start}
    for step in range(SEGMENTS):
        segment = {segment}
        at = {states} + (bh * SEGMENTS + segment) * {elements} + elements
        own = tl.load(at, mask=inside, other=0.0)
        tl.store(at, state, mask=inside)
        state = {whole} + own
    tl.store({last} + bh * {elements} + elements, state, mask=inside)
"""

WALK = """
@triton.jit
def {kernel}({parameters}):
    {which}
    b, h = bh // H, bh % H
    segment = tl.program_id(1)
    steps = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, {block_x})
    {place_x}
    {place_y}
    {place_z}
    {place_along}
    {place_out}
    {before}
    {enter}
    first = segment * SEGMENT
    chunks = tl.cdiv(tl.minimum(SEGMENT, N - first), BLOCK_N)
    for chunk in range(chunks):
        start = first + {chunk} * BLOCK_N
        inside = steps < N - start
        {load_x}
        {load_y}
        {load_z}
        {decays}
        scores = tl.dot({x}, {y}_t{precision})
        {weigh}
        out = tl.dot({x}, state.to({x}.dtype){precision}){entered}
        {products}
        {scale}
        {write}
        {store}
    {leave}
"""

# All steps read one state.
READ = """
@triton.jit
def {kernel}({parameters}):
    {which}
    b, h = bh // H, bh % H
    steps = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, {block_x})
    {place_x}
    {place_out}
    {enter}
    first = tl.program_id(1) * SEGMENT
    for chunk in range(tl.cdiv(tl.minimum(SEGMENT, {steps} - first), BLOCK_N)):
        start = first + chunk * BLOCK_N
        inside = steps < {steps} - start
        {load_x}
        out = tl.dot({x}, state.to({x}.dtype){precision})
        {scale}
        {store}
"""
