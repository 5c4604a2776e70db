"""Run the main network and its subnets with exact prefix sharing: no block is applied twice to the same activation.

The subnets of a step are arranged as a trie over the sequences of blocks they apply. The model itself is called once
for each distinct subnet; on a *replay* a module that was called in the same state before (the same blocks applied so
far to the same input) returns its recorded output instead of computing it. That works on any model, whatever lies
between the blocks, and gives the gradients of separate passes.

`lean_backward` keeps one suffix alive at a time, each starting from detached leaves whose gradients are handed back,
and ends with one backward through the main graph; `one_graph` leaves everything in one autograd graph.
"""

from unloaf.passes.deferred import Deferred
from unloaf.passes.guards import advice_on_small_batches, check_batch, tell_what_is_not_compiled
from unloaf.passes.lean import lean_backward
from unloaf.passes.one_graph import one_graph
from unloaf.passes.one_pass import one_pass
from unloaf.passes.plan import SubnetPass
from unloaf.passes.readout import Readout, call_for_logits, logits_of
from unloaf.passes.separate import separate_backward
from unloaf.passes.terms import Losses, StepTerms

__all__ = [
    "Deferred",
    "Losses",
    "Readout",
    "StepTerms",
    "SubnetPass",
    "advice_on_small_batches",
    "call_for_logits",
    "check_batch",
    "lean_backward",
    "logits_of",
    "one_graph",
    "one_pass",
    "separate_backward",
    "tell_what_is_not_compiled",
]
