"""The compile of one graph, in order: capture, recognise, rewrite. `TORCH_LOGS="+attncompiler"` prints every program."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from attncompiler.errors import AttnCompilerError
from attncompiler.explanation import Missed
from attncompiler.ir.text import to_text
from attncompiler.passes.constant_masks import ConstantMasks
from attncompiler.passes.constants import Constants
from attncompiler.passes.contraction import contraction_of
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.lift_route import lift_route
from attncompiler.passes.normalise import capture, source_line
from attncompiler.passes.recognise import NORMALISERS, cone, recognise, trained_nodes
from attncompiler.passes.recognise_state import recognise_states
from attncompiler.passes.rewrite import rewrite
from attncompiler.passes.site import Recovered, Refusal, Site
from attncompiler.passes.state_site import Lowerable, RecoveredDecay, StateSite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompiledGraph:
    """A graph with its attentions replaced, the sites that were, and those that were not with the reason."""

    module: GraphModule
    sites: tuple[Site, ...]
    missed: tuple[Missed, ...]
    states: tuple[StateSite, ...] = ()

    @property
    def assumed(self) -> tuple[Recovered | RecoveredDecay, ...]:
        """The rules that hold while an input of the graph holds what it holds now."""
        recovered = [r for site in self.sites for r in site.recovered]
        decays = [r for state in self.states for r in state.recovered]
        return tuple(r for r in (*recovered, *decays) if r.recipe.source is not None)


def compile_graph(module: GraphModule, inputs: Sequence[Any], lowerable: Lowerable = lambda state: "") -> CompiledGraph:
    """Needs: Dynamo's graph and its inputs; `lowerable`: why no lowering computes a state. Ensures: an equal graph whose recognised
    attentions, softmax and linear, are single ops."""
    captured = capture(module, inputs)
    log.debug("after normalise:\n%s", captured.code)
    masks = ConstantMasks(Constants(captured, module, inputs))
    trained = trained_nodes(captured, tuple(inputs))
    sites, refusals = recognise(captured, trained, masks)
    states, linear = recognise_states(captured, trained, masks, frozenset(site.output for site in sites), lowerable)
    sites = [lift_route(captured.graph, site) for site in sites]
    refusals = [r for r in _without_linear(refusals, states, linear) if not _is_of_a_layer(r)]
    covered = {node for site in sites for node in site.softmax_nodes} | {n for r in refusals for n in r.softmax_nodes}
    missed = [_missed(refusal) for refusal in refusals] + _unreached(captured, covered)
    left = rewrite(captured, [*sites, *states])
    missed += [Missed(reason, site.program.origin.line, _ADVICE.get(reason, "")) for site, reason in left]
    untaken = {id(site) for site, _ in left}
    taken = tuple(site for site in sites if id(site) not in untaken)
    taken_states = tuple(site for site in states if id(site) not in untaken)
    if not taken and not taken_states:
        captured = module  # nothing to gain from our own trace
    for text in (*(to_text(site.program) for site in taken), *(site.text for site in taken_states)):
        log.debug("taken:\n%s", text)
    for miss in missed:
        log.debug("left to the inner compiler: %s: %s", miss.source_location, miss.reason)
    return CompiledGraph(captured, taken, tuple(missed), taken_states)


def _without_linear(softmax: list[Refusal], states: Sequence[StateSite], linear: Sequence[Refusal]) -> list[Refusal]:
    """All refusals; of a product without a softmax, whose exponentials are decays, what is said of it as linear attention."""
    spoken = {node for site in states for node in site.products | site.softmax_nodes} | {refusal.output for refusal in linear}
    return [r for r in softmax if r.output not in spoken] + list(linear)


_ADVICE = {
    "the attention weights are read by other code, so they are materialised anyway": (
        "do not return the weights where they are not needed"
    ),
    "the scores of a linear attention are read by other code, so they are materialised anyway": (
        "do not return the scores where they are not needed"
    ),
}


def _missed(refusal: Refusal) -> Missed:
    error: AttnCompilerError = refusal.error
    return Missed(error.reason, source_line(refusal.output), error.do)


def _reads_product(node: Node) -> bool:
    """True for a softmax of scores; one over a layer's outputs (a router, a head of classes) is no attention."""
    return any(contraction_of(n) is not None and not _is_layer(n) for n in cone(node.all_input_nodes, NORMALISERS))


def _is_layer(node: Node) -> bool:
    """True for a linear layer, and for x @ w.T: batches of vectors with one matrix. Scores have a matrix for each batch, or no batch."""
    if base_name(node.target) in ("linear", "addmm"):
        return True
    values = [source.meta.get("val") for source in node.all_input_nodes]
    dims = [value.dim() for value in values if isinstance(value, Tensor)]
    return contraction_of(node) is not None and len(dims) == 2 and min(dims) == 2 < max(dims)


def _is_of_a_layer(refusal: Refusal) -> bool:
    """True where all that is normalised is what a layer gives: gates of a router that scale something are no attention."""
    behind = [any(_is_layer(n) for n in cone(s.all_input_nodes, NORMALISERS)) for s in refusal.softmax_nodes]
    return bool(behind) and all(behind) and not any(map(_reads_product, refusal.softmax_nodes))


def _unreached(module: GraphModule, covered: set[Node]) -> list[Missed]:
    """Softmaxes of products of activations whose weights meet no product with values that was looked at."""
    found = []
    for node in module.graph.nodes:
        if node.op == "call_function" and base_name(node.target) in NORMALISERS and node not in covered and _reads_product(node):
            found.append(Missed("the softmax of a product is not summed over values", source_line(node)))
    return found
