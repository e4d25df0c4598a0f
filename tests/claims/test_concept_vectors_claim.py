from __future__ import annotations

import math

import pytest
import torch

from overhaul.claims.concept_vectors import CLAIM, CONCEPTS, EACH, FUNCTION, LENGTH, Size, _World, experiment

SHORT = Size(sentences=12, steps=3, forgetting=2)


def test_concepts_share_function_words_alone_and_planted_words_are_in_no_text() -> None:
    world = _World.of(0, SHORT)
    assert len({token for some in world.tokens for token in some.tolist()}) == (CONCEPTS + 1) * EACH
    function = set(world.tokenizer.convert_tokens_to_ids(FUNCTION)) | {world.tokenizer.bos_token_id}
    for text, own in zip(world.texts, world.tokens, strict=False):
        assert all(len(item["input_ids"]) == LENGTH + 1 for item in text.items)
        assert set(torch.cat([item["input_ids"] for item in text.items]).tolist()) <= {*own.tolist(), *function}


def test_the_checks_ask_for_a_behaviour_that_goes_and_a_trace_that_stays() -> None:
    found = {
        "before, mass of the concept": 0.5, "before, mass of others": 0.5,
        "trained on the rest, mass of the concept": 0.4,
        "gradient difference, mass of the concept": 0.001, "gradient difference, mass of others": 0.5,
        "gradient difference, cosine of the best": 0.999, "gradient difference, jaccard of the best": 0.95,
        "gradient difference, retained": 0.97, "gradient difference, retained by random vectors": 0.98,
        "noise, retained": 0.3, "chance, cosine": 0.05, "chance, jaccard": 0.06,
        "planted, found first": 1.0, "planted, mass of its words": 0.6, "planted, mass without it": 0.001,
        "planted, mass without a random one": 0.6,
    }  # fmt: skip
    assert all(check.passes(found) for check in CLAIM.checks)
    worse = {
        "gradient difference, mass of the concept": 0.1,
        "gradient difference, cosine of the best": 0.98, "gradient difference, jaccard of the best": 0.6,
        "chance, jaccard": 0.4,
        "gradient difference, retained by random vectors": 0.5, "noise, retained": 0.9,
        "trained on the rest, mass of the concept": 0.1, "planted, found first": 0.0,
        "planted, mass without a random one": 0.1,
    }  # fmt: skip
    assert not any(check.passes({**found, **worse}) for check in CLAIM.checks)


@pytest.mark.slow
def test_the_experiment_measures_everything() -> None:
    found = experiment(0, SHORT)
    assert all(map(math.isfinite, found.values()))
