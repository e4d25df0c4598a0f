"""Inputs that are odd: every merge takes them and gives what its formula gives, or refuses them in a sentence."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import tiny_llama
from overhaul import models
from overhaul.errors import MaterialWarning, RequestError, RunError
from overhaul.merge._kinship import Kinship
from overhaul.method import Outcome, methods
from tiny_checkpoints import EVERY, left, make, rewrite, same_bits, sharded, tensors

KNOBS: dict[str, dict[str, Any]] = {"merge.lines": {"alpha": 0.5, "beta": 0.25}, "merge.consensus": {"agree": 1}}
MERGES = sorted(
    name
    for name, known in methods().items()
    if known.verb == "merge" and known.subject and known.subject.name == "base" and name != "merge.stack"
)
SINGLE = ("merge.slerp", "merge.wise_ft")


def merged(name: str, base: Path, tuned: list[Path], out: Path) -> Outcome:
    torch.manual_seed(0)
    known = methods()[name]
    return known.call(base=base, tuned=tuned[0] if name in SINGLE else tuned, **KNOBS.get(name, {}), out=out)


def near(family: str, folder: Path, seed: int, base: Path, share: float = 0.1) -> Path:
    """A model on the way from the base to another one, as if it had been tuned."""
    held = tensors(base)

    def tune(own: dict[str, Tensor]) -> None:
        own |= {n: held[n].lerp(v, share) if v.is_floating_point() else v for n, v in own.items()}

    rewrite(path := make(family, folder, seed), tune)
    return path


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models that were tuned from it."""
    folder = tmp_path_factory.mktemp("three")
    base = make("llama", folder / "base", 0)
    return [base, *(near("llama", folder / f"tuned{seed}", seed, base) for seed in (1, 2))]


# a base that is not the base


@pytest.mark.parametrize("name", MERGES)
def test_a_strange_base_is_said_with_numbers(name: str, three: list[Path], tmp_path: Path) -> None:
    base, *tuned = three
    other = make("llama", tmp_path / "other", 7)
    with pytest.warns(MaterialWarning, match=f"{name}: .*tuned checkpoint.* may not have come from the base") as heard:
        done = merged(name, other, tuned, tmp_path / "out")
    assert 1.2 < done.facts["relative_change"][0] < 1.6 and done.facts["far_share"][0] == 1.0
    assert f"{done.facts['relative_change'][0]:.2f} times as long" in done.facts["advice"]
    assert len([one for one in heard if one.category is MaterialWarning]) == (1 if name in SINGLE else 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = merged(name, base, tuned, tmp_path / "right")
    assert "advice" not in done.facts and done.facts["far_share"][0] == 0.0
    expected = relative(tensors(base), tensors(tuned[0]))
    assert done.facts["relative_change"][0] == pytest.approx(expected, rel=1e-5)


def relative(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> float:
    matrices = [name for name, value in base.items() if value.ndim > 1]
    a, b = (torch.cat([state[name].flatten() for name in matrices]).double() for state in (base, tuned))
    return float((b - a).norm() / a.norm())


@pytest.mark.parametrize("name", [name for name in MERGES if name not in SINGLE])
def test_a_copy_of_the_base_among_the_tuned_is_said(name: str, three: list[Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(three[0], tmp_path / "copied"))
    with pytest.warns(MaterialWarning, match=r"tuned checkpoint 1 is the base, number for number"):
        done = merged(name, three[0], [copied, three[2]], tmp_path / "out")
    assert done.facts["relative_change"][0] == 0.0 < done.facts["relative_change"][1]


@pytest.mark.parametrize("name", MERGES)
def test_copies_of_the_base_alone_are_refused(name: str, three: list[Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(three[0], tmp_path / "copied"))
    with pytest.raises(RunError, match="changed nothing"):
        merged(name, three[0], [copied, copied], tmp_path / "out")
    assert left(tmp_path) == ["copied"]


@pytest.mark.parametrize("name", [name for name in MERGES if name not in SINGLE])
def test_a_folder_that_is_given_twice_is_said(name: str, three: list[Path], tmp_path: Path) -> None:
    again = three[1].parent / "other" / ".." / three[1].name
    (three[1].parent / "other").mkdir(exist_ok=True)
    with pytest.warns(MaterialWarning, match=f"{name}: tuned checkpoint 2 is tuned checkpoint 1 again"):
        done = merged(name, three[0], [three[1], again], tmp_path / "out")
    assert "counts once more" in done.facts["advice"]


def test_a_new_head_is_no_strange_base() -> None:
    kinship, draw = Kinship(), torch.Generator().manual_seed(0)
    for n in range(10):
        base, new = torch.randn(2, 1000, generator=draw)
        kinship.note(f"{n}", True, base, new if n < 4 else base + 0.05 * new)
    kinship.note("norm", False, torch.ones(8), 100 * torch.ones(8))
    assert kinship.facts("merge.x", ["tuned"])["far_share"] == [0.4]
    nothing = Kinship()
    nothing.note("a", True, torch.zeros(9), torch.ones(9))
    assert nothing.facts("merge.x", ["tuned"]) == {"relative_change": [None], "far_share": [None]}


# numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", MERGES)
def test_numbers_that_are_none_are_named(
    name: str, place: int, value: float, three: list[Path], tmp_path: Path
) -> None:
    folders = list(three)
    folders[place] = Path(shutil.copytree(three[place], tmp_path / "damaged"))
    damaged = "model.layers.1.mlp.up_proj.weight"
    rewrite(folders[place], lambda held: held[damaged].view(-1)[3:4].fill_(value))
    with pytest.raises(RunError, match=rf"damaged.*{damaged} holds values that are not finite"):
        merged(name, folders[0], folders[1:], tmp_path / "out")
    assert left(tmp_path) == ["damaged"]


@pytest.fixture(scope="module")
def stored(three: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    """The three in several dtypes, the same numbers in float32, and the three in several files."""
    folder, found = tmp_path_factory.mktemp("stored"), [[], [], []]
    for n, (path, dtype) in enumerate(zip(three, ("bfloat16", "float32", "float16"), strict=True)):
        model = models.open_model(path)[0]
        found[2].append(sharded(model, folder / f"shards{n}", f"{6 + n}KB"))
        found[0].append(models.save(model, None, folder / f"{n}", dtype=dtype))
        wide = models.open_model(found[0][n], dtype="float32")[0]
        found[1].append(models.save(wide, None, folder / f"wide{n}", dtype="float32"))
    return found


@pytest.mark.parametrize("name", MERGES)
def test_dtypes_mix_in_float32_and_are_rounded_once(name: str, stored: list[list[Path]], tmp_path: Path) -> None:
    made, wide = (
        tensors(merged(name, base, others, tmp_path / base.name).model) for base, *others in (stored[0], stored[1])
    )
    assert same_bits(made, {key: value.bfloat16() for key, value in wide.items()})


@pytest.mark.parametrize("name", MERGES)
def test_shards_change_nothing(name: str, three: list[Path], stored: list[list[Path]], tmp_path: Path) -> None:
    (base, one, two), cut = three, stored[2]
    whole = tensors(merged(name, base, [one, two], tmp_path / "whole").model)
    assert same_bits(tensors(merged(name, base, [cut[1], two], tmp_path / "a").model), whole)
    assert same_bits(tensors(merged(name, cut[0], [one, two], tmp_path / "b").model), whole)


@pytest.mark.parametrize("name", [name for name in MERGES if name not in SINGLE])
def test_integers_are_copied_and_have_to_agree(name: str, three: list[Path], tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(path, tmp_path / path.name)) for path in three]
    for path, code in zip(folders, (1, 1, 2), strict=True):
        rewrite(path, lambda held, code=code: held.update({"model.codes": torch.tensor([code, 5])}))
    done = merged(name, folders[0], [folders[1]], tmp_path / "out")
    assert tensors(done.model)["model.codes"].tolist() == [1, 5]
    with pytest.raises(RunError, match=r"model\.codes \(torch\.int64\) differs between"):
        merged(name, folders[0], folders[1:], tmp_path / "other")


# models


@pytest.mark.parametrize("family", [name for name in EVERY if name != "llama"])
@pytest.mark.parametrize("name", ["merge.dare", "merge.slerp"])
def test_other_families_load_again(name: str, family: str, tmp_path: Path) -> None:
    base = make(family, tmp_path / "base", 0)
    tuned = [near(family, tmp_path / f"tuned{seed}", seed, base) for seed in (1, 2)]
    done = merged(name, base, tuned, tmp_path / "out")
    opened, held = models.open_model(done.model)[0].state_dict(), tensors(base)
    assert done.facts["far_share"] == [0.0] * len(done.facts["far_share"])
    counters = [key for key in held if key.endswith("num_batches_tracked")]
    assert all(torch.equal(tensors(done.model)[key], held[key]) for key in counters)
    assert all(bool(value.isfinite().all()) for value in opened.values())


@pytest.mark.parametrize("name", MERGES)
def test_a_model_of_one_block_has_the_last_blocks_share(name: str, tmp_path: Path) -> None:
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        folders.append(models.save(tiny_llama(num_hidden_layers=1), None, tmp_path / f"{seed}"))
    models.open_model(merged(name, folders[0], folders[1:], tmp_path / "out").model)


@pytest.mark.parametrize("name", MERGES)
def test_a_folder_inside_an_input_is_a_model_of_its_own(name: str, three: list[Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(three[0], tmp_path / "base"))
    made = tensors(merged(name, base, three[1:], base / "merged").model)
    assert same_bits(tensors(merged(name, base, three[1:], tmp_path / "out").model), made)
    assert same_bits(tensors(base), tensors(three[0]))
    for folder in (base, base / "merged"):
        models.open_model(folder)
    with pytest.raises(RequestError, match="exists already"):
        merged(name, base, three[1:], base)


def _extra(path: Path) -> None:
    rewrite(path, lambda held: held.update({"model.extra.weight": torch.ones(3)}))


def _less(path: Path) -> None:
    rewrite(path, lambda held: held.pop("model.layers.1.mlp.up_proj.weight"))


def _quantised(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))


def _adapter(path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = models.open_model(path)[0]
    source = path.with_name("under")
    path.rename(source)
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.peft_config["default"].base_model_name_or_path = str(source)
    wrapped.save_pretrained(path)


REFUSED = {
    "extra": (_extra, r"do not have the same tensors: .* lacks model\.extra\.weight"),
    "less": (_less, r"do not have the same tensors: .*odd lacks model\.layers\.1\.mlp\.up_proj\.weight"),
    "quantised": (_quantised, r"odd is quantised .*dequantise|odd is quantised .*save the plain model"),
    "adapter": (_adapter, r"odd is an adapter\. Open and save it first"),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", MERGES)
def test_what_cannot_be_merged_is_refused(name: str, kind: str, three: list[Path], tmp_path: Path) -> None:
    spoil, match = REFUSED[kind]
    spoil(Path(shutil.copytree(three[1], tmp_path / "odd")))
    before = left(tmp_path)
    with pytest.raises(RequestError, match=match):
        merged(name, three[0], [tmp_path / "odd", three[2]], tmp_path / "out")
    if kind in ("quantised", "adapter"):
        with pytest.raises(RequestError, match=match):
            merged(name, tmp_path / "odd", three[1:], tmp_path / "out")
    assert left(tmp_path) == before


@pytest.mark.parametrize("name", MERGES)
def test_a_tied_head_and_one_of_its_own_are_refused(name: str, tmp_path: Path) -> None:
    for tied in (True, False):
        models.save(tiny_llama(tie_word_embeddings=tied), None, tmp_path / str(tied))
    for base, tuned in ((True, False), (False, True)):
        with pytest.raises(RequestError, match=r"lm_head\.weight is a tensor of its own in .*False and is tied"):
            merged(name, tmp_path / str(base), [tmp_path / str(tuned)] * 2, tmp_path / "out")
