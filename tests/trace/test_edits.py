from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import tiny_llama
from families import FAMILIES, LM
from overhaul.errors import RequestError, RunError
from overhaul.stack import LayerStack
from overhaul.stack.calls import invoke
from overhaul.trace import (
    Add,
    Interpolate,
    Primitive,
    ProjectOut,
    Replace,
    Skip,
    Where,
    Zero,
    capture,
    intervene,
    measure,
    windows,
)
from tracing import LENGTH, ROWS, WIDTH, batch, drawn, hooks_of, keep, llama, output, outputs, states_of

# stepping in


@pytest.mark.parametrize("name", FAMILIES)
def test_skipping_a_block_everywhere_is_the_path_without_it(name: str) -> None:
    stack = LayerStack.at(FAMILIES[name].build(), FAMILIES[name].stack)
    inputs = FAMILIES[name].inputs()
    clean = outputs(stack, inputs)
    for place in stack.droppable:
        with stack.following([n for n in range(len(stack)) if n != place]):
            expected = outputs(stack, inputs)
        with intervene(stack, {f"leaving.{place}": Skip()}):
            found = outputs(stack, inputs)
        assert expected and all(map(torch.equal, found, expected))
        assert not all(map(torch.equal, found, clean))
    assert all(map(torch.equal, outputs(stack, inputs), clean)) and not hooks_of(stack.model)


VALUE, OTHER = drawn(WIDTH), drawn(WIDTH, seed=4)
PRIMITIVES: dict[str, Callable[[Tensor], Primitive]] = {
    "Replace": Replace,
    "Add": Add,
    "ProjectOut": ProjectOut,
    "Interpolate": lambda v: Interpolate(v, 0.25),
    "Zero": lambda _: Zero(),
    "Skip": lambda _: Skip(),
}
FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "Replace": lambda x, _, v: v.expand_as(x),
    "Add": lambda x, _, v: x + v,
    "ProjectOut": lambda x, _, v: x - (x @ v)[..., None] * v / v.square().sum(),
    "Interpolate": lambda x, _, v: 0.75 * x + 0.25 * v,
    "Zero": lambda x, _, v: torch.zeros_like(x),
    "Skip": lambda _, entered, v: entered,
}


# a bare tensor, tuples of two and three, two streams by keyword, maps of images
@pytest.mark.parametrize("name", ["Llama", "Bloom", "T5, encoder", "SD3", "ResNet"])
@pytest.mark.parametrize("kind", PRIMITIVES)
def test_each_primitive_does_what_its_formula_says(name: str, kind: str) -> None:
    stack = LayerStack.at(FAMILIES[name].build(), FAMILIES[name].stack)
    inputs = FAMILIES[name].inputs()
    entered, clean = (states_of(stack, inputs, f"{site}.1")[0] for site in ("entering", "leaving"))
    value = VALUE[: clean.shape[2]]
    with intervene(stack, {"leaving.1": PRIMITIVES[kind](value)}):
        seen = states_of(stack, inputs, "leaving.1")[0]
    torch.testing.assert_close(seen, FORMULAS[kind](clean, entered, value))


def test_what_enters_can_be_edited_and_flows_on() -> None:
    stack, inputs = llama(), batch()
    with intervene(stack, {"leaving.1": Add(VALUE)}):
        behind = output(stack, inputs)
    with intervene(stack, {"entering.2": Add(VALUE)}):
        before = output(stack, inputs)
    assert torch.equal(behind, before) and not torch.equal(behind, output(stack, inputs))


def test_edits_reach_the_selected_positions_and_samples_alone() -> None:
    stack, inputs = llama(), batch(3, 9)
    clean = states_of(stack, inputs, "leaving.1")[0]
    mask = drawn(3, 9) > 0
    for where, reached in [
        (Where(positions=-1), [(n, 8) for n in range(3)]),
        (Where(positions=slice(1, 3), samples=[2]), [(2, 1), (2, 2)]),
        (Where(positions=torch.tensor([0, 4]), samples=slice(None, 2)), [(0, 0), (0, 4), (1, 0), (1, 4)]),
        (Where(positions=torch.arange(9) == 5), [(n, 5) for n in range(3)]),
        (Where(positions=mask), [tuple(at) for at in mask.nonzero().tolist()]),
        (Where(samples=torch.tensor([False, True, False])), [(1, n) for n in range(9)]),
    ]:
        with intervene(stack, {"leaving.1": Zero(where)}):
            seen = states_of(stack, inputs, "leaving.1")[0]
        expected = clean.clone()
        for row, position in reached:
            expected[row, position] = 0
        assert torch.equal(seen, expected)


def test_a_batch_of_patches_one_position_each() -> None:
    stack, inputs = llama(), batch(1, 5)
    other = states_of(stack, batch(1, 5, seed=2), "leaving.1")[0]
    rows = {name: value.expand(5, 5) for name, value in inputs.items()}
    diagonal = Where(positions=torch.eye(5, dtype=torch.bool))
    with intervene(stack, {"leaving.1": Replace(other, diagonal)}):
        together = output(stack, rows)
    for n in range(5):
        with intervene(stack, {"leaving.1": Replace(other, Where(positions=n))}):
            torch.testing.assert_close(together[n], output(stack, inputs)[0])


def test_patching_with_ones_own_states_changes_no_bit_and_with_anothers_gives_the_others_answer() -> None:
    stack, inputs, other = llama(), batch(), batch(seed=2)
    for place, (own, foreign) in enumerate(zip(states_of(stack, inputs), states_of(stack, other), strict=True)):
        with intervene(stack, {f"leaving.{place}": Replace(own)}):
            repeated = output(stack, inputs)
        assert torch.equal(repeated, output(stack, inputs))
        with intervene(stack, {f"leaving.{place}": Replace(foreign)}):
            patched = output(stack, inputs)
        assert torch.equal(patched, output(stack, other))
    last = Where(positions=-1)
    with intervene(stack, {"leaving.3": Replace(states_of(stack, other)[3], last)}):
        patched = output(stack, inputs)
    assert torch.equal(patched[:, :-1], output(stack, inputs)[:, :-1])
    torch.testing.assert_close(patched[:, -1], output(stack, other)[:, -1])


def test_a_value_that_the_model_goes_on_working_in_stays_what_it_was() -> None:
    from transformers import FalconConfig, FalconForCausalLM

    options = {name: LM[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    stack, value = LayerStack.of(FalconForCausalLM(FalconConfig(**options)).eval()), drawn(ROWS, LENGTH, WIDTH)
    with intervene(stack, {"transformer.h.1.mlp": Replace(value)}):
        first, second = output(stack, batch()), output(stack, batch())  # attention is added to it in place
    assert torch.equal(value, drawn(ROWS, LENGTH, WIDTH)) and torch.equal(first, second)


def test_a_direction_taken_out_everywhere_is_gone_and_nothing_else() -> None:
    stack, inputs = llama(), batch()
    direction, second = F.normalize(VALUE, dim=0), OTHER - OTHER @ VALUE * VALUE / VALUE.square().sum()
    once = {"entering": ProjectOut(VALUE), "leaving": ProjectOut(VALUE)}
    with intervene(stack, once):
        states = states_of(stack, inputs)
        result = output(stack, inputs)
        with intervene(stack, once):
            torch.testing.assert_close(output(stack, inputs), result, atol=1e-5, rtol=0)
    assert all(float((state @ direction).abs().max()) < 1e-5 for state in states)
    clean = states_of(stack, inputs, "leaving.0")[0]
    with intervene(stack, {"leaving.0": ProjectOut(VALUE)}):
        torch.testing.assert_close(states_of(stack, inputs, "leaving.0")[0] @ second, clean @ second)
    dependent = ProjectOut(torch.stack([VALUE, -2 * VALUE]))
    with intervene(stack, {"leaving.0": dependent}):
        torch.testing.assert_close(states_of(stack, inputs, "leaving.0")[0] @ second, clean @ second)


def test_edits_of_a_site_are_done_in_the_order_given() -> None:
    stack, inputs = llama(), batch()
    clean = states_of(stack, inputs, "leaving.1")[0]
    for edits, expected in [
        ({"leaving.1": [Zero(), Add(VALUE)]}, VALUE.expand_as(clean)),
        ({"leaving.1": [Add(VALUE), Zero()]}, torch.zeros_like(clean)),
        ({"leaving": Zero(), "leaving.1": Add(VALUE)}, VALUE.expand_as(clean)),
        ({"leaving.1": Add(VALUE), "leaving": Zero()}, torch.zeros_like(clean)),
    ]:
        with intervene(stack, edits):
            assert torch.equal(states_of(stack, inputs, "leaving.1")[0], expected)


def test_nested_interventions_act_from_the_outer_to_the_inner_and_a_capture_sees_what_is_around_it() -> None:
    stack, inputs = llama(), batch()
    site = ["leaving.1"]
    with (
        capture(stack, site, keep) as outer,
        intervene(stack, {"leaving.1": Zero()}),
        intervene(stack, {"leaving.1": Add(VALUE)}),
        capture(stack, site, keep) as inner,
    ):
        output(stack, inputs)
    assert torch.equal(inner["leaving.1"][0][0], VALUE.expand(ROWS, LENGTH, WIDTH))
    assert torch.equal(outer["leaving.1"][0][0], states_of(stack, inputs, "leaving.1")[0])


def test_module_outputs_are_edited_in_the_form_in_which_they_are_returned() -> None:
    stack = LayerStack.of(FAMILIES["OPT"].build())
    inputs = FAMILIES["OPT"].inputs()
    names = ["model.decoder.layers.1.self_attn", "model.decoder.layers.1.fc2"]
    with intervene(stack, dict.fromkeys(names, Zero())):
        silent = output(stack, inputs)
    with intervene(stack, {"leaving.1": Skip()}):
        assert torch.equal(silent, output(stack, inputs))


def test_the_text_stream_of_a_joint_block_is_edited_when_asked() -> None:
    stack = LayerStack.at(FAMILIES["Flux, two streams"].build(), "transformer_blocks")
    inputs = FAMILIES["Flux, two streams"].inputs()
    with intervene(stack, {"leaving.1": Zero()}, stream="encoder_hidden_states"):
        text = measure(stack, [inputs], ["leaving.1"], keep, stream="encoder_hidden_states")["leaving.1"][0][0]
        image = states_of(stack, inputs, "leaving.1")[0]
    assert text.shape[1] == 5 and not text.any()
    assert torch.equal(image, states_of(stack, inputs, "leaving.1")[0])


@pytest.mark.parametrize("name", ["Flux, two streams", "SD3"])
def test_text_and_image_of_one_length_are_not_mistaken_for_each_other(name: str) -> None:
    stack = LayerStack.at(FAMILIES[name].build(), "transformer_blocks")
    inputs = FAMILIES[name].inputs()
    length = states_of(stack, inputs, "entering.0")[0].shape[1]
    inputs["encoder_hidden_states"] = drawn(2, length, 16)
    if "txt_ids" in inputs:
        inputs["txt_ids"] = torch.zeros(length, 3)
    entering, leaving = states_of(stack, inputs, "entering"), states_of(stack, inputs)
    assert all(torch.equal(before, after) for before, after in zip(leaving[:-1], entering[1:], strict=True))


def test_bits_outside_an_edit_are_kept_in_bfloat16_and_its_dtype_stays() -> None:
    stack, inputs = LayerStack.of(tiny_llama().bfloat16()), batch()
    clean = states_of(stack, inputs, "leaving.1")[0]
    for edit in (Add(VALUE, Where(positions=3)), ProjectOut(VALUE, Where(positions=3))):
        with intervene(stack, {"leaving.1": edit}):
            seen = states_of(stack, inputs, "leaving.1")[0]
            assert output(stack, inputs).dtype == torch.bfloat16
        others = torch.arange(LENGTH) != 3
        assert torch.equal(seen[:, others], clean[:, others]) and not torch.equal(seen[:, 3], clean[:, 3])


def test_values_can_be_trained_through_an_intervention() -> None:
    stack = llama()
    push = torch.zeros(WIDTH, requires_grad=True)
    with intervene(stack, {"leaving.1": Add(push, Where(positions=slice(1, None)))}):
        invoke(stack.model, batch()).logits.square().mean().backward()
    assert push.grad is not None and float(push.grad.norm()) > 0


def test_interventions_hold_in_generation_with_a_cache() -> None:
    stack, inputs = llama(), batch()
    model: Any = stack.model
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(**inputs, **options)
    with intervene(stack, {"leaving.1": Add(20 * VALUE)}):
        cached, whole = (model.generate(**inputs, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, whole) and not torch.equal(cached, plain)


@pytest.mark.parametrize(
    "positions", [3, [1, 3], slice(2, 5), torch.arange(LENGTH) == 3, (torch.arange(LENGTH) % 4 == 1).expand(ROWS, -1)]
)
def test_prompt_positions_are_edited_once_while_generating_with_a_cache(positions: Any) -> None:
    """The prompt's states in the cache are the edited ones: as in whole forwards in which the same positions are edited."""
    stack, inputs = LayerStack.of(tiny_llama(initializer_range=0.3)), batch()
    model: Any = stack.model
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(**inputs, **options)
    told = inputs["input_ids"]
    with intervene(stack, {"leaving.1": Add(5 * VALUE, Where(positions=positions))}):
        cached = model.generate(**inputs, **options)
    for _ in range(6):
        length = told.shape[1] - LENGTH
        longer = positions
        if isinstance(positions, torch.Tensor):  # a mask of a whole forward is as long as that
            longer = torch.nn.functional.pad(positions, (0, length))
        with intervene(stack, {"leaving.1": Add(5 * VALUE, Where(positions=longer))}):
            told = torch.cat([told, output(stack, {"input_ids": told})[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, told) and not torch.equal(cached, plain)


def test_generated_positions_alone_can_be_edited_and_what_never_comes_is_an_error() -> None:
    stack, inputs = llama(), batch()
    model: Any = stack.model
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    seen: list[int] = []
    for where in (slice(LENGTH, None), LENGTH + 1, [LENGTH, -1]):
        with (
            intervene(stack, {"leaving.2": Add(VALUE, Where(positions=where))}),
            capture(stack, ["leaving.2"], keep) as k,
        ):
            model.generate(**inputs, **options)
        clean = states_of(stack, inputs, "leaving.2")[0]
        same = torch.equal(k["leaving.2"][0][0], clean)
        seen.append(int(same))
    assert seen == [1, 1, 0], "the prompt is left alone unless its last token is named"
    never = {"leaving.2": Add(VALUE, Where(positions=40))}
    with pytest.raises(RunError, match=r"Nothing passed leaving\.2.*none held the positions"), intervene(stack, never):
        model.generate(**inputs, **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_position_is_the_last_token_of_each_row_whatever_the_padding(side: str) -> None:
    stack, inputs = llama(), batch(padded=3)
    ends = [LENGTH - 1, LENGTH - 4]
    if side == "left":
        inputs["attention_mask"], ends = inputs["attention_mask"].flip(1), [LENGTH - 1] * 2
    clean = states_of(stack, inputs, "leaving.1")[0]
    for where, back in ((-1, [0]), ([-1, -2], [0, 1]), (slice(-3, None), [0, 1, 2]), (slice(-3, -1), [1, 2])):
        with intervene(stack, {"leaving.1": Add(VALUE, Where(positions=where))}):
            moved = (states_of(stack, inputs, "leaving.1")[0] - clean).abs().amax(-1) > 0
        expected = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
        for row, end in enumerate(ends):
            expected[row, [end - n for n in back]] = True
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("site", ["model.layers.1.mlp", "model.layers.2.self_attn", "leaving.1", "entering.2"])
def test_gradients_are_those_of_the_edited_forward_also_when_blocks_are_recomputed_after_the_with(
    site: str, reentrant: bool
) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model: Any = tiny_llama().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        stack = LayerStack.of(model)
        padded = batch(padded=3)
        with intervene(stack, {site: Add(3 * VALUE, Where(positions=-1))}):
            inside = output_with_gradient(stack, padded)
            other = output_with_gradient(stack, batch())  # another forward, with other last tokens
        outside = output_with_gradient(stack, padded)
        (inside.square().mean() + other.square().mean() + outside.square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert site == "leaving.1" or not hooks_of(model.get_submodule("model.layers.1"))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def output_with_gradient(stack: LayerStack, inputs: Any) -> torch.Tensor:
    return invoke(stack.model, inputs).logits


def test_a_diffusion_models_blocks_are_recomputed_with_their_edits_too() -> None:
    gradients = []
    for checkpointing in (False, True):
        model: Any = FAMILIES["PixArt"].build().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        stack = LayerStack.of(model)
        with intervene(stack, {"leaving.1": Add(torch.ones(16))}):
            out = invoke(model, FAMILIES["PixArt"].inputs()).sample
        out.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_an_output_by_names_is_edited_at_its_first_tensor() -> None:
    stack, inputs = llama(), batch()
    clean = output(stack, inputs)
    with intervene(stack, {"model": Zero()}):
        assert float(output(stack, inputs).abs().max()) == 0 < float(clean.abs().max())


# what is refused


@pytest.mark.parametrize(
    ("dtype", "edit"),
    [
        (torch.float16, Add(torch.full((WIDTH,), 7e4), Where(positions=2))),
        (torch.float16, Replace(torch.full((WIDTH,), 65520.0))),
        (torch.float16, Interpolate(torch.full((WIDTH,), 6e4), 2.0)),
        (torch.bfloat16, Add(torch.full((WIDTH,), torch.finfo(torch.float32).max))),
    ],
)
def test_what_the_dtype_of_the_states_cannot_hold_is_refused(dtype: torch.dtype, edit: Primitive) -> None:
    stack = LayerStack.of(tiny_llama().to(dtype))
    said = rf"{type(edit).__name__} for leaving\.1 makes values that {dtype} cannot hold"
    with pytest.raises(RequestError, match=said), intervene(stack, {"leaving.1": edit}):
        output(stack, batch())


def test_unknown_sites_are_refused_with_the_nearest_name() -> None:
    stack = llama()
    for site, hint in [
        ("leavin.2", r"Did you mean 'leaving\.2'"),
        ("leaving.4", r"a block from 0 to 3"),
        ("model.layers.1.self_atn", r"Did you mean 'model\.layers\.1\.self_attn'"),
        ("", r"entering\.0"),
    ]:
        with pytest.raises(RequestError, match=hint), capture(stack, [site], keep):
            pass
        with pytest.raises(RequestError, match=hint), intervene(stack, {site: Zero()}):
            pass
    with pytest.raises(RequestError, match="A pair is two different sites"):
        measure(stack, [batch()], [("leaving.1", "leaving.1")], keep)
    with pytest.raises(RequestError, match="window of 5 blocks does not fit"):
        windows(stack, 5)
    assert not hooks_of(stack.model)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Add(torch.zeros(31)), r"a tensor \[31\] of float32, but the stream is 32 wide"),
        (Add(torch.zeros(1)), r"the stream is 32 wide"),
        (Replace(torch.zeros(32, dtype=torch.long)), "needs a tensor of floats"),
        (Replace(torch.full((32,), torch.nan)), "not finite"),
        (ProjectOut(torch.zeros(32)), "length zero"),
        (ProjectOut(torch.zeros(2, 2, 32)), r"directions \[d\] or \[k, d\]"),
        (Interpolate(torch.zeros(32), float("inf")), "weight inf"),
        (torch.zeros(32), "is a Tensor; it must be one of Replace, Add"),
    ],
)
def test_impossible_edits_are_refused_before_anything_runs(edit: Any, message: str) -> None:
    stack = llama()
    with pytest.raises(RequestError, match=message), intervene(stack, {"leaving.1": edit}):
        pytest.fail("entered")
    assert not hooks_of(stack.model)


def test_skip_belongs_to_blocks() -> None:
    stack = llama()
    for site in ("entering.1", "model.layers.1.mlp"):
        with pytest.raises(RequestError, match=r"Skip belongs to a block"), intervene(stack, {site: Skip()}):
            pass
    resnet = LayerStack.of(FAMILIES["ResNet"].build())
    with pytest.raises(RequestError, match="cannot be skipped"), intervene(resnet, {"leaving.3": Skip()}):
        output(resnet, FAMILIES["ResNet"].inputs())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Zero(Where(positions=9)), r"positions for leaving\.2 name 9, but there are only 9 in this forward"),
        (Zero(Where(samples=[0, -3])), r"samples for leaving\.2 name -3"),
        (Zero(Where(positions=torch.ones(8, dtype=torch.bool))), r"there are 9: give \[9\]"),
        (Zero(Where(positions=torch.ones(9, 2, dtype=torch.bool))), r"give booleans \[2, 9\]"),
        (Zero(Where(positions=torch.zeros(2, 9))), r"give booleans \[2, 9\]"),
        (Zero(Where(positions=torch.tensor([0.5]))), "give whole numbers"),
        (Zero(Where(positions=slice(20, None))), "selects none"),
        (Replace(torch.zeros(8, 32)), r"does not fit a state of the shape \(2, 9, 32\)"),
        (Add(torch.zeros(2, 3, 9, 32)), "does not fit a state"),
    ],
)
def test_what_does_not_fit_the_batch_is_refused_before_the_first_block(edit: Primitive, message: str) -> None:
    stack = llama()
    ran: list[int] = []
    stack.blocks[0].register_forward_hook(lambda *_: ran.append(0))
    with pytest.raises(RequestError, match=message), intervene(stack, {"leaving.2": edit}):
        output(stack, batch())
    assert not ran


def test_an_edit_that_nothing_reached_is_an_error() -> None:
    stack = llama()
    with (
        pytest.raises(RunError, match=r"Nothing passed leaving\.1, so nothing"),
        intervene(stack, {"leaving.1": Zero()}),
    ):
        pass
    mlp = "model.layers.2.mlp"
    with pytest.raises(RunError, match=f"Nothing passed {mlp}"), intervene(stack, {mlp: Zero()}), stack.skipping([2]):
        output(stack, batch())
    assert not hooks_of(stack.model)


def test_a_width_that_no_config_tells_is_checked_at_the_first_block() -> None:
    stack = LayerStack.at(FAMILIES["DiT"].build(), "transformer_blocks")
    with pytest.raises(RequestError, match=r"does not fit"), intervene(stack, {"leaving.2": Add(torch.zeros(5))}):
        output(stack, FAMILIES["DiT"].inputs())
