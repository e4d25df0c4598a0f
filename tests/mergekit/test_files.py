"""What a file makes beside its formula: blocks, config, words, adapters, card and lineage; what it refuses; its plan."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import tiny_gpt2, tiny_llama, tiny_tokenizer
from families import FAMILIES as KNOWN
from mergekit_files import file, held, made, near
from overhaul import cli, models, session
from overhaul.errors import MaterialWarning, OverhaulError, RequestError, RunError
from overhaul.mergekit import merge_config, plan_config
from overhaul.stack import LayerStack
from tiny_checkpoints import VISION_LANGUAGE, left, make, same_bits

LAST = "model.layers.{}.mlp.down_proj.weight"


def run(*sources: tuple[str, int, int], **more: Any) -> dict[str, Any]:
    return {"sources": [{"model": one, "layer_range": [a, b]} for one, a, b in sources], **more}


def test_slices_lay_blocks_on_another_and_their_ends_give_what_lies_outside(tmp_path: Path) -> None:
    base, one, two = near("llama", tmp_path)
    slices = [run((one, 0, 3)), run((two, 1, 4)), run((one, 3, 4))]
    slices[1]["sources"][0]["parameters"] = {"scale": [{"filter": "down_proj", "value": [2, 4]}, {"value": 1}]}
    config = {"merge_method": "passthrough", "slices": slices, "base_model": base, "dtype": "bfloat16"}
    done = merge_config(config, tmp_path / "out")
    result, first, second = map(held, (done.model, one, two))
    for position, (state, block) in enumerate(
        [(first, 0), (first, 1), (first, 2), (second, 1), (second, 2), (second, 3)]
    ):
        name = LAST.format(position)
        scale = {3: 2, 4: 3, 5: 4}.get(position, 1)
        assert torch.equal(result[name], state[LAST.format(block)].bfloat16() * scale)
        other = f"model.layers.{position}.self_attn.q_proj.weight"
        assert torch.equal(result[other], state[other.replace(f".{position}.", f".{block}.")].bfloat16())
    assert torch.equal(result["model.embed_tokens.weight"], first["model.embed_tokens.weight"].bfloat16())
    told = json.loads((done.model / "config.json").read_text())
    assert (told["num_hidden_layers"], told["dtype"]) == (7, "bfloat16")
    loaded: Any = AutoModelForCausalLM.from_pretrained(done.model, output_loading_info=True)
    assert loaded[0].dtype == torch.bfloat16 and not any(
        loaded[1][kind] for kind in ("missing_keys", "unexpected_keys")
    )


def test_any_method_merges_inside_a_slice_each_with_its_own_numbers(tmp_path: Path) -> None:
    """The nearest place that says something holds: source, slice, file."""
    base, one, two = near("llama", tmp_path)
    slices = [run((base, 0, 2), (one, 0, 2)), run((base, 1, 4), (one, 1, 4), (two, 0, 3), parameters={"weight": 0.2})]
    slices[1]["sources"][2]["parameters"] = {"weight": [{"filter": "down_proj", "value": [0.0, 1.0]}]}
    config = {"merge_method": "task_arithmetic", "base_model": base, "slices": slices, "parameters": {"weight": 0.5}}
    result = made(config, tmp_path / "out")
    b, o, t = map(held, (base, one, two))
    for block in range(2):
        name = LAST.format(block)
        assert torch.allclose(result[name], b[name] + 0.5 * (o[name] - b[name]), atol=1e-7)
    for n in range(3):
        mine, theirs = LAST.format(n + 1), LAST.format(n)
        share = n / 2
        expected = b[mine] + 0.2 * (o[mine] - b[mine]) + share * (t[theirs] - b[mine])
        assert torch.allclose(result[LAST.format(n + 2)], expected, atol=1e-7)
        gate, from_two = (one.replace("down", "gate") for one in (mine, theirs))
        expected = b[gate] + 0.2 * (o[gate] - b[gate]) + 0.2 * (t[from_two] - b[gate])
        assert torch.allclose(result[LAST.format(n + 2).replace("down", "gate")], expected, atol=1e-7)
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    assert torch.allclose(result[embedding], b[embedding] + 0.5 * (o[embedding] - b[embedding]), atol=1e-7)
    assert torch.allclose(result[norm], b[norm] + 0.2 * (o[norm] - b[norm]) + 0.2 * (t[norm] - b[norm]), atol=1e-7)


def test_a_line_runs_over_the_blocks_and_has_its_first_value_outside(tmp_path: Path) -> None:
    base, one = near("gpt2", tmp_path, 1)
    config = file("linear", None, [base, one], [[1.0, 0.0], [0.0, 1.0]])
    result, b, o = made(config, tmp_path / "out"), held(base), held(one)
    count = len({name.split(".")[2] for name in b if ".h." in name})
    for name, tensor in result.items():
        share = int(name.split(".")[2]) / (count - 1) if ".h." in name else 0.0
        assert torch.allclose(tensor, (1 - share) * b[name] + share * o[name], atol=1e-7), name


def test_lists_that_speak_of_each_block_follow_the_blocks(tmp_path: Path) -> None:
    base = str(models.save(KNOWN["Qwen3, alternating windows"].build(), None, tmp_path / "m"))
    kinds = json.loads((Path(base) / "config.json").read_text())["layer_types"]
    done = merge_config(
        {"merge_method": "passthrough", "slices": [run((base, 1, 3)), run((base, 0, 4))]}, tmp_path / "out"
    )
    told = json.loads((done.model / "config.json").read_text())
    assert told["layer_types"] == [kinds[n] for n in (1, 2, 0, 1, 2, 3)] and told["num_hidden_layers"] == 6
    assert len(LayerStack.of(models.open_model(done.model)[0])) == 6


@pytest.mark.parametrize("family", ["t5", "clip", "gemma3"])
def test_models_of_several_stacks_are_merged_whole(family: str, tmp_path: Path) -> None:
    if family == "gemma3":
        torch.manual_seed(0)
        folders = [str(models.save(VISION_LANGUAGE[family](), None, tmp_path / f"m{n}")) for n in range(2)]
    else:
        folders = [str(make(family, tmp_path / f"m{n}", n)) for n in range(2)]
    result, one, two = made(file("linear", None, folders, [0.5, 1.5]), tmp_path / "out"), *map(held, folders)
    assert all(torch.allclose(result[name], 0.25 * one[name] + 0.75 * two[name], atol=1e-6) for name in one)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_merged_into_its_model_first_and_leaves_nothing(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base, one = near("llama", tmp_path, 1)
    torch.manual_seed(5)
    wrapped: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"])
    )
    for name, tensor in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor)
    wrapped.save_pretrained(tmp_path / "adapter")
    named = f"{base}+{tmp_path / 'adapter'}"
    whole = {name: one.detach().clone() for name, one in wrapped.merge_and_unload().state_dict().items()}
    before = left(tmp_path)
    assert plan_config(file("linear", None, [named, one], [0.5, 0.5])).models[named] > 0
    assert left(tmp_path) == before
    baked = made({"merge_method": "passthrough", "models": [{"model": named}]}, tmp_path / "baked")
    assert all(torch.allclose(tensor, whole[name], atol=1e-7) for name, tensor in baked.items())
    assert not torch.equal(baked[(q := "model.layers.0.self_attn.q_proj.weight")], held(base)[q])
    result, other = made(file("linear", None, [named, one], [0.5, 0.5]), tmp_path / "out"), held(one)
    assert all(torch.allclose(result[name], (whole[name] + other[name]) / 2, atol=1e-7) for name in other)
    assert left(tmp_path) == sorted([*before, "baked", "out"])
    with pytest.raises(RequestError, match=r"m1 in .* is no adapter"):
        merge_config({"merge_method": "passthrough", "models": [{"model": f"{base}+{one}"}]}, tmp_path / "no")


def test_the_folder_says_how_it_was_made_and_opens(tmp_path: Path) -> None:
    base, *tuned = near("llama", tmp_path)
    tiny_tokenizer().save_pretrained(base)
    path = tmp_path / "merge.yml"
    path.write_text("# why\n" + yaml.safe_dump(file("dare_ties", base, tuned, [1, 0.5], parameters={"density": 0.6})))
    done = merge_config(path, tmp_path / "out", seed=7)
    lineage = json.loads((done.model / "lineage.json").read_text())
    (step,) = lineage["steps"]
    assert step["name"] == "mergekit.dare_ties" and step["knobs"]["seed"] == 7
    assert step["knobs"]["text"] == path.read_text() == (done.model / "mergekit_config.yml").read_text()
    assert step["knobs"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [one["source"] for one in lineage["made_of"]] == [base, *tuned]
    card = (done.model / "README.md").read_text()
    assert "mergekit.dare_ties" in card and f"```\n{path.read_text()}```" in card
    assert done.facts["tensors_changed"] == done.facts["tensors"] == len(held(done.model))
    opened, tokenizer = models.open_model(done.model)
    assert tokenizer is not None and len(LayerStack.of(opened)) == 4


def test_models_beside_the_file_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near("llama", tmp_path / "models", 1)
    (tmp_path / "models" / "merge.yml").write_text(yaml.safe_dump(file("linear", None, ["m0", "m1"], [1, 1])))
    monkeypatch.chdir(tmp_path)
    assert merge_config("models/merge.yml", "out").facts["tensors_changed"]


def test_a_chat_template_is_written_beside_the_tokenizer(tmp_path: Path) -> None:
    base, *tuned = near("llama", tmp_path)
    broken = "{% if %}aaaaaaaaaaaaaaaaaaaaaaaa"
    shown = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for folder, template in ((base, None), (tuned[0], shown), (tuned[1], shown)):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    auto = merge_config(file("linear", None, [base, *tuned], [1, 1, 1], chat_template="auto"), tmp_path / "auto")
    own = merge_config(file("linear", None, [base, *tuned], [1, 1, 1], chat_template=shown + "!"), tmp_path / "own")
    assert [AutoTokenizer.from_pretrained(one.model).chat_template for one in (auto, own)] == [shown, shown + "!"]
    with pytest.raises(
        RequestError, match=r"chat_template: 'chatml' is no template. Write auto, or the template itself"
    ):
        plan_config(file("linear", None, tuned, [1, 1], chat_template="chatml"))
    with pytest.raises(RequestError, match=r"chat_template: it is not valid Jinja, line 1 of it: "):
        plan_config(file("linear", None, tuned, [1, 1], chat_template=broken))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"merge_method": "slerp"}, r"slerp needs the parameter 't', and nothing says it for model.embed_tokens"),
        ({"merge_method": "slerp", "base_model": "", "parameters": {"t": 1}}, r"and there is no `base_model:`"),
        ({"merge_method": "nuslerp", "base_model": ""}, r"nuslerp merges 2 models, and there are 3"),
        ({"merge_method": "passthrough", "base_model": ""}, r"passthrough merges one model, and there are 3"),
        ({"merge_method": "della", "parameters": {"density": 0.9}}, r"density 0.9 and epsilon 0.15, .* below 1"),
        ({"merge_method": "linear"}, r"linear needs the parameter 'weight', and nothing says it for .*m3"),
        ({"merge_method": "linear", "parameters": {"weight": -3}}, r"the weights \[1.0, 1.0, 1.0, -3.0\] sum to 0"),
        ({"merge_method": "linear", "parameters": {"weight": -2.9999999}}, r"sum to 0 and cannot"),
        ({"merge_method": "ties", "parameters": {"density": 0}}, r"ties changes nothing: every tensor .*m0. Give `lambda`"),
        ({"merge_method": "task_arithmetic", "parameters": {"lambda": 0}}, r"task_arithmetic changes nothing"),
    ],
)  # fmt: skip
def test_a_method_that_lacks_something_says_what(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    base, *tuned = near("llama", tmp_path, 3)
    changed = {"base_model": base, **change}
    config = {**file("linear", None, tuned, [1, 1, 1]), **{key: one for key, one in changed.items() if one}}
    if change["merge_method"] == "linear" and "parameters" not in change:
        config["base_model"], config["models"] = (
            tuned[2],
            [*config["models"][:2], {"model": base, "parameters": {"weight": 1}}],
        )
    if change["merge_method"] == "slerp":
        config["models"] = [{"model": tuned[0]}]
    with pytest.raises(RequestError, match=match):
        merge_config(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("slices", "match"),
    [
        ([(("A", 0, 5),)], r"slices\[0\]: layer_range: \[0, 5\], but .*m0 has 4 blocks, .* at most \[0, 4\]"),
        ([(("A", 2, 2),)], r"layer_range: \[2, 2\]"),
        ([(("A", 0, 2),), (("A", 0, 2), ("B", 0, 3))], r"slices\[1\]: its sources have \[2, 3\] blocks"),
        ([(("A", 0, 2), ("A", 2, 4))], r"slices\[0\]: .*m0 is named twice"),
        ([(("B", 0, 2), ("wide", 0, 2))], r"is \[32, 48\] in .*m1 and \[32, 40\] in .*wide. intermediate_size is 48 in "),
        ([(("B", 0, 2), ("gpt2", 0, 2))], r"do not have the same tensors|m1 is a LlamaForCausalLM, .* a GPT2LMHeadModel"),
    ],
)  # fmt: skip
def test_slices_that_do_not_fit_are_refused_with_both_numbers(slices: Any, match: str, tmp_path: Path) -> None:
    base, other = near("llama", tmp_path, 1)
    names = {"A": base, "B": other}
    for name, build in (("wide", lambda: tiny_llama(intermediate_size=40)), ("gpt2", tiny_gpt2)):
        names[name] = str(models.save(build(), None, tmp_path / name))
    config = {"merge_method": "linear", "parameters": {"weight": 1}}
    config["slices"] = [run(*((names[m], a, b) for m, a, b in one)) for one in slices]
    with pytest.raises(RequestError, match=match):
        plan_config(config)


def test_nothing_that_changes_nothing_passes(tmp_path: Path) -> None:
    base, same = near("llama", tmp_path, 1, dtype=torch.bfloat16, step=0.0)
    before = left(tmp_path)
    with pytest.raises(RunError, match=r"changed nothing: every tensor is that of .*m0. .* `dtype: float32`"):
        merge_config(file("task_arithmetic", base, [same], [1.0]), tmp_path / "out")
    assert left(tmp_path) == before
    done = merge_config(
        {"merge_method": "passthrough", "models": [{"model": base}], "dtype": "float32"}, tmp_path / "cast"
    )
    assert {one.dtype for one in held(done.model).values()} == {torch.float32}


def test_numbers_that_change_nothing_are_refused_before_the_work(tmp_path: Path) -> None:
    base, one = near("llama", tmp_path, 1)
    slerp = {"merge_method": "slerp", "base_model": base, "models": [{"model": one}], "parameters": {"t": 0}}
    for config, match in (
        (file("linear", None, [one], [0.7]), r"linear changes nothing: .*m1. Give a second model"),
        (file("nuslerp", None, [one, base], [1, 0]), r"nuslerp changes nothing: .* Give the second model a `weight`"),
        (slerp, r"slerp changes nothing: .*m0. Give a `t` that is not 0"),
        (file("ties", base, [f"{base}/../m0"], [1]), r"m0 and .*/../m0 are the same folder. Write one name"),
    ):
        with pytest.raises(RequestError, match=match):
            plan_config(config)
    halved = [{"filter": "mlp", "value": 0}, {"value": 0.5}]
    assert plan_config(file("ties", base, [one], [1], parameters={"density": halved})).passes == 5


def test_a_base_that_the_models_did_not_come_from_is_asked_about(tmp_path: Path) -> None:
    base, *tuned = near("llama", tmp_path)
    torch.manual_seed(9)
    other = str(models.save(tiny_llama(), None, tmp_path / "other"))
    with pytest.warns(MaterialWarning, match=r"mergekit.ties: .*m1 may not have come from the base") as said:
        done = merge_config(file("ties", other, tuned, [1, 1]), tmp_path / "out")
    assert len(said) == 2 and "m2 may not have come" in done.facts["advice"]
    assert all(share > 0.5 for share in done.facts["far_share"])
    kin = merge_config(file("ties", base, tuned, [1, 1]), tmp_path / "kin")
    assert "advice" not in kin.facts and all(0 < one < 0.8 for one in kin.facts["relative_change"])


def test_a_place_where_no_folder_can_be_is_refused_in_the_plan_too(tmp_path: Path) -> None:
    base, one = near("llama", tmp_path, 1)
    config = file("linear", None, [base, one], [1, 1])
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for name, match in (
        ("m0/inside", r"inside lies inside .*m0, which is read"),
        ("m1", r"m1 exists already; a checkpoint is never written over"),
        ("link", r"link exists already as a link"),
        ("file/in", r"cannot be a new folder: Not a directory"),
        ("n" * 300, r"cannot be a new folder: File name too long"),
        ("n" * 250, r"cannot be a new folder: File name too long"),
    ):
        for call in (plan_config, merge_config):
            with pytest.raises(RequestError, match=match):
                call(config, tmp_path / name)


def test_what_is_damaged_leaves_nothing_and_nothing_is_written_over(tmp_path: Path) -> None:
    base, *tuned = near("llama", tmp_path)
    path = Path(tuned[1]) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4:] = b"\xff\xff\xff\xff"
    path.write_bytes(raw)
    before = left(tmp_path)
    with pytest.raises(RunError, match=r"not finite"):
        merge_config(file("linear", None, tuned, [1, 1]), tmp_path / "out")
    assert left(tmp_path) == before
    large = file("linear", None, [base, tuned[0]], [3e38, 3e38], parameters={"normalize": False})
    for dtype, said in (("float32", r"coefficients\.$"), ("float16", r"coefficients or .* such as bfloat16\.$")):
        with pytest.raises(RunError, match=rf"not finite in torch.{dtype}. Use smaller {said}"):
            merge_config({**large, "dtype": dtype}, tmp_path / "out")
    with pytest.raises(RequestError, match=r"m0 exists already"):
        merge_config(file("linear", None, [base, tuned[0]], [1, 1]), base)


def test_a_plan_reads_headers_alone_and_refuses_what_a_merge_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tuned = near("llama", tmp_path)
    config = file("ties", base, tuned, [1, 1], dtype="float32", parameters={"density": 0.5, "int8_mask": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("overhaul.weights.pieces.os.preadv", None)
        plan = plan_config(config)
    written = sum(one.numel() * 4 for one in held(base).values())
    assert (plan.written_bytes, plan.blocks, plan.method, plan.passes) == (written, 4, "ties", 5)
    assert plan.notes == ("`int8_mask` has no effect with ties.",) and plan.peak_bytes < 1e9
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(config))
    before = left(tmp_path)
    monkeypatch.setattr("sys.argv", ["overhaul", "merge", str(path), "-o", str(tmp_path / "out"), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().out
    assert (
        not ended.value.code and "ties makes a LlamaForCausalLM of 4 blocks" in said and "nothing was written" in said
    )
    assert left(tmp_path) == before
    with session.using(planning=True), pytest.raises(session.WorkBegins):
        merge_config(file("linear", None, tuned, [1, 1]), tmp_path / "out")


def test_the_command_merges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tuned = near("llama", tmp_path)
    path, out = tmp_path / "merge.yml", tmp_path / "out"
    for config, code, match in (
        (file("tiess", base, tuned, [1, 1]), 2, "line 2, merge_method: there is no merge method 'tiess'"),
        (file("ties", base, tuned, [1, 1]), 0, "tensors are new"),
    ):
        path.write_text(yaml.safe_dump(config))
        monkeypatch.setattr("sys.argv", ["overhaul", "merge", str(path), "-o", str(out)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert ended.value.code == code and match in said.out + said.err, said
    assert same_bits(held(out), made(file("ties", base, tuned, [1, 1]), tmp_path / "again"))


def test_tokenizers_that_number_words_differently_are_refused_unless_one_is_asked_for(tmp_path: Path) -> None:
    from overhaul.mergekit import document

    assert document.Tokenizer().source == "union"
    base, *tuned = near("llama", tmp_path)
    for folder, shift in ((base, 0), (tuned[0], 1)):
        text = tiny_tokenizer()
        text.save_pretrained(folder)
        if shift:
            path = Path(folder) / "tokenizer.json"
            told = json.loads(path.read_text())
            vocabulary = told["model"]["vocab"]
            first, second = (word for word, n in vocabulary.items() if n in (20, 21))
            vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
            path.write_text(json.dumps(told))
    rule = {"source": {"kind": "model_token", "model": base, "token": [2]}}
    with pytest.raises(RequestError, match=r"tokenizer.tokens.a: token: \[2\] is no word. Write a text in quotes, or"):
        plan_config(file("linear", None, [base, tuned[0]], [1, 1], tokenizer={"tokens": {"a": rule}}))
    with pytest.raises(OverhaulError, match=r"number 2 words differently: .* mergekit file tokenizer_source: base"):
        plan_config(file("linear", None, [base, tuned[0]], [1, 1]))
    result = made(file("linear", None, [base, tuned[0]], [1, 1], tokenizer_source="base"), tmp_path / "out")
    name = "model.embed_tokens.weight"
    one, two = held(base)[name], held(tuned[0])[name]
    assert torch.allclose(result[name][20], (one[20] + two[21]) / 2, atol=1e-7)
