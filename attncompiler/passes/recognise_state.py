"""ATen around products with no softmax between them -> states, or reasons: linear attention in the two ways that people write it.

`quadratic.py` takes scores of all pairs under a causal factor, `running_sums.py` the running sum of outer products. Both end in the
same few clauses of a state. `keys_first.py` says of a third way that it is linear as written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Graph, GraphModule, Node

from attncompiler.errors import AttnCompilerError
from attncompiler.passes.constant_masks import ConstantMasks
from attncompiler.passes.keys_first import keys_times_values
from attncompiler.passes.memory import writes
from attncompiler.passes.quadratic import scores_times_values
from attncompiler.passes.running_sums import query_of_running_sum
from attncompiler.passes.site import Refusal
from attncompiler.passes.state_site import Lowerable, NothingToSay, StateContext, StateSite

_FORMS = (query_of_running_sum, scores_times_values, keys_times_values)


def recognise_states(
    module: GraphModule, trained: frozenset[Node], masks: ConstantMasks, taken: frozenset[Node], lowerable: Lowerable
) -> tuple[list[StateSite], list[Refusal]]:
    """Needs: a captured graph, and the products that are attentions already. Ensures: every linear attention is in one of the two
    lists. Changes nothing."""
    context = StateContext(module, trained, masks, _equal_nodes(module.graph), lowerable)
    sites: list[StateSite] = []
    refusals: list[Refusal] = []
    for node in module.graph.nodes:
        for form in _FORMS if node not in taken else ():
            try:
                sites.append(form(context, node))
            except NothingToSay:
                continue
            except AttnCompilerError as error:
                refusals.append(Refusal(node, error, frozenset()))
            break
    return sites, refusals


def _equal_nodes(graph: Graph) -> Mapping[Node, Node]:
    """For each node the first one that computes the same of the same; itself where memory changes, so that the same may differ."""
    if any(writes(node) for node in graph.nodes):
        return {node: node for node in graph.nodes}
    first: dict[str, Node] = {}
    equal: dict[Node, Node] = {}
    for node in graph.nodes:
        equal[node] = node
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded not in node.target.tags:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: equal[n])
            equal[node] = first.setdefault(f"{node.target} {args} {kwargs}", node)
    return equal
