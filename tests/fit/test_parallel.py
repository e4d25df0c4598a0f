"""Two real processes (gloo) against one with the same total batch: copies of the model, and shards of it (FSDP2).

Each way is started once; its processes go through all scenarios and leave results as files.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from conftest import examples_for, tiny_gpt2, tiny_llama, tiny_resnet
from overhaul import session
from overhaul.data.examples import Batch, Examples
from overhaul.errors import RequestError, RunError
from overhaul.fit import Draw, Ledger, Training, adamw, fit
from overhaul.fit.checkpoints import TrainingState
from overhaul.fit.projection import bilevel
from overhaul.objectives import Penalty, Term, cross_entropy, cross_entropy_sum, sequence_nll, sequences, units
from overhaul.references import cache_outputs
from overhaul.stack import LayerStack

Result = tuple[dict[str, Tensor], dict[str, Any]]
Scenario = Callable[[Path], Result]


pytestmark = pytest.mark.smoke  # processes import everything anew


def sgd(model: nn.Module, trained: Any) -> torch.optim.Optimizer:
    """Plain descent, whose steps are proportional to the gradient: AdamW would hide a wrong factor."""
    return torch.optim.SGD(trained.values(), lr=1.0)


def result(model: nn.Module, ledger: Ledger, **more: Any) -> Result:
    counters = asdict(ledger)
    counters.pop("seconds")
    return {n: t.detach().clone() for n, t in model.state_dict(keep_vars=True).items()}, {**counters, **more}


def small(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=2, initializer_range=0.2, **changes)


def every_kind_of_term(scratch: Path, optimizer: Any = sgd, **knobs: Any) -> Result:
    """Two roles of uneven lengths; per token, per sequence, KL to the start, and a penalty on some weights."""
    model = small()
    data = {"a": examples_for("llama", 40, seed=1), "b": examples_for("llama", 23, seed=2)}
    reference = cache_outputs(model, data["b"], 8)
    data["b"] = reference.examples
    start = {n: p.detach().clone() for n, p in model.named_parameters()}

    def distance(weights: Any) -> Tensor:
        return torch.stack([(weights[n] - start[n]).square().sum() for n in weights if "mlp" in n]).sum()

    def size(weights: Any) -> Tensor:
        return weights["model.layers.1.mlp.up_proj.weight"].square().sum()

    terms = [
        cross_entropy("a", 1.0, "a"),
        Term("a", lambda logits, batch: sequence_nll(logits, batch["labels"]).sum(), sequences, 0.3, "sequences"),
        cross_entropy("b", -0.2, "b"),
        reference.kl_term("b", 2.0),
        Penalty(distance, 0.5, "distance"),
        Penalty(size, 0.05, "size"),
    ]
    options = {"steps": 4, "batch_size": {"a": 7, "b": 4}, "accumulation": 2, "lr": 0.05, "clip": 1.0, **knobs}
    ledger = fit(model, terms, data, optimizer=optimizer, **options)
    return result(model, ledger)


def some_without_answers(scratch: Path) -> Result:
    """Every second example carries no loss, so a process often has none at all of a role."""
    model, data = small(), {"a": examples_for("llama", 12, seed=1), "b": examples_for("llama", 7, seed=2)}
    silent = [
        {**item, "labels": torch.full_like(item["labels"], -100)} if n % 2 else item
        for n, item in enumerate(data["a"].items)
    ]
    data["a"] = Examples(silent, data["a"].rows)
    terms = [cross_entropy("a", 1.0, "a"), cross_entropy("b", 0.5, "b")]
    return result(model, fit(model, terms, data, steps=5, batch_size=2, lr=0.1, optimizer=sgd))


def fewer_examples_than_processes(scratch: Path) -> Result:
    model, data = small(), {"a": examples_for("llama", 5)}
    return result(model, fit(model, [cross_entropy("a")], data, steps=3, batch_size=1, lr=0.1, optimizer=sgd))


def train(
    model: nn.Module, terms: Any, data: Any, batch_size: Any, accumulation: int, combine: Any, **how: Any
) -> Ledger:
    with Training(model, data, **how) as training:
        for step in training:
            step.take(terms, batch_size, accumulation, combine)
    return training.ledger


def orthogonal_gradients(scratch: Path, optimizer: Any = None, metric: Any = "euclidean") -> Result:
    """Forget first: inner products over all weights, from gradients accumulated and added up; clipped afterwards."""
    model = small()
    data = {"forget": examples_for("llama", 20, seed=1), "retain": examples_for("llama", 23, seed=2)}
    terms = [cross_entropy("forget", -1.0, "forget"), cross_entropy("retain", name="retain")]
    ledger = train(
        model, terms, data, {"forget": 4, "retain": 5}, 2, bilevel(1.0, 2.0, metric), steps=3, lr=0.02,
        optimizer=optimizer or sgd,
    )  # fmt: skip
    return result(model, ledger)


def orthogonal_to_the_step_of_adamw(scratch: Path) -> Result:
    return orthogonal_gradients(scratch, adamw(), "adam")


class Routed(nn.Module):
    """Two heads, of which a batch uses one, and a third that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 64) for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.heads[int(input_ids[0, 0]) % 2](self.embedding(input_ids))


def parts_that_a_process_leaves_out(scratch: Path) -> Result:
    torch.manual_seed(0)
    model = Routed()
    # one head each, and of one length: a process has them in one batch
    items = [{"input_ids": torch.tensor([n, 3, 4]), "labels": torch.tensor([n, 3 + n, 4])} for n in range(0, 40, 2)]
    data = {"a": Examples(items, [{}] * len(items)), "b": examples_for("llama", 9)}
    terms = [cross_entropy("a", 1.0, "a"), cross_entropy("b", 0.5, "b")]
    return result(
        model, fit(model, terms, data, steps=4, batch_size={"a": 4, "b": 1}, lr=0.1, optimizer=adamw(weight_decay=0.5))
    )


def statistics_move_by_the_mean(scratch: Path) -> Result:
    torch.manual_seed(0)
    model, data = tiny_resnet(), {"a": examples_for("resnet", 8)}
    return result(model, fit(model, [cross_entropy("a")], data, steps=2, batch_size=8, lr=1e-2))


def dropout_and_roles_of_many_sizes(scratch: Path) -> Result:
    """Straight, and interrupted at the fourth of six steps: whatever is not the same is put into the counters."""
    data = {name: examples_for("llama", size, seed=size) for name, size in (("a", 10), ("b", 7), ("c", 3))}
    terms = [cross_entropy("a", name="a"), cross_entropy("b", 0.5, "b")]

    def interrupt(what: str, done: int, total: int, detail: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    def note_the_seed(ledger: Ledger) -> float:
        (scratch.parent / f"seed-{os.environ.get('RANK')}").write_text(str(torch.initial_seed()))
        return 0.2

    terms.append(replace(cross_entropy("c", name="c"), weight=note_the_seed))

    def train(place: Path | None, report: session.Report = lambda *_: None) -> tuple[nn.Module, Ledger]:
        torch.manual_seed(3)
        model, sizes = tiny_gpt2(n_layer=2, resid_pdrop=0.1, embd_pdrop=0.1), {"a": 4, "b": 3, "c": 2}
        with session.using(scratch=place, checkpoint_seconds=0.0, report=report):
            ledger = fit(model, terms, data, steps=6, batch_size=sizes, lr=1e-2)
        return model, ledger

    straight, whole = train(None)
    drawn = torch.rand(2).tolist()
    with pytest.raises(KeyboardInterrupt):
        train(scratch, interrupt)
    resumed, ledger = train(scratch)
    same = all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
    curves = whole.curves == ledger.curves
    return result(resumed, ledger, same=same, same_curves=curves, drawn=drawn, checkpoints=len([*scratch.iterdir()]))


def a_loss_that_one_process_finds_not_finite(scratch: Path) -> Result:
    calls = [0]

    def spoilt(logits: Tensor, batch: Batch) -> Tensor:
        calls[0] += 1
        bad = calls[0] == 3 and os.environ.get("RANK", "1") == "1"
        return cross_entropy_sum(logits, batch) * (math.nan if bad else 1.0)

    model = small()
    # one example at a time and process, so the third call is the third step
    data, said = {"a": examples_for("llama", 6).select([0] * 6)}, ""
    try:
        fit(model, [Term("a", spoilt, units)], data, steps=6, batch_size=2, lr=0.1, optimizer=sgd)
    except RunError as error:
        said = str(error)
    return result(model, Ledger(), said=said)


def one_training_after_another(scratch: Path) -> Result:
    """Three steps and then three more, with the optimizer's moments and the draws carried over."""
    model, state = small(), TrainingState()
    data = {"a": examples_for("llama", 10)}
    knobs: dict[str, Any] = {"steps": 3, "batch_size": 4, "lr": 1e-2, "state": state}
    fit(model, [cross_entropy("a")], data, **knobs)
    ledger = fit(model, [cross_entropy("a")], data, **knobs)
    return result(model, ledger, step=state.step, examples=state.examples)


def weights_below_float32(scratch: Path) -> Result:
    """Six steps at once, and three with three more: the float32 masters go on from one to the other."""
    data, state = {"a": examples_for("llama", 10)}, TrainingState()
    knobs: dict[str, Any] = {"batch_size": 4, "lr": 1e-4}
    parts, straight = small().to(torch.bfloat16), small().to(torch.bfloat16)
    for _ in range(2):
        fit(parts, [cross_entropy("a")], data, steps=3, state=state, **knobs)
    ledger = fit(straight, [cross_entropy("a")], data, steps=6, **knobs)
    same = all(torch.equal(p, q) for p, q in zip(straight.parameters(), parts.parameters(), strict=True))
    low = all(p.dtype is torch.bfloat16 for p in straight.parameters())
    return result(straight, ledger, same=same, low=low)


def only_some_parameters_in_shards(scratch: Path) -> Result:
    """Three rates by module and depth, the embedding frozen, and a model that stays a plain one."""
    model = small()
    embedding = model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    before = embedding.detach().clone()

    def by_depth(model: nn.Module, trained: Any) -> torch.optim.Optimizer:
        stack = LayerStack.of(model)
        groups = [{"params": [p], "lr": 0.5 ** max(stack.depth(n), 0)} for n, p in trained.items()]
        return torch.optim.AdamW(groups, lr=1.0, weight_decay=0.0)

    data = {"a": examples_for("llama", 10)}
    ledger = fit(
        model, [cross_entropy("a")], data, steps=3, batch_size=4, lr=1e-2, warmup=2, optimizer=by_depth,
        trainable=lambda name: "embed" not in name,
    )  # fmt: skip
    kept = torch.equal(embedding, before) and embedding.requires_grad and not model.training
    plain = type(model).__name__ == "LlamaForCausalLM" and all(type(p) is nn.Parameter for p in model.parameters())
    tied = model.get_output_embeddings().weight is embedding  # pyright: ignore[reportCallIssue]
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    model.save_pretrained(scratch / "saved")  # pyright: ignore[reportCallIssue]
    return result(model, ledger, kept=kept, plain=plain, tied=tied, hooks=hooks)


def a_batch_that_is_too_small(scratch: Path) -> Result:
    model, said = small(), ""
    try:
        fit(model, [cross_entropy("a")], {"a": examples_for("llama", 5)}, steps=1, batch_size=1)
    except RequestError as error:
        said = str(error)
    return result(model, Ledger(), said=said)


def with_activations_computed_again(scratch: Path) -> Result:
    """As `every_kind_of_term`; the names of parameters inside a checkpointed block have another prefix."""
    from accelerate.state import AcceleratorState

    mlp: Any = type(next(module for name, module in small().named_modules() if name.endswith(".mlp")))
    plain, runs = mlp.forward, {"false": 0, "true": 0}

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs[os.environ["FSDP_ACTIVATION_CHECKPOINTING"]] += torch.is_grad_enabled()
        return plain(*args, **kwargs)

    mlp.forward, found = counted, (dict[str, Tensor](), dict[str, Any]())
    try:
        for again in runs:
            AcceleratorState._reset_state()
            os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = again
            found = every_kind_of_term(scratch)
    finally:
        mlp.forward = plain
    found[1]["runs"] = [*runs.values()]
    return found


def shards_of_the_first_generation(scratch: Path) -> Result:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    os.environ["FSDP_VERSION"] = "1"
    return a_batch_that_is_too_small(scratch)


COPIES: list[Scenario] = [
    every_kind_of_term,
    some_without_answers,
    fewer_examples_than_processes,
    parts_that_a_process_leaves_out,
    orthogonal_gradients,
    orthogonal_to_the_step_of_adamw,
    statistics_move_by_the_mean,
    dropout_and_roles_of_many_sizes,
    a_loss_that_one_process_finds_not_finite,
    one_training_after_another,
    weights_below_float32,
]
SHARDS: list[Scenario] = [
    every_kind_of_term,
    orthogonal_gradients,
    orthogonal_to_the_step_of_adamw,
    some_without_answers,
    dropout_and_roles_of_many_sizes,
    a_loss_that_one_process_finds_not_finite,
    one_training_after_another,
    weights_below_float32,
    only_some_parameters_in_shards,
    a_batch_that_is_too_small,
    with_activations_computed_again,
    shards_of_the_first_generation,
]
AS_LAUNCHED = {  # by `accelerate launch --use_fsdp --fsdp_version 2`
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def process(rank: int, port: int, environment: dict[str, str], scenarios: list[Scenario], folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", **environment)
    torch.set_num_threads(1)
    for scenario in scenarios:
        scratch = folder / scenario.__name__
        scratch.mkdir(exist_ok=True)
        tensors, counters = scenario(scratch)
        save_file({n: t.clone() for n, t in tensors.items()}, folder / f"{scenario.__name__}-{rank}.safetensors")
        (folder / f"{scenario.__name__}-{rank}.json").write_text(json.dumps(counters))
    torch.distributed.destroy_process_group()


def run_twice(folder: Path, scenarios: list[Scenario], environment: dict[str, str]) -> Path:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(process, (port, environment, scenarios, folder), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_twice(tmp_path_factory.mktemp("copies"), COPIES, {})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_twice(tmp_path_factory.mktemp("shards"), SHARDS, AS_LAUNCHED)


def of_rank(folder: Path, scenario: Scenario, rank: int) -> Result:
    name = f"{scenario.__name__}-{rank}"
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())


def both(folder: Path, scenario: Scenario) -> Result:
    """What the processes left, which must be the same bit for bit."""
    (weights, counters), (other, others) = (of_rank(folder, scenario, rank) for rank in (0, 1))
    assert weights.keys() == other.keys() and all(torch.equal(weights[n], other[n]) for n in weights)
    assert counters == others
    return weights, counters


def assert_same(ours: Result, theirs: Result, tolerance: float) -> None:
    assert ours[0].keys() == theirs[0].keys()
    for name, tensor in theirs[0].items():
        assert torch.allclose(ours[0][name], tensor, rtol=0, atol=tolerance), name
    for counter in ("step", "examples", "tokens"):
        assert ours[1][counter] == theirs[1][counter]
    assert ours[1]["curves"].keys() == theirs[1]["curves"].keys()
    for name, curve in theirs[1]["curves"].items():
        assert ours[1]["curves"][name] == pytest.approx(curve, abs=10 * tolerance, rel=1e-5), name


WAYS = ["copies", pytest.param("shards", marks=pytest.mark.slow)]
ALIKE = [every_kind_of_term, some_without_answers, fewer_examples_than_processes, parts_that_a_process_leaves_out]


@pytest.mark.parametrize("scenario", [*ALIKE, orthogonal_gradients, one_training_after_another])
def test_two_copies_are_one_process_with_the_double_batch(scenario: Scenario, copies: Path, tmp_path: Path) -> None:
    assert_same(both(copies, scenario), scenario(tmp_path), 1e-6)


def test_a_process_with_no_answer_was_among_them() -> None:
    """Or `some_without_answers` would prove nothing."""
    draws = Draw("a", 12, seed=0).indices(0, 10)
    assert any(draws[n] % 2 != draws[n + 1] % 2 for n in range(0, 10, 2))


def test_a_part_that_nothing_uses_is_left_alone(copies: Path) -> None:
    torch.manual_seed(0)
    before, (after, _) = Routed().state_dict(), both(copies, parts_that_a_process_leaves_out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not name.startswith("heads.2")}


def test_statistics_are_the_same_in_both_processes(copies: Path) -> None:
    (weights, _), before = both(copies, statistics_move_by_the_mean), tiny_resnet().state_dict()
    means = [name for name in before if name.endswith("running_mean")]
    assert means and all(weights[name].abs().sum() > 0 for name in means)
    assert {int(weights[name]) for name in before if name.endswith("num_batches_tracked")} == {2}


@pytest.mark.parametrize("way", WAYS)
def test_resuming_is_bit_exact_with_two_processes(way: str, request: pytest.FixtureRequest) -> None:
    _, counters = both(request.getfixturevalue(way), dropout_and_roles_of_many_sizes)
    assert counters["same"] and counters["same_curves"] and counters["checkpoints"] == 1
    assert counters["examples"] == {"a": 24, "b": 18, "c": 12}


def test_processes_drop_out_each_by_itself_and_go_on_in_step(copies: Path) -> None:
    assert [(copies / f"seed-{rank}").read_text() for rank in (0, 1)] == ["3", str(3 + 7919)]
    _, counters = both(copies, dropout_and_roles_of_many_sizes)  # which has compared what they draw afterwards
    assert len(counters["drawn"]) == 2


@pytest.mark.parametrize("way", WAYS)
def test_what_one_process_finds_stops_both(way: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    weights, counters = both(request.getfixturevalue(way), a_loss_that_one_process_finds_not_finite)
    assert "step 3: the term 'loss' on the role 'a' is nan. The weights are those after step 2" in counters["said"]
    model, data = small(), {"a": examples_for("llama", 6).select([0] * 6)}
    fit(model, [cross_entropy("a")], data, steps=2, batch_size=2, lr=0.1, optimizer=sgd)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(weights[name], tensor, atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [every_kind_of_term, some_without_answers, one_training_after_another])
def test_shards_are_one_process_too(scenario: Scenario, shards: Path, tmp_path: Path) -> None:
    alone = scenario(tmp_path)
    assert_same(both(shards, scenario), alone, 1e-5)
    assert max(alone[1]["curves"]["gradient norm"]) > 1.0, "the gradient was clipped, so its norm had to be right"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scenario", [orthogonal_gradients, orthogonal_to_the_step_of_adamw])
def test_inner_products_are_over_all_of_the_gradient(
    scenario: Scenario, way: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Of shards, too: a process that took its own part for the whole would come to another direction."""
    # AdamW makes a step of full size of any rounding error in a gradient near zero
    assert_same(
        both(request.getfixturevalue(way), scenario),
        scenario(tmp_path),
        1e-5 if "adamw" not in scenario.__name__ else 2e-3,
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["copies", "shards"])
def test_masters_are_kept_with_two_processes(way: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    ours, alone = both(request.getfixturevalue(way), weights_below_float32), weights_below_float32(tmp_path)
    assert ours[1]["same"] and ours[1]["low"] and alone[1]["same"]
    # shards compute in float32, and a bfloat16 next to 1 is 4e-3 away
    assert all(torch.allclose(ours[0][name], tensor, rtol=0, atol=1e-2) for name, tensor in alone[0].items())


@pytest.mark.slow
def test_shards_keep_rates_by_depth_and_leave_a_plain_model(shards: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    ours = both(shards, only_some_parameters_in_shards)
    assert_same(ours, only_some_parameters_in_shards(tmp_path), 1e-5)
    assert (ours[1]["kept"], ours[1]["plain"], ours[1]["tied"], ours[1]["hooks"]) == (True, True, True, 0)
    saved = LlamaForCausalLM.from_pretrained(shards / "only_some_parameters_in_shards" / "saved")
    assert all(torch.equal(tensor, ours[0][name]) for name, tensor in saved.state_dict().items())


@pytest.mark.slow
def test_shards_refuse_a_batch_that_leaves_a_process_without_work(shards: Path) -> None:
    _, counters = both(shards, a_batch_that_is_too_small)
    assert counters["said"].startswith("The role 'a' is drawn 1 at a time, but 2 processes hold shards")


@pytest.mark.slow
def test_shards_of_the_first_generation_are_refused(shards: Path) -> None:
    _, counters = both(shards, shards_of_the_first_generation)
    assert "made for FSDP2. Write `fsdp_version: 2`" in counters["said"]


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing(shards: Path) -> None:
    again, plain = both(shards, with_activations_computed_again), both(shards, every_kind_of_term)
    assert_same(again, plain, 1e-6)
    once, twice = again[1]["runs"]
    assert twice == 2 * once > 0, "every block ran once more for its gradient"
