"""Encoders without a head: sentence-transformers' layout, special tokens, criteria and healing by hidden states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import overhaul as oh
from conftest import tiny_llama
from overhaul import models
from overhaul.errors import RequestError
from overhaul.prefix import path_losses
from overhaul.recipe.check import check
from overhaul.recipe.spec import read
from overhaul.shrink.drop_layers import drop_layers
from overhaul.shrink.heal import heal
from overhaul.stack import LayerStack
from tiny_checkpoints import rewrite

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 160}
WORDS = "the cat dog sat ran on under mat hat sun is warm old red blue and".split()


def bert(**options: Any) -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SIZES, **options)).eval()


def mpnet() -> Any:
    from transformers import MPNetConfig, MPNetModel

    return MPNetModel(MPNetConfig(**SIZES)).eval()


def distilbert() -> Any:
    from transformers import DistilBertConfig, DistilBertModel

    return DistilBertModel(DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=4, n_heads=4)).eval()


def vit() -> Any:
    from transformers import ViTConfig, ViTModel

    sizes = {name: value for name, value in SIZES.items() if name not in ("vocab_size", "max_position_embeddings")}
    return ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1)).eval()


BUILDERS = {"bert": bert, "mpnet": mpnet, "distilbert": distilbert, "vit": vit, "llama": lambda: tiny_llama().model}


def words(first: str = "[CLS]", last: str = "[SEP]", **more: Any) -> Any:
    """One token a word, with a token in front of every text and one behind it."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", first, last, *WORDS]
    whole: Any = Tokenizer(WordLevel({word: n for n, word in enumerate(names)}, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, 2), (last, 3)]
    )
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": first, "sep_token": last, **more}
    return PreTrainedTokenizerFast(tokenizer_object=whole, model_max_length=64, **marks)


def sentences(count: int = 12) -> list[dict[str, str]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 12, (count,), generator=draw).tolist()
    return [
        {"text": " ".join(WORDS[n] for n in torch.randint(len(WORDS), (length,), generator=draw).tolist())}
        for length in lengths
    ]


def layout(model: nn.Module, place: Path) -> Path:
    """A folder as sentence-transformers writes it."""
    models.save(model, words(), place)
    kind = "sentence_transformers.models"
    listed = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    entries = [{"idx": int(n), "name": n, "path": path, "type": f"{kind}.{one}"} for n, path, one in listed]
    (place / "modules.json").write_text(json.dumps(entries))
    (place / "sentence_bert_config.json").write_text('{"max_seq_length": 64, "do_lower_case": false}')
    (place / "config_sentence_transformers.json").write_text('{"prompts": {}}')
    (place / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (place / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (place / "2_Normalize").mkdir()
    return place


@pytest.mark.parametrize("marks", [{}, {"bos_token": "[CLS]", "eos_token": "[SEP]"}])
def test_pieces_of_text_stand_within_the_special_tokens_of_the_tokenizer(marks: dict[str, str]) -> None:
    tokenizer = words(**marks)
    (whole,) = oh.examples([{"text": "the cat sat on the mat"}], tokenizer, length=16)
    assert whole["input_ids"].tolist() == tokenizer("the cat sat on the mat")["input_ids"]
    assert whole["labels"][0] == -100 or marks, "nothing predicts the first token"
    assert whole["labels"][-1] == -100 and (whole["labels"][2:-1] == whole["input_ids"][2:-1]).all()
    cut = oh.examples([{"text": "the cat sat on the mat and the dog ran under the red hat"}], tokenizer, length=8)
    assert [item["input_ids"].tolist()[:: len(item["input_ids"]) - 1] for item in cut] == [[2, 3]] * len(cut)
    assert max(len(item["input_ids"]) for item in cut) == 8
    inner = [token for item in cut for token in item["input_ids"].tolist()[1:-1]]
    assert inner == tokenizer("the cat sat on the mat and the dog ran under the red hat")["input_ids"][1:-1]


@pytest.mark.parametrize("criterion", ["block_influence", "window", "perplexity", "greedy"])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_criterion_drops_blocks_of_a_model_without_a_head(name: str, criterion: Any, tmp_path: Path) -> None:
    model = BUILDERS[name]()
    stack = LayerStack.of(model)
    with torch.no_grad():  # this block adds nothing
        for parameter in stack.blocks[2].parameters():
            if name in ("vit", "llama"):
                parameter.zero_()
    if name == "vit":
        items = [{"pixel_values": torch.randn(1, 8, 8), "labels": torch.tensor(0)} for _ in range(6)]
        data = oh.Examples(items, [{}] * 6)
    else:
        data = oh.examples(sentences(), words(), length=16)
    done = drop_layers(model, data, count=1, criterion=criterion)
    if name in ("vit", "llama"):
        assert done.facts["removed"] == [2]
    assert len(LayerStack.of(model)) == 3
    assert len(LayerStack.of(models.open_model(models.save(model, None, tmp_path / "out"))[0])) == 3


def test_without_a_head_a_path_is_told_by_how_far_the_last_states_turn() -> None:
    model, data = bert(), oh.examples(sentences(), words(), length=16)
    stack = LayerStack.of(model)
    paths = [[0, 1, 2, 3], [0, 2, 3], [1, 1]]
    found = path_losses(stack, paths, data, batch_size=5)
    with torch.no_grad():
        said = []
        for path in paths:
            with stack.following(path):
                said.append([model(item["input_ids"][None]).last_hidden_state[0] for item in data.items])
    turned = [
        torch.cat([1 - nn.functional.cosine_similarity(a, b, dim=-1) for a, b in zip(one, said[0], strict=True)]).mean()
        for one in said
    ]
    torch.testing.assert_close(torch.tensor(found), torch.stack(turned), atol=1e-5, rtol=1e-4)
    assert found[0] < 1e-6 < found[1]


def distance(model: Any, teacher: Any, data: Any) -> float:
    with torch.no_grad():
        pairs = [[one(x["input_ids"][None]).last_hidden_state[0] for one in (model, teacher)] for x in data.items]
    return float(torch.cat([(a - b).square().sum(-1) / b.square().sum(-1) for a, b in pairs]).mean())


def test_healing_brings_a_cut_encoder_back_towards_its_teachers_states(tmp_path: Path) -> None:
    steady = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    place = layout(bert(**steady), tmp_path / "sentences")
    (teacher, tokenizer), (model, _) = oh.open(place), oh.open(place)
    data = oh.examples(sentences(), tokenizer, length=16)
    drop_layers(model, data, count=1)
    before = distance(model, teacher, data)
    done = heal(model, data, teacher, target="states", steps=40, batch_size=4, lr=3e-3, warmup=0, weight_decay=0)
    assert done.curves["loss"][0] == pytest.approx(before, rel=0.5)
    assert distance(model, teacher, data) < 0.3 * before
    out = oh.save(model, tokenizer, tmp_path / "out")
    for name in (
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
    ):
        assert (out / name).read_bytes() == (place / name).read_bytes()
    assert (out / "2_Normalize").is_dir()
    assert distance(oh.open(out)[0], model, data) < 1e-9


def test_heal_says_for_which_models_states_are(tokenizer: Any) -> None:
    data = oh.examples(sentences(), words(), length=16)
    with pytest.raises(RequestError, match='LlamaForCausalLM has one. Write target: "teacher"'):
        heal(tiny_llama(), data, tiny_llama(), target="states")
    with pytest.raises(RequestError, match="no `teacher` is given"):
        heal(bert(), data, target="states")
    for target in ("tokens", "teacher"):
        with pytest.raises(RequestError, match="BertModel has no head"):
            heal(bert(), data, bert(), target=target)


@pytest.mark.parametrize(
    ("step", "judge"),
    [
        ({"forget.npo": {"forget": "text", "retain": "other"}}, {}),
        ({"shrink.heal": {}}, {}),
        ({"shrink.drop_layers": {"count": 1}}, {"kept": {"perplexity": "text"}}),
    ],
)
def test_plan_refuses_what_needs_a_head(step: Any, judge: Any, tmp_path: Path) -> None:
    place = layout(bert(), tmp_path / "m")
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, sentences())))
    (tmp_path / "other.jsonl").write_text('{"text": "the red sun"}')
    material = {name: {"from": str(tmp_path / f"{name}.jsonl")} for name in ("text", "other")}
    with pytest.raises(RequestError, match="BertModel has no head"):
        check(read({"model": str(place), "materials": material, "steps": [step], "judge": judge}))


@pytest.mark.smoke
def test_a_recipe_shortens_and_heals_a_sentence_encoder(tmp_path: Path) -> None:
    place = layout(mpnet(), tmp_path / "m")
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, sentences())))
    recipe = {
        "model": str(place),
        "materials": {
            "text": {"from": str(tmp_path / "text.jsonl"), "length": 16},
            "teacher": {"after": "start"},
        },
        "steps": [{"shrink.drop_layers": {"count": 1}}, {"shrink.heal": {"target": "states", "steps": 3}}],
    }
    done = oh.run(recipe, tmp_path / "run")
    assert (done.folder / "model" / "1_Pooling" / "config.json").is_file()
    assert models.facts(done.folder / "model").config["num_hidden_layers"] == 3


def test_an_encoder_decoder_is_refused_by_plan_and_in_memory(tmp_path: Path) -> None:
    from tiny_checkpoints import tiny_t5

    place = models.save(tiny_t5(), words(), tmp_path / "t5")
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, sentences())))
    recipe = {"model": str(place), "materials": {"text": {"from": str(tmp_path / "text.jsonl")}}}
    with pytest.raises(RequestError, match="T5ForConditionalGeneration is an encoder-decoder"):
        check(read({**recipe, "steps": ["shrink.heal"]}))
    with pytest.raises(RequestError, match="is an encoder-decoder"):
        heal(tiny_t5(), oh.examples(sentences(), words(), length=16), steps=1)


@pytest.mark.parametrize("damage", ["[{]", '{"path": "x"}', "[7]"])
def test_a_damaged_list_of_modules_is_refused_before_anything_is_read(damage: str, tmp_path: Path) -> None:
    place = layout(bert(), tmp_path / "m")
    (place / "modules.json").write_text(damage)
    with pytest.raises(RequestError, match=r"modules\.json"):
        models.check_shapes(models.facts(place))


def test_modules_that_cannot_do_without_their_folders_are_missed(tmp_path: Path) -> None:
    place = layout(bert(), tmp_path / "m")
    listed = json.loads((place / "modules.json").read_text())
    dense = {"idx": 3, "name": "3", "path": "more/3_Dense", "type": "sentence_transformers.models.Dense"}
    (place / "modules.json").write_text(json.dumps([*listed, dense]))
    with pytest.raises(RequestError, match=r"names more/3_Dense \(Dense\), which the folder lacks"):
        models.check_shapes(models.facts(place))
    (place / "more" / "3_Dense").mkdir(parents=True)
    (place / "more" / "3_Dense" / "config.json").write_text("{}")
    model, processor = models.open_model(place)
    out = models.save(model, processor, tmp_path / "out")
    assert (out / "more" / "3_Dense" / "config.json").is_file(), "wherever below the folder it lies"


def pooled(name: str, **options: Any) -> Any:
    import transformers

    sizes = {
        key: value
        for key, value in SIZES.items()
        if name != "ViT" or key not in ("vocab_size", "max_position_embeddings")
    }
    more = {"image_size": 8, "patch_size": 4, "num_channels": 1} if name == "ViT" else {}
    config = getattr(transformers, f"{name}Config")(**sizes, **more)
    return getattr(transformers, f"{name}Model")(config, **options).eval()


@pytest.mark.parametrize("name", ["Bert", "Roberta", "MPNet", "ViT"])
def test_a_folder_without_a_pooler_opens_changes_and_is_saved_without(name: str, tmp_path: Path) -> None:
    source: Any = pooled(name, add_pooling_layer=False)
    source.save_pretrained(tmp_path / "m")
    given = torch.randn(1, 1, 8, 8) if name == "ViT" else torch.arange(3, 12)[None]
    models.check_shapes(models.facts(tmp_path / "m"))
    opened: Any = oh.open(tmp_path / "m")[0]
    with torch.no_grad():
        assert opened.pooler is None
        assert torch.equal(opened(given).last_hidden_state, source(given).last_hidden_state)
        drop_layers(opened, drop=[1])
        again: Any = oh.open(oh.save(opened, None, tmp_path / "out"))[0]
        assert again.pooler is None and torch.equal(again(given)[0], opened(given)[0])
        with pytest.raises(RequestError, match="the weights lack 1 tensors, such as 'pooler.dense.bias'"):
            oh.open(half(tmp_path / "whole", name))


def half(place: Path, name: str) -> Path:
    """A folder with half a pooler."""
    pooled(name).save_pretrained(place)
    rewrite(place, lambda held: held.pop("pooler.dense.bias"))
    return place
