"""What a stack promises, as functions of a family: each is a column of the matrix in `docs/families.md`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import Family
from overhaul import models
from overhaul.conversions import records
from overhaul.errors import RequestError
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls, invoke

OUTPUTS = ("logits", "sample", "logits_per_image", "last_hidden_state")


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the model returns, as one tensor."""
    return tensor_of(invoke(model, inputs))


def tensor_of(out: Any) -> Tensor:
    """The main tensor of a model's output."""
    return next(getattr(out, name) for name in OUTPUTS if getattr(out, name, None) is not None)


def paths(stack: LayerStack) -> dict[str, list[int]]:
    """Paths of every sort: without a block, without the first, one block twice, two blocks in the other order."""
    free, everything = stack.droppable, list(range(len(stack)))
    first, second, last = free[0], free[1], free[-1]
    swapped = list(everything)
    swapped[first], swapped[second] = second, first
    found = {
        "without one": [i for i in everything if i != last],
        "one twice": [*everything[: first + 1], *everything[first:]],
        "two in the other order": swapped,
    }
    return {**found, "without the first": everything[1:]} if first == 0 else found


def state_of(model: Any) -> tuple[Any, ...]:
    """Everything that must come back: the objects themselves, places, config, hooks."""
    tensors = {name: id(p) for name, p in model.state_dict(keep_vars=True).items()}
    modules = {name: (id(module), len(module._forward_hooks)) for name, module in model.named_modules()}
    places = [(n, m.layer_idx) for n, m in model.named_modules() if hasattr(m, "layer_idx")]
    return (
        tensors,
        modules,
        places,
        copy.deepcopy(dict(model.config) if isinstance(model.config, dict) else model.config.to_dict()),
    )


def the_whole_path_is_the_model(family: Family, _: Path) -> None:
    """Along all blocks in their order, each a new object over the same tensors, outputs are equal bit for bit."""
    model, inputs = family.build(), family.inputs()
    stack, before = LayerStack.at(model, family.stack), output(model, inputs)
    with stack.following(list(range(len(stack)))):
        assert torch.equal(output(model, inputs), before)
    with stack.following(list(enumerate(stack.blocks))):
        assert torch.equal(output(model, inputs), before)


def leaving_out_is_doing_nothing(family: Family, _: Path) -> None:
    """Without a block, the model says what it says with a block that returns what enters it."""
    model, inputs = family.build(), family.inputs()
    stack = LayerStack.at(model, family.stack)
    calls = Calls.record(stack, inputs)
    before = output(model, inputs)
    for place in stack.droppable:
        with idle(stack, place, calls):
            expected = output(model, inputs)
        assert not torch.equal(expected, before)
        with stack.skipping([place]):
            assert torch.equal(output(model, inputs), expected)


@contextmanager
def idle(stack: LayerStack, place: int, calls: Calls) -> Iterator[None]:
    """Block `place` returns what enters it, in its own form."""

    def same(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        parts = list(out) if isinstance(out, tuple) else [out]
        for slot, index in calls.slots:
            # what is only computed in the first block (a position bias) is not state that a block could leave alone
            entering = args[slot] if isinstance(slot, int) else kwargs[slot]
            parts[index] = parts[index] if entering is None else entering
        return tuple(parts) if isinstance(out, tuple) else parts[0]

    hook = stack.blocks[place].register_forward_hook(same, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def decoding_with_the_cache_is_the_full_forward(family: Family, _: Path) -> None:
    """Along every path: token by token, in two chunks and in one forward; `generate` with the cache and without."""
    model: Any = family.build()
    stack = LayerStack.at(model, family.stack)
    for path in paths(stack).values():
        with stack.following(path):
            _decodes(model, family)
    if 0 in stack.droppable:
        idle_first: list[Any] = [(0, Idle(family.returns_tuples)), *range(1, len(stack))]
        with stack.following(idle_first):
            _decodes(model, family)


class Idle(nn.Module):
    """A module without attention in the place of a block."""

    def __init__(self, returns_tuples: bool) -> None:
        super().__init__()
        self.returns_tuples = returns_tuples

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden, None) if self.returns_tuples else hidden


@torch.no_grad()
def _decodes(model: Any, family: Family) -> None:
    inputs = family.inputs()
    name = "decoder_input_ids" if family.kind == "seq2seq" else "input_ids"
    rest = {key: value for key, value in inputs.items() if key != name}
    tokens = inputs[name]
    whole = model(**inputs, use_cache=False).logits
    for chunks in ([1] * tokens.shape[1], [4, tokens.shape[1] - 4]):
        cache, said = None, []
        for part in tokens.split(chunks, dim=1):
            out = model(**rest, **{name: part}, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            said.append(out.logits)
        torch.testing.assert_close(torch.cat(said, dim=1), whole, atol=1e-4, rtol=0)
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    prompt = {"attention_mask": torch.ones_like(inputs["input_ids"]), "input_ids": inputs["input_ids"]}
    cached, plain = (model.generate(**prompt, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def what_a_block_is_called_with_follows_it(family: Family, _: Path) -> None:
    """Along every path, each block runs with its own mask, rotary table and conditioning, wherever it stands."""
    model, inputs = family.build(), family.inputs()
    stack = LayerStack.at(model, family.stack)
    calls = Calls.record(stack, inputs)
    for path in paths(stack).values():
        state = calls.entering
        with torch.no_grad():
            for place in path:
                state = calls.run(place, state)
            by_hand = tensor_of(calls.finish(state))
        with stack.following(path):
            said = output(model, inputs)
        assert torch.equal(said, by_hand)


def the_library_counts_its_hidden_states(family: Family, _: Path) -> None:
    """`output_hidden_states` returns one more than the path has stops, whenever it is first asked for."""
    for asked_before in (False, True):
        model: Any = family.build()
        stack = LayerStack.at(model, family.stack)
        if asked_before:
            assert _hidden_states(model, family) == len(stack) + 1
        for path in paths(stack).values():
            with stack.following(path):
                assert _hidden_states(model, family) == len(path) + 1
        assert _hidden_states(model, family) == len(stack) + 1


def _hidden_states(model: Any, family: Family) -> int:
    part = model
    inputs = family.inputs()
    if family.kind == "two towers":
        part = model.get_submodule(family.stack.partition(".")[0])
        wanted = ("pixel_values",) if family.stack.startswith("vision") else ("input_ids", "attention_mask")
        inputs = {name: inputs[name] for name in wanted}
    out = part(**inputs, output_hidden_states=True)
    side = f"{family.stack.partition('.')[0]}_hidden_states"
    return len(out[side if side in out else "hidden_states"])


def checkpointing_changes_no_gradient(family: Family, _: Path) -> None:
    """Along a path with a repeated block, gradients with and without activation checkpointing are equal."""
    gradients = []
    for checkpointing in (False, True):
        model: Any = family.build()
        stack = LayerStack.at(model, family.stack)
        if checkpointing:
            model.enable_gradient_checkpointing() if family.kind == "diffusion" else model.activation_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout | nn.BatchNorm2d):
                module.eval()
        with stack.following(paths(stack)["one twice"]):
            tensor_of(invoke(model, family.inputs())).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def a_path_is_saved_and_opened(family: Family, tmp_path: Path) -> None:
    """Saved along a path and opened again, the model says the same; its library alone does not open the folder."""
    for number, path in enumerate(paths(LayerStack.at(family.build(), family.stack)).values()):
        model, inputs = family.build(), family.inputs()
        plain: Any = type(model)
        stack = LayerStack.at(model, family.stack)
        with stack.following(path):
            said = output(model, inputs)
            folder = models.save(model, None, tmp_path / str(number))
            assert torch.equal(output(model, inputs), said)
        assert type(model) is plain and records(model) == []
        again, _ = models.open_model(folder)
        assert type(again) is plain and torch.equal(output(again, inputs), said)
        with pytest.raises(OSError, match=r"no file named .*model\.(safetensors|bin)"):
            plain.from_pretrained(folder)


def everything_comes_back(family: Family, _: Path) -> None:
    """After a path, also one that failed, the model is the same object with the same blocks, config and hooks."""
    model, inputs = family.build(), family.inputs()
    stack = LayerStack.at(model, family.stack)
    before, said = state_of(model), output(model, inputs)
    for path in paths(stack).values():
        with pytest.raises(ZeroDivisionError), stack.following(path), stack.following(list(range(len(path)))):
            output(model, inputs)
            raise ZeroDivisionError
        assert state_of(model) == before
    assert torch.equal(output(model, inputs), said)


def a_shorter_model_is_plain(family: Family, tmp_path: Path) -> None:
    """Without some blocks, saved and opened by its library alone, the model says the same, with the cache and without."""
    model: Any = family.build()
    inputs, stack = family.inputs(), LayerStack.at(model, family.stack)
    if isinstance(family.drop, str):
        return _cannot_be_shortened(stack, inputs)
    dropped = family.drop or (stack.droppable[1],)
    with stack.skipping(dropped):
        expected = output(model, inputs)
    stack.drop(dropped)
    assert len(stack) == family.blocks - len(dropped) and torch.equal(output(model, inputs), expected)
    again: Any = type(model).from_pretrained(models.save(model, None, tmp_path / "shorter")).eval()
    assert torch.equal(output(again, inputs), expected)
    if family.decodes:
        _generates_alike(again, inputs)


def _cannot_be_shortened(stack: LayerStack, inputs: dict[str, Any]) -> None:
    said, before = output(stack.model, inputs), state_of(stack.model)
    with pytest.raises(RequestError):
        stack.drop([stack.droppable[-1]])
    assert torch.equal(output(stack.model, inputs), said) and state_of(stack.model) == before


@torch.no_grad()
def _generates_alike(model: Any, inputs: dict[str, Any]) -> None:
    """The same numbers at every new token, whether what came before is kept or read again."""
    prompt = {name: value for name, value in inputs.items() if name in ("input_ids", "input_features")}
    if "input_ids" in prompt:
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    cached, plain = (model.generate(**prompt, use_cache=use, **options) for use in (True, False))
    assert len(cached.logits) == 5
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)


@dataclass(frozen=True)
class Guarantee:
    """A column of the matrix: what it says, how it is checked, and for which families it has a meaning."""

    title: str
    check: Callable[[Family, Path], None]
    applies: Callable[[Family], bool] = lambda _: True


GUARANTEES = {
    each.check.__name__: each
    for each in (
        Guarantee("whole path", the_whole_path_is_the_model),
        Guarantee("skip", leaving_out_is_doing_nothing),
        Guarantee("cache", decoding_with_the_cache_is_the_full_forward, lambda family: family.decodes),
        Guarantee("own arguments", what_a_block_is_called_with_follows_it),
        Guarantee("hidden states", the_library_counts_its_hidden_states, lambda family: family.lists_states),
        Guarantee("checkpointing", checkpointing_changes_no_gradient, lambda family: family.checkpoints),
        Guarantee("saved path", a_path_is_saved_and_opened),
        Guarantee("restored", everything_comes_back),
        Guarantee("shorter", a_shorter_model_is_plain),
    )
}
