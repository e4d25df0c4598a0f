from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from conftest import examples_for, mean_loss, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_qwen3
from overhaul.data.examples import Batch, Examples, collate
from overhaul.errors import RunError
from overhaul.fit import fit
from overhaul.forget.first_epoch.ledger import Gradients, chosen
from overhaul.forward import forward
from overhaul.influence import (
    activation_similarity,
    conjugate_gradient,
    dot,
    gradient,
    hessian_vector,
    influence,
    lissa,
    plus,
    tracin,
    twice_differentiable,
)
from overhaul.objectives import cross_entropy, cross_entropy_sum

LANGUAGE: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama, "gpt2": tiny_gpt2, "gemma3": tiny_gemma3, "qwen3": tiny_qwen3,
}  # fmt: skip
DAMPING = 0.3


class Net(nn.Module):
    """Images of 4 pixels to 3 classes, through `hidden` units: fewer than 100 weights."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.layers = nn.ModuleList(layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values.flatten(1)
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


def images(count: int, seed: int = 0) -> Examples:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 1, 2, 2, generator=draw, dtype=torch.float64)
    labels = torch.randint(3, (count,), generator=draw)
    return Examples([{"pixel_values": p, "labels": y} for p, y in zip(pixels, labels, strict=True)], [{}] * count)


def random_like(parameters: dict[str, nn.Parameter], seed: int = 0) -> Gradients:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=draw, dtype=p.dtype) for name, p in parameters.items()}


def test_check_5_the_product_is_that_of_the_explicit_hessian() -> None:
    model, examples = Net(4, 5, 3).double(), images(7)
    parameters = chosen(model, "all")
    assert sum(p.numel() for p in parameters.values()) < 100
    batch = collate(examples.items)

    def value(flat: Tensor) -> Tensor:
        at, weights = 0, {}
        for name, p in parameters.items():
            weights[name] = flat[at : at + p.numel()].view_as(p)
            at += p.numel()
        logits = torch.func.functional_call(model, weights, (), {"pixel_values": batch["pixel_values"]})
        return nn.functional.cross_entropy(logits, batch["labels"])

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    hessian = torch.autograd.functional.hessian(value, flat)
    assert isinstance(hessian, Tensor)
    vector = random_like(parameters)
    expected = hessian @ torch.cat([v.flatten() for v in vector.values()])
    for size in (2, 7):
        product = hessian_vector(model, examples, parameters, vector, batch_size=size)
        assert torch.allclose(torch.cat([v.flatten() for v in product.values()]), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LANGUAGE)
def test_check_5_the_product_is_that_of_finite_differences(name: str) -> None:
    model = LANGUAGE[name]()
    examples, parameters = examples_for("llama", 4), chosen(model, "all")
    vector = random_like(parameters)
    vector = {key: value / dot(vector, vector) ** 0.5 for key, value in vector.items()}
    product = hessian_vector(model, examples, parameters, vector)
    step = 2e-3
    gradients: list[Gradients] = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for key, p in parameters.items():
                p.add_(vector[key], alpha=sign * step)
        gradients.append(gradient(model, examples, parameters))
        with torch.no_grad():
            for key, p in parameters.items():
                p.sub_(vector[key], alpha=sign * step)
    expected = {
        key: value / (2 * step * len(examples)) for key, value in plus(gradients[0], gradients[1], -1.0).items()
    }
    apart = plus(product, expected, -1.0)
    assert dot(apart, apart) ** 0.5 < 1e-3 * dot(expected, expected) ** 0.5


@pytest.mark.parametrize("name", LANGUAGE)
def test_attention_is_eager_inside_and_as_it_was_outside(name: str) -> None:
    model = LANGUAGE[name]().train()
    before = model.config._attn_implementation  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt), twice_differentiable(model):
        assert model.config._attn_implementation == "eager"  # pyright: ignore[reportAttributeAccessIssue]
        assert not model.training
        raise KeyboardInterrupt
    assert before == "sdpa" == model.config._attn_implementation  # pyright: ignore[reportAttributeAccessIssue]
    assert model.training


class Ridge:
    """Least squares with a penalty: everything has a closed form. H is that of the mean, in float64."""

    def __init__(self, n: int = 9, d: int = 4) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, d, generator=draw, dtype=torch.float64)
        self.y = torch.randn(n, generator=draw, dtype=torch.float64)
        self.hessian = self.x.T @ self.x / n + DAMPING * torch.eye(d, dtype=torch.float64)
        self.theta = self.solve(torch.ones(n, dtype=torch.float64))
        self.model = nn.Linear(d, 1, bias=False).double()
        with torch.no_grad():
            self.model.weight.copy_(self.theta)

    def solve(self, weights: Tensor) -> Tensor:
        n = len(self.y)
        system = (self.x * weights[:, None]).T @ self.x / n + DAMPING * torch.eye(self.x.shape[1], dtype=torch.float64)
        return torch.linalg.solve(system, (self.x * weights[:, None]).T @ self.y / n)

    @property
    def module(self) -> nn.Module:
        inner = self.model

        class Reads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, pixel_values: Tensor) -> Tensor:
                return self.inner(pixel_values)[:, 0]

        return Reads()

    def examples(self) -> Examples:
        rows = zip(self.x, self.y, strict=True)
        return Examples([{"pixel_values": x, "labels": y} for x, y in rows], [{}] * len(self.y))


def squared(prediction: Tensor, batch: Batch) -> Tensor:
    return 0.5 * (prediction - batch["labels"]).square().sum()


@pytest.mark.parametrize("solver", ["cg", "lissa"])
def test_check_6_influence_on_ridge_regression_is_its_closed_form(solver: str) -> None:
    ridge = Ridge()
    model, examples = ridge.module, ridge.examples()
    parameters = chosen(model, "all")
    found = influence(
        model, examples, examples[:3], examples, parameters, damping=DAMPING, loss=squared, scale=6.0, iterations=400,
        solver=solver,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    gradients = ridge.x * (ridge.x @ ridge.theta - ridge.y)[:, None]
    expected = -gradients @ torch.linalg.solve(ridge.hessian, gradients[:3].T)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_check_6_leaving_one_out_is_influence_over_n_with_the_correction_of_sherman_and_morrison() -> None:
    ridge = Ridge()
    model, examples = ridge.module, ridge.examples()
    n = len(examples)
    found = influence(model, examples, examples, examples, chosen(model, "all"), damping=DAMPING, loss=squared)
    gradients = ridge.x * (ridge.x @ ridge.theta - ridge.y)[:, None]
    leverage = (ridge.x * torch.linalg.solve(ridge.hessian, ridge.x.T).T).sum(1) / n
    for z in range(n):
        weights = torch.ones(n, dtype=torch.float64)
        weights[z] = 0.0
        moved = ridge.solve(weights) - ridge.theta
        # the first-order change of each probe's loss along the exact way of the weights
        exact = gradients @ moved
        assert torch.allclose(-found[z].double() / n / (1 - leverage[z]), exact, rtol=1e-3, atol=1e-6)


def test_check_7_tracin_with_one_checkpoint_is_the_product_of_gradients() -> None:
    model = tiny_llama(num_hidden_layers=2)
    samples, probes = examples_for("llama", 3, seed=1), examples_for("llama", 2, seed=2)
    found = tracin([(model, 0.1)], samples, probes)
    for z in range(3):
        for q in range(2):
            pair = []
            for part, place in ((samples, z), (probes, q)):
                batch = collate([part.items[place]])
                loss = cross_entropy_sum(forward(model, batch), batch)
                pair.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
            assert float(found[z, q]) == pytest.approx(0.1 * float(pair[0] @ pair[1]), rel=1e-4)
    both = tracin([(model, 0.1), (model, 0.2)], samples, probes)
    assert torch.allclose(both, 3 * found, rtol=1e-4)


def test_tracin_foretells_a_small_step() -> None:
    model = tiny_llama(num_hidden_layers=2)
    sample, probe = examples_for("llama", 1, seed=1), examples_for("llama", 1, seed=2)
    tokens = [int((part.items[0]["labels"][1:] >= 0).sum()) for part in (sample, probe)]
    expected = float(tracin([(model, 1e-4)], sample, probe)) / tokens[0]
    before = mean_loss(model, probe) * tokens[1]
    from overhaul.fit import sgd

    fit(model, [cross_entropy("x")], {"x": sample}, steps=1, batch_size=1, lr=1e-4, clip=None, optimizer=sgd())
    assert before - mean_loss(model, probe) * tokens[1] == pytest.approx(expected, rel=0.1, abs=2e-5)


def test_conjugate_gradients_and_lissa_agree_on_a_net() -> None:
    model, examples = Net(4, 3).double(), images(9)  # logistic regression: convex
    parameters = chosen(model, "all")
    target = random_like(parameters)

    def product(vector: Gradients) -> Gradients:
        return hessian_vector(model, examples, parameters, vector)

    first = conjugate_gradient(product, target, 0.1)
    second = lissa(product, target, 0.1, scale=5.0, iterations=600)
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)
    again = plus(product(first), first, 0.1)
    assert all(torch.allclose(again[name], target[name], atol=1e-4) for name in target)


def test_solvers_say_when_they_cannot() -> None:
    parameters = {"w": nn.Parameter(torch.ones(2))}
    target = random_like(parameters)
    with pytest.raises(RunError, match="larger damping"):
        conjugate_gradient(lambda v: {"w": -v["w"]}, target, 0.1)
    with pytest.raises(RunError, match="LiSSA diverges"):
        lissa(lambda v: {"w": 100.0 * v["w"]}, target, 0.0, scale=1.0)


@pytest.mark.parametrize("name", LANGUAGE)
def test_activations_of_a_sample_are_most_alike_to_themselves(name: str) -> None:
    model, examples = LANGUAGE[name](), examples_for("llama", 5)
    found = activation_similarity(model, examples, examples, depth=2)
    assert found.shape == (5, 5)
    assert torch.allclose(found.diagonal(), torch.ones(5), atol=1e-5)
    assert (found <= 1 + 1e-5).all() and torch.allclose(found, found.T, atol=1e-5)
    one = activation_similarity(model, examples[1:2], examples, depth=2)  # without padding
    assert torch.allclose(one[0], found[1], atol=1e-4)
