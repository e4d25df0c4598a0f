"""What is saved opens as what it was: adapters in hand, tables that are not stored, sizes of files, dtypes; tokenizers."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import overhaul as oh
from conftest import tiny_llama, tiny_resnet
from more_families import MORE
from overhaul import finite, models
from overhaul.errors import RequestError, RunError
from overhaul.recipe.check import check
from overhaul.recipe.spec import read
from overhaul.shrink.drop_layers import drop_layers
from tiny_checkpoints import rewrite, sharded, tensors


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """A library that takes seconds to import is no part of a test's time."""
    import peft

    assert peft


def with_peft(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()


def with_adapter(model: Any) -> Any:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize("adapted", [with_peft, with_adapter])
def test_an_adapter_in_hand_is_not_saved_as_the_model(adapted: Callable[[Any], Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"[Mm]erge"):
        oh.save(adapted(tiny_llama()), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_in_hand_is_saved_once_it_is_merged(tmp_path: Path) -> None:
    wrapped, ids = with_peft(tiny_llama()), torch.arange(3, 12)[None]
    with torch.no_grad():
        said = wrapped(ids).logits
        opened, _ = oh.open(oh.save(wrapped.merge_and_unload(), None, tmp_path / "out"))
        torch.testing.assert_close(opened(ids).logits, said, atol=1e-5, rtol=1e-4)


def slower(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(2)


def another_base(model: Any) -> None:
    model.config.rope_parameters["rope_theta"] = 99.0


def another_norm(model: Any) -> None:
    model.config.rms_norm_eps = 0.5


def another_norm_in_place(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def another_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def looking_ahead(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


def no_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.Identity()


def all_activations(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.ReLU())


def without_angles(model: Any) -> None:
    model.model.rotary_emb = None


EDITS = [
    slower, another_base, another_norm, another_norm_in_place, another_activation, looking_ahead, no_activation,
    all_activations, without_angles,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_what_a_reload_would_compute_otherwise_is_not_saved(edit: Callable[[Any], None], tmp_path: Path) -> None:
    model = tiny_llama()
    edit(model)
    with pytest.raises(RunError, match="would open as another model"):
        oh.save(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def doubled(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def test_what_no_folder_holds_is_said_where_it_may_change_what_the_model_says(tmp_path: Path) -> None:
    hooked: Any = tiny_llama()
    quiet: Any = tiny_llama()
    hooked.model.layers[1].mlp.register_forward_hook(doubled)
    with pytest.warns(UserWarning, match=r"model\.layers\.1\.mlp has hooks here"):
        oh.save(hooked, None, tmp_path / "hooked")
    quiet.enable_input_require_grads()  # a hook of the library's own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oh.save(quiet, None, tmp_path / "quiet")


def test_tensors_that_are_not_in_one_piece_are_saved(tmp_path: Path) -> None:
    model: Any = tiny_resnet()
    model = model.to(memory_format=torch.channels_last)
    assert not all(parameter.is_contiguous() for parameter in model.parameters())
    opened, _ = oh.open(oh.save(model, None, tmp_path / "out"))
    expected = dict(model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in opened.named_parameters())


@pytest.mark.filterwarnings("ignore")
def test_what_torch_quantised_is_refused_in_words(tmp_path: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(tiny_llama(), {nn.Linear})
    with pytest.raises(RunError, match="would not load back what this model holds"):
        oh.save(model, None, tmp_path / "out")


def test_weights_that_were_cast_are_saved_and_it_is_said_that_tables_were_too(tmp_path: Path) -> None:
    model = tiny_llama(initializer_range=0.3).to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"2 tables .* were rounded with the weights"):
        place = oh.save(model, None, tmp_path / "out")
    opened, _ = oh.open(place, dtype="bfloat16")
    assert all(torch.equal(held, opened.state_dict()[name]) for name, held in model.state_dict().items())
    oh.save(opened, None, tmp_path / "again")


def test_a_table_that_opening_rounds_with_the_weights_is_no_other_table(tmp_path: Path) -> None:
    model = MORE["XGLM"].build().to(torch.bfloat16)
    opened, _ = oh.open(oh.save(model, None, tmp_path / "out"), dtype="bfloat16")
    table = "model.embed_positions.weights"
    assert torch.equal(opened.get_buffer(table), model.get_buffer(table))
    oh.save(opened, None, tmp_path / "again")  # warnings are errors here


def test_a_table_that_follows_the_length_of_inputs_is_no_other_model(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model: Any = tiny_llama(rope_parameters=rope, max_position_embeddings=16)
    before = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        model(torch.arange(3, 60)[None])
    assert not torch.equal(before, model.model.rotary_emb.inv_freq)
    oh.save(model, None, tmp_path / "out")


def test_files_are_as_large_as_those_that_the_model_came_in(folder: Path, tmp_path: Path) -> None:
    model, _ = oh.open(folder)
    assert len(list(oh.save(model, None, tmp_path / "one").glob("*.safetensors"))) == 1
    (tmp_path / "parts").mkdir()
    place = sharded(model, tmp_path / "parts", "40KB")
    again = oh.save(oh.open(place)[0], None, tmp_path / "again")
    sizes = [sorted(path.stat().st_size for path in one.glob("*.safetensors")) for one in (place, again)]
    assert len(sizes[1]) > 1 and sizes[1][-1] <= sizes[0][-1]


def test_a_config_says_the_dtype_of_the_files(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    place = oh.save(tiny_llama(), None, tmp_path / "out", dtype="bfloat16")
    assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(AutoModelForCausalLM.from_pretrained(place).parameters()).dtype is torch.bfloat16


# tokenizers of another length than the vocabulary


def with_pad(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    longer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, model_max_length=128, **marks)
    longer.add_special_tokens({"pad_token": "[PAD]"})
    return longer


def small(place: Path, tokenizer: Any) -> Path:
    """A model with a row for each of the 60 words and none for what was added behind them."""
    models.save(tiny_llama(vocab_size=60), tokenizer, place)
    return place


def test_a_token_that_was_added_behind_the_rows_does_no_harm_where_no_text_holds_it(
    tokenizer: Any, tmp_path: Path
) -> None:
    place = small(tmp_path / "m", with_pad(tokenizer))
    assert models.count_tokens(models.facts(place)) == 61
    model, words = oh.open(place)
    assert len(words) == 61 and nn.Module.get_parameter(model, "model.embed_tokens.weight").shape[0] == 60
    for name, text in {"good": "abc def. " * 9, "bad": "abc [PAD] def. " * 9}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "abc " * 9}) + "\n" + json.dumps({"text": text}))

    def checked(name: str) -> Any:
        material = {"text": {"from": str(tmp_path / f"{name}.jsonl"), "length": 32}}
        return check(read({"model": str(place), "materials": material, "steps": ["shrink.heal"]}))

    assert checked("good").encode()
    with pytest.raises(
        RequestError, match=r"row \d+, has token 60 \('\[PAD\]'\), but the model's vocabulary ends at 59"
    ):
        checked("bad").encode()


def test_a_vocabulary_that_is_longer_than_the_tokenizer_is_what_padding_leaves(tokenizer: Any, tmp_path: Path) -> None:
    models.save(tiny_llama(vocab_size=64), tokenizer, tmp_path / "m")
    assert models.count_tokens(models.facts(tmp_path / "m")) == 60
    assert len(oh.open(tmp_path / "m")[1]) == 60


def test_a_model_without_a_tokenizer_refuses_text_in_words(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    for path in (tmp_path / "m").glob("*token*"):
        path.unlink()
    model, words = oh.open(tmp_path / "m")
    assert words is None and model is not None
    (tmp_path / "a.txt").write_text("some text " * 20)
    material = {"text": {"from": str(tmp_path / "a.txt")}}
    with pytest.raises(RequestError, match="has no tokenizer"):
        check(read({"model": str(tmp_path / "m"), "materials": material, "steps": ["shrink.heal"]}))


def test_a_tokenizer_of_words_alone_is_found(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    models.save(BertModel(config), None, tmp_path / "m")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    (tmp_path / "m" / "vocab.txt").write_text("\n".join(names))
    assert models.count_tokens(models.facts(tmp_path / "m")) == 7
    assert oh.open(tmp_path / "m")[1]("the cat")["input_ids"] == [2, 5, 6, 3]


def test_another_make_of_the_same_activation_and_switches_of_training_are_saved(tmp_path: Path) -> None:
    model: Any = tiny_llama(attention_dropout=0.1)
    model.model.layers[1].mlp.act_fn = nn.SiLU(inplace=False)
    model.activation_checkpointing_enable()
    model.train()
    opened: Any = oh.open(oh.save(model, None, tmp_path / "out"))[0]
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model.eval()(ids).logits)


def test_a_function_that_was_exchanged_is_not_saved(tmp_path: Path) -> None:
    from transformers import GPT2Config

    from conftest import tiny_gpt2

    assert GPT2Config().activation_function == "gelu_new"
    model: Any = tiny_gpt2()
    model.transformer.h[0].mlp.act.forward = torch.tanh
    with pytest.raises(RunError, match="transformer.h.0.mlp.act has a forward of its own"):
        oh.save(model, None, tmp_path / "out")


def test_what_is_exact_among_smaller_numbers_stays_exact(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    for n, layer in enumerate(model.model.layers):
        layer.input_layernorm.weight.data += 1e-4 * (n + 1)
    place = oh.save(model, None, tmp_path / "m", dtype="bfloat16")
    norms = {name: tensor for name, tensor in model.state_dict().items() if "input_layernorm" in name}
    rewrite(place, lambda held: held.update(norms))
    opened: Any = oh.open(place)[0]
    drop_layers(opened, drop=[1])
    stored = tensors(oh.save(opened, None, tmp_path / "out", dtype="bfloat16"))
    assert {name for name, tensor in stored.items() if tensor.dtype is torch.float32} == set(list(norms)[:3])
    assert [float(stored[name][0]) for name in list(norms)[:3]] == [
        float(norms[name][0]) for n, name in enumerate(norms) if n != 1
    ]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    whole = oh.open(oh.save(model, None, tmp_path / "exact"))[0]
    assert {t.dtype for t in tensors(oh.save(whole, None, tmp_path / "small", dtype="bfloat16")).values()} == {
        torch.bfloat16
    }


def test_what_changes_no_number_is_no_other_model(tmp_path: Path) -> None:
    built: list[Any] = [tiny_llama(), MORE["Marian, decoder"].build(), MORE["ALBERT"].build()]
    for n, model in enumerate(built):
        model.resize_token_embeddings(model.config.vocab_size + 16)
        model.set_attn_implementation("eager")
        opened: Any = oh.open(oh.save(model, None, tmp_path / f"m{n}"))[0]
        assert opened.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape


@pytest.mark.filterwarnings("ignore")
def test_tables_with_the_smallest_numbers_of_float16_are_told_to_be_rounded(tmp_path: Path) -> None:
    model: Any = MORE["ERNIE 4.5"].build()
    oh.save(model.half(), None, tmp_path / "m")


def test_masks_that_older_files_hold_are_left_out(tmp_path: Path) -> None:
    from conftest import tiny_gpt2

    place = oh.save(tiny_gpt2(), None, tmp_path / "m")
    rewrite(place, lambda held: held.update({"transformer.h.1.attn.masked_bias": torch.tensor(-float("inf"))}))
    assert "masked_bias" not in "".join(oh.open(place)[0].state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_folder_with_a_weight_that_is_no_number_is_not_opened(value: float, tmp_path: Path) -> None:
    folder = sharded(tiny_llama(), tmp_path / "bad", "20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.2.mlp.up_proj.weight"
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name][3, 1] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(RequestError, match=rf"{file.name}: '{name}' holds values that are not finite .*in float32\."):
        oh.open(folder)
    # sums that are too large are no fault
    assert finite.is_finite(torch.full((4,), 3e38)) and not finite.is_finite(torch.tensor([value]))
