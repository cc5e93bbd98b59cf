"""The forward kernel of the softmax family: online softmax in base 2 over the key tiles of the plan."""

KERNEL = """
@triton.jit
def attention_forward({parameters}):
    q_tile = tl.load(Order + tl.program_id(0))
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    {query_positions}
    channels = tl.arange(0, BLOCK_DV)
    {load_queries}
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)  # row maximum of the scores, in base-2 units
    l_i = tl.zeros([BLOCK_M], tl.float32)  # sum of exp2(score - m_i)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    {loops}
    {extra_scores}
    {finish}
    rows = (b.to(tl.int64) * H + h) * M + q_idx
    tl.store(Lse + rows, lse, mask=q_idx < M)
    {store_rcp}
    o_rows = O + b.to(tl.int64) * stride_o_b + h.to(tl.int64) * stride_o_h + q_idx.to(tl.int64)[:, None] * stride_o_m
    tl.store(o_rows + channels[None, :], out.to(O.dtype.element_ty), mask=(q_idx[:, None] < M) & (channels[None, :] < DV))
"""

# One key tile: scores, then the online softmax, then the values.
TILE = """
{key_positions}
{load_keys}
{score_lines}
scores = {score}
{apply_mask}
m_new = tl.maximum(m_i, tl.max(scores, 1){scale})
{reference}
p = tl.exp2(scores{scale} - m_ref[:, None])
alpha = tl.exp2(m_i - m_ref)
l_i = l_i * alpha + tl.sum(p, 1)
{adjust}
{load_values}
acc = {add_values}
m_i = m_new
"""

LOOP_OVER_RANGES = """
plan_row = {plan_row}
{origins}
for r in range(tl.load({name}Count + plan_row)):
    first = tl.load({name}Begin + plan_row * {name}_ranges + r) * BLOCK_N
    last = tl.load({name}End + plan_row * {name}_ranges + r) * BLOCK_N
    for kv_start in range(first, last, BLOCK_N):
        {tile}
"""
