"""Autoencoders: the top-k code on numbers worked out by hand, three layouts of files, and what training keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from overhaul.errors import RequestError
from overhaul.sae import Dictionary, SparseAutoencoder, learn, specificity

SMALL = Dictionary(expansion=2, k=3, autoencoder_steps=150, autoencoder_batch=64, autoencoder_lr=1e-2)


def random_tensors(width: int = 6, latents: int = 10) -> dict[str, Tensor]:
    """The official layout."""
    return {
        "pre_bias": torch.randn(width),
        "encoder.weight": torch.randn(latents, width),
        "latent_bias": torch.randn(latents),
        "decoder.weight": torch.randn(width, latents),
        "neuron_activity": torch.arange(float(latents)),
    }


def planted(count: int = 600, width: int = 12, features: int = 8) -> tuple[Tensor, Tensor]:
    """States made of three of some directions each, and how much of each direction is in them."""
    directions = torch.nn.functional.normalize(torch.randn(features, width), dim=1)
    chosen = torch.rand(count, features).topk(3, dim=1).indices
    amounts = torch.zeros(count, features).scatter(1, chosen, 1 + torch.rand(count, 3))
    return amounts @ directions + 5, amounts


def test_top_k_keeps_the_largest_and_relu_what_is_positive() -> None:
    made = SparseAutoencoder(4, 4, k=2)
    with torch.no_grad():
        made.encoder.weight.copy_(torch.eye(4))
    states = torch.tensor([[1.0, 3.0, -5.0, 2.0], [-1.0, -2.0, 4.0, -3.0], [2.0, 1.0, 2.0, 2.0]])
    wanted = [[0.0, 3.0, 0.0, 2.0], [0.0, 0.0, 4.0, 0.0], [2.0, 0.0, 2.0, 2.0]]  # the last has ties
    assert made.encode(states).tolist() == wanted
    made.k = None
    assert torch.equal(made.encode(states), states.relu())


def test_the_code_is_taken_of_what_lies_beyond_the_bias() -> None:
    made = SparseAutoencoder.of_tensors(random_tensors(), k=4)
    states = torch.randn(5, 6)
    codes = (states - made.pre_bias) @ made.encoder.weight.T
    assert torch.allclose(made.linear(states), codes)
    above = codes + made.latent_bias
    fourth = above.sort(dim=1, descending=True).values[:, 3:4]
    latents = torch.where(above >= fourth, above, 0).relu()
    assert torch.allclose(made.encode(states), latents)
    assert torch.allclose(made(states), latents @ made.decoder.weight.T + made.pre_bias, atol=1e-6)


def test_a_new_one_has_columns_of_length_one_and_encodes_by_their_transpose() -> None:
    made = SparseAutoencoder(8, 16, k=2)
    assert torch.allclose(made.decoder.weight.norm(dim=0), torch.ones(16))
    assert torch.equal(made.encoder.weight, made.decoder.weight.T)
    assert not made.latent_bias.any()


def test_trained_it_explains_planted_directions_and_keeps_columns_of_length_one() -> None:
    states, _ = planted()
    torch.manual_seed(1)
    made = learn(states, SMALL, "autoencoder")
    untrained = SparseAutoencoder(12, 24, k=3)
    with torch.no_grad():
        untrained.pre_bias.copy_(states.mean(dim=0))
    assert torch.allclose(made.decoder.weight.norm(dim=0), torch.ones(24), atol=1e-5)
    before, after = untrained.explained_variance(states), made.explained_variance(states)
    assert before is not None and after is not None and after > max(0.6, before + 0.1)
    active = (made.encode(states) > 0).sum(dim=0)
    assert torch.equal(made.neuron_activity, active.float()) and int(active.max()) > 0


def test_explained_variance_is_one_of_a_perfect_code_and_zero_of_the_mean() -> None:
    states = torch.randn(40, 5)
    made = SparseAutoencoder(5, 10)
    with torch.no_grad():
        made.decoder.weight.copy_(torch.cat([torch.eye(5), -torch.eye(5)], dim=1))
        made.encoder.weight.copy_(made.decoder.weight.T)
        assert made.explained_variance(states) == pytest.approx(1.0, abs=1e-6)
        made.pre_bias.copy_(states.mean(dim=0))
        made.encoder.weight.zero_()
    assert made.explained_variance(states) == pytest.approx(0.0, abs=1e-6)


def test_a_latent_that_no_state_activates_is_dead() -> None:
    made = SparseAutoencoder(4, 8, k=2)
    with torch.no_grad():
        made.latent_bias[5] = -100.0
    made.count(torch.randn(50, 4))
    assert made.neuron_activity[5] == 0
    assert made.neuron_activity.sum() > 0


def test_the_official_layout_comes_back_as_it_was() -> None:
    tensors = random_tensors()
    made = SparseAutoencoder.of_tensors(tensors, k=4)
    assert made.state_dict().keys() == tensors.keys()
    assert all(torch.equal(made.state_dict()[name], value) for name, value in tensors.items())
    again = SparseAutoencoder.of_tensors(made.tensors())
    assert again.k == 4 and torch.equal(again(states := torch.randn(3, 6)), made(states))


@pytest.mark.parametrize("subtracts", [True, False])
def test_files_of_sae_lens_are_read(subtracts: bool) -> None:
    tensors = {
        "W_enc": torch.randn(6, 10),
        "b_enc": torch.randn(10),
        "W_dec": torch.randn(10, 6),
        "b_dec": torch.randn(6),
    }
    states = torch.randn(7, 6)
    made = SparseAutoencoder.of_tensors(tensors, subtracts=subtracts)
    entering = states - tensors["b_dec"] if subtracts else states
    latents = (entering @ tensors["W_enc"] + tensors["b_enc"]).relu()
    assert torch.allclose(made.encode(states), latents, atol=1e-5)
    assert torch.allclose(made(states), latents @ tensors["W_dec"] + tensors["b_dec"], atol=1e-4)


def test_files_of_sparsify_are_read() -> None:
    tensors = {"encoder.weight": torch.randn(10, 6), "encoder.bias": torch.randn(10)}
    tensors |= {"W_dec": torch.randn(10, 6), "b_dec": torch.randn(6)}
    states = torch.randn(7, 6)
    made = SparseAutoencoder.of_tensors(tensors, k=3)
    above = ((states - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu()
    values, places = above.topk(3, dim=1)
    latents = torch.zeros_like(above).scatter(1, places, values)
    assert torch.allclose(made(states), latents @ tensors["W_dec"] + tensors["b_dec"], atol=1e-5)


def test_what_is_no_autoencoder_is_refused() -> None:
    with pytest.raises(RequestError, match="no autoencoder that can be read: weight. Known: official: encoder.weight"):
        SparseAutoencoder.of_tensors({"weight": torch.zeros(2)})
    with pytest.raises(RequestError, match="can be read: threshold"):  # a gate that would be left out
        SparseAutoencoder.of_tensors({**random_tensors(), "threshold": torch.zeros(10)})
    with pytest.raises(RequestError, match=r"decoder.weight is \[5, 10\].* 6 features and 10 latents"):
        SparseAutoencoder.of_tensors({**random_tensors(), "decoder.weight": torch.zeros(5, 10)})
    with pytest.raises(RequestError, match="k=11 of 10 latents"):
        SparseAutoencoder.of_tensors(random_tensors(), k=11)
    with pytest.raises(RequestError, match="all states are alike"):
        learn(torch.ones(20, 4), SMALL, "autoencoder")
    with pytest.raises(RequestError, match="autoencoder: the states it is to learn: 4 of 80 values are not finite"):
        learn(torch.where(torch.arange(20)[:, None] == 7, torch.nan, torch.randn(20, 4)), SMALL, "autoencoder")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("encoder.weight", torch.zeros(10), r"encoder.weight is \[10\], and a matrix is"),
        ("latent_bias", torch.zeros(10, 1), r"latent_bias is \[10, 1\], and a vector is"),
        ("pre_bias", torch.full((6,), torch.nan), "pre_bias: 6 of 6 values are not finite"),
        ("k", torch.tensor([2, 3]), r"k is \[2, 3\], and it is to be one whole number"),
        ("k", torch.tensor(2.5), r"k is 2.5, and it is to be one whole number"),
        ("k", torch.tensor(torch.nan), "k: 1 of 1 values are not finite"),
    ],
)
def test_tensors_that_cannot_be_are_named(name: str, value: Tensor, said: str) -> None:
    with pytest.raises(RequestError, match=f"The autoencoder's {said}"):
        SparseAutoencoder.of_tensors({**random_tensors(), name: value})


def test_states_that_are_alike_have_no_variance_to_explain() -> None:
    assert SparseAutoencoder(4, 8, k=2).explained_variance(torch.randn(1, 4)) is None


def test_a_push_is_the_chosen_part_of_the_way() -> None:
    made = SparseAutoencoder.of_tensors(random_tensors())
    own, goal = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    codes = made.linear(own), made.linear(goal)
    assert not made.push(*codes, []).any() and made.push(*codes, []).shape == own.shape
    assert not made.push(codes[0], codes[0], [1, 4]).any()
    by_hand: Any = sum((codes[1] - codes[0])[..., latent, None] * made.decoder.weight[:, latent] for latent in (1, 4))
    assert torch.allclose(made.push(*codes, [1, 4]), by_hand, atol=1e-5)


def test_features_are_told_by_their_means_or_by_their_order() -> None:
    from sklearn.metrics import roc_auc_score

    made = SparseAutoencoder.of_tensors(random_tensors(), k=3)
    states, members = torch.randn(60, 6), torch.arange(60) < 20
    latents = made.encode(states)
    means = latents[:20].mean(dim=0) - latents[20:].mean(dim=0)
    assert torch.allclose(specificity(made, states, members, "mean_difference"), means, atol=1e-6)
    wanted = [roc_auc_score(members.numpy(), column.numpy()) for column in latents.detach().T]
    assert specificity(made, states, members, "auroc").tolist() == pytest.approx(wanted, abs=1e-9)
    with pytest.raises(RequestError, match="give states of both"):
        specificity(made, states, torch.ones(60, dtype=torch.bool), "auroc")
