"""What a mergekit file may say: everything else is refused in a sentence with its place, and nothing passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from overhaul.errors import RequestError
from overhaul.mergekit.document import model_and_adapter, read
from overhaul.mergekit.methods import METHODS, NUMBER
from overhaul.mergekit.settings import check_setting, value_of

PLAIN: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "a",
    "models": [{"model": "b", "parameters": {"weight": 0.5, "density": 0.3}}],
}
SLICES: dict[str, Any] = {
    "merge_method": "passthrough",
    "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}],
}


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"merge_method": "tise"}, r"merge_method: there is no merge method 'tise'. Did you mean 'ties'\?"),
        ({"merge_method": "karcher"}, r"mergekit's 'karcher' is not among the methods here. Known: breadcrumbs, "),
        ({"merge_method": "multislerp"}, r"mergekit's 'multislerp' is not .* Did you mean 'nuslerp'\?"),
        ({"merge_method": None}, r"there is no merge method None"),
        ({"base": "a"}, r"base: mergekit's files have no 'base' here. Known: base_model, chat_template"),
        ({"models": [{"model": "b", "weight": 1}]}, r"models\[0\].weight: mergekit's files have no 'weight' here"),
        ({"models": [{"parameters": {}}]}, r"models\[0\].model: 'model' is missing"),
        ({"models": {"model": "b"}}, r"models: a list is wanted here"),
        ({"models": []}, r"names no model to merge"),
        ({"models": None}, r"must have either `models:` or `slices:`"),
        ({"slices": SLICES["slices"]}, r"must have either `models:` or `slices:`"),
        ({"modules": {"text": {}}}, r"modules: merging by modules is not supported. Write `models:`"),
        ({"dtype": "float17"}, r"dtype: 'float17' is no dtype to merge in. Did you mean 'float16'\?"),
        ({"out_dtype": "int64"}, r"out_dtype: 'int64' is no dtype"),
        ({"parameters": {"dense": 1}}, r"parameters.dense: ties has no parameter 'dense'. Did you mean 'density'\?"),
        ({"parameters": {"density": "many"}}, r"parameters.density: 'many' will not do: input should be a valid number"),
        ({"parameters": {"density": None}}, r"parameters.density: None is no value"),
        ({"parameters": {"density": {"value": [1, "x"]}}}, r"density: 'x' will not do"),
        ({"parameters": {"density": [{"filter": "mlp"}]}}, r"is no \{filter: ..., value: ...\}"),
        ({"parameters": {"density": [{"filter": 3, "value": 1}]}}, r"filter: 3 is no part of a name"),
        ({"parameters": {"density": [{"value": {"a": 1}}]}}, r"value: .* is neither a value nor a list"),
        ({"parameters": {"density": [0.5, {"value": 1}]}}, r"0.5 is no \{filter"),
        ({"merge_method": ["ties"]}, r"merge_method: there is no merge method \['ties'\]. Did you mean 'ties'\?"),
        ({"models": ["b"]}, r"models\[0\]: 'b' will not do: a mapping is wanted here, such as \{model: ...,"),
        ({"tokenizer": "base"}, r"tokenizer: 'base' will not do: .* write `tokenizer_source: base`"),
        ({"tokenizer": {"tokens": {"x": {"source": 3}}}}, r"tokens.x.source: 3 will not do: a text or a mapping"),
        ({"tokenizer": {"pad_to_multiple_of": -3}}, r"pad_to_multiple_of: .* greater than 0"),
        ({"parameters": {"density": [0.5, -1]}}, r"parameters.density: -1 will not do: .* or equal to 0"),
        ({"parameters": {"density": 53}}, r"parameters.density: 53 will not do: .* or equal to 1"),
        ({"parameters": {"lambda": "1e40"}}, r"parameters.lambda: 1e.40 will not do: .* less than or equal to 3"),
        ({"merge_method": "breadcrumbs", "parameters": {"gamma": -0.1}}, r"parameters.gamma: -0.1 will not do"),
        ({"tokenizer": {"sauce": "base"}}, r"tokenizer.sauce: .* Did you mean 'source'\?"),
        ({"tokenizer": {"tokens": {"x": {"sources": "a"}}}}, r"tokenizer.tokens.x.sources: .*Did you mean 'source'"),
        ({"tokenizer_source": "base", "tokenizer": {"source": "base"}}, r"`tokenizer_source` says the same"),
    ],
)  # fmt: skip
def test_what_mergekit_would_pass_over_or_is_not_supported_is_refused(changed: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        read({key: one for key, one in {**PLAIN, **changed}.items() if one is not None or key == "merge_method"})


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ([{"sources": [{"model": "a"}]}], r"slices\[0\].sources\[0\].layer_range: 'layer_range' is missing"),
        ([{"sources": [{"model": "a", "layer_range": [0, 1, 2]}]}], r"slices\[0\].sources\[0\].layer_range"),
        ([{"sources": [{"model": "a", "layer_range": [0, 2], "layer": 1}]}], r"no 'layer' here. .*'layer_range'"),
        ([{"sources": [{"model": "a", "layer_range": [0, 2]}], "residual_weight": 1}], r"have no 'residual_weight' here"),
        ([{"sources": []}], r"names no model to merge"),
    ],
)  # fmt: skip
def test_slices_too(changed: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        read({**SLICES, "slices": changed})


def test_the_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text("merge_method: linear\n\nmodels:\n  - model: a\n    parameters:\n      wieght: 1\n")
    with pytest.raises(RequestError, match=r"merge.yml, line 6, models\[0\].parameters.wieght: .* mean 'weight'"):
        read(path)
    path.write_text("merge_method: linear\nmodels: [a: b: c]\n")
    with pytest.raises(RequestError, match=r"(?s)merge.yml is not valid YAML: .*line 2"):
        read(path)
    path.write_text("just words")
    with pytest.raises(RequestError, match=r"must be a mapping"):
        read(path)
    with pytest.raises(RequestError, match=r"There is no mergekit file at"):
        read(tmp_path / "none.yml")


def test_what_has_no_effect_is_said() -> None:
    document = read({**PLAIN, "parameters": {"int8_mask": True, "t": 0.5, "normalize": "yes"}})
    assert document.notes == ["`int8_mask` has no effect with ties.", "`t` has no effect with ties."]
    assert not read(PLAIN).notes and len(read(PLAIN).sha256) == 64


@pytest.mark.parametrize("name", ["nuslerp_flatten", "nuslerp_row_wise", "filter_wise"])
def test_angles_of_rows_are_refused_by_name(name: str) -> None:
    method = "model_stock" if name == "filter_wise" else "nuslerp"
    usual = name == "nuslerp_flatten"
    models = [{"model": one, "parameters": {"weight": 1}} for one in "bc"]
    assert read({"merge_method": method, "models": models, "parameters": {name: usual}}).kind is METHODS[method]
    with pytest.raises(RequestError, match=rf"parameters.{name}: angles of single rows are not supported"):
        read({"merge_method": method, "models": models, "parameters": {name: not usual}})


def test_models_are_named_once_the_base_first() -> None:
    slices = [{"base_model": "c", "sources": [{"model": one, "layer_range": [0, 2]} for one in ("b", "a")]}]
    assert read({**SLICES, "slices": slices, "base_model": "d"}).named() == ["d", "c", "b", "a"]
    assert read(PLAIN).named() == ["a", "b"]
    assert model_and_adapter("a + b") == ("a", "b") and model_and_adapter("a") == ("a", None)
    with pytest.raises(RequestError, match=r"names more than a model and an adapter"):
        model_and_adapter("a+b+c")


def test_a_line_goes_through_its_points_and_the_first_filter_that_fits_holds() -> None:
    def at(setting: Any, t: float, tensor: str = "layers.1.mlp.up", *wider: Any) -> Any:
        return value_of("w", NUMBER, [{"w": setting}, *({"w": one} for one in wider)], tensor, t)

    assert [at([0, 1, 0.5], t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.75, 0.5]
    assert at("1e-3", 0) == 1e-3 and at([2], 0.7) == 2
    filters = [{"filter": "attn", "value": 1}, {"filter": "mlp", "value": [0, 4]}, {"value": 9}]
    assert (at(filters, 0.5), at(filters, 0.5, "attn.q"), at(filters, 0.5, "norm")) == (2, 1, 9)
    assert at({"filter": "*", "value": 3}, 0) == 3
    assert at(filters[:1], 0, "norm", [{"filter": "mlp", "value": 1}], 5) == 5, "the next scope that says anything"
    assert at(filters[:1], 0, "norm") is None and at([], 0, "norm", 5) == 5
    assert not check_setting(filters, NUMBER)
