"""Checkpoint folders: what is refused before it is opened, and what is saved."""

from __future__ import annotations

import errno
import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import FAMILIES as FAMILY
from conftest import tiny_gpt2, tiny_llama, tiny_resnet
from families import FAMILIES
from overhaul import models
from overhaul.checkpoints import weight_files
from overhaul.errors import RequestError, RunError
from overhaul.stack import LayerStack
from overhaul.weights import relative_change
from tiny_checkpoints import sharded


def test_headers_tell_parameters_and_dtype_without_reading_weights(folder: Path) -> None:
    known = models.facts(folder)
    model = tiny_llama()
    assert known.architecture == "LlamaForCausalLM"
    assert known.parameters == sum(p.numel() for p in model.parameters())
    assert known.dtype == "bfloat16"
    assert known.bytes == (folder / "model.safetensors").stat().st_size


def test_open_gives_model_and_tokenizer_and_save_round_trips(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = models.open_model(folder)
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    saved = models.save(model, tokenizer, tmp_path / "out", dtype="bfloat16")
    assert relative_change(folder, saved).total == 0
    assert next(model.parameters()).dtype == torch.float32, "the held model is not cast"
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    changed = models.save(model, tokenizer, tmp_path / "changed", dtype="bfloat16")
    assert relative_change(saved, changed).total > 0


def test_a_model_without_a_processor_opens(tmp_path: Path) -> None:
    models.save(tiny_resnet(), None, tmp_path / "resnet")
    model, processor = models.open_model(tmp_path / "resnet")
    assert processor is None and isinstance(model, nn.Module)


def test_saving_never_replaces_a_folder(folder: Path) -> None:
    with pytest.raises(RequestError, match="exists already"):
        models.save(tiny_llama(), None, folder)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        models.save(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_said_in_words(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(models, "write_checkpoint", refuse)
    with pytest.raises(RunError, match=r"disk is full|read-only|permission was denied"):
        models.save(tiny_llama(), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no config.json"):
        models.facts(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(RequestError, match=r"only pickled weights \(pytorch_model.bin\)"):
        models.facts(tmp_path)


def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(RequestError, match="cut short"):
        models.facts(tmp_path)


def test_a_damaged_header_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for noise in (b"{no json", b"\xff\xfe\xfd"):
        (tmp_path / "model.safetensors").write_bytes(len(noise).to_bytes(8, "little") + noise)
        with pytest.raises(RequestError, match="its header is not JSON"):
            models.facts(tmp_path)


def test_missing_tensors_are_not_filled_at_random(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.2.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=f"lack 1 tensors, such as '{lost}'"):
        models.open_model(tmp_path)


def test_a_tokenizer_that_is_too_large_is_refused(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    models.save(tiny_llama(vocab_size=32), tokenizer, tmp_path / "small")
    with pytest.raises(RequestError, match="60 tokens but the model only 32"):
        models.open_model(tmp_path / "small")


def test_an_unknown_source_names_the_possibilities() -> None:
    with pytest.raises(RequestError, match="does not exist"):
        models.facts("./nowhere")
    with pytest.raises(RequestError, match="no starter model 'docs-lama'"):
        models.facts("starter:docs-lama")


def test_config_and_weights_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    models.check_shapes(models.facts(folder))
    with pytest.raises(RequestError, match=r"has the shape .* but config.json describes"):
        models.check_shapes(models.facts(tmp_path))


def test_a_class_of_ours_is_found_by_the_module_that_its_config_names(folder: Path) -> None:
    known = models.facts(folder)
    ours = replace(known, config={**known.config, "overhaul": "overhaul.models", "architectures": ["Checkpoint"]})
    assert models.class_of(ours) is models.Checkpoint
    theirs = replace(known, config={**known.config, "overhaul": "os.path"})
    assert models.class_of(theirs) is models.class_of(known)


# strict: what the class would not load back is not saved, what it has no place for is not opened


def test_what_the_class_would_not_load_back_is_not_saved(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    model.model.layers[1].gate = nn.Parameter(torch.zeros(3))
    with pytest.raises(
        RunError, match=r"1 tensors are not those .* such as 'model\.layers\.1\.gate'; nothing was saved"
    ):
        models.save(model, None, tmp_path / "out")
    narrow: Any = tiny_llama()
    mlp = narrow.model.layers[2].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
        nn.Linear(32, 8, False),
        nn.Linear(32, 8, False),
        nn.Linear(8, 32, False),
    )
    with pytest.raises(RunError, match="3 tensors"):
        models.save(narrow, None, tmp_path / "out")
    with pytest.raises(RunError, match="no model of transformers or diffusers"):
        models.save(nn.Linear(2, 2), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_blocks_are_saved_under_plain_names(whole: bool, tmp_path: Path) -> None:
    model: Any = tiny_llama()
    said = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        for n, layer in enumerate(model.model.layers):
            model.model.layers[n] = torch.compile(layer, backend="eager")
        LayerStack.at(model, "model.layers").drop([1])
    models.save(model, None, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("_orig_mod" in name for name in stored)
    assert torch.equal(
        stored["model.layers.2.mlp.up_proj.weight"], said[f"model.layers.{2 if whole else 3}.mlp.up_proj.weight"]
    )
    assert any("_orig_mod" in name for name in model.state_dict()), "the held model is still a compiled one"
    models.open_model(tmp_path / "out")


def copied(folder: Path, out: Path, **changes: Any) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **changes}))
    return out


def test_weights_with_more_blocks_than_the_config_are_refused(folder: Path, tmp_path: Path) -> None:
    short = copied(folder, tmp_path / "short", num_hidden_layers=3)
    with pytest.raises(
        RequestError, match=r"9 tensors that LlamaForCausalLM has no place for, such as 'model\.layers\.3"
    ):
        models.open_model(short)
    with pytest.raises(RequestError, match=r"hold model\.layers\.3\..* without that block"):
        models.check_shapes(models.facts(short))


def test_a_tensor_that_the_class_has_no_place_for_is_refused_and_a_head_of_another_task_is_not(
    folder: Path, tmp_path: Path
) -> None:
    held = load_file(folder / "model.safetensors")
    copied(folder, tmp_path / "m")
    place = tmp_path / "m" / "model.safetensors"
    save_file({**held, "model.norm.shift": torch.zeros(32)}, place, {"format": "pt"})
    with pytest.raises(RequestError, match=r"no place for, such as 'model\.norm\.shift'"):
        models.open_model(tmp_path / "m")
    save_file({**held, "score.weight": torch.zeros(2, 32)}, place, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"also holds score\.weight: heads of other tasks"):
        models.open_model(tmp_path / "m")
    (tmp_path / "m" / "lineage.json").write_text("{}")
    with pytest.raises(RequestError, match="no place for"):
        models.open_model(tmp_path / "m")


def test_what_transformers_knows_to_be_left_over_opens(tmp_path: Path) -> None:
    """Old checkpoints hold rotary tables per block, GPT-2's its masks, BERT's a pooler and a second head."""
    llama = models.save(tiny_llama(), None, tmp_path / "llama")
    rewrite(llama, lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    gpt2 = models.save(tiny_gpt2(), None, tmp_path / "gpt2")
    rewrite(gpt2, lambda held: held.update({"transformer.h.0.attn.bias": torch.zeros(1, 1, 8, 8)}))
    bert = models.save(FAMILIES["BERT"].build(), None, tmp_path / "bert")
    rewrite(bert, lambda held: held.update({"bert.pooler.dense.weight": torch.zeros(32, 32)}))
    rewrite(bert, lambda held: held.update({"cls.seq_relationship.weight": torch.zeros(2, 32)}))
    for name in (llama, gpt2):
        models.open_model(name)
        models.check_shapes(models.facts(name))
    with pytest.warns(UserWarning, match=r"cls\.seq_relationship\.weight"):
        models.open_model(bert)


# two copies of the weights, and indexes that lie


def test_a_second_copy_of_the_weights_is_not_counted(folder: Path, tmp_path: Path) -> None:
    plain = models.facts(folder)
    twice = copied(folder, tmp_path / "twice")
    held = load_file(folder / "model.safetensors")
    save_file({f"x.{name}": tensor for name, tensor in held.items()}, twice / "consolidated.safetensors")
    save_file(held, twice / "model.fp16.safetensors")
    known = models.facts(twice)
    assert (known.bytes, known.parameters, known.shapes) == (plain.bytes, plain.parameters, plain.shapes)
    assert [path.name for path in known.weight_files] == ["model.safetensors"]


def test_weights_that_could_be_read_in_two_ways_are_refused(folder: Path, tmp_path: Path) -> None:
    both = copied(folder, tmp_path / "both")
    model, _ = models.open_model(folder)
    sharded(model, both, "20KB")
    shutil.copyfile(folder / "model.safetensors", both / "model.safetensors")
    with pytest.raises(
        RequestError, match=r"holds model\.safetensors and model\.safetensors\.index\.json, which names"
    ):
        models.facts(both)
    (both / "model.safetensors").unlink()
    assert models.facts(both).shapes == models.facts(folder).shapes
    other = copied(folder, tmp_path / "other")
    (other / "model.safetensors").rename(other / "weights.safetensors")
    with pytest.raises(RequestError, match=r"holds weights\.safetensors, but neither model\.safetensors nor its index"):
        models.facts(other)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "sub/model.safetensors"])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    bad = copied(folder, tmp_path / "bad")
    (bad / "model.safetensors").unlink()
    shutil.copyfile(folder / "model.safetensors", tmp_path / "secret.safetensors")
    (bad / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(RequestError, match="which lies outside of the folder"):
        models.facts(bad)


# a start without weights


@pytest.mark.parametrize("family", ["llama", "gpt2", "resnet"])
def test_a_new_model_is_drawn_from_config_and_seed_alone(family: str, tmp_path: Path) -> None:
    made = models.save(FAMILY[family](), None, tmp_path / "made")
    (tmp_path / "bare").mkdir()
    shutil.copyfile(made / "config.json", tmp_path / "bare" / "config.json")
    known = models.facts(f"new:{tmp_path / 'bare'}")
    assert known.is_new and known.weight_files == () and known.shapes == models.facts(made).shapes
    models.check_shapes(known)
    torch.manual_seed(5)
    first, here = known.open().state_dict(), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), here), "the seed of the caller is left alone"
    again = models.facts(f"new:{made}").open().state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items()), (
        "weights beside the config do not count"
    )
    other = models.facts(f"new:{made}", seed=1)
    assert other.digest() != known.digest() and models.facts(f"new:{made}").digest() == known.digest()
    different = other.open("bfloat16").state_dict()
    assert any(not torch.equal(tensor.bfloat16(), different[name]) for name, tensor in first.items())
    assert sum(math.prod(shape) * 4 for shape in known.shapes.values()) == known.bytes


def test_a_new_model_opens_with_the_tokenizer_that_lies_there(folder: Path) -> None:
    model, tokenizer = models.open_model(f"new:{folder}")
    assert tokenizer is not None and isinstance(model, type(models.open_model(folder)[0]))
    empty = folder.parent / "empty"
    empty.mkdir()
    with pytest.raises(RequestError, match=r"no \*\.safetensors weights.*new:"):
        weight_files(empty)


# adapters


def adapter(base: Path, out: Path, **options: Any) -> tuple[Path, Any]:
    """A random adapter for a saved base, as peft saves it, and the model with it."""
    from peft import LoraConfig, get_peft_model

    model: Any
    model, _ = models.open_model(base)
    model.config._name_or_path = str(base)
    kept = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(model, kept).eval()
    wrapped.save_pretrained(str(out))
    return out, wrapped


def test_an_adapter_opens_merged_into_its_base(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    place, wrapped = adapter(folder, tmp_path / "adapter")
    known = models.facts(place)
    assert known.is_adapter and known.base is not None and known.base.folder == folder
    assert known.config == models.facts(folder).config and known.architecture == "LlamaForCausalLM"
    assert len(known.shapes) == 16 and known.parameters > models.facts(folder).parameters
    models.check_shapes(known)
    opened, processor = models.open_model(place)
    assert len(processor) == len(tokenizer) and all(p.requires_grad for p in opened.parameters())
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, wrapped(ids).logits, atol=1e-5, rtol=0)
    assert relative_change(folder, models.save(opened, None, tmp_path / "merged", dtype="bfloat16")).total > 0
    before = known.digest()
    rewrite_file(place / "adapter_model.safetensors", lambda held: next(iter(held.values())).add_(1))
    assert models.facts(place).digest() != before != models.facts(folder).digest()


def test_an_adapter_whose_base_is_not_there_or_another_is_refused(folder: Path, tmp_path: Path) -> None:
    place, _ = adapter(folder, tmp_path / "adapter")
    options = json.loads((place / "adapter_config.json").read_text())

    def naming(base: str | None) -> None:
        (place / "adapter_config.json").write_text(json.dumps({**options, "base_model_name_or_path": base}))

    naming("./nowhere/to/be/found")
    with pytest.raises(RequestError, match=r"is an adapter for './nowhere/.*does not exist"):
        models.facts(place)
    naming(None)
    with pytest.raises(RequestError, match="does not name its base"):
        models.facts(place)
    naming(str(models.save(tiny_gpt2(), None, tmp_path / "gpt2")))
    with pytest.raises(RequestError, match="does not fit its base"):
        models.open_model(place)
    naming(str(models.save(tiny_llama(num_hidden_layers=3), None, tmp_path / "short")))
    with pytest.raises(RequestError, match=r"does not fit its base .*layers\.3\."):
        models.open_model(place)
    shutil.copytree(folder, tmp_path / "beside")
    naming("../beside")
    assert models.facts(place).is_adapter, "a base is also found beside the adapter"
    (place / "adapter_model.safetensors").unlink()
    with pytest.raises(RequestError, match=r"no adapter_model\.safetensors"):
        models.facts(place)


def test_a_model_with_an_adapter_beside_it_is_not_guessed_at(folder: Path, tmp_path: Path) -> None:
    both = copied(folder, tmp_path / "both")
    adapter(folder, both)
    assert not models.facts(both).is_adapter and models.facts(both).bytes == models.facts(folder).bytes
    for refused in (models.open_model, lambda place: models.check_shapes(models.facts(place))):
        with pytest.raises(RequestError, match="a whole model and an adapter"):
            refused(both)


def rewrite_file(path: Path, change: Any) -> None:
    held = load_file(path)
    change(held)
    save_file(held, path, {"format": "pt"})


def rewrite(folder: Path, change: Any) -> None:
    rewrite_file(folder / "model.safetensors", change)


def test_what_would_not_be_what_it_was_when_it_is_opened_is_not_saved(tmp_path: Path) -> None:
    model: Any = tiny_llama(tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(RunError, match="are one tensor here, and LlamaForCausalLM does not tie them"):
        models.save(model, None, tmp_path / "tied by hand")
    model = tiny_llama()
    model.model.norm.weight.data.fill_(1e6)
    with pytest.raises(RunError, match=r"values that torch.float16 files cannot, such as 'model.norm.weight'"):
        models.save(model, None, tmp_path / "large", dtype="float16")
    models.save(model, None, tmp_path / "large in bfloat16", dtype="bfloat16")
    model = tiny_resnet()
    next(b for b in model.buffers() if b.is_floating_point()).fill_(math.nan)
    with pytest.raises(RunError, match="values that are not finite"):
        models.save(model, None, tmp_path / "statistics")
    assert [path.name for path in tmp_path.iterdir()] == ["large in bfloat16"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": "LlamaForCausalLM"}, "must be a list with the name of a class"),
        ({"architectures": [3]}, "must be a list with the name of a class"),
        ({"hidden_size": "wide"}, "can be built from config.json"),
        ({"overhaul": "overhaul.nothing"}, "names overhaul.nothing, which this Overhaul has not"),
    ],
)
def test_a_damaged_config_is_refused_in_words(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    models.save(tiny_llama(), None, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RequestError, match=message):
        models.check_shapes(models.facts(tmp_path / "model"))


@pytest.mark.parametrize("header", ["[]", '{"a": 3}', '{"a": {"dtype": "F32"}}', '{"a": {"data_offsets": [0, 4]}}'])
def test_a_header_that_describes_no_tensors_is_refused_in_words(header: str, tmp_path: Path) -> None:
    models.save(tiny_llama(), None, tmp_path / "model")
    content = header.encode()
    (tmp_path / "model" / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(RequestError, match="its header describes no tensors"):
        models.facts(tmp_path / "model")


def test_an_adapter_of_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    tied = models.save(tiny_llama(), None, tmp_path / "tied")
    untied = models.save(tiny_llama(tie_word_embeddings=False), None, tmp_path / "untied")
    ids = torch.arange(12).reshape(2, 6)
    for n, name in enumerate(("embed_tokens", "lm_head")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            place, _ = adapter(tied, tmp_path / f"a{n}", target_modules=[name, "q_proj"])
            other, wrapped = adapter(untied, tmp_path / f"b{n}", target_modules=[name, "q_proj"])
            for attempt in (
                lambda place=place: models.check_shapes(models.facts(place)),
                lambda p=place: models.open_model(p),
            ):
                with pytest.raises(RequestError, match=f"adapts .*{name}, which its base ties to another"):
                    attempt()
            opened, _ = models.open_model(other)
        with torch.no_grad():
            torch.testing.assert_close(opened(ids).logits, wrapped(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, r"lora_A.weight has the shape \(2, 32\), and \(8, 32\)"),
        ({"peft_type": "ODD"}, "does not fit its base .*Correct adapter_config.json"),
        ({"lora_alpha": "x"}, "does not fit its base .*Correct adapter_config.json"),
        ({"target_modules": ["nothing"]}, "does not fit its base .*not found in the base"),
        ({"target_modules": ["q_proj"]}, r"down_proj.lora_A.weight, .* is on one side only"),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, r"v_proj.lora_A.weight, .* is on one side only"),
    ],
)
def test_an_adapter_that_does_not_fit_is_told_without_weights(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    place, _ = adapter(folder, tmp_path / "adapter")
    options = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**options, **changes}))
    for attempt in (lambda: models.check_shapes(models.facts(place)), lambda: models.open_model(place)):
        with pytest.raises(RequestError, match=message) as refused:
            attempt()
        assert "\n" not in str(refused.value)
    (place / "adapter_config.json").write_text(json.dumps({**options, "base_model_name_or_path": str(place)}))
    with pytest.raises(RequestError, match="names its own folder as its base"):
        models.facts(place)


def test_what_the_weights_lack_is_told_from_headers(folder: Path, tmp_path: Path) -> None:
    for n, changes in enumerate(
        (
            {"tie_word_embeddings": False},
            {"num_hidden_layers": 5},
            {"architectures": ["LlamaForSequenceClassification"]},
        )
    ):
        lacking = copied(folder, tmp_path / f"c{n}", **changes)
        for attempt in (lambda p=lacking: models.check_shapes(models.facts(p)), lambda p=lacking: models.open_model(p)):
            with pytest.raises(RequestError, match=r"the weights lack \d tensors, such as"):
                attempt()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", "{", "generation_config.json is not valid JSON"),
        ("generation_config.json", "[]", "generation_config.json is not valid JSON: it holds a list"),
        (
            "generation_config.json",
            '{"cache_implementation": "odd"}',
            "cannot be read: Invalid .*Correct it, or remove it",
        ),
        ("config.json", {"quantization_config": {}}, r"`quantization_config` is \{\} and names no method"),
        ("config.json", {"quantization_config": False}, "`quantization_config` is False and names no method"),
        ("model.safetensors", torch.int8, r"most of the weights are whole numbers \(i8\)"),
    ],
)
def test_what_transformers_would_trip_over_is_refused_from_files(
    name: str, content: Any, message: str, folder: Path, tmp_path: Path
) -> None:
    odd = copied(folder, tmp_path / "odd", **(content if isinstance(content, dict) else {}))
    if isinstance(content, torch.dtype):
        held = load_file(odd / name)
        save_file({key: tensor.to(content) for key, tensor in held.items()}, odd / name)
    elif isinstance(content, str):
        (odd / name).write_text(content)
    with pytest.raises(RequestError, match=message):
        models.check_shapes(models.facts(odd))


def test_an_index_without_metadata_and_weights_one_folder_below_are_told(folder: Path, tmp_path: Path) -> None:
    shards = sharded(tiny_llama(), tmp_path / "shards", "20KB")
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    with pytest.raises(RequestError, match="index.json has no `metadata`, without which transformers does not read it"):
        models.facts(shards)
    below = copied(folder, tmp_path / "below")
    (below / "weights").mkdir()
    (below / "model.safetensors").rename(below / "weights" / "model.safetensors")
    with pytest.raises(RequestError, match=r"holds no weights, but .*weights does \(model.safetensors\)"):
        models.facts(below)
    (tmp_path / "above").mkdir()
    shutil.copytree(folder, tmp_path / "above" / "m")
    with pytest.raises(RequestError, match=r"has no config.json.* /.*m has one: open that"):
        models.facts(tmp_path / "above")


def test_a_model_without_weights_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no weights"):
        models.save(tiny_llama().to("meta"), None, tmp_path / "m")
