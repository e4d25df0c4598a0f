"""What must hold exactly of class prompts, on four families of classifiers with different ways of pooling."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import overhaul as oh
from conftest import examples_for, tiny_llama, tiny_resnet, tiny_vit
from contract import Case, pictures
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError, RunError
from overhaul.forget.prompt_tokens import Gated, mixed_prompts, prompt_tokens, terms, wrong_prompts
from overhaul.forget.prompt_tokens.gating import all_subsets, gated, linear_probe, logits_under, recover, uniform_kl
from overhaul.forget.prompt_tokens.prompts import CLOSED, PromptedClassifier, inputs_of
from overhaul.forward import forward
from overhaul.models import save
from overhaul.recipe.run import run

OPTIONS: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 10,
    "initializer_range": 0.2,
}  # fmt: skip
IMAGES = {**OPTIONS, "image_size": 8, "patch_size": 4, "num_channels": 1}
BANDS = {**OPTIONS, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8}
CLASSES = 10


CASE = Case(
    method=prompt_tokens,
    materials=lambda: {
        "model": KINDS["ViT"](),
        "full": pictures(list(range(10)) * 2),
        "forget": pictures([3] * 4, 1),
    },
    knobs={"epochs": 2.0, "batch_size": 5},
    varied={
        "epochs": (2.0, 1.0),
        "lr": (1e-3, 1e-2),
        "batch_size": (5, 4),
        "weights": ("lora", "all"),
        "rank": (4, 2),
        "alpha": (4, 8),
        "dropout": (0.1, 0.5),
        "prompts_per_class": (1, 2),
        "harden": (False, True),
    },
    apart={"random state": "dropout and the wrong prompts are drawn from it"},
)


def build(name: str, config: str, options: Mapping[str, Any]) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options)).eval()


KINDS: dict[str, Callable[[], nn.Module]] = {
    "ViT": lambda: build("ViTForImageClassification", "ViTConfig", IMAGES),
    "DINOv2": lambda: build("Dinov2ForImageClassification", "Dinov2Config", IMAGES),
    "DeiT": lambda: build("DeiTForImageClassificationWithTeacher", "DeiTConfig", IMAGES),
    "AST": lambda: build("ASTForAudioClassification", "ASTConfig", BANDS),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def data_for(kind: str, count: int) -> Examples:
    """Every class in turn; random inputs."""
    draw = torch.Generator().manual_seed(1)
    name, shape = ("input_values", (16, 8)) if kind == "AST" else ("pixel_values", (1, 8, 8))
    labels = [n % CLASSES for n in range(count)]
    items = [{name: torch.randn(*shape, generator=draw), "labels": torch.tensor(label)} for label in labels]
    return Examples(items, [{"label": label} for label in labels])


def prompted(kind: str, tokens: int = 1) -> tuple[PromptedClassifier, Examples]:
    data = data_for(kind, 20)
    return PromptedClassifier.around(KINDS[kind](), collate(data.items), tokens), data


def logits(model: PromptedClassifier, data: Examples, prompts: Any = None) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(collate(data.items), model), prompts=prompts).logits


def labelled(data: Examples, *classes: int) -> Examples:
    return data.select([i for i, item in enumerate(data.items) if int(item["labels"]) in classes])


def test_kl_from_uniform_is_zero_for_equal_logits_alone_and_is_the_mean_negative_log_probability_less_log_c() -> None:
    z = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    oracle = F.kl_div(z.log_softmax(-1), torch.full((6, 7), 1 / 7), reduction="none").sum(-1)
    assert torch.allclose(uniform_kl(z), oracle, atol=1e-6)
    assert torch.allclose(uniform_kl(z), -z.softmax(-1).log().mean(-1) - math.log(7), atol=1e-6)
    assert (uniform_kl(z) > 0.01).all()
    assert torch.allclose(uniform_kl(torch.full((2, 7), 3.5)), torch.zeros(2), atol=1e-6)


def test_the_order_of_prompts_does_not_matter_and_their_choice_does(kind: str) -> None:
    model, data = prompted(kind)
    straight = logits(model, data, [0, 3, 5, 8])
    assert (straight - logits(model, data, [8, 0, 5, 3])).abs().max() < 1e-5
    assert (straight - logits(model, data, [0, 3, 5, 9])).abs().max() > 1e-3


def test_without_prompts_the_logits_are_those_of_the_plain_model(kind: str) -> None:
    model, data = prompted(kind)
    with torch.no_grad():
        plain = KINDS[kind]()(**inputs_of(collate(data.items), model)).logits
    assert torch.equal(logits(model, data, []), plain)
    assert not torch.equal(logits(model, data), plain)


def test_prompts_stand_before_the_tokens_and_the_head_reads_cls_behind_them() -> None:
    model, data = prompted("ViT")
    vit: Any = model.inner
    with torch.no_grad():
        state = vit.vit.embeddings(collate(data.items)["pixel_values"])
        state = torch.cat([model.bank[[2, 7]].flatten(0, 1).expand(len(data), -1, -1), state], dim=1)
        for block in vit.vit.layers:
            state = block(state, None)
        expected = vit.classifier(vit.vit.layernorm(state)[:, 2])
    assert torch.allclose(logits(model, data, [2, 7]), expected, atol=1e-6)


def test_each_example_can_have_prompts_of_its_own() -> None:
    model, data = prompted("ViT", tokens=2)
    rows = torch.tensor([[n % 10, (n + 3) % 10] for n in range(len(data))])
    together = logits(model, data, rows)
    for n in (0, 7):
        assert torch.allclose(together[n], logits(model, data[n : n + 1], rows[n].tolist())[0], atol=1e-6)


def test_forgetting_is_bit_for_bit_the_forward_with_the_other_prompts(kind: str) -> None:
    model, data = prompted(kind)
    expected = logits(model, data, [0, 1, 3, 4, 5, 7, 8, 9])
    model.forget([6, 2])
    assert torch.equal(logits(model, data), expected)
    assert model.available == [0, 1, 3, 4, 5, 7, 8, 9]


def test_wrong_prompts_never_contain_the_label_and_mixed_ones_contain_it_once() -> None:
    labels = torch.arange(CLASSES).repeat(20)
    torch.manual_seed(0)
    for count in range(CLASSES):
        wrong = wrong_prompts(labels, CLASSES, count)
        mixed = mixed_prompts(labels, CLASSES, count)
        assert wrong.shape == (200, count) and mixed.shape == (200, count + 1)
        assert not (wrong == labels[:, None]).any()
        at = mixed == labels[:, None]
        assert (at.sum(dim=1) == 1).all() and (at == at[0]).all()  # at one place, drawn once for the batch
        for rows in (wrong.tolist(), mixed.tolist()):
            assert all(len(set(row)) == len(row) for row in rows)
    first = wrong_prompts(torch.zeros(9000, dtype=torch.long), CLASSES, 1).flatten().bincount(minlength=CLASSES)
    assert first[0] == 0 and (first[1:] > 800).all()


def test_the_number_of_prompts_is_drawn_once_a_batch_uniformly_from_0_to_c_minus_1() -> None:
    seen: list[tuple[int, ...]] = []

    class Watching(nn.Linear):
        classes = CLASSES

        def forward(self, pixel_values: Tensor, prompts: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            seen.append(tuple(prompts.shape))
            return type("Output", (), {"logits": torch.zeros(len(pixel_values), CLASSES)})

    torch.manual_seed(0)
    batch = collate(data_for("ViT", 4).items)
    watching: Any = Watching(1, 1)
    for _ in range(1000):
        forward(Gated(watching, ["pixel_values"]), batch)
    assert {shape[0] for shape in seen} == {4}
    for counts in ([shape[1] - 1 for shape in seen[::2]], [shape[1] for shape in seen[1::2]]):
        frequency = torch.tensor(counts).bincount(minlength=CLASSES)
        assert len(frequency) == CLASSES and (frequency > 60).all() and (frequency < 140).all()


def test_the_loss_is_cross_entropy_under_the_right_prompt_and_kl_under_wrong_ones() -> None:
    model, data = prompted("ViT")
    batch = collate(data.items)
    torch.manual_seed(3)
    stacked = forward(Gated(model, ["pixel_values"]), batch)
    right, wrong = (term.loss(stacked, batch) / term.count(batch) for term in terms())
    torch.manual_seed(3)
    counts = torch.randint(CLASSES, (2,)).tolist()
    given = mixed_prompts(batch["labels"], CLASSES, counts[0]), wrong_prompts(batch["labels"], CLASSES, counts[1])
    mixed, others = (logits(model, data, prompts) for prompts in given)
    p = mixed.softmax(-1)[torch.arange(len(data)), batch["labels"]]
    assert torch.allclose(right, -p.log().mean(), atol=1e-5)
    q = others.softmax(-1)
    assert torch.allclose(wrong, (0.1 * (0.1 / q).log()).sum(-1).mean(), atol=1e-5)


def test_a_prompt_that_is_not_given_has_a_gradient_of_exactly_zero(kind: str) -> None:
    model, data = prompted(kind)
    batch = collate(data.items)
    out = model(**inputs_of(batch, model), prompts=[1, 4]).logits
    F.cross_entropy(out, batch["labels"]).backward()
    assert model.bank.grad is not None
    sizes = model.bank.grad.abs().sum(dim=(1, 2))
    assert (sizes[[1, 4]] > 0).all()
    assert not sizes[[0, 2, 3, 5, 6, 7, 8, 9]].any()


def test_giving_the_deleted_vector_back_restores_the_logits_bit_for_bit(kind: str) -> None:
    model, data = prompted(kind)
    before, bank = logits(model, data), model.bank.detach().clone()
    model.forget([9])
    assert not torch.equal(logits(model, data), before)
    with torch.no_grad():
        again = model.with_tokens(
            torch.cat([model.bank.flatten(0, 1), bank[9]]), **inputs_of(collate(data.items), model)
        )
    assert torch.equal(again, before)


def test_after_a_deletion_no_tensor_of_the_state_holds_the_vector() -> None:
    model, _ = prompted("ViT")
    gone = model.bank[4].detach().clone().flatten()
    assert holds(model, gone)
    model.forget([4])
    assert not holds(model, gone)
    assert model.bank.untyped_storage().nbytes() == 9 * 32 * 4


def holds(model: nn.Module, vector: Tensor) -> bool:
    """Whether the storage behind some tensor of the state contains the vector."""
    storages = [tensor.detach().untyped_storage() for tensor in model.state_dict().values()]
    flat = [torch.tensor([], dtype=torch.float32).set_(storage) for storage in storages]
    windows = [each.unfold(0, len(vector), 1) for each in flat if len(each) >= len(vector)]
    return any(bool((window == vector).all(dim=1).any()) for window in windows)


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_it_trains_forgets_is_saved_and_opens_again(kind: str, weights: Any, tmp_path: Path) -> None:
    data = data_for(kind, 10)
    model = KINDS[kind]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcome = prompt_tokens(model, data, weights=weights, epochs=2, batch_size=5)
    trained = outcome.model
    assert isinstance(trained, PromptedClassifier)
    assert {name for name, _ in trained.inner.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert all(parameter.requires_grad for parameter in trained.parameters()) and not trained.training
    changed = {name for name, tensor in trained.inner.state_dict().items() if not torch.equal(before[name], tensor)}
    if weights == "lora":
        leaves = {name.split(".")[-2] for name in changed}
        assert leaves == {"q_proj", "v_proj"} | {name for name in leaves if "classifier" in name or name == "dense"}
        assert not any(name.endswith("bias") and "proj" in name for name in changed)
    else:
        assert any("mlp" in name or "fc1" in name or "intermediate" in name for name in changed)
    assert len(outcome.curves["loss"]) == 4
    save(trained, None, tmp_path / "bank")
    opened, _ = oh.open(tmp_path / "bank")
    assert isinstance(opened, PromptedClassifier) and torch.equal(logits(opened, data), logits(trained, data))
    facts = prompt_tokens(opened, None, labelled(data, 3, 5)).facts
    assert facts["forgotten"] == [3, 5] and facts["remaining"] == opened.available == [0, 1, 2, 4, 6, 7, 8, 9]
    assert torch.equal(logits(opened, data), logits(trained, data, opened.available))
    save(opened, None, tmp_path / "forgot")
    again, _ = oh.open(tmp_path / "forgot")
    assert isinstance(again, PromptedClassifier) and again.bank.shape == (8, 1, 32)
    assert torch.equal(logits(again, data), logits(opened, data))
    assert (
        json.loads((tmp_path / "forgot" / "config.json").read_text())["overhaul"]
        == "overhaul.forget.prompt_tokens.prompts"
    )


def test_forgetting_later_changes_no_weight() -> None:
    data = data_for("ViT", 10)
    trained: Any = prompt_tokens(KINDS["ViT"](), data, epochs=1).model
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    prompt_tokens(trained, data, labelled(data, 3))
    after = trained.state_dict()
    assert torch.equal(after["bank"], before["bank"][[0, 1, 2, 4, 5, 6, 7, 8, 9]])
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items() if name != "bank")


def test_hardening_empties_the_row_and_closes_the_class() -> None:
    for kind in ("ViT", "DeiT"):
        model, data = prompted(kind)
        expected = logits(model, data, [0, 1, 2, 3, 5, 6, 7, 8, 9])
        prompt_tokens(model, None, labelled(data, 4)[:1], harden=True)
        found = logits(model, data)
        others = [name for name in range(CLASSES) if name != 4]
        assert torch.equal(found[:, others], expected[:, others]) and (found[:, 4] == CLOSED).all()
        assert len(model.heads()) == (2 if kind == "DeiT" else 1)
        assert all(not head.weight[4].any() for head in model.heads())


def test_a_trained_bank_gates_its_classes_and_the_attacks_find_them_again() -> None:
    """Ten images, one for each class: what is learnt is certain, so only the gate decides."""
    levels = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = [n % CLASSES for n in range(20)]
    items = [{"pixel_values": levels[label], "labels": torch.tensor(label)} for label in labels]
    data = Examples(items, [{}] * 20)
    options = {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    outcome = prompt_tokens(tiny_vit(**options), data, weights="all", epochs=150, batch_size=20, lr=3e-3)
    model = outcome.model
    assert isinstance(model, PromptedClassifier)
    assert gated(model, data, model.available).retained == 1.0
    one = all_subsets(model, data, 1)
    assert one["retained"][0] > 0.95 and one["false_unlocks"][0] < 0.1
    assert one["forgotten_kl"][0] < one["retained_kl"][0] / 10
    facts: dict[str, Any] = prompt_tokens(model, data, labelled(data, 3)).facts
    assert facts["retained_accuracy"] > 0.95 and facts["recovered_accuracy"] == 1.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe = linear_probe(model, data, data)
    assert sorted(probe) == list(range(CLASSES)) and probe[3] == 1.0
    fresh = recover(model, labelled(data, 3)[:1], steps=5)
    assert fresh.shape == (1, 32)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_all_subsets_is_the_mean_over_every_set_and_changes_nothing() -> None:
    model, data = prompted("ViT")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = all_subsets(model, data, 1)
    right: list[float] = []
    for name in range(CLASSES):
        values, labels = logits_under(model, data, [one for one in range(CLASSES) if one != name])
        right.append(float((values.argmax(-1) == labels)[labels == name].float().mean()))
    mean = sum(right) / CLASSES
    assert found["forgotten"][0] == pytest.approx(mean)
    assert found["forgotten"][1] == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in right) / CLASSES))
    assert all_subsets(model, data, 5, limit=4) == all_subsets(model, data, 5, limit=4)
    assert all_subsets(model, data, 5, limit=4) != all_subsets(model, data, 5, limit=5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_false_unlock_is_a_forgotten_image_that_a_remaining_class_claims_with_more_than_one_half() -> None:
    model, data = prompted("ViT")
    (head,) = model.heads()
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 9.0] + [0.0] * 8))
    assert gated(model, data, [0, 1]).false_unlocks == 1.0
    assert gated(model, data, [0, 2]).false_unlocks == 0.0
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.0, 0.1] + [0.0] * 8))
    assert gated(model, data, [0, 1]).false_unlocks == 0.0


def test_the_facts_are_measured_on_what_is_given() -> None:
    model, data = prompted("ViT")
    facts: dict[str, Any] = prompt_tokens(model, None, labelled(data, 3)).facts
    assert "retained_accuracy" not in facts
    values, labels = logits_under(model, labelled(data, 3))
    assert facts["forgotten_accuracy"] == float((values.argmax(-1) == labels).float().mean())
    assert facts["forgotten_kl"] == pytest.approx(float(uniform_kl(values).mean()), rel=1e-4)
    facts = prompt_tokens(model, data, labelled(data, 4)[:1]).facts
    values, labels = logits_under(model, labelled(data, *model.available))
    assert facts["retained_accuracy"] == pytest.approx(float((values.argmax(-1) == labels).float().mean()))
    assert "recovered_accuracy" not in facts  # one image cannot be both fitted and judged


def test_what_cannot_be_done_is_refused_and_says_what_could_be() -> None:
    model, data = prompted("ViT")
    prompt_tokens(model, None, labelled(data, 3)[:1])
    with pytest.raises(RequestError, match=r"\[3\] are forgotten already. Those that are left are \[0, 1, 2, 4"):
        prompt_tokens(model, None, labelled(data, 3, 4))
    assert 4 in model.available
    strange = Examples([{**data.items[0], "labels": torch.tensor(12)}], [{}])
    with pytest.raises(RequestError, match=r"no classes \[12\]. Those that can be forgotten are \[0, 1, 2, 4"):
        prompt_tokens(model, None, strange)
    with pytest.raises(RequestError, match="at least one must stay"):
        prompt_tokens(model, None, labelled(data, *model.available))
    with pytest.raises(RequestError, match="has its prompts already"):
        prompt_tokens(model, data)
    with pytest.raises(RequestError, match=r"no prompts of the classes \[3, 11\]"):
        logits(model, data, [3, 11, 1])
    with pytest.raises(RequestError, match="trained on the role `full`"):
        prompt_tokens(KINDS["ViT"](), None, labelled(data, 3))
    with pytest.raises(RequestError, match=r"labels \[12\], but the model's head knows"):
        prompt_tokens(KINDS["ViT"](), strange)


def test_models_that_cannot_be_prompted_are_refused() -> None:
    images = examples_for("resnet", 4)
    with pytest.raises(RequestError, match="no tokens"):
        prompt_tokens(tiny_resnet(), images)
    with pytest.raises(RequestError, match="reads text"):
        prompt_tokens(tiny_llama(), examples_for("llama", 4))
    with pytest.raises(RequestError, match="classes of transformers"):
        prompt_tokens(nn.Linear(2, 2), images)
    relative = build(
        "BeitForImageClassification", "BeitConfig", {**IMAGES, "use_relative_position_bias": True, "vocab_size": 8}
    )
    with pytest.raises(RequestError, match="more tokens than the image has"):
        prompt_tokens(relative, images)


def test_a_training_that_diverges_stops_with_finite_weights() -> None:
    data = data_for("ViT", 20)
    data.items[7]["pixel_values"][:] = math.inf
    model = KINDS["ViT"]()
    with pytest.raises(RunError, match="stopped at step"):
        prompt_tokens(model, data, epochs=1, batch_size=5)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_recipe_trains_forgets_and_judges(tmp_path: Path) -> None:
    save(tiny_vit(), None, tmp_path / "vit")
    recipe = {
        "model": str(tmp_path / "vit"),
        "materials": {
            "full": {"from": "starter:digits", "limit": 60},
            "forget": {"from": "starter:digits", "where": {"label": 3}, "limit": 10},
        },
        "steps": [{"forget.prompt_tokens": {"epochs": 1}}],
        "judge": {"forgotten": {"accuracy": "forget"}},
    }
    run(recipe, tmp_path / "out")
    opened, _ = oh.open(tmp_path / "out" / "model")
    assert isinstance(opened, PromptedClassifier) and 3 not in opened.available and len(opened.available) == 9
