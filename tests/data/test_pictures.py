"""Pictures as they are meant: upright, in 8 bits, with the class that the model means."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from overhaul.data.classes import labels_of
from overhaul.data.duplicates import identity
from overhaul.data.materials import Source, encode, examples, load_rows
from overhaul.errors import RequestError
from overhaul.recipe.check import check
from overhaul.recipe.spec import read as read_recipe

ANIMALS = {"zebra": 0, "dog": 1, "cat": 2}
DEFAULT = {f"LABEL_{n}": n for n in range(12)}


def processor(images: Any, return_tensors: str) -> Any:
    """Pixel values as they are."""
    return {"pixel_values": torch.from_numpy(np.array(images)).permute(2, 0, 1)[None].float()}


def grey(value: int = 128, size: tuple[int, int] = (4, 3)) -> Image.Image:
    return Image.new("L", size, value)


def save(image: Image.Image, *way: Any, **options: Any) -> Path:
    path = Path(*map(str, way))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def load(folder: Path, name: str = "i", labels: Any = None, notes: Any = None, **options: Any) -> list[dict[str, Any]]:
    return list(load_rows(Source.model_validate({"from": name, **options}), folder, labels=labels, said=notes))


def numbers(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {row["class"]: row["label"] for row in rows}


def test_classes_are_the_models(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save(grey(), tmp_path, "i", name, "a.png")
    assert numbers(load(tmp_path, labels=ANIMALS)) == {"cat": 2, "dog": 1}
    assert [int(item["labels"]) for item in examples("i", processor, base=tmp_path, labels=ANIMALS)] == [2, 1]
    for wanted in ("dog", 1, ["dog", "frog"]):  # the rest of the folder has no part in its number
        assert numbers(load(tmp_path, labels=ANIMALS, where={"label": wanted})) == {"dog": 1}
    assert numbers(load(tmp_path, labels=ANIMALS, unless={"class": ["dog"]})) == {"cat": 2}
    save(grey(), tmp_path, "i", "frog", "a.png")
    with pytest.raises(RequestError, match="the model has no class frog. It has zebra, dog, cat"):
        load(tmp_path, labels=ANIMALS)


def test_a_model_without_names_takes_folders_in_order_and_says_so(tmp_path: Path) -> None:
    for n in range(1, 13):
        save(grey(), tmp_path, "i", n, "a.png")
    notes: list[str] = []
    found = numbers(load(tmp_path, labels=DEFAULT, notes=notes))
    assert found == {str(n): n - 1 for n in range(1, 13)}
    assert len(notes) == 1 and "numbered in order: 1 is 0, 2 is 1" in notes[0]
    assert [row["class"] for row in load(tmp_path, labels=DEFAULT, where={"label": 3})] == ["3"]
    with pytest.warns(UserWarning, match="numbered in order"):
        examples("i", processor, base=tmp_path, labels=DEFAULT)
    with pytest.raises(RequestError, match="has 12 classes .* but the model has 4"):
        load(tmp_path, labels={f"LABEL_{n}": n for n in range(4)})
    for name in ("b", "a"):
        save(grey(), tmp_path, "j", name, "a.png")
    assert numbers(load(tmp_path, "j", labels={"LABEL_0": 0, "LABEL_1": 1}, notes=notes)) == {"a": 0, "b": 1}
    with pytest.raises(RequestError, match="has 2 classes .a, b., but the model has 12 and no names"):
        load(tmp_path, "j", labels=DEFAULT)


def test_numbers_of_classes_are_themselves_and_in_range(tmp_path: Path) -> None:
    for name in ("3", "7"):
        save(grey(), tmp_path, "i", name, "a.png")
    assert numbers(load(tmp_path, labels=DEFAULT)) == numbers(load(tmp_path)) == {"3": 3, "7": 7}
    pixels = np.zeros((2, 2), dtype="float32")
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": pixels.tolist(), "label": 3}))
    for label, message in ((3, "is 3, but the model has 3 classes"), (-1, "is -1"), (None, "is None"), (1.5, "is 1.5")):
        with pytest.raises(RequestError, match=f"rows, row 1: 'label' {message}"):
            examples([{"image": pixels, "label": label}], labels=ANIMALS)
    rows = [{"image": pixels, "label": label} for label in (2, "dog", np.int64(0))]
    assert [int(item["labels"]) for item in examples(rows, labels=ANIMALS)] == [2, 1, 0]


def test_numbers_in_a_table_are_the_models_also_as_text(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save(grey(), tmp_path, "i", name)
    (tmp_path / "i" / "metadata.csv").write_text("file_name,label\na.png,2\nb.png,0\n")
    for labels in (ANIMALS, DEFAULT, None):
        assert [row["label"] for row in load(tmp_path, labels=labels)] == [2, 0]
        assert [row["file"] for row in load(tmp_path, labels=labels, where={"label": 2})] == ["a.png"]
    (tmp_path / "i" / "metadata.csv").write_text("file_name,label\na.png,2\nb.png,3\n")
    with pytest.raises(RequestError, match="b.png: 'label' is 3, but the model has 3 classes, from 0 to 2"):
        load(tmp_path, labels=ANIMALS)


def test_texts_have_the_classes_of_their_model_too(tokenizer: Any) -> None:
    rows = [{"text": "it barks", "label": "dog"}, {"text": "it purrs", "label": "cat"}, {"text": "it is", "label": "0"}]
    made = examples(rows[:2], tokenizer, form="classified", labels=ANIMALS)
    assert [int(item["labels"]) for item in made] == [1, 2]
    assert [int(item["labels"]) for item in examples(rows[2:], tokenizer, form="classified", labels=ANIMALS)] == [0]
    with pytest.raises(RequestError, match="the model has no class frog"):
        examples([{"text": "it croaks", "label": "frog"}], tokenizer, form="classified", labels=ANIMALS)


def test_a_filter_on_a_class_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save(grey(), tmp_path, "i", name, "a.png")
    with pytest.raises(RequestError, match="none of its 2 rows is left .* Its classes are cat, dog"):
        load(tmp_path, where={"label": "frog"})


def test_the_classes_of_a_config() -> None:
    assert labels_of({"id2label": {"0": "zebra", "1": "dog", "2": "cat"}}) == ANIMALS
    assert labels_of({"architectures": ["ViTForImageClassification"]}) == {"LABEL_0": 0, "LABEL_1": 1}
    assert labels_of({"architectures": ["LlamaForCausalLM"]}) is None
    assert labels_of({"label2id": ANIMALS}) == ANIMALS
    with pytest.raises(RequestError, match="gives no numbers"):
        labels_of({"id2label": {"zebra": "0"}})


def test_a_recipe_checks_folders_against_its_model(tmp_path: Path) -> None:
    from conftest import tiny_vit
    from overhaul.models import save as save_model

    model = tiny_vit(num_labels=3, label2id=ANIMALS, id2label={n: name for name, n in ANIMALS.items()}, num_channels=3)
    save_model(model, None, tmp_path / "model")
    for name in ("cat", "dog"):
        save(grey(size=(8, 8)), tmp_path, "i", name, "a.png")
    recipe: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "materials": {
            "forget": {"from": str(tmp_path / "i"), "where": {"label": "cat"}},
            "full": {"from": str(tmp_path / "i")},
        },
        "steps": ["forget.ssd"],
    }
    checked = check(read_recipe(recipe))
    assert [[row["label"] for row in rows] for parts in checked.rows.values() for _, rows in parts] == [[2], [2, 1]]
    assert not checked.warnings
    save(grey(), tmp_path, "i", "cat", "b.png").write_bytes(b"no picture")
    recipe["materials"]["full"]["skip_broken"] = recipe["materials"]["forget"]["skip_broken"] = True
    (note,) = check(read_recipe(recipe)).warnings  # both materials say the same of their folder
    assert "1 of its 3 pictures cannot be read and are left out" in note
    save(grey(), tmp_path, "i", "frog", "a.png")
    with pytest.raises(RequestError, match="no class frog"):
        check(read_recipe(recipe))


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    levels = np.array([[0, 256, 32768], [257, 65000, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tiff", "a.pgm"):
        Image.fromarray(levels).save(tmp_path / name) if name != "a.pgm" else (tmp_path / name).write_bytes(
            b"P5 3 2 65535\n" + levels.astype(">u2").tobytes()
        )
        (tmp_path / name.replace("a.", "d")).mkdir()
        (tmp_path / name).rename(tmp_path / name.replace("a.", "d") / name)
        (row,) = load(tmp_path, name.replace("a.", "d"))
        assert np.asarray(row["image"]).tolist() == [[0, 1, 128], [1, 253, 255]], name
    Image.fromarray(np.ones((2, 2), dtype=np.int32)).save(tmp_path / "dpng" / "b.tif")
    with pytest.raises(RequestError, match=r"b.tif is no picture that can be read: it holds 32-bit numbers"):
        load(tmp_path, "dpng")


def test_pixels_are_not_held(tmp_path: Path) -> None:
    save(grey(9, (500, 400)), tmp_path, "i", "x", "a.png")
    (row,) = load(tmp_path)
    assert not any(hasattr(value, "getpixel") or hasattr(value, "shape") for value in vars(row["image"]).values())
    before = identity(row)
    assert np.asarray(row["image"]).shape == (400, 500) and before == identity(load(tmp_path)[0])
    save(grey(8, (500, 400)), tmp_path, "i", "x", "a.png")
    assert identity(load(tmp_path)[0]) != before
    (tmp_path / "i" / "x" / "a.png").unlink()
    with pytest.raises(RequestError, match="a.png is no file"):
        row["image"].convert("RGB")


def test_pictures_stand_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    save(image, tmp_path, "i", "a.png", exif=exif)
    (row,) = load(tmp_path)
    assert row["image"].image.size == (2, 4) and row["image"].image.getpixel((1, 0)) == (255, 0, 0)
    (again,) = examples([{"image": Image.open(tmp_path / "i" / "a.png")}], processor, form="images")
    assert again["pixel_values"].shape == (3, 4, 2)


def colours() -> dict[str, Image.Image]:
    clear = Image.new("RGBA", (4, 3), (255, 0, 0, 0))
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    see_through = palette.copy()
    see_through.info["transparency"] = 1
    return {"RGBA": clear, "P": palette, "P+": see_through, "CMYK": Image.new("CMYK", (4, 3), (0, 255, 255, 0)),
            "1": Image.new("1", (4, 3), 1), "LA": Image.new("LA", (4, 3), (0, 255))}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "end", "colour"),
    [
        ("RGBA", "png", (255, 255, 255)), ("P", "png", (0, 0, 255)), ("P+", "png", (255, 255, 255)),
        ("CMYK", "tiff", (255, 0, 0)), ("1", "png", 255), ("LA", "png", (0, 0, 0)),
    ],
)  # fmt: skip
def test_colours_become_rgb_and_what_is_clear_white(kind: str, end: str, colour: Any, tmp_path: Path) -> None:
    save(colours()[kind], tmp_path, "i", f"a.{end}")
    (row,) = load(tmp_path)
    assert row["image"].image.getpixel((1, 1)) == colour
    (item,) = examples("i", processor, base=tmp_path)
    assert item["pixel_values"].shape == (3, 3, 4)


@pytest.mark.parametrize(
    "end", ["png", "PNG", "jpg", "JPEG", "bmp", "gif", "tif", "TIFF", "webp", "ppm", "tga", "jp2", "ico", "avif"]
)
def test_what_pillow_reads_is_read(end: str, tmp_path: Path) -> None:
    save(Image.new("RGB", (16, 16), (128, 128, 128)), tmp_path, "i", "x", f"a.{end}")
    (row,) = load(tmp_path)
    value = row["image"].image.getpixel((3, 3))
    assert all(abs(each - 128) < 4 for each in (value if isinstance(value, tuple) else (value,)))


def test_of_a_moving_picture_the_first_is_read_and_said(tmp_path: Path) -> None:
    save(grey(10), tmp_path, "i", "a.gif", save_all=True, append_images=[grey(200)])
    save(grey(30), tmp_path, "i", "b.png")
    notes: list[str] = []
    rows = load(tmp_path, notes=notes)
    assert [np.asarray(row["image"])[0, 0].max() for row in rows] == [10, 30]
    assert notes == ["i: 1 of its pictures are of several frames; the first of each is read."]


def test_folders_of_splits_number_their_classes_alike(tmp_path: Path) -> None:
    for way in ("train/cat/a.png", "train/dog/b.png", "train/zebra/c.png", "val/dog/d.png", "test/zebra/e.png"):
        save(grey(), tmp_path, "i", way)
    assert numbers(load(tmp_path)) == {"cat": 0, "dog": 1, "zebra": 2}
    assert numbers(load(tmp_path, split="validation")) == {"dog": 1}
    assert numbers(load(tmp_path, split="test", labels=ANIMALS)) == {"zebra": 0}
    with pytest.raises(RequestError, match="no split 'tset'. Did you mean 'test'"):
        load(tmp_path, split="tset")
    save(grey(), tmp_path, "i", "cat", "a.png")
    with pytest.raises(RequestError, match=r"cat/a.png is in none of them"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_say_what_pictures_are(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    table = [{"file_name": "a.png", "label": "dog", "by": "x"}, {"file_name": "more/b.png", "label": "cat", "by": "y"}]
    for row in table:
        save(grey(), tmp_path, "i", row["file_name"])

    def write(rows: list[dict[str, Any]]) -> None:
        text = "\n".join(map(json.dumps, rows)) if kind == "jsonl" else "\n".join(
            [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        )  # fmt: skip
        (tmp_path / "i" / f"metadata.{kind}").write_text(text)

    write(table)
    rows = load(tmp_path, labels=ANIMALS)
    assert [(row["file"], row["label"], row["by"]) for row in rows] == [("a.png", 1, "x"), ("b.png", 2, "y")]
    write([{**table[0], "file_name": "c.png"}, table[1]])
    with pytest.raises(
        RequestError, match=rf"metadata.{kind}, line {1 if kind == 'jsonl' else 2}: 'c.png' is no picture in"
    ):
        load(tmp_path)
    write([{**table[0], "file_name": "../c.png"}, table[1]])
    with pytest.raises(RequestError, match="must name a picture in this folder or below, not '../c.png'"):
        load(tmp_path)
    write(table[:1])
    with pytest.raises(RequestError, match=r"more/b.png has no line in its folder's metadata"):
        load(tmp_path)
    write([{"file_name": "a.png", "text": "a dog"}, {"file_name": "more/b.png", "text": "a cat"}])
    spec = Source.model_validate({"from": "i"})

    class Both:
        image_processor = staticmethod(processor)

        def __init__(self) -> None:
            self.tokenizer = tokenizer

    made = encode(load_rows(spec, tmp_path), spec, Both())
    assert made.kind == "image_text" and [row["text"] for row in made.rows] == ["a dog", "a cat"]


def test_broken_pictures_are_named_or_counted(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for n in range(4):
        save(Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)), tmp_path, "i", "x", f"{n}.png")
    whole = (tmp_path / "i" / "x" / "1.png").read_bytes()
    (tmp_path / "i" / "x" / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "i" / "x" / "2.png").write_text("no picture")
    with pytest.raises(RequestError, match=r"i/x/1.png is no picture that can be read.*`skip_broken: true`"):
        load(tmp_path)
    notes: list[str] = []
    assert [row["file"] for row in load(tmp_path, skip_broken=True, notes=notes)] == ["0.png", "3.png"]
    assert (
        len(notes) == 1 and "i: 2 of its 4 pictures cannot be read and are left out" in notes[0] and "1.png" in notes[0]
    )
    with pytest.warns(UserWarning, match="2 of its 4 pictures"):
        assert len(examples("i", processor, base=tmp_path, skip_broken=True)) == 2
    with pytest.raises(RequestError, match="none of its 4 rows is left"):
        load(tmp_path, skip_broken=True, where={"file": ["1.png", "2.png"]})


def test_other_files_are_named_and_hidden_ones_passed_over(tmp_path: Path) -> None:
    save(grey(), tmp_path, "i", "x", "a.png")
    for name in (".DS_Store", "Thumbs.db", "README.md", "x/.a.png.part"):
        (tmp_path / "i" / name).write_text("x")
    assert len(load(tmp_path)) == 1
    (tmp_path / "i" / "x" / "notes.txt").write_text("x")
    with pytest.raises(RequestError, match=r"notes.txt is among the pictures of .* and is none"):
        load(tmp_path)
    (tmp_path / "i" / "x" / "notes.txt").unlink()
    save(grey(), tmp_path, "i", "b.png")
    with pytest.raises(RequestError, match=r"b.png lies in no folder of a class"):
        load(tmp_path)
    (tmp_path / "i" / "b.png").unlink()
    save(grey(), tmp_path, "i", "x", "y", "b.png")
    with pytest.raises(RequestError, match="lies deeper than CLASS/file"):
        load(tmp_path)


def test_pictures_in_parquet_as_the_hub_has_them(tmp_path: Path) -> None:
    held = io.BytesIO()
    Image.new("RGB", (4, 3), (1, 2, 3)).save(held, "PNG")
    table = pa.table({"image": [{"bytes": held.getvalue(), "path": "a.png"}] * 2, "label": [0, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    made = examples("a.parquet", processor, base=tmp_path, labels=ANIMALS)
    assert made.items[0]["pixel_values"][:, 0, 0].tolist() == [1, 2, 3]
    assert [int(item["labels"]) for item in made] == [0, 2]
    pq.write_table(
        pa.table({"image": [{"bytes": held.getvalue()[:30], "path": "a.png"}], "label": [0]}), tmp_path / "a.parquet"
    )
    with pytest.raises(RequestError, match=r"a.parquet, row 1 is no picture that can be read"):
        examples("a.parquet", processor, base=tmp_path)


def test_a_saved_data_set_of_pictures_goes_by_the_names_of_its_classes(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Picture

    features = Features({"image": Picture(), "label": ClassLabel(names=["cat", "dog"])})
    Dataset.from_dict({"image": [grey(), grey(7)], "label": [0, 1]}, features=features).save_to_disk(tmp_path / "d")
    assert numbers(load(tmp_path, "d", labels=ANIMALS)) == {"cat": 2, "dog": 1}
    assert numbers(load(tmp_path, "d")) == {"cat": 0, "dog": 1}
    (row,) = load(tmp_path, "d", labels=ANIMALS, where={"label": "dog"})
    assert row["label"] == 1 and row["image"].image.getpixel((0, 0)) == 7


def test_names_that_a_data_set_gives_to_any_column_are_its_values(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features(
        {"text": Value("string"), "kind": ClassLabel(names=["dog", "cat"]), "key": ClassLabel(names=["A", "B"])}
    )
    made = Dataset.from_dict({"text": ["it barks", "it purrs"], "kind": [0, 1], "key": [1, 0]}, features=features)
    made.save_to_disk(tmp_path / "d")
    for name in ("p/train-0.parquet", "p/train-1.parquet", "d.parquet"):
        (tmp_path / "p").mkdir(exist_ok=True)
        made.to_parquet(tmp_path / name)
    for name in ("d", "d.parquet", "p", "p/*.parquet"):
        options: dict[str, Any] = {"as": "classified", "columns": {"label": "kind"}}
        assert [row["kind"] for row in load(tmp_path, name, labels=ANIMALS, **options)][:2] == [1, 2]
        assert [row["kind"] for row in load(tmp_path, name, labels={"LABEL_0": 0, "LABEL_1": 1}, **options)][:2] == [
            0,
            1,
        ]
        assert len(load(tmp_path, name, labels=ANIMALS, where={"kind": "cat"}, **options)) in (1, 2)
        asked = load(tmp_path, name, **{"as": "qa", "columns": {"question": "text", "answer": "key"}})
        assert [row["key"] for row in asked][:2] == ["B", "A"]
    Dataset.from_dict({"kind": [0]}, features=Features({"kind": ClassLabel(names=["cat", "dog"])})).to_parquet(
        tmp_path / "p" / "train-1.parquet"
    )
    with pytest.raises(RequestError, match=r"train-1.parquet numbers the classes of 'kind' in another way"):
        load(tmp_path, "p", labels=ANIMALS, **{"as": "classified", "columns": {"label": "kind"}})


def test_a_class_folder_may_be_a_link(tmp_path: Path) -> None:
    save(grey(), tmp_path, "i", "dog", "a.png")
    save(grey(), tmp_path, "cats", "a.png")
    (tmp_path / "i" / "cat").symlink_to(tmp_path / "cats")
    assert numbers(load(tmp_path, labels=ANIMALS)) == {"cat": 2, "dog": 1}


def test_one_number_is_one_class(tmp_path: Path) -> None:
    for name in ("1", "01"):
        save(grey(), tmp_path, "i", name, "a.png")
    with pytest.raises(RequestError, match="the classes '01' and '1' are one number, 1"):
        load(tmp_path, labels=DEFAULT)


@pytest.mark.parametrize("value", [math.nan, math.inf, True, None, "", [1, None], np.array([1, 2]), 1.5])
def test_what_is_no_class_is_refused(value: Any, tmp_path: Path) -> None:
    spec = Source.model_validate({"from": "rows", "as": "classified"})
    with pytest.raises(RequestError, match="rows, row 1: 'label' is .*the name or the number of a class is needed"):
        load_rows(spec, tmp_path, [{"text": "a", "label": value}], DEFAULT)


def test_numbers_of_classes_may_have_lost_their_wholeness_and_stand_not_beside_names(tmp_path: Path) -> None:
    spec = Source.model_validate({"from": "rows", "as": "classified"})
    rows: list[dict[str, Any]] = [{"text": str(n), "label": f"{n}.0"} for n in range(11)]
    assert [row["label"] for row in load_rows(spec, tmp_path, rows, DEFAULT)] == list(range(11))
    both: list[dict[str, Any]] = [{"text": "a", "label": 0}, {"text": "b", "label": "good"}]
    with pytest.raises(RequestError, match=r"holds names of classes \(good\) and numbers \(0\)"):
        load_rows(spec, tmp_path, both)
    assert [row["label"] for row in load_rows(spec, tmp_path, both, {"bad": 0, "good": 1})] == [0, 1]


def test_a_config_says_its_classes_in_one_way() -> None:
    unnamed = {str(n): f"LABEL_{n}" for n in range(3)}
    assert labels_of({"label2id": ANIMALS, "id2label": unnamed}) == ANIMALS
    assert labels_of({"architectures": ["LlamaForSequenceClassification"], "num_labels": "3"}) is not None
    with pytest.raises(RequestError, match="other numbers in `id2label` than in `label2id`"):
        labels_of({"label2id": ANIMALS, "id2label": {"0": "cat", "1": "dog", "2": "zebra"}})
    spec = Source.model_validate({"from": "rows", "as": "classified"})
    with pytest.raises(RequestError, match=r"numbers its classes \[0, 5\], which are not 0 to 1"):
        load_rows(spec, Path(), [{"text": "a", "label": "b"}], {"a": 0, "b": 5})
