"""Weights: checkpoints as vectors, streamed; see `merge` for what is written and `compare` for what is measured."""

from overhaul.weights.agreement import differences as differences
from overhaul.weights.compare import Reduction as Reduction
from overhaul.weights.compare import Totals as Totals
from overhaul.weights.compare import cosine as cosine
from overhaul.weights.compare import delta_norms as delta_norms
from overhaul.weights.compare import reduction as reduction
from overhaul.weights.compare import relative_change as relative_change
from overhaul.weights.compare import totals as totals
from overhaul.weights.index import Source as Source
from overhaul.weights.index import TensorFacts as TensorFacts
from overhaul.weights.index import TensorIndex as TensorIndex
from overhaul.weights.merge import Chosen as Chosen
from overhaul.weights.merge import Coefficient as Coefficient
from overhaul.weights.merge import add_deltas as add_deltas
from overhaul.weights.merge import blend as blend
from overhaul.weights.merge import combined as combined
from overhaul.weights.merge import correspond as correspond
from overhaul.weights.merge import restore as restore
from overhaul.weights.merge import scale_by_depth as scale_by_depth
from overhaul.weights.merge import stream as stream
from overhaul.weights.merge import weighted_deltas as weighted_deltas
from overhaul.weights.merge import weighted_sum as weighted_sum
from overhaul.weights.output import Combine as Combine
from overhaul.weights.output import Storage as Storage
from overhaul.weights.ranks import kth_largest as kth_largest
