"""EleutherAI's lm-evaluation-harness on a model that is held already: its tasks found, checked and run.

The numbers are those of `lm_eval.simple_evaluate` on the model's saved folder with the same options. How it differs:
1. One name is evaluated at a time, each from the seeds; examples before a question do not depend on its neighbours.
2. What lm-eval ignores or meets under way is refused before: a number of examples that the task sets to 0 itself, a metric
   that there is none of, an answer longer than the model's positions, a template that does not fit the rows.
3. A recipe is data, so code runs only where it says `trust_remote_code: true`: Python beside a task of the user's own
   (`!function`), and metrics that would be fetched from the hub with their code.
4. Nothing of it is imported before a task is asked for.
"""

from __future__ import annotations

from overhaul.judge.harness.running import Score as Score
from overhaul.judge.harness.running import look_ahead as look_ahead
from overhaul.judge.harness.running import scores as scores
from overhaul.judge.harness.running import unfit as unfit
from overhaul.judge.harness.tasks import check as check
from overhaul.judge.harness.tasks import content as content
from overhaul.judge.harness.tasks import places as places

UNSAID = ("include_path", "batch_size", "metric", "confirm_run_unsafe_code")
"""Options that a measure's name leaves out: they are no part of what is measured."""
