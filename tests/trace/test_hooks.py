from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import examples_for, tiny_llama
from families import FAMILIES
from overhaul.errors import RequestError, RunError
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls, State, invoke
from overhaul.trace import (
    Skip,
    Zero,
    capture,
    intervene,
    largest,
    last_token,
    measure,
    merged,
    statistics,
    turn,
    windows,
)
from tracing import LENGTH, ROWS, WIDTH, batch, hooks_of, keep, llama, output, states_of

# what is seen


@pytest.mark.parametrize("name", FAMILIES)
def test_what_enters_and_leaves_is_what_the_blocks_hand_on(name: str) -> None:
    stack = LayerStack.at(FAMILIES[name].build(), FAMILIES[name].stack)
    inputs = FAMILIES[name].inputs()
    calls = Calls.record(stack, inputs)
    at = [slot for slot, _ in calls.slots]
    for stream, slot in (("hidden_states", 0 if 0 in at else "hidden_states"), ("encoder_hidden_states",) * 2):
        if slot not in at:
            continue
        seen = measure(stack, [inputs], ["entering", "leaving"], keep, stream=stream)  # pyright: ignore[reportArgumentType]
        state: State = calls.entering
        for place in range(len(stack)):
            for site in ("entering", "leaving"):
                expected = state[at.index(slot)]
                if expected is None:  # the last block of SD3 returns no text
                    assert f"{site}.{place}" not in seen
                else:
                    flat = expected if expected.ndim == 3 else expected.flatten(2).transpose(1, 2)
                    assert torch.equal(seen[f"{site}.{place}"][0][0], flat)
                if site == "entering":
                    with torch.no_grad():
                        state = calls.run(place, state)


def test_modules_are_seen_by_name_flattened_or_not_bare_or_in_tuples() -> None:
    opt = LayerStack.of(FAMILIES["OPT"].build())
    inputs = FAMILIES["OPT"].inputs()
    names = ["model.decoder.layers.1.self_attn", "model.decoder.layers.1.fc2"]  # a tuple; [b * t, d]
    seen = measure(opt, [inputs], [*names, "entering.1", "leaving.1"], keep)
    attention, mlp, entering, leaving = (kept[0][0] for kept in seen.values())
    assert attention.shape == mlp.shape == (ROWS, LENGTH, WIDTH)
    torch.testing.assert_close(entering + attention + mlp, leaving)


def test_a_path_in_force_counts_its_stops() -> None:
    stack, inputs = llama(), batch()
    with stack.following([0, 1, 1, 3, 2]):
        states = states_of(stack, inputs)
    calls = Calls.record(stack, inputs)
    state = calls.entering
    for place, seen in zip([0, 1, 1, 3, 2], states, strict=True):
        with torch.no_grad():
            state = calls.run(place, state)
        torch.testing.assert_close(seen, state[0])


# reductions


def test_statistics_are_those_of_the_positions_that_count() -> None:
    stack, inputs = llama(), batch(padded=4)
    seen = measure(stack, [inputs], ["leaving"], statistics)
    for place, state in enumerate(states_of(stack, inputs)):
        rows = torch.cat([state[0], state[1, :5]])
        found, norms = seen[f"leaving.{place}"], rows.norm(dim=1)
        assert found.count == len(rows) == 14
        for name, expected in {
            "mean": rows.mean(0),
            "second_moment": rows.square().mean(0),
            "max_abs": rows.abs().amax(0),
            "norm_mean": norms.mean(),
            "norm_std": norms.std(correction=0),
            "norm_max": norms.max(),
        }.items():
            torch.testing.assert_close(getattr(found, name).float(), expected, msg=name)


@pytest.mark.parametrize("reduce", [statistics, largest(5), last_token, keep])
def test_two_captures_merged_are_one_capture_of_both(reduce: Callable[..., Any]) -> None:
    stack = llama()
    batches = [batch(2, 9, 1, 3), batch(3, 7, 2), batch(1, 4, 3, 1)]
    sites = ["entering.0", "leaving"]
    apart = [measure(stack, part, sites, reduce) for part in (batches[:1], batches[1:])]
    whole, both = measure(stack, batches, sites, reduce), merged(*apart)
    assert list(whole) == list(both)
    for site, found in whole.items():
        if isinstance(found, list):
            assert all(map(torch.equal, itertools.chain(*found), itertools.chain(*both[site])))
        else:
            for name, value in vars(found).items():
                torch.testing.assert_close(value, getattr(both[site], name), msg=f"{site} {name}")


def test_how_rows_are_batched_changes_nothing() -> None:
    stack, rows = llama(), batch(6, 9, padded=4)
    split = [{name: value[n : n + 1] for name, value in rows.items()} for n in range(6)]
    one, many = (measure(stack, batches, windows(stack), turn) for batches in ([rows], split))
    for pair in one:
        assert one[pair].count == many[pair].count == 50
        torch.testing.assert_close(one[pair].mean, many[pair].mean)


def test_a_long_capture_loses_no_digits() -> None:
    found = statistics(torch.full((1, 1, 2), 3.0), torch.ones(1, 1, dtype=torch.bool))
    for _ in range(4_000):
        found += statistics(torch.full((1, 1, 2), 3.1), torch.ones(1, 1, dtype=torch.bool))
    expected = (3 + 4_000 * 3.1) / 4_001
    torch.testing.assert_close(found.mean, torch.full((2,), expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert float(found.norm_std) == pytest.approx(0.1 * 2**0.5 * (4_000**0.5) / 4_001, rel=1e-3)


def test_block_influence_in_three_lines() -> None:
    stack, examples = llama(), examples_for("llama", 7)
    for width, skip in ((1, 1), (3, 0)):
        turned = measure(stack, examples.batches(3), windows(stack, width), turn, skip_first=skip)
        influence = {n: float(found.mean) for n, found in enumerate(turned.values())}
        for first in range(len(stack) - width + 1):
            cosines = []
            for one in examples.batches(1):
                entering = states_of(stack, one, f"entering.{first}")[0]
                leaving = states_of(stack, one, f"leaving.{first + width - 1}")[0]
                cosines.append(F.cosine_similarity(entering[0, skip:].double(), leaving[0, skip:].double(), dim=-1))
            assert influence[first] == pytest.approx(1 - float(torch.cat(cosines).mean()), abs=1e-6)
        assert all(float(found.cosine) == pytest.approx(1 - float(found.mean)) for found in turned.values())


def test_a_block_that_does_nothing_turns_nothing() -> None:
    stack = llama()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        nn.init.zeros_(stack.blocks[2].get_submodule(name).weight)  # pyright: ignore[reportArgumentType]
    turned = measure(stack, [batch()], windows(stack), turn)
    assert float(turned["entering.2", "leaving.2"].mean) == 0.0


def test_pairs_may_lie_in_any_order_and_share_sites() -> None:
    stack, inputs = llama(), batch()
    seen = measure(stack, [inputs], [("leaving.3", "entering.1"), ("entering.1", "leaving.3"), "leaving.3"], keep)
    backward, forward = seen["leaving.3", "entering.1"][0], seen["entering.1", "leaving.3"][0]
    assert torch.equal(backward[0], forward[1]) and torch.equal(backward[1], forward[0])
    assert torch.equal(forward[1], seen["leaving.3"][0][0])


def test_a_site_named_twice_counts_once() -> None:
    seen = measure(llama(), [batch()], ["leaving", "leaving.1", "leaving.1"], statistics)
    assert len(seen) == 4 and {found.count for found in seen.values()} == {ROWS * LENGTH}


def test_a_pair_whose_shapes_differ_is_left_out_of_turns() -> None:
    stack = LayerStack.of(FAMILIES["ResNet"].build())
    turned = measure(stack, [FAMILIES["ResNet"].inputs()], windows(stack), turn)
    assert [pair[0] for pair in turned] == [f"entering.{n}" for n in (0, 1, 2, 4, 5)]


def test_largest_finds_the_positions_of_largest_norm_over_all_batches() -> None:
    stack, batches = llama(), [batch(2, 9, 1, 3), batch(3, 7, 2)]
    found = measure(stack, batches, ["leaving.1"], largest(4))["leaving.1"]
    norms: dict[tuple[int, int], float] = {}
    for before, inputs in zip((0, 2), batches, strict=True):
        state = states_of(stack, inputs, "leaving.1")[0]
        for row, position in inputs["attention_mask"].nonzero().tolist():
            norms[before + row, position] = float(state[row, position].norm())
    best = sorted(norms, key=lambda at: -norms[at])[:4]
    assert list(zip(found.samples.tolist(), found.positions.tolist(), strict=True)) == best
    assert found.norms.tolist() == pytest.approx([norms[at] for at in best])


@pytest.mark.parametrize("side", ["right", "left"])
def test_last_token_is_the_last_that_counts(side: str) -> None:
    stack, inputs = llama(), batch(padded=4)
    if side == "left":
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    found = measure(stack, [inputs], ["leaving.2"], last_token)["leaving.2"].states
    state = states_of(stack, inputs, "leaving.2")[0]
    assert torch.equal(found, state[[0, 1], [8, 4 if side == "right" else 8]])


def test_a_function_of_ones_own_is_summed_over_batches() -> None:
    stack, batches = llama(), [batch(2, 9, 1, 3), batch(3, 7, 2)]
    found = measure(stack, batches, ["leaving.2"], lambda state, mask: state[mask].T @ state[mask])["leaving.2"]
    rows = torch.cat([states_of(stack, one, "leaving.2")[0][one["attention_mask"].bool()] for one in batches])
    torch.testing.assert_close(found, rows.T @ rows)


def test_states_come_in_float32_and_without_gradient() -> None:
    stack = LayerStack.of(tiny_llama().bfloat16())
    with capture(stack, ["leaving.1"], keep) as seen:
        invoke(stack.model, batch())
    assert seen["leaving.1"][0][0].dtype == torch.float32 and not seen["leaving.1"][0][0].requires_grad


# what counts


@pytest.mark.parametrize(
    ("name", "count"),
    [("BERT", 15), ("T5, encoder", 15), ("T5, decoder", 18), ("CLIP, text", 15), ("CLIP, vision", 10), ("ViT", 10)],
)
def test_the_mask_that_counts_is_that_of_the_stack(name: str, count: int) -> None:
    stack = LayerStack.at(FAMILIES[name].build(), FAMILIES[name].stack)
    seen = measure(stack, [FAMILIES[name].inputs()], ["entering.0", "leaving"], statistics)
    assert {found.count for found in seen.values()} == {count}


def test_a_decoders_own_mask_is_used() -> None:
    stack = LayerStack.at(FAMILIES["T5, decoder"].build(), "decoder.block")
    inputs = FAMILIES["T5, decoder"].inputs() | {"decoder_attention_mask": torch.ones(2, 9, dtype=torch.long).tril(6)}
    seen = measure(stack, [inputs], ["leaving.0"], statistics)
    assert seen["leaving.0"].count == 7 + 8


def test_the_first_real_positions_can_be_left_out() -> None:
    stack, inputs = llama(), batch(padded=4)
    masks = {}
    for side in ("right", "left"):
        flipped = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)} if side == "left" else inputs
        masks[side] = measure(stack, [flipped], ["leaving.0"], keep, skip_first=2)["leaving.0"][0][1]
    assert masks["right"].int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0, 0, 0]]
    assert masks["left"].int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1, 1]]


def test_generation_with_a_cache_counts_every_token_once() -> None:
    stack, inputs = llama(), batch(padded=3)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    model: Any = stack.model
    with capture(stack, ["leaving.3"], statistics, skip_first=1) as seen:
        model.generate(**inputs, do_sample=False, max_new_tokens=4, eos_token_id=None, pad_token_id=0)
    # the last new token is chosen and never read
    assert seen["leaving.3"].count == (8 + 5) + 2 * 3


def test_recomputation_in_a_backward_pass_does_not_count_again() -> None:
    stack, inputs = llama(), batch(padded=3)
    model: Any = stack.model
    model.activation_checkpointing_enable()
    model.train()
    ran: list[int] = []
    stack.blocks[1].get_submodule("self_attn").register_forward_hook(lambda *_: ran.append(1))
    with capture(stack, ["entering", "leaving", "model.layers.1.self_attn"], statistics) as seen:
        model(**inputs, use_cache=False).logits.sum().backward()
    assert len(ran) == 2 and {found.count for found in seen.values()} == {15}


def test_measuring_puts_the_mode_back_and_takes_no_gradient() -> None:
    stack = LayerStack.of(tiny_llama(attention_dropout=0.5).train())
    first, second = (states_of(stack, batch())[-1] for _ in range(2))
    assert torch.equal(first, second) and stack.model.training
    with pytest.raises(IndexError):
        states_of(stack, {"input_ids": torch.tensor([[10_000]])})
    assert stack.model.training and not hooks_of(stack.model)


# what is refused


def test_a_capture_that_saw_nothing_is_an_error() -> None:
    stack = llama()
    with pytest.raises(RunError, match=r"Nothing passed leaving\.1: no forward ran"):
        measure(stack, [], ["leaving.1"], statistics)
    with pytest.raises(RequestError, match=r"No position counted at leaving\.1.*first 9"):
        measure(stack, [batch()], ["leaving.1"], statistics, skip_first=9)
    with pytest.raises(RequestError, match="Sample 1 of a batch has no position"):
        measure(stack, [batch(padded=6)], ["leaving.1"], last_token, skip_first=4)
    with pytest.raises(RequestError, match="at least one position"):
        largest(0)


def test_states_whose_padding_or_positions_cannot_be_told_are_refused() -> None:
    stack = LayerStack.at(FAMILIES["T5, encoder"].build(), "encoder.block")
    inputs = FAMILIES["T5, encoder"].inputs() | {"decoder_input_ids": torch.tensor([[0, 4], [0, 5]])}
    with pytest.raises(RequestError, match=r"to which the attention mask \[2, 9\] does not belong"):
        measure(stack, [inputs], ["decoder.block.0"], statistics)
    qwen = LayerStack.of(FAMILIES["Qwen3, alternating windows"].build())
    with pytest.raises(RequestError, match=r"\(2, 9, 4, 8\), whose samples and positions cannot be told"):
        measure(qwen, [batch()], ["model.layers.0.self_attn.q_norm"], statistics)


# no hook is left


def test_an_output_by_names_gives_its_first_tensor_and_one_without_tensors_is_refused() -> None:
    stack, inputs = llama(), batch()
    whole, last = (measure(stack, [inputs], [site], keep)[site][0][0] for site in ("model", "model.norm"))
    assert torch.equal(whole, last)
    stack.model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda *_: {"state": None, "number": 3})
    with pytest.raises(RequestError, match=r"model\.layers\.1\.mlp returned no tensor \(NoneType, int\)"):
        measure(stack, [inputs], ["model.layers.1.mlp"], keep)


def test_no_hook_is_left_after_errors_inside_nested_uses_and_a_users_own_survive() -> None:
    stack, inputs = llama(), batch()
    called: list[str] = []
    stack.blocks[1].register_forward_hook(lambda *_: called.append("after"))
    stack.blocks[1].register_forward_pre_hook(lambda *_: called.append("before"))
    before, clean = hooks_of(stack.model), output(stack, inputs)
    with (
        pytest.raises(ZeroDivisionError),
        intervene(stack, {"leaving": Zero(), "entering.2": Zero()}),
        capture(stack, ["leaving", "entering", "model.layers.1.mlp"], keep),
        stack.following([0, 1, 1]),
    ):
        output(stack, inputs)
        raise ZeroDivisionError
    assert hooks_of(stack.model) == before
    with pytest.raises(KeyError), capture(stack, ["leaving"], lambda *_: {}["missing"]):
        output(stack, inputs)
    assert hooks_of(stack.model) == before
    called.clear()
    assert torch.equal(output(stack, inputs), clean) and called == ["before", "after"]


def test_a_model_that_was_compiled_before_is_seen_and_changed_and_is_compiled_again_afterwards() -> None:
    torch.compiler.reset()
    model: Any = tiny_llama()
    compiled: Any = torch.compile(model, backend="eager")
    inputs, graphs = batch(), torch._dynamo.utils.counters["stats"]
    with torch.no_grad():
        clean = compiled(**inputs, use_cache=False).logits
        stack = LayerStack.of(compiled)
        with capture(stack, ["leaving"], statistics) as seen, intervene(stack, {"leaving.1": Zero()}):
            zeroed = compiled(**inputs, use_cache=False).logits
        assert len(seen) == 4 and not torch.equal(zeroed, clean)
        assert not hooks_of(compiled)
        known = graphs["unique_graphs"]
        assert torch.equal(compiled(**inputs, use_cache=False).logits, clean) and known > 0
        assert graphs["unique_graphs"] == known
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_with_adapters_is_seen_and_changed() -> None:
    import peft

    plain = llama()
    expected = states_of(plain, batch(padded=3))
    wrapped: Any = peft.get_peft_model(plain.model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))  # pyright: ignore[reportArgumentType]
    stack = LayerStack.of(wrapped)
    assert stack.path == "base_model.model.model.layers"
    seen = measure(stack, [batch(padded=3)], ["leaving"], keep)
    assert all(torch.equal(kept[0][0], state) for kept, state in zip(seen.values(), expected, strict=True))
    assert seen["leaving.0"][0][1].sum() == 15
    with intervene(stack, {"leaving.1": Skip()}):
        skipped = output(stack, batch())
    with stack.following([0, 2, 3]):
        assert torch.equal(output(stack, batch()), skipped)
    assert not hooks_of(wrapped)


# what enters a module


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT", "ViT"])
def test_what_enters_a_module_is_what_it_turns_into_its_output(name: str) -> None:
    stack, inputs = LayerStack.at(FAMILIES[name].build(), FAMILIES[name].stack), FAMILIES[name].inputs()
    block = stack.blocks[1]
    for path, module in [(path, module) for path, module in block.named_modules() if hasattr(module, "weight")]:
        site = next(f"{whole}.{path}" for whole, each in stack.model.named_modules() if each is block)
        seen = measure(stack, [inputs], [f"into.{site}", site], keep)
        entering, leaving = (kept[0][0] for kept in seen.values())
        with torch.no_grad():
            torch.testing.assert_close(module(entering), leaving)


def test_what_enters_a_module_counts_without_padding_and_cannot_be_edited() -> None:
    stack = llama()
    name = "into.model.layers.2.mlp.down_proj"
    seen = measure(stack, [batch(padded=4)], [name], statistics)
    assert seen[name].count == ROWS * LENGTH - 4
    with pytest.raises(RequestError, match=r"can be captured and not edited"), intervene(stack, {name: Zero()}):
        pass
    with pytest.raises(RequestError, match=r"Did you mean 'into.model.layers.2.mlp.down_proj'"):
        measure(stack, [batch()], ["into.model.layers.2.mlp.down_prj"], statistics)


@pytest.mark.parametrize("site", [2, None, ("entering.0", "leaving.0"), b"leaving.0"])
def test_a_site_is_a_text(site: Any) -> None:
    stack = LayerStack.of(tiny_llama())
    with pytest.raises(RequestError, match="A site is a text such as"), intervene(stack, {site: Zero()}):
        pass
    if not isinstance(site, tuple):
        with pytest.raises(RequestError, match="A site is a text such as"), capture(stack, [site], statistics):
            pass
    with pytest.raises(RequestError, match='Write "leaving.2" for what block 2 returns'), intervene(stack, {2: Zero()}):  # pyright: ignore
        pass


def test_one_site_may_stand_alone_and_what_was_seen_is_shown_in_a_line() -> None:
    model = tiny_llama()
    stack, ids = LayerStack.of(model), torch.arange(3, 11)[None]
    with (
        torch.no_grad(),
        capture(stack, "leaving", statistics) as seen,
        capture(stack, "leaving.3", last_token) as last,
    ):
        model(ids)
    assert list(seen) == [f"leaving.{n}" for n in range(4)]
    assert re.fullmatch(
        r"Statistics: 8 positions, 32 features, norm [\d.e-]+ \+- [\d.e-]+, at most [\d.e-]+", repr(seen["leaving.3"])
    )
    assert repr(last["leaving.3"]) == "LastTokens: states [1, 32]"


def test_a_model_is_no_stack_and_one_batch_may_stand_alone() -> None:
    model: Any = tiny_llama()
    for work in (
        lambda: capture(model, ["leaving.0"], statistics).__enter__(),
        lambda: intervene(model, {"leaving.0": Zero()}).__enter__(),
        lambda: measure(model, [], ["leaving.0"], statistics),
    ):
        with pytest.raises(RequestError, match=r"A LlamaForCausalLM is no stack of blocks. Write `LayerStack.of"):
            work()
    inputs = {"input_ids": torch.arange(3, 11)[None]}
    alone, listed = (measure(LayerStack.of(model), given, ["leaving.0"], statistics) for given in (inputs, [inputs]))
    assert alone["leaving.0"].count == 8 and torch.equal(alone["leaving.0"].mean, listed["leaving.0"].mean)
