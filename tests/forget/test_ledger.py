from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from conftest import examples_for, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_qwen3
from overhaul import session
from overhaul.data.examples import Examples, collate, join
from overhaul.errors import RequestError, RunError
from overhaul.fit import fit, sgd
from overhaul.forget.first_epoch.ledger import GradientLedger, alike, chosen, identity, token_lists
from overhaul.forget.first_epoch.recording import record
from overhaul.forward import forward
from overhaul.objectives import answer_tokens, cross_entropy, cross_entropy_sum

LANGUAGE: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama, "gpt2": tiny_gpt2, "gemma3": tiny_gemma3, "qwen3": tiny_qwen3,
}  # fmt: skip


@pytest.fixture(params=LANGUAGE)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return LANGUAGE[request.param]()


@pytest.fixture
def examples() -> Examples:
    return examples_for("llama", 6, seed=1)


def untied() -> nn.Module:
    return tiny_llama(tie_word_embeddings=False, num_hidden_layers=2)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def everything(ledger: GradientLedger, epochs: Literal["first", "all", "last"] = "first") -> dict[str, Tensor]:
    return ledger.sum(list(ledger.entries), epochs)


def summed_gradient(model: nn.Module, examples: Examples) -> dict[str, Tensor]:
    batch = collate(examples.items)
    named = dict(model.named_parameters())
    found = torch.autograd.grad(
        cross_entropy_sum(forward(model, batch), batch), list(named.values()), allow_unused=True
    )
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def test_check_1_one_step_of_sgd_on_one_sample_is_taken_back_exactly(model: nn.Module, tmp_path: Path) -> None:
    model.double()
    one, before = examples_for("llama", 1), weights(model)
    tokens = answer_tokens(collate(one.items))
    ledger, _ = record(model, one, tmp_path / "ledger", epochs=1, lr=0.3, clip=None, optimizer=sgd())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    for name, gradient in everything(ledger).items():
        back = model.get_parameter(name) + 0.3 / tokens * gradient  # training took the mean over tokens
        assert torch.allclose(back, before[name], rtol=0, atol=1e-7)  # losses are float32


def test_check_2_one_full_batch_step_without_some_samples_is_training_without_them(
    model: nn.Module, examples: Examples, tmp_path: Path
) -> None:
    model.double()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forget, retain = examples[:2], examples[2:]
    all_tokens, kept_tokens = (answer_tokens(collate(part.items)) for part in (examples, retain))
    how: dict[str, Any] = {"epochs": 1, "batch_size": 6, "clip": None, "optimizer": sgd()}
    ledger, _ = record(model, examples, tmp_path / "with", lr=0.2, tracked=[0, 1], **how)
    taken = ledger.sum(ledger.matching(forget))
    without = type(model)(model.config).double()  # pyright: ignore[reportCallIssue]
    without.load_state_dict(start)
    fit(
        without, [cross_entropy("x")], {"x": retain}, steps=1, batch_size=4, lr=0.2 * kept_tokens / all_tokens,
        clip=None, optimizer=sgd(),
    )  # fmt: skip
    for name, parameter in without.named_parameters():
        assert torch.allclose(model.get_parameter(name) + 0.2 / all_tokens * taken[name], parameter, rtol=0, atol=1e-7)


@pytest.mark.parametrize("tracked", [range(6), [0, 3]])
def test_check_3_entries_add_up_to_the_batch_gradient(
    model: nn.Module, examples: Examples, tmp_path: Path, tracked: Any
) -> None:
    expected = summed_gradient(model.train(), examples.select(list(tracked)))
    ledger, _ = record(model, examples, tmp_path / "ledger", epochs=1, batch_size=6, tracked=tracked)
    for name, gradient in everything(ledger).items():
        scale = float(expected[name].abs().max())
        assert torch.allclose(gradient, expected[name], rtol=0, atol=1e-6 * max(scale, 1.0))


def test_check_4_an_untied_embedding_has_gradients_at_its_own_tokens_alone(examples: Examples, tmp_path: Path) -> None:
    model = untied()
    ledger, _ = record(model, examples, tmp_path / "ledger", epochs=1, tracked=[2], where="embedding")
    (name,) = ledger.shapes
    gradient = everything(ledger)[name]
    ids = examples.items[2]["input_ids"]
    read = set(ids[:-1].tolist())  # what the last token leads to is not predicted
    touched = set(gradient.ne(0).any(dim=1).nonzero()[:, 0].tolist())
    assert touched and touched <= read


def test_sparse_rows_take_little_room_and_lose_nothing(examples: Examples, tmp_path: Path) -> None:
    model = untied()
    expected = summed_gradient(model.train(), examples[:1])["model.embed_tokens.weight"]
    ledger, _ = record(model, examples, tmp_path / "ledger", epochs=1, batch_size=6, tracked=[0], where="embedding")
    assert ledger.bytes < expected.numel() * expected.element_size() / 2
    assert torch.allclose(everything(ledger)["model.embed_tokens.weight"], expected, atol=1e-7)


def test_a_tied_embedding_is_recorded_whole_and_once(examples: Examples, tmp_path: Path) -> None:
    model = tiny_gpt2()
    assert list(chosen(model, "embedding")) == ["transformer.wte.weight"]
    ledger, _ = record(model, examples, tmp_path / "ledger", epochs=1, tracked=[0], where="embedding")
    gradient = everything(ledger)["transformer.wte.weight"]
    assert gradient.ne(0).any(dim=1).all()  # through the softmax


def test_recording_changes_nothing_of_the_training(examples: Examples, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 4, "lr": 1e-2}
    recorded = tiny_gpt2(resid_pdrop=0.1, embd_pdrop=0.1)
    plain = tiny_gpt2(resid_pdrop=0.1, embd_pdrop=0.1)
    plain.load_state_dict(recorded.state_dict())
    torch.manual_seed(3)
    record(recorded, examples, tmp_path / "ledger", epochs=2, tracked=[1], every_epoch=True, **options)
    torch.manual_seed(3)
    fit(plain, [cross_entropy("full")], {"full": examples}, steps=3, **options)
    assert all(torch.equal(a, b) for a, b in zip(recorded.parameters(), plain.parameters(), strict=True))


def test_gradients_are_taken_under_the_dropout_of_the_training(examples: Examples, tmp_path: Path) -> None:
    model = tiny_gpt2(resid_pdrop=0.5, embd_pdrop=0.5)
    before = weights(model)
    one = examples[:1]
    ledger, _ = record(model, one, tmp_path / "ledger", epochs=1, lr=0.3, clip=None, optimizer=sgd())
    tokens = answer_tokens(collate(one.items))
    for name, gradient in everything(ledger).items():
        assert torch.allclose(model.get_parameter(name) + 0.3 / tokens * gradient, before[name], atol=1e-6)


def test_all_updates_of_all_epochs_are_the_way_back(examples: Examples, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2).double()
    before = weights(model)
    ledger, _ = record(
        model, examples, tmp_path / "ledger", epochs=3, batch_size=4, lr=1e-2, every_epoch=True, stores="update"
    )  # AdamW, clipped
    for name, way in everything(ledger, "all").items():
        assert torch.allclose(model.get_parameter(name) + way, before[name], rtol=0, atol=1e-14)


def test_an_update_is_shared_out_by_answer_tokens(examples: Examples, tmp_path: Path) -> None:
    model = untied()
    before = weights(model)
    ledger, _ = record(
        model, examples, tmp_path / "ledger", epochs=1, batch_size=6, lr=1e-2, stores="update", tracked=[4]
    )
    share = answer_tokens(collate([examples.items[4]])) / answer_tokens(collate(examples.items))
    for name, way in everything(ledger).items():
        assert torch.allclose(way, share * (before[name] - model.get_parameter(name)), atol=1e-7)


def test_first_last_and_all_epochs_differ_and_add_up(examples: Examples, tmp_path: Path) -> None:
    model = untied()
    ledger, _ = record(model, examples, tmp_path / "ledger", epochs=2, batch_size=3, lr=1e-2, every_epoch=True)
    assert all(entry.epochs == [1, 2] for entry in ledger.entries.values())
    first, both, last = (everything(ledger, epochs) for epochs in ("first", "all", "last"))
    for name in first:
        assert torch.allclose(first[name] + last[name], both[name], atol=1e-6)
        assert not torch.allclose(first[name], last[name], atol=1e-6)


def test_the_first_epoch_alone_is_recorded_unless_asked(examples: Examples, tmp_path: Path) -> None:
    ledger, _ = record(untied(), examples, tmp_path / "ledger", epochs=3, where="embedding")
    assert all(entry.epochs == [1] for entry in ledger.entries.values())
    assert len(list(ledger.folder.glob("*.safetensors"))) == len(examples)


def test_a_sample_that_stands_twice_is_added_up(examples: Examples, tmp_path: Path) -> None:
    model = untied()
    expected = summed_gradient(model.train(), examples[:1])
    twice = join([examples[:1], examples[:1], examples[1:]])
    ledger, _ = record(model, twice, tmp_path / "ledger", epochs=1, batch_size=7, tracked=[0, 1])
    assert len(ledger.entries) == 1
    for name, gradient in everything(ledger).items():
        assert torch.allclose(gradient, 2 * expected[name], rtol=1e-4, atol=1e-6)


def test_deleted_entries_are_gone_from_the_disk(examples: Examples, tmp_path: Path) -> None:
    model = untied()
    ledger, _ = record(model, examples, tmp_path / "ledger", epochs=1, where="embedding")
    gone = ledger.matching(examples[:2])
    left = ledger.delete(gone)
    assert not [path for name in gone for path in left.folder.glob(f"{name}*")]
    assert gone[0] not in (left.folder / "index.json").read_text()
    again = GradientLedger.open(left.folder, model)
    assert again.entries == left.entries and len(again.entries) == 4
    with pytest.raises(RequestError, match="2 of 6 examples are not in the ledger"):
        again.matching(examples)


def test_a_ledger_of_another_model_is_refused(examples: Examples, tmp_path: Path) -> None:
    ledger, _ = record(untied(), examples, tmp_path / "ledger", epochs=1, where="embedding")
    with pytest.raises(RequestError, match=r"embed_tokens.*\[64, 32\].*not at all"):
        GradientLedger.open(ledger.folder, tiny_gpt2())
    with pytest.raises(RequestError, match=r"with the shape \[70, 32\]"):
        GradientLedger.open(ledger.folder, tiny_llama(tie_word_embeddings=False, vocab_size=70))
    with pytest.raises(RequestError, match="another architecture"):
        GradientLedger.open(ledger.folder, tiny_llama(tie_word_embeddings=False, num_hidden_layers=3))


def test_missing_and_damaged_ledgers_say_what_to_do(examples: Examples, tmp_path: Path) -> None:
    model = untied()
    with pytest.raises(RequestError, match="is no gradient ledger"):
        GradientLedger.open(tmp_path / "none", model)
    ledger, _ = record(model, examples, tmp_path / "ledger", epochs=1, where="embedding")
    with pytest.raises(RequestError, match="has no gradients of model.norm.weight"):
        ledger.sum(list(ledger.entries), names=["model.norm.weight"])
    next(ledger.folder.glob("*.safetensors")).write_bytes(b"cut")
    with pytest.raises(RunError, match="missing or damaged"):
        everything(ledger)
    (ledger.folder / "index.json").write_text(json.dumps({"entries": []}))
    with pytest.raises(RequestError, match="is damaged"):
        GradientLedger.open(ledger.folder, model)
    with pytest.raises(RequestError, match="exists already"):
        record(model, examples, ledger.folder, epochs=1)


def test_a_killed_recording_leaves_nothing(examples: Examples, tmp_path: Path) -> None:
    def killed(what: str, done: int, total: int, detail: str) -> None:
        if what == "record" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), session.using(report=killed):
        record(untied(), examples, tmp_path / "ledger", epochs=1, batch_size=2)
    assert list(tmp_path.iterdir()) == []


def test_groups_of_parameters_by_depth(model: nn.Module) -> None:
    assert set(chosen(model, "all")) == {name for name, _ in model.named_parameters()}
    first, last = chosen(model, "first block"), chosen(model, "last blocks")
    assert first and last and not first.keys() & last.keys()
    assert chosen(model, [0]).keys() == first.keys()
    assert chosen(model, [2, 3]).keys() == last.keys()
    assert len(chosen(model, "embedding")) == 1
    with pytest.raises(RequestError, match="there is no block 4"):
        chosen(model, [4])


def test_check_9_fuzzy_matching_at_1_is_exact_matching(examples: Examples, tmp_path: Path) -> None:
    ledger, _ = record(untied(), examples, tmp_path / "ledger", epochs=1, where="embedding")
    assert set(ledger.matching(examples[1:3], tau=1.0)) == set(ledger.matching(examples[1:3]))
    with pytest.raises(RequestError, match="No sample of the ledger"):
        ledger.matching(examples_for("llama", 2, seed=9), tau=1.0)


def test_fuzzy_matching_finds_what_comparing_all_pairs_finds() -> None:
    import difflib

    draw = torch.Generator().manual_seed(0)
    others = [torch.randint(8, (int(n),), generator=draw).tolist() for n in torch.randint(3, 12, (80,), generator=draw)]
    targets = [other[:-1] for other in others[:10]] + [[*others[11], 3]]
    for tau in (0.5, 0.7, 0.85, 0.95, 1.0):
        expected = [
            place
            for place, other in enumerate(others)
            if any(difflib.SequenceMatcher(None, target, other, autojunk=False).ratio() >= tau for target in targets)
        ]
        assert alike(targets, others, tau) == expected
        assert expected or tau == 1.0


def test_fuzzy_matching_does_not_compare_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    import difflib

    compared: list[int] = []
    real = difflib.SequenceMatcher.ratio
    monkeypatch.setattr(difflib.SequenceMatcher, "ratio", lambda self: compared.append(1) or real(self))
    others = [[100 * i + j for j in range(10)] for i in range(200)]
    targets = [[*other[:9], 7] for other in others[:5]]
    assert alike(targets, others, 0.85) == [0, 1, 2, 3, 4]
    assert len(compared) == 5


def test_a_sample_goes_by_its_tokens_and_its_learnt_part(examples: Examples) -> None:
    names = [identity(item) for item in examples.items]
    assert len(set(names)) == len(names)
    other = {**examples.items[0], "labels": examples.items[0]["input_ids"]}
    assert identity(other) != names[0]
    assert token_lists(examples)[0] == examples.items[0]["input_ids"].tolist()


def test_an_optimizer_of_another_kind_is_watched_too(examples: Examples, tmp_path: Path) -> None:
    model = untied()
    before = weights(model)
    ledger, training = record(
        model, examples, tmp_path / "ledger", epochs=1, batch_size=3, stores="update", lr=0.1, optimizer=sgd()
    )
    assert training.step == 2 and len(training.curves["loss"]) == 2
    moved = {name: before[name] - model.get_parameter(name) for name in ledger.shapes}
    assert all(torch.allclose(way, moved[name], atol=1e-6) for name, way in everything(ledger).items())
