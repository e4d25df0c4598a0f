"""Restoration: how much of a forgotten group comes back when features of the original model are steered into a layer?

Jang, Lee, Kim, Jo and Woo, "Suppression or Deletion: A Restoration-Based Representation-Level Analysis of Machine
Unlearning", arXiv:2602.18505.

    features  E    the m latents of a top-k autoencoder of the original's layer l that respond most to the group
    steering       h + alpha W_d[:, E] (z(h') - z(h))[E] at patches,  h + alpha (h' - h) at the class token
    rate           RR = (A_steered - A_unlearned) / (A_original - A_unlearned)

h are the unlearned model's states behind block l, h' the original's on the same example, z(h) = W_e (h - b_pre). The paper
reads a high rate as suppression: the information was there, and only the decision was changed.

How it differs from the paper and its code:

1. A state is moved by the difference of codes, so that alpha 0 and no features change nothing. The code replaces it by its
   decoded code, which is another state at any alpha: `form="replace"`.
2. Controls stand beside the paper's arm, and decide what it means: the class token alone (at alpha 1 it is the original's
   own: behind the last block that tells of the head, so no sentence is made of that layer where there are others),
   features alone, as many random features that move as far, and the original's tail on the unlearned states.
3. What steering cannot tell is flagged: models that are identical up to the layer (nothing to steer: the tail swap
   tells), states in another basis, as after training from scratch (nothing can come back), nothing forgotten.
4. A linear probe reads the group from the unlearned model's own states, which needs no common basis.
5. The code steers the images whose true class is the forgotten one. All others are steered too, for what it costs them.
6. How features are selected and autoencoders trained is not in the code, nor is the rate: see `experts_by` and `sae`.
7. Positions of a ResNet are pixels of its channels and none is a class token. Of language models, prompts carry features,
   and the positions that predict the answer stand for the class token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, MinLen
from torch import nn

from overhaul import session
from overhaul.data.examples import Examples, Tensors, join
from overhaul.errors import RequestError
from overhaul.inspect.restoration.passes import Material, Run, by_layer, original_pass, steering_pass, unlearned_pass
from overhaul.inspect.restoration.reading import outcome
from overhaul.inspect.restoration.states import NAME, check_kind, parts
from overhaul.judge.representation import check_probe
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint, planned
from overhaul.pairs import corresponding
from overhaul.sae import Dictionary, SparseAutoencoder
from overhaul.selectors import blocks_of
from overhaul.stack import LayerStack


@method(
    verb="inspect",
    paper="2602.18505",
    changes="nothing",
    memory="forward",
    alone=True,
    makes={"autoencoders": "tensors", "experts": "json"},
)
def restoration(
    model: Checkpoint,
    original: Checkpoint,
    train: Examples,
    test: Examples,
    autoencoders: Tensors | None = None,
    *,
    value: str | int,
    column: str = "label",
    layers: str | None = None,
    alphas: Annotated[list[Annotated[float, Ge(0)]], MinLen(1)] | None = None,
    experts: Annotated[int, Ge(1)] = 10,
    experts_by: Literal["mean_difference", "auroc"] = "mean_difference",
    codes: Literal["linear", "topk"] = "linear",
    form: Literal["delta", "replace"] = "delta",
    measure: Literal["accuracy", "probability"] = "accuracy",
    random_sets: Annotated[int, Ge(1)] = 3,
    class_tokens: Annotated[int, Ge(0)] | None = None,
    probe: bool = True,
    same_basis: Annotated[float, Gt(0), Le(1)] = 0.25,
    dictionary: Dictionary = Dictionary(),
    batch_size: Annotated[int, Ge(1)] = 64,
) -> Outcome:
    """Steer an unlearned model towards its original, layer by layer, and say how much of a forgotten group comes back.

    The models are opened one after the other in float32, the unlearned one twice, so one is held at a time. What is kept of
    them in main memory are the states of `test` at the chosen layers (those of the group twice) and some of `train`.

    Args:
        model: the unlearned model: an image classifier or a language model. It stays as it is.
        original: the model before unlearning, of the same class and size (in a recipe: `{after: start}`).
        train: examples of the forgotten group and of others: autoencoders, features and probes are made from them.
        test: other examples of both, on which rates are measured.
        autoencoders: of the original's layers, in place of those that are trained here: what this method made, or files in
            the official layout, sparsify's or sae-lens's, by "LAYER.NAME"; without a layer where `layers` is one.
        value: what the forgotten group has in `column`.
        column: the column of the rows that tells groups apart.
        layers: places of the blocks behind which it is steered ("8-10"); if not given, all, or those of `autoencoders`.
        alphas: how far it is steered; beyond 1, past the original. 1, 5 and 10 if not given.
        experts: features that are steered.
        experts_by: what a feature is selected by: its mean on the group minus its mean elsewhere, or the AUROC of telling
            the group by it.
        codes: whether differences are taken of W_e (h - b_pre), or of what the autoencoder encodes (bias, TopK).
        form: whether a state is moved by a difference ("delta"), or replaced by a decoded code as in the released code.
        measure: what is restored: accuracy, or the probability of the answer (of several tokens, their geometric mean).
        random_sets: draws of random features, over which their rate is the mean.
        class_tokens: positions before the patches of an image; as its config says if not given.
        probe: whether linear probes are trained on the states of both models; they tell the values of `column` apart.
        same_basis: correlation of both models' features below which a layer is flagged as another basis.
        dictionary: the autoencoders that are trained; of those that are given, `k` where their tensors do not say.
        batch_size: examples in one forward; does not change the values beyond rounding.

    Returns:
        No model. Facts: accuracies before and after, the best inner layer and alpha of the paper's arm with the controls,
        flagged layers, and a sentence on how to read them. Tables: rates by arm and layer for every alpha, all accuracies,
        and what label-free steering does to the others. Layers: how well autoencoders explain states, how far the models
        are apart, and probes. `made["autoencoders"]`: their tensors in the official layout, by "LAYER.NAME";
        `made["experts"]`: the selected features by layer.

    Raises:
        RequestError: models that do not correspond, no rows of the group or none of others, data without answers, a layer
            that is not there, too few features for a control, or labels that no probe can learn.
        RunError: a state or an output is not finite, or a training diverged.
    """
    for role, examples in (("train", train), ("test", test)):
        check_kind(role, examples)
    groups = {role: parts(role, each, column, value) for role, each in (("train", train), ("test", test))}
    if probe:
        try:
            check_probe(train, test, column)
        except RequestError as error:
            raise RequestError(f"{NAME}: {error} Or leave the probes out: `probe: false`.") from None
    pair = corresponding(NAME, {"model": model, "original": original})
    given = None if autoencoders is None else by_layer(autoencoders, layers, dictionary.k)
    network = planned(model)
    places = None if network is None else _layers(network, layers, given)
    session.begins()
    seed = torch.initial_seed()
    data = Material(join(groups["train"]), len(groups["train"][0]), *groups["test"])
    run = Run(
        alphas=list(dict.fromkeys(alphas if alphas is not None else (1.0, 5.0, 10.0))),
        experts=experts, experts_by=experts_by, codes=codes, form=form, random_sets=random_sets,
        class_tokens=class_tokens, dictionary=dictionary, batch_size=batch_size, seed=seed,
        column=column if probe else None, given=given,
    )  # fmt: skip
    with torch.random.fork_rng():
        with pair["model"].opened() as opened:
            places = _layers(opened, layers, given) if places is None else places
            unlearned = unlearned_pass(opened, data, run, places)
        with pair["original"].opened() as opened:
            source = original_pass(opened, data, run, unlearned)
        with pair["model"].opened() as opened:
            steered = steering_pass(opened, data, run, unlearned, source)
    return outcome(data, run, unlearned, source, steered, measure=measure, value=value, same_basis=same_basis)


def _layers(model: nn.Module, layers: str | None, given: Mapping[int, SparseAutoencoder] | None) -> list[int]:
    """The places of the chosen blocks.

    Raises:
        RequestError: there is no such block, or no autoencoder for one of them.
    """
    wanted = sorted(given) if layers is None and given is not None else layers
    places = blocks_of(LayerStack.of(model), "all" if wanted is None else wanted, "layers")
    if given is not None and (lacking := [place for place in places if place not in given]):
        raise RequestError(f"{NAME}: `autoencoders` has none for the layer {lacking[0]}, only for {sorted(given)}.")
    return places
