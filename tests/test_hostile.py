"""Hostile and broken input: an error that says the fix; no crash, no hang, nothing written, nothing run, little memory.

`fuzz/readers.py` looks for such inputs led by coverage. Here are those made by hand or found there, and a short run of
random changes to valid files; `GOLDDIFF_FUZZ=60` changes them for so many seconds for each reader.
"""

import bz2
import gzip
import io
import json
import os
import pickle
import random
import signal
import socket
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import golddiff as gd
from golddiff import derived
from golddiff.cells import Cells
from golddiff.files import hash_edges
from golddiff.foreign import Npz
from golddiff.images.pages import largest_pages
from golddiff.jsons import sealed
from golddiff.locality import MaskRuns
from golddiff.prepare import Journal
from golddiff.recipe import comparison, parse_seeds, read_settings

sys.path.append(str(Path(__file__).parents[1] / "fuzz"))
import targets

SECONDS = float(os.environ.get("GOLDDIFF_FUZZ", "0"))
INPUTS = 150  # of each reader, without that
MIB = 2**20
MOST = 128 * MIB  # that a refusal may take


@pytest.fixture(autouse=True)
def no_hang():
    """A test that waits for ever fails."""

    def stop(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60 + 3 * int(SECONDS))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def resident(line):
    return next(int(text.split()[1]) * 1024 for text in Path("/proc/self/status").open() if text.startswith(line))


def grown(work):
    """How much memory work takes at its peak, bytes; 0 where the system does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = resident("VmRSS")
    except OSError:
        work()
        return 0
    work()
    return resident("VmHWM") - before


def read(path, **options):
    images = gd.open_source(path, **options)
    return [images.read(i, i + 1) for i in range(len(images))]


def refused(work, message, most=MOST):
    """It raises a `GolddiffError` of one line that says so, and takes little memory."""
    caught = []

    def attempt():
        with pytest.raises(gd.GolddiffError, match=message) as error:
            work()
        caught.append(str(error.value))

    assert grown(attempt) < most
    assert "\n" not in caught[0]


class Canary:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# ---- pictures ----------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, pixels=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def bmp_of(width, height, bits, packed):
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, packed, 0, 0, 0, 256 if bits == 8 else 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54 + 1024) + sizes + bytes(2000)


PNG = png_of(2, 2, bytes(14))
LARGE = {
    "png": png_of(8200, 8200),
    "gif": b"GIF89a" + struct.pack("<HHBBBBHHHHB", 65535, 65535, 0, 0, 0, 0x2C, 0, 0, 65535, 65535, 0)
    + b"\x02\x02\x44\x01\x00;",
    "bmp": bmp_of(9000, 9000, 24, 0),
    "runs.bmp": bmp_of(2500, 2500, 8, 1),  # under the bound of others, and decoded pixel by pixel
    "ppm": b"P6 60000 60000 255\n" + bytes(100),
    "tiff": b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 4)
    + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in ((256, 9000), (257, 9000), (262, 1), (273, 8)))
    + bytes(4),
}  # fmt: skip


@pytest.mark.parametrize("kind", LARGE)
def test_pictures_that_announce_too_many_pixels(tmp_path, kind):
    (tmp_path / f"a.{kind}").write_bytes(LARGE[kind])
    refused(lambda: read(tmp_path), "pixels.*: (make it smaller|remove it)")
    refused(lambda: read(tmp_path, size=8), "pixels.*: (make it smaller|remove it)")
    refused(lambda: read(tmp_path, size=8, skip_broken=True), "no pictures that can be read")


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/run\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "pictures").mkdir()
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\n%%EOF\n"
    (tmp_path / "pictures" / "a.png").write_bytes(postscript)
    refused(lambda: read(tmp_path / "pictures"), "of no known kind")
    assert not (tmp_path / "run").exists()


def test_many_large_pictures_are_read_only_where_they_fit(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png_of(2000, 2000, bytes(6001 * 2000)))
    monkeypatch.setattr("golddiff.memory.room", lambda: 50 * MIB)
    refused(lambda: read(tmp_path), "1 pictures of 2000 x 2000 needs .* with --size")


# ---- folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "gone", "itself"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    folder, path = tmp_path / "pictures", tmp_path / "pictures" / "b.png"
    folder.mkdir()
    (folder / "a.png").write_bytes(PNG)
    opened = socket.socket(socket.AF_UNIX)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        before = Path.cwd()
        os.chdir(folder)  # the names of sockets are short
        opened.bind(path.name)
        os.chdir(before)
    else:
        path.symlink_to({"device": "/dev/zero", "gone": "nowhere.png", "itself": "b.png"}[kind])
    refused(lambda: read(folder), "b.png is no file but")
    assert len(gd.open_source(folder, skip_broken=True)) == 1
    opened.close()


NAMES = ("a.npy", "a.npz", "a.zip", "a.tar", "a.parquet", "a.bin", "train-images-idx3-ubyte")


@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_is_no_source(tmp_path, name):
    (tmp_path / "pictures").mkdir()
    os.mkfifo(tmp_path / "pictures" / name)
    refused(lambda: read(tmp_path / "pictures" / name), "no file but a pipe")
    with pytest.raises(gd.GolddiffError):
        read(tmp_path / "pictures")


def test_a_pipe_beside_the_pictures(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(struct.pack(">HBB3I", 0, 8, 3, 1, 2, 2) + bytes(4))
    os.mkfifo(tmp_path / "train-labels-idx1-ubyte")
    refused(lambda: read(path), "no file but a pipe")


def test_links_that_lead_in_rings_or_to_ever_more_folders(tmp_path):
    ring = tmp_path / "ring"
    (ring / "a" / "b").mkdir(parents=True)
    (ring / "a" / "b" / "c").symlink_to(ring)
    (ring / "a" / "x.png").write_bytes(PNG)
    refused(lambda: read(ring), "links lead to twice: remove the link")
    doubling = tmp_path / "doubling"
    for i in range(40):  # 2^40 paths
        (doubling / str(i)).mkdir(parents=True)
        for name in "ab":
            (doubling / str(i) / name).symlink_to(f"../{i + 1}")
    refused(lambda: read(doubling / "0"), "links lead to twice: remove the link")


# ---- zips --------------------------------------------------------------------------------------------


def zip_of(path, entries, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def patched(path, *changes):
    """Overwrites numbers of the entry of a zip, in its own header and in the table of contents."""
    data = bytearray(path.read_bytes())
    for mark, place, value in changes:
        at = data.rindex(mark) + place
        data[at : at + len(value)] = value
    path.write_bytes(data)
    return path


def test_names_that_climb_out_are_names_only(tmp_path):
    names = ["../../evil.png", f"{tmp_path}/b/evil.png", "a\\..\\..\\evil.png"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(name, PNG)
        archive.writestr("dataset.json", json.dumps({"labels": None}))
    assert targets.attempt("zip", (tmp_path / "a.zip").read_bytes(), tmp_path / "b" / "c" / "in")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in names:
            add(archive, name, PNG)
    assert targets.attempt("tar", (tmp_path / "a.tar").read_bytes(), tmp_path / "b" / "c" / "in")
    bank = gd.Bank.build(tmp_path / "a.zip", tmp_path / "bank")
    assert sorted(bank.ids.tolist()) == sorted(name.encode() for name in names)
    assert not list(tmp_path.rglob("*evil*"))


def test_bombs_in_a_zip(tmp_path):
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = packed.compress(bytes(2**26)) + packed.flush()  # stands for an entry of any size: its bytes are not reached
    size = struct.pack("<I", 2**28 + 1)
    large = patched(zip_of(tmp_path / "large.zip", {"a.png": zeros}), (b"PK\1\2", 24, size))
    refused(lambda: read(large), "announces 268435457 bytes, more than a picture has")
    labels = patched(zip_of(tmp_path / "labels.zip", {"a.png": PNG, "dataset.json": zeros}), (b"PK\1\2", 24, size))
    refused(lambda: read(labels), "dataset.json announces 256.0 MiB, more than")
    odd = zip_of(tmp_path / "odd.zip", {"a.png": bytes(2**24)}, zipfile.ZIP_BZIP2)
    assert len(bz2.compress(bytes(2**20))) < 100  # a hundred bytes would become a MiB before any size is known
    refused(lambda: read(odd), "neither plain nor deflated")
    inflated = zip_of(tmp_path / "inflated.zip", {"a.png": bytes(2**26)})
    refused(lambda: read(inflated), "a.png cannot be read as a picture", 2**28)
    inner = zip_of(tmp_path / "inner.zip", {"a.png": inflated.read_bytes()})
    refused(lambda: read(inner), "a.png cannot be read as a picture")


def test_lies_in_a_zip(tmp_path):
    path = tmp_path / "a.zip"
    more = patched(zip_of(path, {"a.png": PNG}), (b"PK\1\2", 24, struct.pack("<I", 2**27)))
    refused(lambda: read(more), r"announces 128.0 MiB, more than \d+ bytes can be packed from")
    less = patched(zip_of(path, {"a.png": PNG}), (b"PK\1\2", 24, struct.pack("<I", 20)))
    refused(lambda: read(less), "a.png cannot be read")
    locked = patched(zip_of(path, {"a.png": PNG}), (b"PK\1\2", 8, b"\1\0"), (b"PK\3\4", 6, b"\1\0"))
    refused(lambda: read(locked), "neither plain nor deflated")
    table = patched(zip_of(path, {"a.png": PNG}), (b"PK\5\6", 12, struct.pack("<I", 2**32 - 16)))
    refused(lambda: read(table), "not a readable zip")


def test_a_table_of_contents_that_does_not_fit(tmp_path, monkeypatch):
    path = zip_of(tmp_path / "a.zip", {f"{i}.png": b"" for i in range(2000)})
    monkeypatch.setattr("golddiff.memory.room", lambda: MIB)
    refused(lambda: read(path), "table of contents of .*a.zip needs .* make several smaller zips")


LABELS = {
    "nested": (b"[" * 10**5, "nest too deeply"),
    "huge": (b'[["a.png", 1%s]]' % (b"0" * 400), "label of 1329 bits: give whole numbers from 0"),
    "more digits than are read": (b'[["a.png", 1%s]]' % (b"0" * 5000), "dataset.json cannot be read"),
    "beyond 64 bits": (b'[["a.png", 9223372036854775808]]', "label 9223372036854775808: give whole"),
    "beyond 31 bits": (b'[["a.png", 4294967296]]', "label 4294967296: give whole"),
    "negative": (b'[["a.png", -2]]', "label -2: give whole"),
    "infinite": (b'[["a.png", 1e999]]', "are not like"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_a_zip_and_a_tar(tmp_path, kind):
    text, message = LABELS[kind]
    refused(lambda: read(zip_of(tmp_path / "a.zip", {"a.png": PNG, "dataset.json": text})), message)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "a.png", PNG)
        add(archive, "a.cls", text.removeprefix(b'[["a.png", ').removesuffix(b"]]"))
    refused(lambda: read(tmp_path / "a.tar"), "label")


def test_one_long_name_among_many(monkeypatch):
    images = gd.open_source(np.zeros((1000, 4, 4), np.uint8), layout="NHW")
    images.ids[7] = "x" * 65535  # an array of names has room for the longest in each place
    monkeypatch.setattr("golddiff.memory.room", lambda: 20 * MIB)
    refused(lambda: gd.Bank.build(images), "names of pictures, one of them 65535 bytes long.* shorten the longest")


# ---- tars --------------------------------------------------------------------------------------------


def add(archive, name, data, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def header(name, size, kind=tarfile.REGTYPE):
    """A tar header with any size, negative ones too."""
    info = tarfile.TarInfo(name)
    info.type = kind
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else (size % 2**96 | 2**95).to_bytes(12, "big")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def padded(data):
    return data + bytes(-len(data) % 512)


def pax(text):
    return header("x", len(text), tarfile.XHDTYPE) + padded(text)


TARS = {
    "negative size": header("a.png", -1024) + padded(PNG),
    "size past the end": header("a.png", 2**27) + padded(PNG),
    "size of exabytes": header("a.png", 2**70) + padded(PNG),
    "negative size in an extra header": pax(b"14 size=-1024\n") + header("a.png", 0) + padded(PNG),
    "negative extra header": header("x", -512, tarfile.XHDTYPE) + header("a.png", len(PNG)) + padded(PNG),
    "long extra header": pax(b"1" * 2**18) + header("a.png", len(PNG)) + padded(PNG),  # squared in tarfile's pattern
    "long name": header("x", 2**20, tarfile.GNUTYPE_LONGNAME) + bytes(2**20) + header("a.png", 0),
    "names of names": (header("x", 5, tarfile.GNUTYPE_LONGNAME) + padded(b"a.png")) * 5000 + header("a.png", 0),
    "holes": pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.realsize=9\n")
    + header("a.png", 512) + padded(b"99999999999\n"),
    "no end of holes": header("a.png", 512, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + bytes(29),
}  # fmt: skip


@pytest.mark.parametrize("kind", TARS)
def test_lies_in_a_tar(tmp_path, kind):
    path = tmp_path / "a.tar"
    path.write_bytes(TARS[kind])
    refused(lambda: read(path), "a.tar (is not a readable, uncompressed tar|holds no pictures).*")


def test_links_and_devices_in_a_tar_are_no_pictures(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        ):
            add(archive, f"{i}.png", b"", type=kind, linkname="/etc/passwd")
    refused(lambda: read(tmp_path / "a.tar"), "holds no pictures")


# ---- parquet -----------------------------------------------------------------------------------------


def test_few_bytes_of_parquet_that_stand_for_many_pictures(tmp_path):
    picture = png_of(400, 400, bytes(1201 * 400)) + np.random.default_rng(0).bytes(
        MIB // 2
    )  # what follows the end is left
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema([("image", pa.binary())])) as writer:
        writer.write_table(pa.table({"image": pa.array([picture] * 800, pa.binary())}), row_group_size=800)
    assert path.stat().st_size < 2 * MIB
    taken = []

    def some():
        images = gd.open_source(path, limit=100)
        taken.extend(images.read(90, 100))

    assert grown(some) < 2**27  # all of them are 400 MiB
    assert len(taken) == 10


def test_lies_in_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.nulls(10**6, pa.binary())}), path)
    refused(lambda: read(path), r"announces 1000000 rows, 1000000 in its groups, and has \d+ bytes")
    pq.write_table(pa.table({"image": [PNG], "label": pa.array([2**64 - 1], pa.uint64())}), path)
    refused(lambda: read(path), "damaged|label")
    pq.write_table(pa.table({"image": [PNG], "label": pa.array([2**40])}), path)
    refused(lambda: read(path), "label 1099511627776: give whole numbers")
    pq.write_table(pa.table({"image": [PNG.hex()], "label": [1]}), path)
    refused(lambda: read(path), "0 columns of picture bytes")
    pq.write_table(pa.table({"image": [{"bytes": PNG.hex()}]}), path)
    refused(lambda: read(path), "no picture bytes")
    pq.write_table(pa.table({"image": [PNG], "label": pa.array([None], pa.uint8())}), path)
    assert gd.open_source(path).labels.tolist() == [-1]


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_sizes_of_pages_are_those_that_were_written(tmp_path, codec, version, dictionary):
    cells = [{"bytes": bytes([row]) * 3000, "path": None} for row in range(200)]  # 3,000: longer than most headers
    table = pa.table({"image": cells, "label": list(range(200))})
    path = tmp_path / "a.parquet"
    pq.write_table(
        table, path, row_group_size=100, compression=codec, data_page_version=version, use_dictionary=dictionary
    )
    values, keys = largest_pages(path, {"image"})
    stored = 100 * (4 + 3000)  # of one group: each value after its length
    if dictionary:
        assert keys == stored
        assert values < 1000
    else:
        assert keys == 0
        assert stored < values < stored + 100
    assert sum(largest_pages(path, {"label"})) < 2000


def parquet_bomb(path, size, dictionary):
    value = pa.array([bytes(size)], pa.binary())
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 16, pa.int32()), value) if dictionary else value
    options = {"use_dictionary": dictionary, "dictionary_pagesize_limit": 2**31 - 1}
    table = pa.table({"image": column})
    pq.write_table(table, path, compression="zstd", write_statistics=False, store_schema=False, **options)
    assert path.stat().st_size < size / 10_000


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_page_of_parquet_that_inflates_to_much(tmp_path, monkeypatch, dictionary):
    parquet_bomb(tmp_path / "a.parquet", 128 * MIB, dictionary)
    monkeypatch.setattr("golddiff.memory.room", lambda: 1000 * MIB)  # Arrow would take 4 or 20 times the page
    refused(lambda: read(tmp_path / "a.parquet"), r"whose pages inflate to 128\.0 MiB, needs .* of memory")


@pytest.mark.parametrize("dictionary", [True, False])
def test_what_pages_of_parquet_take_is_not_underestimated(tmp_path, monkeypatch, dictionary):
    parquet_bomb(tmp_path / "a.parquet", 32 * MIB, dictionary)
    needed = []
    monkeypatch.setattr("golddiff.images.parquet.require", lambda size, *_: needed.append(size))

    def cell():
        with suppress(gd.GolddiffError):  # 32 MiB of zeros are no picture
            read(tmp_path / "a.parquet")

    assert grown(cell) < max(needed) + 32 * MIB  # what Arrow takes once


def test_pages_of_parquet_that_are_none(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [PNG]}), path, use_dictionary=False)
    whole = path.read_bytes()
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    for header in (
        b"\xff" * 12,  # a kind of value that there is not
        b"\x15" + b"\xff" * 11,  # a number without an end
        b"\x19\xfc" + b"\xff\xff\xff\xff\x0f" * 2,  # a list of 2^32 structures
        b"\x1c" * 12 + b"\x1c" * 12,  # structures of structures
        b"\x15\x00\x15\x01\x15\x01\x00",  # sizes of -1
        b"\x00",  # no size
    ):
        path.write_bytes(whole[:start] + header + whole[start + len(header) :])
        refused(lambda: read(path), "is damaged .*: fetch it again")


def test_no_pickle_in_the_schema_of_parquet_is_run(tmp_path):
    kind = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Canary(tmp_path / "run")),
    }
    schema = pa.schema([pa.field("image", pa.binary(), metadata=kind)])
    pq.write_table(pa.table({"image": [PNG]}, schema=schema), tmp_path / "a.parquet")
    with_or_without = gd.open_source(tmp_path / "a.parquet")
    assert len(with_or_without) == 1
    assert not (tmp_path / "run").exists()


# ---- arrays ------------------------------------------------------------------------------------------


def idx(*sizes, kind=8):
    return struct.pack(">HBB", 0, kind, len(sizes)) + struct.pack(f">{len(sizes)}I", *sizes)


IDX = {
    "more than there is": (idx(2**32 - 1, 2**32 - 1, 2**32 - 1), "announces .* and holds 0"),
    "no pixels": (idx(2**28 + 2**20, 0, 2051), "at least one pixel"),
    "255 dimensions": (idx(*[1] * 255), "255 dimensions, not pictures"),
    "floats": (idx(1, 2, 2, kind=0x0D) + bytes(16), "not an IDX file of bytes"),
    "packed: more than there is": (gzip.compress(idx(1000, 1000, 4000)), "more than its .* can be packed from"),
    "packed: a bomb": (gzip.compress(idx(8, 28, 28) + bytes(2**28)), "announces 8 x 28 x 28 bytes and holds more than"),
    "packed: cut": (gzip.compress(idx(8, 28, 28) + bytes(8 * 28 * 28))[:-12], "cannot be read"),
}


@pytest.mark.parametrize("kind", IDX)
def test_idx_headers_that_lie(tmp_path, kind):
    data, message = IDX[kind]
    (tmp_path / "train-images-idx3-ubyte").write_bytes(data)
    refused(lambda: read(tmp_path), message)


def npy(shape, descr="'|u1'", data=b"", order=False):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + data


NPY = {
    "more than there is": (npy("(1000000000000, 4, 4)"), "not a readable NumPy file"),
    "more than 64 bits": (npy(f"({2**40}, {2**40}, 4)"), "not a readable NumPy file"),
    "negative": (npy("(-4, 4, 4)", data=bytes(64)), "not a readable NumPy file|--layout"),
    "no axes": (npy("()", data=b"1"), "shape"),
    "no axes of floats": (npy("()", "'<f4'", bytes(4)), "shape"),
    "no pixels": (npy("(1000000000, 0, 7)"), "at least one pixel|not a readable"),
    "no pictures": (npy("(0, 5, 5)", "'<f4'"), "at least one|not a readable"),
    "fields": (npy("(1, 5, 5)", "[('a', '|u1')]", bytes(25)), "convert them to uint8"),
    "text": (npy("(1, 5, 5)", "'<U9'", bytes(900)), "convert them to uint8"),
    "too deep": (npy("(" * 5000 + ")" * 5000), "not a readable NumPy file"),
    "code": (npy("__import__('os').mkdir('run')"), "not a readable NumPy file"),
    "header of 4 GiB": (b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1), "not a readable NumPy file"),
}


@pytest.mark.parametrize("kind", NPY)
def test_npy_headers_that_lie(tmp_path, kind, monkeypatch):
    data, message = NPY[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.npy").write_bytes(data)
    refused(lambda: read(tmp_path / "a.npy"), message)
    packed = zip_of(tmp_path / "a.npz", {"images.npy": data, "labels.npy": npy("(1,)", "'<i8'", bytes(8))})
    refused(lambda: read(packed), "save it again|at least one|shape|convert them")
    assert not (tmp_path / "run").exists()


def test_objects_are_not_made(tmp_path):
    objects = np.array([Canary(tmp_path / "run")] * 2, dtype=object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "a.npz", images=objects)
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 5, 5), np.uint8), labels=objects)
    (tmp_path / "c.npy").write_bytes(pickle.dumps(Canary(tmp_path / "run")))
    zip_of(tmp_path / "c.npz", {"images": pickle.dumps(Canary(tmp_path / "run"))})
    refused(lambda: read(tmp_path / "a.npy"), "not a readable NumPy file of plain numbers")
    refused(lambda: read(tmp_path / "a.npz"), "images is damaged or holds objects")
    refused(lambda: read(tmp_path / "b.npz"), "labels is damaged or holds objects")
    refused(lambda: read(tmp_path / "c.npy"), "not a readable NumPy file")
    refused(lambda: read(tmp_path / "c.npz"), "images is damaged")
    assert not (tmp_path / "run").exists()
    with pytest.raises(gd.GolddiffError, match="holds objects"):
        Npz(tmp_path / "a.npz")["images"]


def test_bombs_in_an_npz(tmp_path, monkeypatch):
    bomb = zip_of(tmp_path / "a.npz", {"images.npy": npy(str((2**18, 16, 16)), data=bytes(2**26))})
    assert bomb.stat().st_size < MIB
    monkeypatch.setattr("golddiff.memory.room", lambda: 50 * MIB)
    refused(lambda: read(bomb), "images needs 64.0 MiB of memory and 50.0 MiB is left")
    raw = zip_of(tmp_path / "b.npz", {"images": bytes(2**26)})  # what is no array, numpy unpacks as bytes
    refused(lambda: read(raw), "images is damaged", 32 * MIB)


def test_labels_beyond_their_range():
    pixels = np.zeros((2, 5, 5), np.uint8)
    for labels in (np.array([0, 2**31]), np.array([0, 2**63], np.uint64), [0, 2**70], [0, -(2**70)]):
        refused(lambda labels=labels: gd.open_source(pixels, labels=labels), "give whole numbers from 0 to 2147483647")


def test_what_does_not_fit_into_memory_is_said(tmp_path, monkeypatch):
    def fails(*_):
        raise MemoryError

    np.save(tmp_path / "a.npy", np.zeros((2, 5, 5), np.uint8))
    monkeypatch.setattr("golddiff.images.source.read_numpy", fails)
    refused(lambda: read(tmp_path / "a.npy"), "does not fit into memory: take fewer pictures")


# ---- recipes, calibrations, banks --------------------------------------------------------------------


def settings_in(path, text):
    path.write_bytes(text)
    return read_settings(path)


RECIPES = {
    "code": (b"steps: !!python/object/apply:os.mkdir ['run']", "neither YAML nor JSON"),
    "a name of code": (b"method: !!python/name:os.system", "neither YAML nor JSON"),
    "laughs": (b"options: &a [x, x]\nlabels: [*a, *a]\n", "aliases are not read here"),
    "nested": (b"[" * 50_000, "neither YAML nor JSON"),
    "nested JSON": (b'{"options":' * 50_000, "neither YAML nor JSON|more than"),
    "sixties": (b"steps: " + b":".join([b"59"] * 10_000), "63 bits"),
    "long": (b"# " + b"x" * 2**17, "more than 64.0 KiB of text: shorten it"),
    "many bits": (b"steps: 0x" + b"f" * 9000, "63 bits"),
    "a date": (b"steps: 2001-01-01", "a recipe holds a date"),
    "bytes": (b"method: !!binary aGVsbG8=", "a recipe holds a bytes"),
    "a set": (b"options: !!set {a, b}", "a recipe holds a set"),
    "no text": (b"\xff\xfe\0", "cannot be read"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes_that_are_none(tmp_path, kind, monkeypatch):
    text, message = RECIPES[kind]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    refused(lambda: settings_in(path, text), message)
    refused(lambda: comparison(str(path)), message)
    assert not (tmp_path / "run").exists()


def test_a_pipe_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "recipe.yaml")
    refused(lambda: read_settings(tmp_path / "recipe.yaml"), "no file but a pipe")


def test_more_seeds_than_there_may_be():
    ranges = ",".join(f"{i}-{i + 9_999_998}" for i in range(0, 10**9, 10**7))
    refused(lambda: parse_seeds(ranges), "too many", 2**30)


@pytest.mark.parametrize(
    "windows",
    [
        "[" * 10**5,
        "[[1e999999, 3.5]]",
        f"[[{10**400}, 3]]",
        f"[[1, {2**40 + 1}]]",
        "[[1, -3]]",
        "{}",
        "[[NaN, 3]]",
        '"x"',
    ],
)
def test_calibrations_that_are_none(tmp_path, toy, windows):
    path = tmp_path / "c.json"
    path.write_text(f'{{"windows": {windows}}}')
    refused(lambda: gd.denoiser("ls", toy, window=str(path)), "make a calibration|window is")


BANK = {
    "pixels": np.zeros((0, 3, 4, 5), np.uint8), "labels": np.zeros(7, np.int64), "ids": np.zeros(60, np.int64),
    "keys": np.zeros((60, 1), np.int64), "centre": np.zeros(61, np.float32), "norms": np.zeros(60, np.float32),
    "proxy": np.zeros((60, 1), np.float32),
}  # fmt: skip


@pytest.mark.parametrize("name", BANK)
def test_arrays_of_a_bank_that_do_not_belong_together(tmp_path, toy, name):
    """Also where bank.json says that they should be so: compiled loops would read beyond them."""
    folder = bank_folder(tmp_path, toy)
    np.save(folder / f"{name}.npy", BANK[name])
    meta = json.loads((folder / "bank.json").read_text())
    meta["arrays"][name] = f"{BANK[name].dtype.str} {'x'.join(map(str, BANK[name].shape))}"
    meta["edges"][name] = hash_edges(folder / f"{name}.npy")
    (folder / "bank.json").write_text(json.dumps(sealed(meta)))
    refused(lambda: gd.Bank.open(folder), f"{name}.npy does not fit the pixels: build the bank again")


def bank_folder(tmp_path, bank):
    gd.Bank.build(bank.pixels.numpy(), tmp_path / "bank", labels=bank.labels.numpy(), layout="NCHW")
    return tmp_path / "bank"


def test_files_of_a_bank_that_are_none(tmp_path, toy):
    folder = bank_folder(tmp_path, toy)
    plain = (folder / "bank.json").read_text()
    nameless = json.dumps(sealed({**json.loads(plain), "classes": [[1]]}))
    for text in ("[" * 10**5, "[]", "{}", nameless, '{"format": 1}'):
        (folder / "bank.json").write_text(text)
        refused(lambda: gd.Bank.open(folder), "bank.json .*: build the bank again")
    (folder / "bank.json").write_text(plain)
    keys = (folder / "keys.npy").read_bytes()
    packed = zip_of(tmp_path / "keys.zip", {"keys.npy": keys}).read_bytes()
    for data in (packed, pickle.dumps(Canary(tmp_path / "run")), b"", keys[:100]):
        (folder / "keys.npy").write_bytes(data)
        refused(lambda: gd.Bank.open(folder), "keys.npy cannot be opened")
    assert not (tmp_path / "run").exists()


def test_what_is_derived_from_a_bank_is_checked_too(tmp_path, toy):
    """Its hash is no secret; what it leads compiled loops to must be there."""
    folder = bank_folder(tmp_path, toy)
    x, noise = toy.images(slice(0, 1)), gd.Noise(0.7, 0.7)
    expected = gd.denoiser("golddiff", gd.Bank.open(folder))(x, noise).mean
    levels = list((folder / "derived").glob("level-*.safetensors"))
    assert levels
    tensors = load_file(levels[0])
    for name, value in (("inputs", 2**30), ("inputs", -1), ("counts", 2**40), ("tiling", 99)):
        wrong = {**tensors, name: torch.full_like(tensors[name], value)}
        stamp = {"fingerprint": toy.fingerprint, "format": str(derived.FORMAT), "hash": derived._hashed(wrong)}
        save_file(wrong, levels[0], metadata=stamp)
        refused(
            lambda: gd.denoiser("golddiff", gd.Bank.open(folder))(x, noise), "does not fit its bank: remove it", 2**29
        )
    levels[0].unlink()
    assert torch.equal(gd.denoiser("golddiff", gd.Bank.open(folder))(x, noise).mean, expected)


def test_runs_of_masks_and_cells_lead_to_what_is_there():
    pytest.importorskip("numba")
    mask = torch.rand(1500, 1500, generator=torch.Generator().manual_seed(0)) < 0.3
    runs = MaskRuns.of(mask, torch.arange(40))
    assert runs.within(1500)
    changes = {"inputs": 1500, "outputs": -1, "blocks": 1437, "start": len(runs.ends) + 2, "ends": 1025}
    for name, value in changes.items():
        array = getattr(runs, name).copy()
        array.flat[-1] = value
        assert not replace(runs, **{name: array}).within(1500)
    assert not replace(runs, start=runs.start[:, :-1]).within(1500)
    inputs = torch.arange(6).view(2, 3)
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    kept = Cells.find(lambda chosen: rows[chosen], torch.arange(50), inputs, torch.ones(2, 3))
    assert Cells.fit(kept, 50, inputs)
    for name, value in {"begins": 51, "rows": 50, "cells": -1}.items():
        wrong = kept[name].clone()
        wrong.view(-1)[-1] = value
        assert not Cells.fit({**kept, name: wrong}, 50, inputs)
    assert not Cells.fit(kept, 49, inputs)


def test_a_journal_of_another_build(tmp_path):
    for pixels, total in ((-1, np.zeros(4)), (11, np.zeros(4)), (1, np.zeros(5)), (1, np.zeros(4, np.int64))):
        np.savez(tmp_path / "journal.npz", pixels=pixels, proxies=0, total=total)
        refused(lambda: Journal(tmp_path / "journal.npz", 4, 10), "journal.npz is damaged .* remove the folder")


# ---- random changes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bank_of_targets(tmp_path_factory):
    targets.prepare_bank(tmp_path_factory.mktemp("hostile") / "bank")


def changed(data, rng):
    """A copy of bytes with some of them changed, removed, repeated, or made the largest of numbers."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.choice((b"\xff", b"\0", b"\x7f")) * min(length, 8)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif rng.randrange(8) == 0:
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize("target", targets.TARGETS)
def test_random_changes_of_valid_files(bank_of_targets, tmp_path, target):
    folder, rng = tmp_path / "work" / "in", random.Random(target)  # noqa: S311
    valid = targets.seeds(target)
    with targets.without_checksums():
        accepted = [targets.attempt(target, data, folder) for data in valid]
        assert any(accepted)
        ends, done = time.monotonic() + SECONDS, 0
        while done < INPUTS or time.monotonic() < ends:
            targets.attempt(target, changed(rng.choice(valid), rng), folder)
            done += 1


def test_what_the_watch_notices(tmp_path, monkeypatch):
    """The check itself: a reader that writes elsewhere, runs something, or fails in another way is found."""

    def writes(path):
        (path.parent.parent / "x").write_text("x")

    def runs(path):
        pickle.loads(pickle.dumps(Canary(path.parent / "run")))  # noqa: S301

    def fails(path):
        raise gd.GolddiffError("x") from None if path.suffix else KeyError

    for use, message in ((writes, "open .*x"), (runs, "pickle.find_class")):
        monkeypatch.setitem(targets.TARGETS, "npy", targets.Target("a.npy", list, use))
        with pytest.raises(targets.Finding, match=message):
            targets.attempt("npy", b"x", tmp_path / "a" / "in")
    monkeypatch.setitem(targets.TARGETS, "npy", targets.Target("a.npy", list, fails))
    assert not targets.attempt("npy", b"x", tmp_path / "a" / "in")


# ---- networks ----------------------------------------------------------------------------------------


def network():
    diffusers = pytest.importorskip("diffusers")
    shape = {"in_channels": 3, "out_channels": 3, "sample_size": (4, 5), "block_out_channels": (32,)}
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return diffusers.UNet2DModel(**shape, **kinds, layers_per_block=1)


LIES = {
    "layers_per_block": (10**9, 64, 2, -1, 0, 1.5, "1", None, [1], True),
    "block_out_channels": ([2**40], [2**19], [64], [32, 32], [32] * 10**5, [], [0], 32, "3"),
    "down_block_types": (["DownBlock2D"] * 10**5, ["os.system"], ["AttnDownBlock2D"], []),
    "in_channels": (2**40, 2**20, -3, 0, "3"),
    "norm_num_groups": (10**9, 0, -1, 7),
    "attention_head_dim": (0, 10**9),
    "sample_size": (2**40, -1, "4", [4], [4, 5, 6]),
    "_class_name": ("AutoencoderKL", "os.system", None, ["UNet2DModel"]),
    "time_embedding_type": ("fourier", "x"),
    "num_class_embeds": (10**12, 10**6),
    "num_train_timesteps": (10**12,),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", LIES)
def test_settings_of_a_network_that_lie(tmp_path, toy, key):
    network().save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    gd.oracle(tmp_path, toy, schedule="ddpm")
    for lie in LIES[key]:
        (tmp_path / "config.json").write_text(json.dumps(stated | {key: lie}))

        def attempt():
            with suppress(gd.GolddiffError):
                x, noise = torch.zeros(1, *toy.shape), gd.Noise(1.0, 1.0)
                made = gd.oracle(tmp_path, toy, schedule="ddpm")(x, noise).mean
                (tmp_path / "config.json").write_text(json.dumps(stated))
                assert torch.equal(made, gd.oracle(tmp_path, toy, schedule="ddpm")(x, noise).mean)  # it does not matter

        assert grown(attempt) < 2**28, lie


def test_weights_that_are_missing_are_not_made_up(tmp_path, toy):
    network().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["other"] = weights.pop("conv_in.weight")
    save_file(weights, file, metadata={"format": "pt"})
    refused(lambda: gd.oracle(tmp_path, toy, schedule="ddpm"), "its files lack conv_in.weight", 2**29)


@pytest.mark.parametrize(
    "lie", [{"num_train_timesteps": 10**12}, {"beta_schedule": "os.system"}, {"trained_betas": []}, []]
)
def test_settings_of_a_scheduler_that_lie(tmp_path, toy, lie):
    network().save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(lie))
    refused(lambda: gd.oracle(tmp_path, toy), "holds no network that can be read|alphas_cumprod", 2**28)


def test_pickled_weights_of_a_network_run_nothing(tmp_path, toy):
    network().save_config(tmp_path)
    torch.save({"weights": Canary(tmp_path / "run")}, tmp_path / "diffusion_pytorch_model.bin")
    refused(lambda: gd.oracle(tmp_path, toy, schedule="ddpm"), "holds no network that can be read", 2**29)
    assert not (tmp_path / "run").exists()
