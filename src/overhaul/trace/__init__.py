"""Trace: see what flows through a stack, step in, and find out which modules of a block add to the stream (`sites`)."""

from overhaul.trace.edits import Add as Add
from overhaul.trace.edits import Interpolate as Interpolate
from overhaul.trace.edits import Primitive as Primitive
from overhaul.trace.edits import ProjectOut as ProjectOut
from overhaul.trace.edits import Replace as Replace
from overhaul.trace.edits import Skip as Skip
from overhaul.trace.edits import Zero as Zero
from overhaul.trace.hooks import capture as capture
from overhaul.trace.hooks import intervene as intervene
from overhaul.trace.hooks import measure as measure
from overhaul.trace.hooks import merged as merged
from overhaul.trace.hooks import windows as windows
from overhaul.trace.reductions import Largest as Largest
from overhaul.trace.reductions import LastTokens as LastTokens
from overhaul.trace.reductions import Statistics as Statistics
from overhaul.trace.reductions import Turn as Turn
from overhaul.trace.reductions import counted as counted
from overhaul.trace.reductions import largest as largest
from overhaul.trace.reductions import last_token as last_token
from overhaul.trace.reductions import statistics as statistics
from overhaul.trace.reductions import turn as turn
from overhaul.trace.where import EVERYWHERE as EVERYWHERE
from overhaul.trace.where import Where as Where
