import gzip
import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import golddiff as gd
from conftest import outside
from golddiff.images.arrays import from_array, guess_layout

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 5, 7), dtype=np.uint8)
LABELS = np.array([0, 0, 1, 1, 1, 2])


def all_of(images):
    return np.concatenate([block for _, block in images.blocks(4)])


def png(array, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG", **options)
    return file.getvalue()


def write_idx(path, array):
    data = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_flat_folder(tmp_path):
    for i in (2, 0, 1):
        (tmp_path / f"{i}.png").write_bytes(png(COLOUR[i]))
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    images = gd.open_source(tmp_path)
    assert np.array_equal(all_of(images), COLOUR[:3].transpose(0, 3, 1, 2))
    assert list(images.ids) == ["0.png", "1.png", "2.png"]
    assert images.labels.tolist() == [-1, -1, -1]


def test_class_folders(tmp_path):
    for i, name in enumerate(["cat", "cat", "ant", "ant", "bee", "bee"]):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{i}.PNG").write_bytes(png(GREY[i]))
    images = gd.open_source(tmp_path)
    assert images.classes == ("ant", "bee", "cat")
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(all_of(images), GREY[[2, 3, 4, 5, 0, 1]][:, None])
    assert images.ids[0] == "ant/2.PNG"


def test_splits_in_folders(tmp_path):
    for split, i in (("train", 0), ("val", 1)):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.png").write_bytes(png(COLOUR[i]))
    assert np.array_equal(all_of(gd.open_source(tmp_path, split="val"))[0], COLOUR[1].transpose(2, 0, 1))
    with pytest.raises(gd.GolddiffError, match="no split 'test'"):
        gd.open_source(tmp_path, split="test")


def test_grey_only_if_all_are_grey(tmp_path):
    (tmp_path / "a.png").write_bytes(png(GREY[0]))
    assert gd.open_source(tmp_path).shape == (1, 5, 7)
    (tmp_path / "b.png").write_bytes(png(COLOUR[0]))
    images = gd.open_source(tmp_path)
    assert images.shape == (3, 5, 7)
    assert np.array_equal(all_of(images)[0], np.stack([GREY[0]] * 3))


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_idx(tmp_path, gz):
    write_idx(tmp_path / f"train-images-idx3-ubyte{gz}", GREY)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{gz}", LABELS.astype(np.uint8))
    for source in (tmp_path, tmp_path / f"train-images-idx3-ubyte{gz}"):
        images = gd.open_source(source)
        assert np.array_equal(all_of(images), GREY[:, None])
        assert images.labels.tolist() == LABELS.tolist()
    with pytest.raises(gd.GolddiffError, match="no split 'test'"):
        gd.open_source(tmp_path, split="test")


def write_parquet(path, pictures, labels, names=("a", "b", "c")):
    cells = [{"bytes": png(p), "path": None} for p in pictures]
    table = pa.table({"img": cells, "label": pa.array(labels, pa.int64())})
    info = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)


def test_parquet_in_shards(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", COLOUR[:4], LABELS[:4])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", COLOUR[4:], LABELS[4:])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", COLOUR[:1], LABELS[:1])
    images = gd.open_source(tmp_path)
    assert np.array_equal(all_of(images), COLOUR.transpose(0, 3, 1, 2))
    assert images.labels.tolist() == LABELS.tolist()
    assert images.classes == ("a", "b", "c")
    assert len(gd.open_source(tmp_path, split="test")) == 1
    assert len(gd.open_source(tmp_path / "test-00000-of-00001.parquet")) == 1


@pytest.mark.parametrize(("pictures", "labels"), [("arr_0", "arr_1"), ("images", "labels"), ("x", None)])
def test_npz(tmp_path, pictures, labels):
    arrays = {pictures: COLOUR} | ({labels: LABELS} if labels else {})
    np.savez(tmp_path / "a.npz", **arrays)
    images = gd.open_source(tmp_path / "a.npz")
    assert np.array_equal(all_of(images), COLOUR.transpose(0, 3, 1, 2))
    assert images.labels.tolist() == (LABELS.tolist() if labels else [-1] * 6)


def test_npy_of_floats_is_taken_as_it_is(tmp_path):
    data = (COLOUR / 127.5 - 1).astype(np.float32)
    np.save(tmp_path / "a.npy", data)
    bank = gd.Bank.build(tmp_path / "a.npy", tmp_path / "bank")
    assert np.abs(bank.images(slice(None)).numpy() - data.transpose(0, 3, 1, 2)).max() < 1e-6


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((9, 32, 32, 3), "NHWC"), ((9, 3, 32, 32), "NCHW"), ((9, 28, 28), "NHW"), ((9, 1, 28, 28), "NCHW"),
        ((9, 28, 28, 1), "NHWC"), ((9, 32, 32, 4), "NHWC"), ((9, 4, 4, 3), "NHWC"), ((9, 3, 8, 5), "NCHW"),
        ((9, 3, 32, 3), None), ((9, 3, 4, 4), None), ((9, 3, 3, 3), None), ((9, 28, 3), None), ((9, 2, 8, 8), None),
    ],
)  # fmt: skip
def test_layout_from_the_shape(shape, layout):
    if layout is None:
        with pytest.raises(gd.GolddiffError, match="--layout"):
            guess_layout(shape)
    else:
        assert guess_layout(shape) == layout


def test_layout_can_be_said():
    data = np.zeros((9, 3, 32, 3), dtype=np.uint8)
    assert from_array(data, layout="NCHW").shape == (3, 32, 3)
    assert from_array(data, layout="NHWC").shape == (3, 3, 32)


def test_size_cuts_the_square_and_resizes(tmp_path):
    wide = np.zeros((20, 40, 3), dtype=np.uint8)
    wide[:, 10:30] = 200
    (tmp_path / "a.png").write_bytes(png(wide))
    (tmp_path / "b.png").write_bytes(png(COLOUR[0]))
    images = gd.open_source(tmp_path, size=10)
    assert images.shape == (3, 10, 10)
    assert (all_of(images)[0] == 200).all()


def test_pictures_that_are_upright_only_by_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.png").write_bytes(png(COLOUR[0], exif=exif))
    images = gd.open_source(tmp_path)
    assert images.shape == (3, 7, 5)
    assert np.array_equal(all_of(images)[0], np.rot90(COLOUR[0], -1).transpose(2, 0, 1))


def write_zip(path, pictures, labels=None, names=None):
    with zipfile.ZipFile(path, "w") as archive:
        names = names or [f"00000/img{i:08d}.png" for i in range(len(pictures))]
        for name, picture in zip(names, pictures, strict=True):
            archive.writestr(name, png(picture))
        pairs = None if labels is None else [[n, int(v)] for n, v in zip(names, labels, strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": pairs}))


def test_zip_of_edm(tmp_path):
    write_zip(tmp_path / "a.zip", COLOUR, LABELS)
    images = gd.open_source(tmp_path / "a.zip")
    assert np.array_equal(all_of(images), COLOUR.transpose(0, 3, 1, 2))
    assert images.labels.tolist() == LABELS.tolist()
    write_zip(tmp_path / "b.zip", COLOUR)
    assert gd.open_source(tmp_path / "b.zip").labels.tolist() == [-1] * 6


def test_zip_with_class_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("dog/1.png", png(COLOUR[1]))
        archive.writestr("cat/0.png", png(COLOUR[0]))
        archive.writestr("__MACOSX/cat/._0.png", b"x")
    images = gd.open_source(tmp_path / "a.zip")
    assert images.classes == ("cat", "dog")
    assert np.array_equal(all_of(images), COLOUR[:2].transpose(0, 3, 1, 2))


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def test_webdataset_shards(tmp_path):
    for shard, rows in enumerate([range(4), range(4, 6)]):
        with tarfile.open(tmp_path / f"train-{shard:04d}.tar", "w") as archive:
            for i in rows:
                label = b"%d" % LABELS[i] if i % 2 else json.dumps({"label": int(LABELS[i])}).encode()
                add(archive, f"s{i:03d}.cls" if i % 2 else f"s{i:03d}.json", label)
                add(archive, f"s{i:03d}.png", png(COLOUR[i]))
    for source, rows in ((tmp_path, range(6)), (tmp_path / "train-0001.tar", range(4, 6))):
        images = gd.open_source(source)
        assert np.array_equal(all_of(images), COLOUR[list(rows)].transpose(0, 3, 1, 2))
        assert images.labels.tolist() == LABELS[list(rows)].tolist()


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar_binary(tmp_path, hundred):
    pictures = RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    names = ["train.bin"] if hundred else ["data_batch_1.bin", "data_batch_2.bin"]
    for name, rows in zip(names, np.array_split(np.arange(6), len(names)), strict=True):
        head = np.stack([7 + 0 * LABELS[rows], LABELS[rows]], 1) if hundred else LABELS[rows, None]
        data = np.concatenate([head.astype(np.uint8), pictures[rows].reshape(len(rows), -1)], axis=1)
        (tmp_path / name).write_bytes(data.tobytes())
    (tmp_path / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_text("ant\nbee\ncat\n")
    images = gd.open_source(tmp_path)
    assert np.array_equal(all_of(images), pictures)
    assert images.labels.tolist() == LABELS.tolist()
    assert images.classes == ("ant", "bee", "cat")
    with pytest.raises(gd.GolddiffError, match="no split 'test'"):
        gd.open_source(tmp_path, split="test")


@pytest.mark.parametrize("hundred", [False, True])
def test_pickled_cifar_is_refused_with_a_command_that_converts_it(tmp_path, hundred, monkeypatch):
    pictures = RNG.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    names = ["train"] if hundred else [f"data_batch_{i}" for i in range(1, 6)]
    for i, name in enumerate(names):
        rows = slice(None) if hundred else slice(i, i + 1)
        content = {
            "data": pictures[rows].reshape(-1, 3072),
            "fine_labels" if hundred else "labels": LABELS[:5][rows].tolist(),
        }
        (tmp_path / name).write_bytes(pickle.dumps(content))
    (tmp_path / ("meta" if hundred else "batches.meta")).write_bytes(b"x")
    with pytest.raises(gd.GolddiffError, match="pickles are never read") as caught:
        gd.open_source(tmp_path)
    command = str(caught.value).split("convert them there with: ")[1]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, check=True)
    images = gd.open_source(tmp_path / "cifar.npz")
    assert np.array_equal(all_of(images), pictures)
    assert images.labels.tolist() == LABELS[:5].tolist()


def test_hub_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    cells = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(p) for p in COLOUR], "label": LABELS.tolist()},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}),
    )
    cells.to_parquet(tmp_path / "set" / "train.parquet")
    images = gd.open_source(f"hf:{tmp_path / 'set'}")
    assert np.array_equal(all_of(images), COLOUR.transpose(0, 3, 1, 2))
    assert images.labels.tolist() == LABELS.tolist()
    assert images.classes == ("a", "b", "c")
    with pytest.raises(gd.GolddiffError, match="cannot be loaded"):
        gd.open_source(f"hf:{tmp_path / 'nothing'}")


class Pairs(torch.utils.data.Dataset):
    def __init__(self, pictures, labels=None):
        self.pictures, self.labels = pictures, labels

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return self.pictures[i] if self.labels is None else (self.pictures[i], int(self.labels[i]))


@pytest.mark.parametrize("kind", ["array", "tensor", "pil", "grey", "no labels", "float"])
def test_torch_datasets_and_tensors(kind):
    pictures = GREY if kind == "grey" else COLOUR
    expected = pictures[:, None] if kind == "grey" else pictures.transpose(0, 3, 1, 2)
    labels = None if kind == "no labels" else LABELS
    given = pictures
    if kind == "tensor":
        given = torch.from_numpy(expected)
    elif kind == "pil":
        given = [Image.fromarray(p) for p in pictures]
    elif kind == "float":
        given = expected = (expected / 127.5 - 1).astype(np.float32)
    bank = gd.Bank.build(Pairs(given, labels))
    assert np.array_equal(bank.pixels.numpy(), expected)
    assert bank.labels.tolist() == ([-1] * 6 if labels is None else LABELS.tolist())
    if kind == "tensor":
        assert gd.Bank.build(given, labels=torch.from_numpy(LABELS)).fingerprint == bank.fingerprint


def test_items_that_differ_are_refused():
    with pytest.raises(gd.GolddiffError, match="item 1 is"):
        gd.Bank.build(Pairs([COLOUR[0], COLOUR[1][:2]]))


def test_nested_folders(tmp_path):
    for i, name in enumerate(["ant/black/1.png", "ant/2.png", "bee/a/b/c/3.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(COLOUR[i]))
    images = gd.open_source(tmp_path)
    assert list(images.ids) == ["ant/2.png", "ant/black/1.png", "bee/a/b/c/3.png"]
    assert images.labels.tolist() == [0, 0, 1]


def test_flip_adds_mirror_images_after_all():
    images = gd.open_source(COLOUR, labels=LABELS, flip=True)
    expected = COLOUR.transpose(0, 3, 1, 2)
    assert np.array_equal(all_of(images), np.concatenate([expected, expected[..., ::-1]]))
    assert images.labels.tolist() == [*LABELS, *LABELS]
    assert images.ids[6] == "0|flip"
    assert len(gd.open_source(COLOUR, limit=2, flip=True)) == 4


def test_skip_broken_leaves_out_and_names_them(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(COLOUR[i]))
    (tmp_path / "2.png").write_bytes(png(COLOUR[2])[:-70])
    (tmp_path / "4.png").write_bytes(b"hello")
    with pytest.raises(gd.GolddiffError, match=r"2\.png cannot be read"):
        gd.open_source(tmp_path)
    images = gd.open_source(tmp_path, skip_broken=True)
    assert [Path(name).name for name in images.skipped] == ["2.png", "4.png"]
    assert list(images.ids) == ["0.png", "1.png", "3.png", "5.png"]
    assert np.array_equal(all_of(images), COLOUR[[0, 1, 3, 5]].transpose(0, 3, 1, 2))
    assert gd.Bank.build(tmp_path, skip_broken=True).source["skipped"] == list(images.skipped)


@pytest.mark.parametrize("kind", ["cmyk", "palette", "one bit", "opaque alpha", "webp", "bmp"])
def test_other_kinds_of_pictures_are_accepted(tmp_path, kind):
    picture = Image.fromarray(COLOUR[0])
    suffix = {"cmyk": "jpg", "webp": "webp", "bmp": "bmp"}.get(kind, "png")
    modes = {"cmyk": "CMYK", "palette": "P", "one bit": "1", "opaque alpha": "RGBA"}
    picture = picture.convert(modes[kind]) if kind in modes else picture
    options = {"lossless": True} if kind == "webp" else {}
    picture.save(tmp_path / f"a.{suffix}", **options)
    with Image.open(tmp_path / f"a.{suffix}") as stored:
        expected = np.asarray(stored.convert("L" if kind == "one bit" else "RGB"))
    pixels = all_of(gd.open_source(tmp_path))[0]
    assert np.array_equal(pixels, expected[None] if kind == "one bit" else expected.transpose(2, 0, 1))


def test_every_reader_gives_the_same_fingerprint(tmp_path):
    pictures = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    planes = pictures.transpose(0, 3, 1, 2)
    made = {name: tmp_path / name for name in ("folder", "tar", "cifar", "hub")}
    for path in made.values():
        path.mkdir()
    for i, label in enumerate(LABELS):
        (made["folder"] / f"class{label}").mkdir(exist_ok=True)
        (made["folder"] / f"class{label}" / f"{i}.png").write_bytes(png(pictures[i]))
    with tarfile.open(made["tar"] / "train.tar", "w") as archive:
        for i in range(6):
            add(archive, f"{i}.png", png(pictures[i]))
            add(archive, f"{i}.cls", b"%d" % LABELS[i])
    records = np.concatenate([LABELS[:, None].astype(np.uint8), planes.reshape(6, -1)], axis=1)
    (made["cifar"] / "data_batch_1.bin").write_bytes(records.tobytes())
    write_zip(tmp_path / "a.zip", pictures, LABELS)
    write_parquet(tmp_path / "a.parquet", pictures, LABELS)
    np.savez(tmp_path / "a.npz", arr_0=pictures, arr_1=LABELS)
    sources = [
        *(made[name] for name in ("folder", "tar", "cifar")),
        *(tmp_path / f"a.{e}" for e in ("zip", "parquet", "npz")),
    ]
    banks = [gd.Bank.build(source) for source in sources]
    banks += [gd.Bank.build(planes, labels=LABELS), gd.Bank.build(Pairs(pictures, LABELS))]
    assert {bank.fingerprint for bank in banks} == {banks[0].fingerprint}
    assert all(torch.equal(bank.keys, banks[0].keys) for bank in banks)


@pytest.mark.parametrize(
    ("name", "count", "shape"),
    [("mnist", 60000, (1, 28, 28)), ("fashion_mnist", 60000, (1, 28, 28)), ("cifar10", 50000, (3, 32, 32))],
)
def test_real_data(name, count, shape):
    outside("GOLDDIFF_DATA")
    images = gd.open_source(name)
    assert (len(images), images.shape) == (count, shape)
    assert sorted(set(images.labels.tolist())) == list(range(10))
    assert len(gd.open_source(name, split="test")) == 10000


def test_real_photographs_in_class_folders():
    outside("GOLDDIFF_DATA")
    images = gd.open_source("imagenet_sample", size=16)
    assert (len(images), images.shape, len(images.classes)) == (1000, (3, 16, 16), 1000)
    assert images.labels.tolist() == list(range(1000))
    assert images.read(3, 5).std() > 10


def test_built_in_digits_are_those_of_their_packages():
    from sklearn.datasets import load_digits

    images = gd.open_source("digits")
    assert np.abs(all_of(images).reshape(-1, 64) / 255 * 16 - load_digits().data).max() < 0.04
    assert images.labels.tolist() == load_digits().target.tolist()
    assert gd.open_source("mnist5k").shape == (1, 28, 28)


def broken(tmp_path, kind):
    """A source that must be refused."""
    if kind == "missing":
        return tmp_path / "nothing"
    if kind == "empty folder":
        return tmp_path
    if kind == "unknown name":
        return "digitz"
    (tmp_path / "a.png").write_bytes(png(COLOUR[0]))
    if kind == "truncated picture":
        (tmp_path / "b.png").write_bytes(png(COLOUR[1])[:-60])
    elif kind == "not a picture":
        (tmp_path / "b.png").write_bytes(b"hello")
    elif kind == "sizes differ":
        (tmp_path / "b.png").write_bytes(png(COLOUR[0][:4]))
    elif kind == "16 bits":
        (tmp_path / "b.png").write_bytes(png(GREY[0].astype(np.uint16)))
    elif kind in ("16 bits in colour", "16 bits in a ppm"):
        deep = np.repeat(GREY[0].astype(">u2")[..., None] * 257, 3, axis=2)
        if kind.endswith("ppm"):
            (tmp_path / "b.ppm").write_bytes(b"P6 7 5 65535\n" + deep.tobytes())
        else:
            lines = b"".join(b"\0" + row.tobytes() for row in deep)
            chunks = [
                (b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)),
                (b"IDAT", zlib.compress(lines)),
                (b"IEND", b""),
            ]
            body = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
            (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    elif kind == "animated":
        frames = [Image.fromarray(COLOUR[i]) for i in (0, 1)]
        frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    elif kind == "transparent":
        (tmp_path / "b.png").write_bytes(png(np.concatenate([COLOUR[0], COLOUR[1][..., :1]], axis=2)))
    elif kind == "beside class folders":
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "b.png").write_bytes(png(COLOUR[0]))
    else:
        return broken_file(tmp_path, kind)
    return tmp_path


def broken_file(tmp_path, kind):
    if kind == "lying idx":
        path = tmp_path / "train-images-idx3-ubyte"
        write_idx(path, GREY)
        data = bytearray(path.read_bytes())
        data[4:8] = struct.pack(">I", 2**31)
        path.write_bytes(data)
    elif kind == "cut gzip":
        path = tmp_path / "train-images-idx3-ubyte.gz"
        write_idx(path, GREY)
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "pickle in npy":
        path = tmp_path / "a.npy"
        np.save(path, np.array([{}, {}], dtype=object), allow_pickle=True)
    elif kind == "cut npz":
        path = tmp_path / "a.npz"
        np.savez(path, arr_0=COLOUR)
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "no pictures in npz":
        path = tmp_path / "a.npz"
        np.savez(path, weights=COLOUR)
    elif kind == "labels too few":
        path = tmp_path / "a.npz"
        np.savez(path, arr_0=COLOUR, arr_1=LABELS[:3])
    elif kind == "nan":
        path = tmp_path / "a.npy"
        np.save(path, np.where(COLOUR[3, 0, 0, 0] == COLOUR, np.nan, 0.5).astype(np.float32))
    elif kind == "int64":
        path = tmp_path / "a.npy"
        np.save(path, COLOUR.astype(np.int64))
    elif kind == "floats to 255":
        path = tmp_path / "a.npy"
        np.save(path, COLOUR.astype(np.float32))
    elif kind == "not parquet":
        path = tmp_path / "a.parquet"
        path.write_bytes(b"PAR1 no")
    elif kind == "parquet without pictures":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"n": [1, 2]}), path)
    elif kind == "cut zip":
        path = tmp_path / "a.zip"
        write_zip(path, COLOUR)
        path.write_bytes(path.read_bytes()[:-80])
    elif kind == "zip without pictures":
        path = tmp_path / "a.zip"
        write_zip(path, [])
    elif kind == "zip with a label missing":
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.png", png(COLOUR[0]))
            archive.writestr("dataset.json", json.dumps({"labels": [["b.png", 1]]}))
    elif kind == "cut tar":
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w") as archive:
            add(archive, "a.png", png(RNG.integers(0, 256, (90, 90, 3), dtype=np.uint8)))
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "tar with a bad label":
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w") as archive:
            add(archive, "a.png", png(COLOUR[0]))
            add(archive, "a.cls", b"dog")
    elif kind == "cut cifar":
        path = tmp_path / "data_batch_1.bin"
        path.write_bytes(b"x" * 5000)
    elif kind == "other file":
        path = tmp_path / "a.txt"
        path.write_text("x")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "nothing at .*check the path"), ("empty folder", "holds no pictures"),
        ("unknown name", "did you mean 'digits'"), ("truncated picture", "b.png cannot be read"),
        ("not a picture", "b.png cannot be read"), ("sizes differ", "a.png is 7x5, .*b.png is 7x4; give --size"),
        ("16 bits", "b.png has pixels of mode I"), ("16 bits in colour", "16 bits, not 8-bit"),
        ("16 bits in a ppm", "16 bits, not 8-bit"), ("animated", "b.gif is animated"),
        ("transparent", "b.png is partly transparent"), ("beside class folders", "beside class folders"),
        ("lying idx", "announces 2147483648 x 5 x 7 bytes and holds 210"), ("cut gzip", "cannot be read"),
        ("pickle in npy", "not a readable NumPy file"), ("cut npz", "not a readable NumPy file"),
        ("no pictures in npz", "has the arrays weights"), ("labels too few", "labels of shape"),
        ("nan", "row 3 has NaN"), ("int64", "convert them to uint8"), ("floats to 255", "from 0 to 255: bring them"),
        ("not parquet", "not a readable parquet file"), ("parquet without pictures", "0 columns of picture bytes"),
        ("other file", "not a kind of file"), ("cut zip", "not a readable zip"),
        ("zip without pictures", "no pictures"),
        ("zip with a label missing", "no label for a.png"), ("cut tar", "a.tar"), ("tar with a bad label", "no label"),
        ("cut cifar", "no multiple of 3073"),
    ],
)  # fmt: skip
def test_broken_sources_are_refused_with_the_fix(tmp_path, kind, message):
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(gd.GolddiffError, match=message) as caught:
        gd.Bank.build(broken(source, kind), tmp_path / "bank")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_known_names_without_their_files_say_how(monkeypatch):
    monkeypatch.delenv("GOLDDIFF_DATA", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(gd.GolddiffError, match="set GOLDDIFF_DATA"):
        gd.open_source("mnist")


def test_a_tar_of_a_folder(tmp_path):
    """As `tar cf a.tar -C folder .` makes it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "0.png").write_bytes(png(COLOUR[0]))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "folder", arcname=".")
    assert np.array_equal(all_of(gd.open_source(tmp_path / "a.tar"))[0], COLOUR[0].transpose(2, 0, 1))


@pytest.mark.parametrize("source", ["digits", "npz", "flat", "tar"])
def test_a_split_of_what_has_no_parts_is_refused(tmp_path, source):
    path = tmp_path / "data"
    path.mkdir()
    if source == "flat":
        (path / "a.png").write_bytes(png(COLOUR[0]))
    elif source == "tar":
        with tarfile.open(path / "train-0.tar", "w") as archive:
            add(archive, "a.png", png(COLOUR[0]))
    elif source == "npz":
        path = tmp_path / "a.npz"
        np.savez(path, arr_0=COLOUR)
    with pytest.raises(gd.GolddiffError, match="no split 'test'"):
        gd.open_source("digits" if source == "digits" else path, split="test")


@pytest.mark.parametrize(
    "labels",
    [
        {},
        3,
        "x",
        {"labels": {}},
        {"labels": [["a.png", 1.5]]},
        {"labels": [["a.png", True]]},
        {"labels": [["a.png", -7]]},
        {"labels": [["a.png", 1], ["a.png", 2]]},
    ],
)
def test_bad_labels_in_zips_are_refused(tmp_path, labels):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", png(COLOUR[0]))
        archive.writestr("dataset.json", json.dumps(labels))
    if labels == {}:
        assert gd.open_source(tmp_path / "a.zip").labels.tolist() == [-1]
        return
    with pytest.raises(gd.GolddiffError):
        gd.open_source(tmp_path / "a.zip")


def test_limit_is_reached_without_reading_the_rest(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(COLOUR[i]) if i < 2 else b"broken")
    assert len(gd.open_source(tmp_path, limit=2)) == 2
