"""A top-k sparse autoencoder on states of a network: trained, read from files of others, and used to move a state.

    z(x) = TopK_k(W_e (x - b_pre) + b_lat)       x' = W_d z + b_pre       loss  sum |x - x'|^2 / sum |x - mean x|^2

Gao et al., "Scaling and evaluating sparse autoencoders", arXiv:2406.04093.

1. TopK keeps what is at least the k-th largest value, then ReLU: ties keep more than k, negative values fewer. Without a k
   it is ReLU alone.
2. The columns of W_d have length 1 after every step; W_e starts as its transpose, b_pre as the mean of the states.
3. The loss is a share of the variance (1 - explained variance), so that rates do not depend on a layer's scale.
4. Latents that died are counted and not revived: there is no auxiliary loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from annotated_types import Ge, Gt
from jaxtyping import Bool, Float
from torch import Tensor, nn

from overhaul.data.examples import Batch, Examples
from overhaul.errors import RequestError
from overhaul.finite import check_finite
from overhaul.fit import OptimizerFactory, adamw, fit
from overhaul.objectives import Term

COLUMN = "states"
"""The column of examples that an autoencoder reads."""

LAYOUTS: Mapping[str, Mapping[str, str]] = {
    "official": {"encoder.weight": "encoder.weight", "latent_bias": "latent_bias", "decoder.weight": "decoder.weight",
                 "pre_bias": "pre_bias"},
    "sparsify": {"encoder.weight": "encoder.weight", "encoder.bias": "latent_bias", "W_dec": "decoder.weight'",
                 "b_dec": "pre_bias"},
    "sae-lens": {"W_enc": "encoder.weight'", "b_enc": "latent_bias", "W_dec": "decoder.weight'", "b_dec": "pre_bias"},
}  # fmt: skip
"""Names in files, and what they are here; ' is transposed."""

ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Dictionary:
    """How large an autoencoder is and how it is trained.

    Attributes:
        expansion: latents for each feature of the states.
        k: latents that are active at once.
        autoencoder_steps: optimizer steps of its training (AdamW, constant rate).
        autoencoder_batch: states in one step.
        autoencoder_lr: learning rate.
        states: about how many states of the training examples it learns from, as many of each example; a tenth is held out.
    """

    expansion: Annotated[int, Ge(1)] = 1
    k: Annotated[int, Ge(1)] = 16
    autoencoder_steps: Annotated[int, Ge(1)] = 1000
    autoencoder_batch: Annotated[int, Ge(1)] = 1024
    autoencoder_lr: Annotated[float, Gt(0)] = 1e-3
    states: Annotated[int, Ge(2)] = 65536


class SparseAutoencoder(nn.Module):
    """An autoencoder of states [..., d] with n latents; its tensors have the names of the official layout.

    Args:
        width: d.
        latents: n.
        k: most that are active at once; None for ReLU alone.
    """

    reads = (COLUMN,)

    def __init__(self, width: int, latents: int, k: int | None = None) -> None:
        super().__init__()
        if k is not None and not 0 < k <= latents:
            raise RequestError(f"k={k} of {latents} latents cannot be active at once. Write 1 to {latents}.")
        self.k = k
        self.pre_bias = nn.Parameter(torch.zeros(width))
        self.encoder = nn.Linear(width, latents, bias=False)
        self.latent_bias = nn.Parameter(torch.zeros(latents))
        self.decoder = nn.Linear(latents, width, bias=False)
        self.neuron_activity: Tensor
        self.register_buffer("neuron_activity", torch.zeros(latents))
        self.normalise()
        with torch.no_grad():
            self.encoder.weight.copy_(self.decoder.weight.T)

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every column of the decoder the length 1."""
        self.decoder.weight.div_(self.decoder.weight.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny))

    def linear(self, states: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        """W_e (x - b_pre): codes without bias and TopK."""
        return self.encoder(states - self.pre_bias)

    def encode(self, states: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        """The latents."""
        found = self.linear(states) + self.latent_bias
        if self.k is not None:
            found = found.masked_fill(found < found.topk(self.k, dim=-1).values[..., -1:], 0.0)
        return found.relu()

    def decode(self, latents: Float[Tensor, "... n"]) -> Float[Tensor, "... d"]:
        """W_d z + b_pre."""
        return self.decoder(latents) + self.pre_bias

    def forward(self, states: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The reconstruction."""
        return self.decode(self.encode(states))

    def push(
        self, codes: Float[Tensor, "... n"], towards: Float[Tensor, "... n"], chosen: list[int]
    ) -> Float[Tensor, "... d"]:
        """W_d[:, E] (z' - z)[E]: what the chosen latents add on the way from one code to another; exactly 0 without any."""
        return (towards - codes)[..., chosen] @ self.decoder.weight[:, chosen].T

    @torch.no_grad()
    def count(self, states: Float[Tensor, "n d"]) -> None:
        """Set `neuron_activity`: at how many of some states each latent is active."""
        self.neuron_activity.zero_()
        for rows in states.split(ROWS_AT_ONCE):
            self.neuron_activity += (self.encode(rows.to(self.pre_bias)) > 0).sum(dim=0)

    @torch.no_grad()
    def explained_variance(self, states: Float[Tensor, "n d"]) -> float | None:
        """1 - sum |x - x'|^2 / sum |x - mean x|^2; None where all states are alike."""
        if not (whole := variance(states)):
            return None
        unexplained = sum(
            float((rows - self(rows)).double().square().sum()) for rows in states.to(self.pre_bias).split(ROWS_AT_ONCE)
        )
        return 1 - unexplained / whole

    def tensors(self) -> dict[str, Tensor]:
        """What `of_tensors` reads, k included."""
        told = {} if self.k is None else {"k": torch.tensor(self.k)}
        return {**self.state_dict(), **told}

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], k: int | None = None, *, subtracts: bool = True
    ) -> SparseAutoencoder:
        """An autoencoder from tensors in the official layout, sparsify's or sae-lens's.

        Args:
            tensors: by name, as a safetensors file has them.
            k: latents that are active at once, where the tensors do not say; None for ReLU.
            subtracts: whether the decoder's bias is taken from what is encoded (sae-lens: `apply_b_dec_to_input`).

        Raises:
            RequestError: they are of no layout known here, are not finite, or their shapes do not belong together.
        """
        layout = next((names for names in LAYOUTS.values() if names.keys() <= tensors.keys()), None)
        more = set(tensors) - {"neuron_activity", "k", *(layout or ())}
        if layout is None or more:
            known = "; ".join(f"{name}: {', '.join(names)}" for name, names in LAYOUTS.items())
            raise RequestError(
                f"These tensors are no autoencoder that can be read: {', '.join(sorted(more or tensors))}. Known: {known}."
            )
        for name, ours in layout.items():
            dims, wanted = (2, "matrix") if "weight" in ours else (1, "vector")
            if tensors[name].ndim != dims:
                raise RequestError(
                    f"The autoencoder's {name} is {list(tensors[name].shape)}, and a {wanted} is what belongs there. Give "
                    "the tensors as they were saved."
                )
        for name, value in tensors.items():
            check_finite(value, f"The autoencoder's {name}", "Train or fetch it again.")
        said = {
            ours.rstrip("'"): tensors[name].T if ours[-1] == "'" else tensors[name] for name, ours in layout.items()
        }
        latents, width = said["encoder.weight"].shape
        made = cls(width, latents, _whole(tensors["k"]) if "k" in tensors else k)
        said["neuron_activity"] = tensors.get("neuron_activity", made.neuron_activity)
        wrong = [name for name, value in made.state_dict().items() if value.shape != said[name].shape]
        if wrong:
            raise RequestError(
                f"The autoencoder's {wrong[0]} is {list(said[wrong[0]].shape)}, and its encoder is for {width} features and "
                f"{latents} latents: they do not belong together."
            )
        made.load_state_dict({name: value.float() for name, value in said.items()})
        if not subtracts:
            with torch.no_grad():
                made.latent_bias += made.encoder(made.pre_bias)
        return made.eval()


def _whole(k: Tensor) -> int:
    """How many latents a tensor says are active at once.

    Raises:
        RequestError: it is not one whole number.
    """
    if k.numel() != 1 or k.item() != int(k.item()):
        raise RequestError(
            f"The autoencoder's k is {k.tolist()}, and it is to be one whole number: how many latents are active at once."
        )
    return int(k.item())


def variance(states: Float[Tensor, "n d"]) -> float:
    """The summed squared distance of some states from their mean."""
    return float((states.double() - states.double().mean(dim=0)).square().sum())


def learn(states: Float[Tensor, "n d"], size: Dictionary, name: str) -> SparseAutoencoder:
    """Train an autoencoder.

    Args:
        states: what it learns, on the CPU.
        size: how.
        name: what progress and the checkpoint are called.

    Raises:
        RequestError: k is larger than the number of latents, or states are not finite or all alike.
        RunError: the training diverged.
    """
    check_finite(states, f"{name}: the states it is to learn", "Look at the model's weights and its inputs.")
    spread = variance(states) / len(states)
    if not spread > 0:
        raise RequestError(f"{name}: all states are alike, so there is nothing to learn. Take another layer.")
    made = SparseAutoencoder(states.shape[1], size.expansion * states.shape[1], size.k)
    with torch.no_grad():
        made.pre_bias.copy_(states.mean(dim=0))
    term = Term(
        COLUMN,
        lambda logits, batch: (logits.float() - batch[COLUMN]).square().sum() / spread,
        rows,
        name="unexplained variance",
    )
    data = {COLUMN: Examples([{COLUMN: row} for row in states], [{}] * len(states))}
    fit(
        made,
        [term],
        data,
        steps=size.autoencoder_steps,
        batch_size=min(size.autoencoder_batch, len(states)),
        lr=size.autoencoder_lr,
        optimizer=normalised(adamw()),
        name=name,
    )
    made.count(states)
    return made


def rows(batch: Batch) -> int:
    """Number of states in a batch."""
    return len(batch[COLUMN])


def normalised(make: OptimizerFactory) -> OptimizerFactory:
    """An optimizer after each of whose steps the decoder's columns have the length 1 again."""

    def build(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        made = make(model, trained)
        made.register_step_post_hook(lambda *_: cast(SparseAutoencoder, model).normalise())
        return made

    return build


@torch.no_grad()
def specificity(
    made: SparseAutoencoder, states: Float[Tensor, "n d"], members: Bool[Tensor, " n"], by: str
) -> Float[Tensor, " n"]:
    """How much each latent says of membership in a group: by the difference of its means, or as an AUROC.

    Raises:
        RequestError: all states are members, or none.
    """
    if bool(members.all()) or not bool(members.any()):
        raise RequestError("Latents of a group are told from those of others; give states of both.")
    latents = torch.cat([made.encode(part.to(made.pre_bias)).cpu() for part in states.split(ROWS_AT_ONCE)])
    inside, outside = latents[members], latents[~members]
    if by == "mean_difference":
        return inside.mean(dim=0) - outside.mean(dim=0)
    ranked = outside.T.sort(dim=1).values.contiguous()
    asked = inside.T.contiguous()
    places = torch.searchsorted(ranked, asked) + torch.searchsorted(ranked, asked, right=True)
    return places.double().mean(dim=1) / (2 * len(outside))
