from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest
from torch import Tensor, nn

from conftest import examples_for, tiny_llama, tiny_resnet, tiny_vit
from contract import Case, pictures
from learnt import by_heart
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError, RunError
from overhaul.forget.vertical import Unlearning, in_process, split, train, unlikelihood, vertical
from overhaul.forget.vertical.mixup import LegacyMix, class_mixing, mix, pair_mixing
from overhaul.models import open_model, save
from overhaul.objectives import evaluate
from overhaul.parties.messages import InProcess, Message, PartyLost
from overhaul.parties.model import Part, VerticalConfig, VerticalModel
from overhaul.parties.party import ActiveParty, PassiveParty, Rates

NONE = torch.empty(0, dtype=torch.long)


CASE = Case(
    method=vertical,
    materials=lambda: {
        "model": by_heart(
            tiny_resnet(), {"all": pictures([n % 4 for n in range(24)])}, steps=30, batch_size=8, lr=3e-3
        ),
        "forget": pictures([3] * 6, 1),
        "recovery": pictures([0, 1, 2] * 2, 2),
    },
    knobs={"epochs": 2, "batch_size": 4, "stop_at": None},
    varied={
        "epochs": (2, 3),
        "lr": (0.01, 0.02),
        "batch_size": (4, 3),
        "loss": ("unlikelihood", "cross_entropy"),
        "mixup": (True, False),
        "recover": (True, False),
        "gradient": ("chain_rule", "legacy"),
        "interleave": (False, True),
        "stop_at": (None, 0.99, {"lr": 1.0}),
        "momentum": (0.9, 0.0),
        "weight_decay": (5e-4, 0.5),
        "clip": (1.0, 1e-3),
        "freeze_norms": (True, False),
    },
    apart={
        "random state": "the mixtures of the recovery are drawn from it",
        "goes on": "parties begin anew, with the same result: what each would have to keep is its own",
    },
)


def halves(**changes: Any) -> VerticalModel:
    """Two parties with the halves of an 8 x 8 image."""
    options: dict[str, Any] = {"columns": [[0, 4], [4, 8]], "bottoms": [{"widths": [32, 12, 6]}] * 2, "top": [12, 10]}
    return VerticalModel(VerticalConfig(**options | changes))


def convolutional() -> VerticalModel:
    """Two transformers models below: norms with statistics, pooled embeddings."""
    config: Any = tiny_resnet().config
    inner = config.to_dict()
    return halves(bottoms=[{"inner": inner, "inner_class": "ResNetModel"}] * 2, top=[32, 10])


def labelled(labels: Sequence[int], seed: int = 0) -> Examples:
    """Noise around one picture per label, which a network can learn."""
    pictures = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    draw = torch.Generator().manual_seed(seed)
    items = [
        {"pixel_values": pictures[y] + 0.3 * torch.randn(1, 8, 8, generator=draw), "labels": torch.tensor(y)}
        for y in labels
    ]
    return Examples(items, [{}] * len(items))


def parties(model: nn.Module, examples: Examples, rates: Rates, training: bool = False) -> ActiveParty:
    batch = collate(examples.items)
    with split(model, batch["pixel_values"]) as parts:
        return in_process(parts, batch["labels"], rates, training=training)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def loss(model: nn.Module, examples: Examples) -> float:
    (value,) = evaluate(model, lambda z, b: F.cross_entropy(z, b["labels"]), [collate(examples.items)])
    return float(value)


# the protocol


@pytest.mark.parametrize("make", [halves, convolutional])
def test_check_1_a_round_of_messages_equals_backpropagation_through_the_whole(
    make: Callable[[], VerticalModel],
) -> None:
    ours, theirs = make(), make()
    theirs.load_state_dict(ours.state_dict())
    examples = labelled([0, 1, 2, 3, 4, 5])
    batch = collate(examples.items)
    active = parties(ours, examples, Rates(0.1, momentum=0.9, weight_decay=0.01), training=True)
    theirs.train()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for ids in (torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 0])):
        active.round(ids, Unlearning(active.top, NONE, mixup=False))
        optimizer.zero_grad()
        F.cross_entropy(theirs(batch["pixel_values"][ids]).logits, batch["labels"][ids]).backward()
        optimizer.step()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


def test_check_8_only_embeddings_gradients_ids_and_round_cross() -> None:
    active = parties(halves(), labelled([0, 0, 0, 1, 2]), Rates(0.1))
    active.round(torch.tensor([0, 1, 2]), Unlearning(active.top, torch.tensor([0])))
    transport = active.transport
    assert isinstance(transport, InProcess)
    assert [(m.phase, m.party) for m in transport.recorded] == [
        (phase, party)
        for down, up in (("ask", "embeddings"), ("gradients", "ready"), ("commit", "done"))
        for party in (0, 1)
        for phase in (down, up)
    ]
    assert Message._fields == ("round", "phase", "party", "ids", "values")
    for message in transport.recorded:
        assert message.ids.tolist() == [0, 1, 2]
        carries = message.phase in ("embeddings", "gradients")
        assert message.values.shape == ((3, 6) if carries else (0, 0))
        assert not message.values.requires_grad


class Leaving(PassiveParty):
    """A party that is gone as soon as it hears of a phase; `late` ones do what they were told before."""

    leaves_at = ""
    late = False

    def handle(self, message: Message) -> Message:
        if message.phase == self.leaves_at:
            if self.late:
                super().handle(message)
            raise ConnectionError("gone")
        return super().handle(message)


@pytest.mark.parametrize(("phase", "late"), [("ask", 0), ("gradients", 0), ("commit", 0), ("commit", 1)])
def test_where_a_party_leaves_no_other_has_moved_and_when_it_is_back_the_round_is_held(phase: str, late: int) -> None:
    model, other = convolutional(), convolutional()
    other.load_state_dict(model.state_dict())
    examples = labelled([0, 1, 2, 3])
    batch = collate(examples.items)
    rates = Rates(0.1, momentum=0.9)
    leaving = Leaving(1, model.bottoms[1], model.blocks(batch["pixel_values"])[1], rates, training=True)
    staying = PassiveParty(0, model.bottoms[0], model.blocks(batch["pixel_values"])[0], rates, training=True)
    active = ActiveParty(model.top, batch["labels"], InProcess([staying, leaving]), rates, training=True)
    ids, plain = torch.arange(4), Unlearning(model.top, NONE, mixup=False)
    active.round(ids, plain)
    before, leaving.leaves_at, leaving.late = state(model), phase, bool(late)
    for _ in range(2):
        with pytest.raises(PartyLost, match=rf"Party 1 did not answer '{phase}' in round 1 .*no party has moved"):
            active.round(ids, plain)
        gone = {} if not late else {name for name in before if name.startswith("bottoms.1.")}
        assert equal(state(model), {n: state(model)[n] if n in gone else t for n, t in before.items()})
    leaving.leaves_at = ""
    active.round(ids, plain)
    never_left = parties(other, examples, rates, training=True)
    for _ in range(2):
        never_left.round(ids, Unlearning(other.top, NONE, mixup=False))
    assert equal(state(model), state(other))


def test_a_loss_that_is_not_finite_moves_nobody() -> None:
    model = halves()
    active = parties(model, labelled([0, 1]), Rates(0.1))
    before = state(model)
    with pytest.raises(RunError, match="no party has moved"):
        active.round(torch.tensor([0, 1]), lambda embeddings, _: embeddings[0].sum() * float("inf"))
    assert equal(state(model), before)


def test_gradients_that_nobody_asked_for_or_of_the_wrong_shape_are_refused() -> None:
    party = PassiveParty(0, nn.Linear(4, 3), torch.randn(5, 4), Rates(0.1))
    ids = torch.tensor([0, 1])
    with pytest.raises(RunError, match="a round it was not asked for"):
        party.handle(Message(0, "gradients", 0, ids, torch.zeros(2, 3)))
    party.handle(Message(0, "ask", 0, ids, torch.empty(0, 0)))
    with pytest.raises(RunError, match=r"'commit' in a round it was not asked for"):
        party.handle(Message(0, "commit", 0, ids, torch.empty(0, 0)))
    with pytest.raises(RunError, match=r"gradients \(2, 4\) for embeddings \(2, 3\)"):
        party.handle(Message(0, "gradients", 0, ids, torch.zeros(2, 4)))


# mixing


def test_check_2_pairs_have_the_right_number_and_weights_and_stay_within_a_label() -> None:
    labels = torch.tensor([3, 5, 3, 3, 5, 3, 7])
    mixing = pair_mixing(labels)
    assert len(mixing.first) == 3 * 4 * 3 // 2 + 3 * 2 * 1 // 2 + 1
    assert torch.equal(labels[mixing.first], labels[mixing.second])
    alone = mixing.first == mixing.second
    assert mixing.first[alone].tolist() == [6] and mixing.weight[alone].tolist() == [1.0]
    assert (mixing.first < mixing.second)[~alone].all()
    triples = set(zip(mixing.first.tolist(), mixing.second.tolist(), mixing.weight.tolist(), strict=True))
    assert len(triples) == len(mixing.first) and (0, 2, 0.25) in triples and (1, 4, 0.75) in triples
    ones = torch.ones(7, 2)
    torch.testing.assert_close(mix(ones, mixing), torch.ones(len(alone), 2))


def test_check_2_without_mixing_the_loss_is_plain_ascent() -> None:
    top = nn.Linear(4, 3)
    embeddings, labels = [torch.randn(5, 2), torch.randn(5, 2)], torch.tensor([1] * 5)
    plain = -F.cross_entropy(top(torch.cat(embeddings, dim=1)), labels)
    climbed = Unlearning(top, torch.tensor([1]), mixup=False, loss="cross_entropy")
    torch.testing.assert_close(climbed(embeddings, labels), plain)
    same = [part[:1].expand(5, 2) for part in embeddings]  # mixtures of equal samples are these samples
    mixed = Unlearning(top, torch.tensor([1]), loss="cross_entropy")(same, labels)
    torch.testing.assert_close(mixed, -F.cross_entropy(top(torch.cat(same, dim=1)), labels))


def test_check_3_the_gradient_of_mixing_is_the_weighted_sum_over_pairs() -> None:
    embedded = torch.randn(5, 3, requires_grad=True)
    mixing = pair_mixing(torch.zeros(5, dtype=torch.long))
    upstream = torch.randn(len(mixing.first), 3)
    (found,) = torch.autograd.grad((mix(embedded, mixing) * upstream).sum(), embedded)
    by_hand = torch.zeros(5, 3)
    for i, j, weight, row in zip(mixing.first, mixing.second, mixing.weight, upstream, strict=True):
        by_hand[i] += weight * row
        by_hand[j] += (1 - weight) * row
    torch.testing.assert_close(found, by_hand)


def test_legacy_credits_each_sample_with_the_mean_of_its_chunk_and_takes_recovery_mixing_for_the_identity() -> None:
    embedded = torch.randn(5, 3, requires_grad=True)
    mixing = pair_mixing(torch.zeros(5, dtype=torch.long))
    upstream = torch.randn(30, 3)
    out: Any = LegacyMix.apply(embedded, mixing)
    torch.testing.assert_close(out, mix(embedded, mixing))
    (found,) = torch.autograd.grad((out * upstream).sum(), embedded)
    torch.testing.assert_close(found, upstream.view(5, 6, 3).mean(dim=1))
    again: Any = LegacyMix.apply(embedded, class_mixing(torch.tensor([0, 0, 1, 1, 1])))
    (found,) = torch.autograd.grad((again * upstream[:5]).sum(), embedded)
    torch.testing.assert_close(found, upstream[:5])


def test_check_4_recovery_mixes_within_a_class_leaves_single_members_and_draws_uniform_weights() -> None:
    labels = torch.arange(400) % 7
    labels[0] = 9
    weights: list[float] = []
    moved = 0
    for _ in range(5):
        mixing = class_mixing(labels)
        assert torch.equal(labels[mixing.second], labels)
        assert mixing.second.sort().values.tolist() == list(range(400))
        embedded = torch.randn(400, 2)
        assert torch.equal(mix(embedded, mixing)[0], embedded[0])
        weights += mixing.weight[1:].tolist()
        moved += int((mixing.first != mixing.second).sum())
    assert kstest(weights, "uniform").pvalue > 0.01 and moved > 1800


def test_check_5_with_a_linear_top_mixing_embeddings_is_mixing_logits() -> None:
    top = nn.Linear(6, 4)
    embedded, mixing = torch.randn(5, 6), pair_mixing(torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(top(mix(embedded, mixing)), mix(top(embedded), mixing))


@pytest.mark.parametrize("kind", ["unlikelihood", "cross_entropy"])
@pytest.mark.parametrize("gradient", ["chain_rule", "legacy"])
def test_check_6_a_small_step_raises_the_loss_to_forget_and_lowers_the_one_to_recover(gradient: Any, kind: Any) -> None:
    forget, recovery = labelled([0] * 6), labelled([1, 1, 1, 2, 2, 2])
    for examples, sign in ((forget, 1), (recovery, -1)):
        model = halves()
        before = loss(model, examples)
        active = parties(model, examples, Rates(1e-3))
        active.round(torch.arange(6), Unlearning(active.top, torch.tensor([0]), True, gradient, kind))
        assert sign * (loss(model, examples) - before) > 1e-6


def test_check_7_one_party_whose_bottom_is_frozen_and_the_identity_unlearns_a_head_alone() -> None:
    head, plain = nn.Linear(4, 3), nn.Linear(4, 3)
    plain.load_state_dict(head.state_dict())
    scale = nn.Parameter(torch.ones(()))

    class Identity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    features, labels = torch.randn(6, 4), torch.zeros(6, dtype=torch.long)
    transport = InProcess([PassiveParty(0, Identity(), features, Rates(1e-30))])
    objective = Unlearning(head, torch.tensor([0]), loss="cross_entropy")
    ActiveParty(head, labels, transport, Rates(0.1)).round(torch.arange(6), objective)
    assert float(scale.detach()) == 1.0
    (-F.cross_entropy(plain(mix(features, pair_mixing(labels))), mix_labels := torch.zeros(45).long())).backward()
    assert len(mix_labels) == 45 and plain.weight.grad is not None
    torch.testing.assert_close(head.weight, plain.weight - 0.1 * plain.weight.grad)


# the method


@pytest.fixture(scope="module")
def learnt() -> VerticalModel:
    torch.manual_seed(0)
    model = halves()
    losses = train(model, labelled([y for y in range(5) for _ in range(12)]), epochs=15, rates=Rates(0.1, 0.9))
    assert losses[-1] < 0.1 < losses[0]
    return model


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"mixup": False},
        {"interleave": True},
        {"gradient": "legacy", "lr": 0.3},
        {"recover": False},
        {"loss": "cross_entropy", "epochs": 100},
    ],
)
def test_it_forgets_and_stops_at_chance(learnt: VerticalModel, knobs: dict[str, Any]) -> None:
    model = copy.deepcopy(learnt)
    outcome = vertical(model, labelled([0] * 12, 1), labelled([1, 2, 3, 4] * 3, 1), **knobs)
    assert outcome.model is model
    assert outcome.facts["forget_accuracy_before"] == 1.0 and outcome.facts["stopped_early"] == "yes"
    assert float(str(outcome.facts["forget_accuracy_after"])) <= 0.1
    assert len(outcome.curves["forget accuracy"]) == int(str(outcome.facts["epochs"])) + 1
    assert loss(model, labelled([0] * 12, 2)) > loss(learnt, labelled([0] * 12, 2)) + 1.0


def test_several_labels_are_forgotten_where_no_loss_was_left_and_climbing_cross_entropy_moves_nothing() -> None:
    torch.manual_seed(0)
    sure = halves()
    losses = train(sure, labelled([y for y in range(5) for _ in range(12)]), epochs=60, rates=Rates(0.1, 0.9))
    assert losses[-1] < 1e-4
    forget, recovery = labelled([0, 2] * 10, 1), labelled([1, 3, 4] * 3, 1)
    climbed = vertical(copy.deepcopy(sure), forget, recovery, loss="cross_entropy").facts
    assert climbed["forget_accuracy_after"] == 1.0 and climbed["stopped_early"] == "no"
    outcome = vertical(sure, forget, recovery)
    assert outcome.facts["labels"] == [0, 2] and outcome.facts["stopped_early"] == "yes"


def test_unlikelihood_is_minus_log_of_the_rest_and_exact_where_the_rest_rounds_to_nothing() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    own = logits.softmax(dim=1)[torch.arange(6), labels]
    torch.testing.assert_close(unlikelihood(logits, labels), -(1 - own).log().mean())
    sure = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(unlikelihood(sure, torch.tensor([0])), sure)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -0.5, -0.5]]))


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_an_ordinary_classifier_is_cut_before_its_head_and_put_together_again(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = make()
    names, statistics = list(model.state_dict()), {n: b.clone() for n, b in model.named_buffers()}
    examples = examples_for("vit", 12)
    forget = examples.select([i for i in range(12) if int(examples[i]["labels"]) == int(examples[0]["labels"])])
    outcome = vertical(model, forget, recover=False, stop_at=None, epochs=2)
    assert list(model.state_dict()) == names
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    assert loss(model, forget) > 2.0 and outcome.facts["rounds"] == 2
    opened, _ = open_model(save(model, None, tmp_path / "cut"))
    assert loss(opened, forget) == pytest.approx(loss(model, forget))


@pytest.mark.parametrize("make", [halves, convolutional])
def test_the_whole_and_each_part_alone_can_be_saved_and_opened(
    make: Callable[[], VerticalModel], tmp_path: Path
) -> None:
    model = make().eval()
    pixels = torch.randn(3, 1, 8, 8)
    opened, _ = open_model(save(model, None, tmp_path / "whole"))
    assert isinstance(opened, VerticalModel) and equal(state(opened), state(model))
    part, _ = open_model(save(model.bottoms[1], None, tmp_path / "one"))
    assert isinstance(part, Part) and len(list(part.parameters())) == len(list(model.bottoms[1].parameters()))
    with torch.no_grad():
        torch.testing.assert_close(part(pixels[..., 4:]), model.bottoms[1](pixels[..., 4:]))


def test_what_cannot_be_done_is_refused(learnt: VerticalModel) -> None:
    forget, recovery = labelled([0] * 4), labelled([1, 2])
    with pytest.raises(RequestError, match="write recover: false"):
        vertical(learnt, forget)
    with pytest.raises(RequestError, match="label 0 is in `forget` and in `recovery`"):
        vertical(learnt, forget, labelled([0, 1]))
    with pytest.raises(RequestError, match="interleave: true needs recovery"):
        vertical(learnt, forget, recover=False, interleave=True)
    with pytest.raises(RequestError, match="needs images with a label each"):
        vertical(learnt, examples_for("llama", 2), recovery)
    with pytest.raises(RequestError, match="no linear layer"):
        vertical(tiny_llama(num_labels=7), forget, recovery)
    with pytest.raises(RunError, match="nothing to forget"):
        vertical(learnt, labelled([9] * 4), recovery)
    with pytest.raises(RequestError, match="1 spans of columns for 2"):
        halves(columns=[[0, 8]])


class Difference(nn.Module):
    """A top that says by how much the parties' embeddings differ."""

    def forward(self, embeddings: Tensor) -> Tensor:
        ours, theirs = embeddings.chunk(2, dim=1)
        return ours - theirs


@pytest.mark.parametrize("gradient", ["chain_rule", "legacy"])
def test_all_parties_mix_alike(gradient: Any) -> None:
    """Parties that see the same differ in nothing after mixing either, so every class is as likely as the others."""
    seen, labels = torch.randn(9, 4), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    recovery = Unlearning(Difference(), NONE, gradient=gradient)([seen, seen.clone()], labels)
    assert recovery.item() == pytest.approx(math.log(4), abs=1e-6)
    forgetting = Unlearning(Difference(), labels.unique(), gradient=gradient)([seen, seen.clone()], labels)
    assert forgetting.item() == pytest.approx(-math.log(1 - 1 / 4), abs=1e-6)
