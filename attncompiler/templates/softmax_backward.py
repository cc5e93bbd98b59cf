"""The backward kernels of the softmax family. Weights are recomputed from lse; nothing is summed by atomics.

P = exp2(score - reference), the reference being lse in base-2 units; dS = P * (dP - delta), delta = rowsum(O * dO) - dlse. One
kernel walks the keys of each query tile and makes the gradients of the query side; the other walks the queries of each key tile and
makes those of the key side. That one has keys on rows, so that no register tile is transposed before a product (Triton 3.4 to 3.7.0
miscompiles that on Hopper).

delta is also rowsum(P * dP). Summed from the P and dP that dS is made of, by a walk of its own over the keys, it leaves in a sum of
dS over keys the rounding of that sum only; rowsum(O * dO) leaves that of O, which is rounded to the operands' dtype. Where P sums
to 1, it is the mean of dP, and is summed as such, from the dP of a heavy key: a row that has one key has dS = 0 then, as it should,
however its weight of 1 is rounded.
"""

DELTA = """
@triton.jit
def attention_delta({parameters}):
    q_idx = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    rows = (b.to(tl.int64) * H + h) * M + q_idx
    {make_reference}
    channels = tl.arange(0, BLOCK_DV)
    inside = (q_idx[:, None] < M) & (channels[None, :] < DV)
    {pass_empty}
    at_o = b.to(tl.int64) * stride_o_b + h.to(tl.int64) * stride_o_h + q_idx.to(tl.int64)[:, None] * stride_o_m
    at_do = b.to(tl.int64) * stride_do_b + h.to(tl.int64) * stride_do_h + q_idx.to(tl.int64)[:, None] * stride_do_m
    o = tl.load(O + at_o + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    do = tl.load(DO + at_do + channels[None, :] * stride_do_d, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1)
    {store_delta}
"""

MAKE_REFERENCE = """
reference = {lse}
{guard_empty}
"""

STORE_DELTA = """
{subtract_grad_lse}
{guard_empty}
tl.store(Delta + rows, delta, mask=q_idx < M)
tl.store(Reference + rows, reference, mask=q_idx < M)
"""

ADD_TO_MEAN = """
heaviest = tl.max(tl.where(p == tl.max(p, 1)[:, None], gradient, float("-inf")), 1)
pivot = tl.where(weight == 0.0, heaviest, pivot)
delta += tl.sum(p * (gradient - pivot[:, None]), 1)
weight += tl.sum(p, 1)
"""

FINISH_MEAN = "delta = tl.where(weight == 0.0, 0.0, pivot + delta / weight)"

LOAD_DELTA = """
reference = tl.load(Reference + rows, mask=q_idx < M, other=float("inf"))
delta = tl.load(Delta + rows, mask=q_idx < M, other=0.0)
"""

QUERIES = """
@triton.jit
def {kernel}({parameters}):
    q_tile = tl.load(Order + tl.program_id(0))
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    {query_positions}
    channels = tl.arange(0, BLOCK_DV)
    {load_queries}
    {load_grad_o}
    rows = (b.to(tl.int64) * H + h) * M + q_idx
    {load_rows}
    {load_rcp}
    {accumulators}
    {loops}
    {store}
"""

QUERIES_TILE = """
{key_positions}
{load_keys}
{score_lines}
scores = {score}
{apply_mask}
p = tl.exp2(scores{scale} - reference[:, None]){rcp}
{load_values}
dp = {grad_weights}
{gradients}
"""

KEYS = """
@triton.jit
def attention_backward_keys({parameters}):
    kv_tile = tl.load(Order + tl.program_id(0))
    b = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    {key_positions}
    channels = tl.arange(0, BLOCK_DV)
    h = kv_head * GROUP
    {load_keys}
    {load_values}
    {accumulators}
    for member in range(GROUP):
        h = kv_head * GROUP + member
        {head_lines}
        {loops}
        {store_per_head}
    {store}
"""

KEYS_TILE = """
{query_positions}
{load_queries}
rows = (b.to(tl.int64) * H + h) * M + q_idx
{load_rows}
{load_rcp}
{score_lines}
scores = {score}  # keys on rows
{apply_mask}
p = tl.exp2(scores{scale} - reference[None, :]){rcp}
{load_grad_o}
{gradients}
"""

LOOP_OVER_RANGES = """
plan_row = {plan_row}
{origins}
for r in range(tl.load({name}Count + plan_row)):
    first = tl.load({name}Begin + plan_row * {name}_ranges + r) * BLOCK_M
    last = tl.load({name}End + plan_row * {name}_ranges + r) * BLOCK_M
    for q_start in range(first, last, BLOCK_M):
        {tile}
"""
