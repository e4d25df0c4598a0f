from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FAMILIES, examples_for, tiny_llama, tiny_resnet, tiny_vit
from contract import Case, pictures
from overhaul.data.examples import Examples, collate, join
from overhaul.errors import RequestError
from overhaul.forget.sisa import example_ids, sisa
from overhaul.forget.sisa.ensemble import Ensemble, aggregate
from overhaul.forget.sisa.shards import (
    ShardMap,
)
from overhaul.forward import forward
from overhaul.generation import generate
from overhaul.models import open_model, save
from overhaul.objectives import evaluate

EASY: dict[str, Any] = {"shards": 3, "slices": 2, "epochs": 2.0, "batch_size": 4, "lr": 1e-2}
COUNT = 12
SHALLOW: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2}, "gpt2": {"n_layer": 2}, "vit": {"num_hidden_layers": 2}, "resnet": {"depths": [2, 1]},
}  # fmt: skip
CASES = [("llama", "lora"), ("vit", "lora"), ("llama", "all"), ("resnet", "all")]


CASE = Case(
    method=sisa,
    materials=lambda: {"model": base("vit"), "full": pictures([n % 3 for n in range(12)]), "forget": pictures([0])},
    knobs={"shards": 2, "slices": 2, "epochs": 2.0, "batch_size": 3, "lr": 1e-2},
    varied={
        "shards": (2, 3),
        "slices": (2, 1),
        "epochs": (2.0, 4.0),
        "aggregate": ("vote", "mean"),
        "weights": ("lora", "all"),
        "batch_size": (3, 2),
        "lr": (1e-2, 1e-3),
        "warmup": (0.1, 2),
        "schedule": ("linear", "constant"),
        "rank": (8, 2),
        "alpha": (16, 4),
    },
    idle={"checkpoints": "where they are kept changes nothing"},
    apart={
        "requires_grad": "the base is part of the ensemble now, and frozen there",
        "random state": "new adapters are drawn from it",
    },
)


def base(family: str) -> nn.Module:
    torch.manual_seed(1)
    return FAMILIES[family](**SHALLOW[family])


def ensemble(family: str, weights: Any, full: Examples, forget: Examples | None = None, **knobs: Any) -> Any:
    """The outcome on a base that is the same every time."""
    model = base(family)
    torch.manual_seed(0)
    return sisa(model, full, forget, weights=weights, **{**EASY, **knobs})


def tensors(model: nn.Module) -> dict[int, dict[str, Tensor]]:
    assert isinstance(model, Ensemble)
    return {shard: model.tensors(shard) for shard in model.config.members}


def same_members(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[shard][name]) for shard, state in ours.items() for name, tensor in state.items()
    )


def logits(model: nn.Module, examples: Examples) -> Tensor:
    return evaluate(model, lambda logits, _: logits, [collate(examples.items)])[0]


@pytest.mark.parametrize(("family", "weights"), CASES)
def test_check_8_and_9_networks_forget_exactly_and_untouched_members_keep_their_hash(
    family: str, weights: str, tmp_path: Path
) -> None:
    full = examples_for(family, COUNT)
    trained = ensemble(family, weights, full, checkpoints=str(tmp_path / "kept")).model
    folder = save(trained, None, tmp_path / "model")
    opened, _ = open_model(folder)
    before = {shard: trained.digest(shard) for shard in range(3)}
    assert torch.equal(logits(opened, full), logits(trained, full))
    outcome = sisa(opened, full, full.select([5]), checkpoints=str(tmp_path / "kept"))
    assert outcome.model is opened
    scratch = ensemble(family, weights, full, full.select([5])).model
    assert same_members(opened, scratch)
    assert torch.equal(logits(opened, full), logits(scratch, full))
    (touched,) = outcome.facts["trained_shards"]  # pyright: ignore[reportGeneralTypeIssues]
    now = {shard: opened.digest(shard) for shard in range(3)}  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    assert [shard for shard in range(3) if now[shard] != before[shard]] == [touched]


def test_checkpoints_make_forgetting_cheaper_and_give_the_same_member(tmp_path: Path) -> None:
    full = examples_for("vit", 18)
    folder = str(tmp_path / "kept")
    with_folder = ensemble("vit", "lora", full, slices=3, checkpoints=folder).model
    without = ensemble("vit", "lora", full, slices=3).model
    places = ShardMap.from_json(with_folder.config.shard_map)
    last = example_ids(full).index(places.slices[1][2][0])
    cheap, dear = (
        sisa(with_folder, full, full.select([last]), checkpoints=folder),
        sisa(without, full, full.select([last])),
    )
    assert same_members(cheap.model, dear.model)
    assert (cheap.made["record"][-1]["retrained"][0]["first_slice"], cheap.facts["visits"]) == (2, 4)
    assert dear.facts["visits"] == 2 + 4 + 4
    files = {path.name for path in (tmp_path / "kept").iterdir()}
    assert len(files) == 9 and all(name.endswith(".safetensors") for name in files)


def test_every_shard_learns_its_own_examples_and_the_base_stays() -> None:
    full = examples_for("vit", COUNT)
    before = base("vit").state_dict()
    model = ensemble("vit", "all", full, slices=1, epochs=40.0, lr=3e-3).model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base.state_dict().items())
    places = ShardMap.from_json(model.config.shard_map)
    for place, one in enumerate(example_ids(full)):
        (shard,) = places.touched([one])
        member = model.member(shard)
        assert int(logits(member, full.select([place])).argmax()) == int(full.items[place]["labels"])


def test_batch_norm_statistics_belong_to_the_member() -> None:
    full = examples_for("resnet", COUNT)
    model = ensemble("resnet", "all", full).model
    name = next(name for name in model.tensors(0) if name.endswith("running_mean"))
    means = [model.tensors(shard)[name] for shard in range(3)]
    assert not torch.equal(means[0], means[1]) and not torch.equal(means[1], means[2])
    assert torch.equal(model.base.state_dict()[name], base("resnet").state_dict()[name])


@pytest.mark.parametrize(("family", "weights"), [("gpt2", "lora"), ("vit", "lora"), ("llama", "all")])
def test_a_member_is_a_plain_model_that_saves_and_loads(family: str, weights: str, tmp_path: Path) -> None:
    full = examples_for(family, COUNT)
    model = ensemble(family, weights, full, slices=1).model
    member = model.member(2)
    assert type(member) is type(FAMILIES[family]())
    inputs = {name: tensor for name, tensor in collate(full.items).items() if name != "labels"}
    with torch.no_grad():
        expected = model.member_logits(**inputs)[2]
    opened, _ = open_model(save(member, None, tmp_path / "member"))
    assert torch.allclose(logits(opened, full), expected, atol=1e-5)


def test_a_class_with_most_votes_always_wins_and_ties_go_to_the_more_probable_one() -> None:
    members = torch.randn(5, 200, 4) * 8
    votes = nn.functional.one_hot(members.argmax(dim=-1), 4).sum(dim=0)
    decided = aggregate(members, "vote")
    assert (votes.gather(1, decided.argmax(dim=-1)[:, None])[:, 0] == votes.max(dim=-1).values).all()
    tie = torch.tensor([[[2.0, 0.0]], [[0.0, 9.0]]])
    assert int(aggregate(tie, "vote").argmax()) == 1
    for how in ("vote", "mean"):
        assert torch.allclose(aggregate(members, how).exp().sum(dim=-1), torch.ones(200), atol=1e-5)
        assert aggregate(members * 1e4, how).isfinite().all()
    assert torch.allclose(aggregate(members, "mean").exp(), members.softmax(dim=-1).mean(dim=0), atol=1e-6)


def test_a_language_model_aggregates_token_probabilities_and_generates_by_them() -> None:
    full = examples_for("llama", COUNT)
    model = ensemble("llama", "lora", full, aggregate="mean").model
    batch = {name: tensor for name, tensor in collate(full.items).items() if name != "labels"}
    with torch.no_grad():
        mean = torch.stack([forward(model.member(shard), batch).softmax(dim=-1) for shard in range(3)]).mean(dim=0)
        assert torch.allclose(forward(model, batch).exp(), mean, atol=1e-5)
        prompt = full.items[0]["input_ids"][:4]
        expected = prompt
        for _ in range(5):
            following = forward(model, {"input_ids": expected[None]})[0, -1].argmax()
            expected = torch.cat([expected, following[None]])
    assert generate(model, [prompt], 5, []) == [expected[4:].tolist()]


def test_an_example_that_is_alone_in_its_slice_trains_batch_norm_too() -> None:
    full = examples_for("resnet", 4)
    outcome = ensemble("resnet", "all", full, shards=2, slices=2, epochs=1.5)
    assert outcome.facts["visits"] == 2 * (2 + 2)


def test_an_emptied_shard_drops_its_member_also_in_the_saved_model(tmp_path: Path) -> None:
    full = examples_for("vit", 9)
    model = ensemble("vit", "lora", full, slices=1).model
    places, ids = ShardMap.from_json(model.config.shard_map), example_ids(full)
    gone = full.select([ids.index(one) for one in places.ids(1)])
    outcome = sisa(model, full, gone)
    assert outcome.facts["members"] == 2 and model.config.members == [0, 2]
    opened, _ = open_model(save(model, None, tmp_path / "two"))
    assert torch.equal(logits(opened, full), logits(model, full))


def test_equal_examples_leave_together() -> None:
    full = examples_for("vit", COUNT)
    doubled = join([full, full.select([5])])
    assert example_ids(doubled)[5] == example_ids(doubled)[-1]
    model = ensemble("vit", "lora", doubled).model
    once = ensemble("vit", "lora", full).model
    assert not same_members(model, once)
    sisa(model, doubled, full.select([5]))
    sisa(once, full, full.select([5]))
    assert same_members(model, once)


def test_the_record_says_what_was_trained_and_what_members_there_are() -> None:
    full = examples_for("vit", COUNT)
    model = ensemble("vit", "lora", full).model
    outcome = sisa(model, full, full.select([2, 3]))
    first, second = outcome.made["record"]
    assert json.loads(json.dumps(outcome.made["record"])) == json.loads(json.dumps(model.config.record))
    assert [one["shard"] for one in first["retrained"]] == [0, 1, 2] and not first["forgotten"]
    assert sorted(second["forgotten"]) == sorted(example_ids(full.select([2, 3])))
    assert second["after"] == {str(shard): model.digest(shard) for shard in range(3)}
    assert second["before"] == first["after"] and not first["before"]
    changed = [int(shard) for shard in second["after"] if second["after"][shard] != second["before"][shard]]
    assert changed == [one["shard"] for one in second["retrained"]]
    assert second["visits"] < second["from_scratch"] == outcome.facts["visits_from_scratch"]


def test_data_may_lack_what_is_forgotten_but_not_what_the_shard_keeps() -> None:
    full = examples_for("vit", COUNT)
    model = ensemble("vit", "lora", full).model
    places, ids = ShardMap.from_json(model.config.shard_map), example_ids(full)
    gone, kept = (ids.index(one) for one in places.slices[0][0])
    before = model.digest(0)
    with pytest.raises(RequestError, match="1 of 3 examples that the touched shards keep are not in `full`"):
        sisa(model, full.select([i for i in range(COUNT) if i != kept]), full.select([gone]))
    assert model.digest(0) == before
    sisa(model, full.select([i for i in range(COUNT) if i != gone]), full.select([gone]))
    assert model.digest(0) != before


def test_requests_that_cannot_be_met_say_why() -> None:
    full, strangers = examples_for("vit", COUNT), examples_for("vit", 2, seed=9)
    model = ensemble("vit", "lora", full).model
    with pytest.raises(RequestError, match="2 of 2 examples to forget were never in a shard"):
        sisa(model, full, strangers)
    with pytest.raises(RequestError, match="name what it is to forget"):
        sisa(model, full)
    with pytest.raises(RequestError, match="trained with lr: 0.01.*lr: 0.5 is not possible"):
        sisa(model, full, full.select([0]), lr=0.5)
    sisa(model, full, full.select([0]))
    with pytest.raises(RequestError, match="1 of the examples were forgotten before"):
        sisa(model, full, full.select([0]))


def test_models_that_cannot_be_members_are_refused() -> None:
    full = examples_for("vit", COUNT)
    with pytest.raises(RequestError, match='ResNetForImageClassification keeps running statistics.*weights: "all"'):
        sisa(tiny_resnet(), full, **EASY)
    with pytest.raises(RequestError, match="must be of a class of transformers; Linear is none"):
        sisa(nn.Linear(2, 2), full, **EASY)
    used = tiny_llama()
    sisa(used, examples_for("llama", COUNT), **EASY)
    with pytest.raises(RequestError, match="carries adapters already"):
        sisa(used, examples_for("llama", COUNT), **EASY)
    with pytest.raises(RequestError, match="12 different examples cannot fill 5 shards of 4 slices"):
        sisa(tiny_vit(), full)


def test_an_ensemble_cannot_be_trained_as_one() -> None:
    full = examples_for("vit", COUNT)
    model = ensemble("vit", "all", full).model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    sisa(model, full, full.select([0]))
    assert not any(parameter.requires_grad for parameter in model.parameters())
