"""Model soups: average the weights of several fine-tuned models, all of them or those that help on held-out data.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
time", ICML 2022, arXiv:2203.05482.

    theta   = theta_0 + lambda(l) sum_t c_t (theta_t - theta_0)
    uniform : c_t = 1/T
    greedy  : c_t = 1/k for the k models chosen: the best on held-out data, then each by its rank if with it the soup is no
              worse there
    learned : c = softmax(s), s by AdamW on the loss on held-out data

For lambda = 1 the first model has no part in the mean: it gives config, tokenizer and dtype.

How it differs from the paper and its code:

1. A soup of k models is the mean of k files, rounded once. The code goes on from the rounded soup of k - 1.
2. A model is added where the soup is as good with it, as in the paper; in the code it has to be better.
3. "learned" trains c alone; the paper's code learns a factor on the logits besides, which no checkpoint holds.
4. `scale` and `beta` other than 1 and 0 (`merge.lines`) scale the soup that was chosen without them.
5. Integers are the base's. Running statistics of batch norms are averaged like weights, which they are not: measure them
   anew on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from overhaul import session
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.fit import Regime
from overhaul.merge._held_out import HeldOut
from overhaul.merge._ramp import Ramp
from overhaul.merge._words import Words
from overhaul.merge._writing import by_depth, some, written
from overhaul.merge.soup.greedy import greedy
from overhaul.merge.soup.learned import Per, Shares, learned
from overhaul.method import Outcome, Table, method
from overhaul.models import Checkpoint
from overhaul.weights import TensorFacts, corresponding, weighted_deltas


@method(
    verb="merge",
    paper="2203.05482",
    changes="weights",
    memory={"kind": {"uniform": "stream", "greedy": "forward", "learned": "gradient"}},
)
def soup(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    held_out: Examples | None = None,
    *,
    kind: Literal["uniform", "greedy", "learned"] = "uniform",
    metric: str = "perplexity",
    per: Per = "model",
    training: Regime = Regime(lr=0.05, batch_size=32, warmup=0, schedule="constant", clip=None),
    words: Words = Words(),
    ramp: Ramp = Ramp(),
    out: Path | None = None,
) -> Outcome:
    """Average fine-tuned checkpoints.

    Args:
        base: the checkpoint from which all were tuned; config, tokenizer and dtype are taken from it.
        tuned: the fine-tuned checkpoints, with the same tensors.
        held_out: data that no model was tuned on and that the result is not judged by; for "greedy" and "learned".
        kind: the mean of all ("uniform"), of those that help ("greedy"), or with learnt shares ("learned").
        metric: for "greedy", what is measured on the held-out data: any metric that `judge:` knows of one role
            ("accuracy" for images).
        per: for "learned", whether shares are learnt for the whole "model", for each "block" or for each "tensor".
        training: for "learned", how long and how fast. The paper takes a rate of 0.05.
        words: which words the result knows; other than "same" for uniform soups alone, since models are measured with one
            tokenizer.
        ramp: how much of the mean change is added.
        out: folder to write.

    Returns:
        The folder. Facts: the share of each checkpoint, the value of the best one and of the soup on the held-out data where
        it was measured, number of tensors, how many changed, how far each is from the base, in what the folders differ.
        Curves: those of the training. Tables: what each checkpoint is worth by itself, and whether it is in the soup.
        Layers: the coefficients by depth.

    Raises:
        RequestError: the checkpoints do not correspond, `held_out` is missing or cannot be measured, or nothing would
            change.
        RunError: nothing changed, a number is not finite, or the training diverged.
    """
    count = some("merge.soup", base, tuned)
    ramp.check("merge.soup")
    assert out is not None
    if words.tokenizer != "same" and kind != "uniform":
        raise RequestError(
            f"merge.soup: kind {kind!r} measures all models with one tokenizer, so tokenizer has to be the same. Write "
            'kind: "uniform".'
        )
    base, tuned = words.read(base, tuned)
    corresponding([base, *tuned])
    made = Outcome(Path(out))
    if kind == "uniform":
        shares = Shares.even(range(count), count)
    elif held_out is None or not len(held_out):
        raise RequestError(
            f"merge.soup: kind {kind!r} measures on held-out data, but the role `held_out` is missing or empty. Give it, or "
            'write kind: "uniform".'
        )
    elif kind == "greedy":
        measure = HeldOut.of("merge.soup", "held_out", held_out, metric)
        session.begins()
        shares = greedy(tuned, measure, Path(out).parent, made)
    else:
        shares, made.curves = learned(base, tuned, held_out, per, training)

    def coefficient(n: int, tensor: TensorFacts) -> float:
        return ramp(tensor) * shares.of(tensor)[n]

    coefficients = [partial(coefficient, n) for n in range(count)]
    made.facts |= {"shares": shares.mean, **written("merge.soup", base, tuned, weighted_deltas(coefficients), out)}
    if per == "tensor" and kind == "learned":
        rows = [(name, *each) for name, each in shares.by_key.items()]
        made.tables["shares of the tensors"] = Table(("tensor", *(one.source for one in tuned)), tuple(rows))
        return made
    for n, one in enumerate(coefficients):
        made.layers |= {f"{name} of model {n + 1}": line for name, line in by_depth(base, one).items()}
    return made
