"""An ensemble of networks that share one base: each member is the base with some of its tensors exchanged.

    mean    logits = log( (1/S) sum_s p_s )
    vote    logits = log( (n + (1/S) sum_s p_s) / (S + 1) )      n: how many members find the class most probable

1. Members are kept as the tensors in which they differ from the base (all of them, or adapters), under their names in the
   base, and swapped in for each forward: S forwards one after the other. Norm statistics belong to the member.
2. A vote counts whole numbers and the mean probability stays below one, so the class with most votes always has the
   highest logit, ties go to the more probable class, and the logits are those of a distribution without zeros.
3. Language models are aggregated token by token. `generate` runs without a cache.
4. Nothing of it requires gradients: training members together would undo their isolation.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import SequenceClassifierOutput

from overhaul.adapters import projections
from overhaul.conversions.within import build_within, class_within, describe
from overhaul.errors import RequestError

ADAPTER = "shard"
_OF_THE_BASE = ("vocab_size", "max_position_embeddings", "image_size", "num_channels", "pad_token_id", "eos_token_id")
"""What others read in a model's config, taken over from the base."""

State = dict[str, Tensor]
"""The tensors in which a member differs from the base, by their names there."""


class EnsembleConfig(PreTrainedConfig):
    """What config.json says of an ensemble.

    Args:
        inner: the base's config.
        inner_class: the base's class in transformers.
        members: shards with a member.
        adapter: rank, alpha and the names of the adapted projections; None where members own all weights.
        aggregate: "vote" or "mean".
        training: the knobs the members were trained with.
        shard_map: where each example went.
        record: what was trained and forgotten, request by request.
        decision: a fair decision table, if there is one.
        kwargs: of every config.
    """

    model_type = "overhaul_ensemble"

    def __init__(
        self,
        inner: Mapping[str, Any] | None = None,
        inner_class: str = "",
        members: Sequence[int] = (),
        adapter: Mapping[str, Any] | None = None,
        aggregate: str = "vote",
        training: Mapping[str, Any] | None = None,
        shard_map: Mapping[str, Any] | None = None,
        record: Sequence[Mapping[str, Any]] = (),
        decision: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        describe(self, "overhaul.forget.sisa.ensemble", inner, inner_class, _OF_THE_BASE)
        self.adapter = adapter
        self.members, self.aggregate = list(members), aggregate
        self.training, self.shard_map = dict(training or {}), dict(shard_map or {})
        self.record, self.decision = list(record), decision


class Member(nn.Module):
    """A member's own tensors: parameters and buffers as in the base, with "/" for the dots in their names.

    Args:
        base: the network that they replace tensors of.
        names: of these tensors.
    """

    def __init__(self, base: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        parameters = dict(base.named_parameters())
        state = base.state_dict()
        for name in names:
            empty = torch.empty_like(state[name])
            if name in parameters:
                self.register_parameter(name.replace(".", "/"), nn.Parameter(empty, requires_grad=False))
            else:
                self.register_buffer(name.replace(".", "/"), empty)

    def tensors(self) -> State:
        """Its tensors by their names in the base."""
        return {name.replace("/", "."): tensor for name, tensor in self.state_dict().items()}


class Ensemble(PreTrainedModel, GenerationMixin):
    """Several members over one base; a forward gives their aggregated logits.

    Args:
        config: what it consists of; all tensors are to be loaded.
    """

    config_class = EnsembleConfig  # pyright: ignore[reportAssignmentType]
    base_model_prefix = ""

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__(config)
        self.base: nn.Module = build_within(config)
        if config.adapter is not None:
            add_adapter(self.base, config.adapter)
        names = own_names(self.base, config.adapter is not None)
        self.members = nn.ModuleDict({str(shard): Member(self.base, names) for shard in config.members})
        self.main_input_name = class_within(config).main_input_name
        self.requires_grad_(False)
        self.post_init()

    @classmethod
    def around(cls, base: nn.Module, config: EnsembleConfig, states: Mapping[int, State]) -> Ensemble:
        """An ensemble over a base that is at hand (with its adapter, if it has one); `states` by shard.

        The base becomes part of it, not a copy.
        """
        config.members = list(states)
        with torch.device("meta"), no_init_weights():
            ensemble = cls(config)
        ensemble.base = base
        names = own_names(base, config.adapter is not None)
        ensemble.members = nn.ModuleDict({str(shard): Member(base, names) for shard in states})
        for shard, state in states.items():
            ensemble.put(shard, state)
        return ensemble.requires_grad_(False).eval()

    def put(self, shard: int, state: State | None) -> None:
        """Replace one member's tensors, or drop the member."""
        if state is None:
            del self.members[str(shard)]
            self.config.members = [int(one) for one in self.members]
            return
        with torch.no_grad():
            for name, tensor in self.tensors(shard).items():
                tensor.copy_(state[name])

    def tensors(self, shard: int) -> State:
        """A member's own tensors, by their names in the base."""
        member = self.members[str(shard)]
        assert isinstance(member, Member)
        return member.tensors()

    def digest(self, shard: int) -> str:
        """SHA-256 of a member's own tensors."""
        return digest(self.tensors(shard))

    def member(self, shard: int) -> nn.Module:
        """One member as a plain model of the base's class: a copy, with its adapter merged."""
        plain = copy.deepcopy(self.base)
        plain.load_state_dict(self.tensors(shard), strict=False)
        if self.config.adapter is not None:
            merge_adapter(plain)
        return plain

    def member_logits(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Int[Tensor, "b t"] | None = None,
        pixel_values: Tensor | None = None,
    ) -> Float[Tensor, "s b *classes"]:
        """Each member's logits, float32: [members, b, classes], or [members, b, t, vocabulary]."""
        if pixel_values is not None:
            inputs: dict[str, Any] = {"pixel_values": pixel_values}
        else:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        shards = self.config.members
        found = [functional_call(self.base, self.tensors(shard), (), inputs).logits.float() for shard in shards]
        return torch.stack(found)

    def votes(self, **inputs: Tensor) -> Int[Tensor, "b s"]:
        """Which class each member finds most probable; of a classifier. Inputs as in `member_logits`."""
        return self.member_logits(**inputs).argmax(dim=-1).T

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Int[Tensor, "b t"] | None = None,
        pixel_values: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Aggregated logits, float32: the logarithm of a distribution."""
        logits = self.member_logits(input_ids, attention_mask, pixel_values)
        return SequenceClassifierOutput(logits=aggregate(logits, self.config.aggregate))  # pyright: ignore[reportArgumentType]

    def decide(self, inputs: Mapping[str, Tensor], groups: Sequence[Any], ids: Sequence[str]) -> Int[Tensor, " b"]:
        """Fair decisions (0 or 1) of a two-class ensemble by the table that `forget.fair_sisa` attached.

        Args:
            inputs: as in `member_logits`.
            groups: the protected attribute of each example.
            ids: a name for each example: the same name with the same votes is always decided alike.

        Raises:
            RequestError: there is no table, or a group is not in it.
        """
        if self.config.decision is None:
            raise RequestError("This ensemble has no decision table; run forget.fair_sisa on a calibration set first.")
        from overhaul.forget.fair_sisa.fairness import DecisionTable  # its package stands on this one

        table = DecisionTable.from_json(self.config.decision)
        return torch.from_numpy(table.decide(self.votes(**inputs).cpu().numpy(), groups, ids))

    def can_generate(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether the base can."""
        return class_within(self.config).can_generate()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # members would need a cache each
        return False

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The whole sequence, every time."""
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}


def aggregate(logits: Float[Tensor, "s ... classes"], how: str) -> Float[Tensor, "... classes"]:
    """Members' logits as the logarithm of one distribution; `how` is "vote" or "mean" (see the module's equations)."""
    members, classes = logits.shape[0], logits.shape[-1]
    mean = logits.log_softmax(dim=-1).logsumexp(dim=0) - torch.tensor(float(members)).log()
    if how == "mean":
        return mean
    votes = nn.functional.one_hot(logits.argmax(dim=-1), classes).sum(dim=0)
    return torch.logaddexp(mean, votes.float().log()) - torch.tensor(members + 1.0).log()


def own_names(base: nn.Module, adapted: bool) -> list[str]:
    """The tensors that a member has of its own: those of the adapter, or all; of tied ones the one they are tied to."""
    # on the meta device, where a checkpoint is planned, tied tensors are not one yet: go by what the class declares
    tied: Mapping[str, str] = getattr(base, "all_tied_weights_keys", None) or {}
    parameters = [name for name, _ in base.named_parameters(remove_duplicate=False) if name not in tied]
    if adapted:
        return [name for name in parameters if f".{ADAPTER}." in name]
    buffers = {name for name, _ in base.named_buffers()}
    return [*parameters, *(name for name in base.state_dict() if name in buffers)]


def adapter_options(model: nn.Module, rank: int, alpha: int) -> dict[str, Any]:
    """What config.json keeps of an adapter on every projection inside the blocks."""
    names = projections(model)
    kinds = {type(model.get_submodule(name)).__name__ for name in names}
    return {"rank": rank, "alpha": alpha, "names": names, "transposed": kinds == {"Conv1D"}}


def add_adapter(base: nn.Module, options: Mapping[str, Any]) -> None:
    """Put an adapter beside each projection; everything else is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(
        r=options["rank"],
        lora_alpha=options["alpha"],
        target_modules=options["names"],
        fan_in_fan_out=options["transposed"],
    )
    inject_adapter_in_model(lora, base, ADAPTER)


def adapter_layers(base: nn.Module) -> dict[str, Any]:
    """The layers that carry an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def merge_adapter(base: nn.Module) -> None:
    """Make the adapter part of the projections, which become plain layers again."""
    for name, layer in adapter_layers(base).items():
        layer.merge()
        base.set_submodule(name, layer.get_base_layer())


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, dtypes and shapes."""
    hasher = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
