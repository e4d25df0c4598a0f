"""Whether models give what is read of them, told from their classes: logits, of tokens or of classes; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from overhaul import models
from overhaul.data.forms import Form
from overhaul.errors import RequestError
from overhaul.forward import encodes_and_decodes, headless, without_head, without_padding
from overhaul.judge import harness
from overhaul.objectives import one_class
from overhaul.recipe.materials import Reference, model_of

if TYPE_CHECKING:
    from overhaul.recipe.check import Step


def check_opened(
    steps: Sequence[Step], references: Mapping[str, Reference], anchors: Sequence[str], trust: bool
) -> None:
    """Whether the models beside the recipe's own can be opened, those that will be."""
    opened = [
        name for step in steps for role in step.method.roles if role.kind == "model" for name in step.names(role.name)
    ]
    for name in dict.fromkeys([*opened, *anchors]):
        reference = references.get(name, {})
        if not reference.get("model", "starter:").startswith("starter:"):
            models.check_shapes(model_of(reference, trust))


def check_head(model: nn.Module, steps: Sequence[Step], used: Sequence[str], requests: Sequence[Any]) -> None:
    """Whether the model gives what steps and the judge read of it: logits, where they read examples."""
    name = type(model).__name__
    if used and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise RequestError(encodes_and_decodes(name))
    if not headless(model):
        return
    for step in steps:
        reads = any(role.kind == "examples" and role.name in step.reads for role in step.method.roles)
        if reads and not step.method.headless(step.knobs):
            raise RequestError(f"Step {step.number}, {step.name}: {without_head(name)}")
    if requests:
        raise RequestError(f"judge: {without_head(name)}")


def check_speaks(known: models.Checkpoint, words: int | None) -> None:
    """Whether the model continues text, as tasks of lm-evaluation-harness ask it to.

    Args:
        known: the model's facts.
        words: how many tokens its tokenizer has; None without one.

    Raises:
        RequestError: it has no tokenizer, or does not write.
    """
    if words is None:
        raise RequestError(
            f"judge: lm_eval puts text to the model, but {known.source} has no tokenizer. Put its tokenizer.json beside the "
            "weights (`tokenizer.save_pretrained(folder)`), or leave lm_eval out."
        )
    network = models.planned(known)
    if network is not None and (reason := harness.unfit(network)):
        raise RequestError(f"judge: {reason}")


def check_classes(role: str, model: nn.Module, forms: Sequence[Form]) -> None:
    """Whether texts have classes where the model classifies them, and only there."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS

    kind = vars(type(model)).get("plain", type(model))  # of a converted class
    classifies = kind in CLASSIFIERS.values()
    for form in forms:
        labelled = "label" in form.columns
        if form.kind == "tokens" and labelled != classifies:
            raise RequestError(f"The material {role!r} does not fit {kind.__name__}. {one_class(labelled)}")
    config: Any = getattr(model, "config", None)
    if classifies and hasattr(model, "score") and config.get_text_config().pad_token_id is None:
        raise RequestError(without_padding(kind.__name__))
