"""Groups: the rows and columns of a network's tensors that leave together, masked or cut out; found by structure.

    found = groups(model, "mlp.neuron")                          # one for every block
    sizes = {group: group.sums(model, lambda name, tensor: tensor.abs()) for group in found}
    keep = {group: size >= size.topk(40).values[-1] for group, size in sizes.items()}
    with masked(model, keep):
        ...                                                      # runs as if the others were not there
    cut(model, keep)                                             # is a plain model without them

Units, of which a group holds those of one place:

    mlp.neuron        a row of gate and up, a column of down, its biases; of a mixture, the same of every expert
    attention.head    what cannot be told apart by later weights: a head, or the query heads of one key and value
    residual.channel  one number of the residual stream, wherever it is written, normalised and read
    channel           of any network without blocks, or with convolutions: a channel and all that is added to it

1. What belongs together is seen by `reach`, never by name: an index of a tensor and an input of a later weight are one unit
   if that input depends on the index. So fused and grouped queries, tied embeddings, experts and additions need no rule.
2. A unit that the result of the network holds, or a convolution in groups reads, belongs to no group.
3. `masked` lets all that reads a unit read zeros for it: what is written there no longer matters. A norm over the units
   takes its statistics over those that stay, since that is what it does when the others are cut. (With plain zeros in
   the stream it would not: the mean of 32 numbers of which 8 are zero is not the mean of the 24 others.) Masked so, a model
   says what it says when it is cut.
4. `cut` changes the config so that the class builds these sizes, and compares the cut model with the masked one on a few
   tokens or images. What no config describes (another width in every block, another head than width / heads) is refused;
   `cut_copy` makes it in memory.
5. One block of each kind is looked into; what is true of it is true of the others.
"""

from __future__ import annotations

from overhaul.groups.cutting import cut, cut_copy
from overhaul.groups.finding import UNITS, Group, Slice, groups
from overhaul.groups.masking import masked

__all__ = ["UNITS", "Group", "Slice", "cut", "cut_copy", "groups", "masked"]
