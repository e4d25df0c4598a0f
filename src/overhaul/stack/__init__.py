"""Stack: a network as an ordered list of blocks, the paths over them, and blocks run by hand."""

from overhaul.stack.layer_stack import LayerStack as LayerStack
