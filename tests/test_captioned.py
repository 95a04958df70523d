"""Captioned pictures in every format: what is used, what is counted as left out, in which order."""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import json
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from examples.scenes.world import SceneWorld
from training import data
from training.captioned import Captioned, CaptionedBatches, Place
from training.preparation import Bound, Fetcher, LeftOut, Preparation, clean_caption

FORMATS = ("jsonl", "csv", "texts", "tar", "parquet")


@pytest.fixture(autouse=True)
def frozen_objects():
    """The library collects garbage after each file, which all of torch's objects make slow."""
    gc.freeze()


def encoded(size=(80, 72), colour=(200, 30, 30), kind="JPEG") -> bytes:
    memory = io.BytesIO()
    Image.new("RGB", size, colour).save(memory, kind)
    return memory.getvalue()


def noisy_jpeg() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    memory = io.BytesIO()
    Image.fromarray(pixels).save(memory, "JPEG")
    return memory.getvalue()


MIXED = [  # name, caption, file
    *((f"good{i}", f"picture number {i}", encoded(colour=(20 * i, 0, 0))) for i in range(4)),
    ("corrupt", "half a file", noisy_jpeg()[:2000]),
    ("text", "a file of text", b"<html>not found</html>"),
    ("gone", "a file that is not there", None),
    ("markup", "<b><br/></b>&nbsp;<img src='x'>", encoded()),
    ("tiny", "too few pixels", encoded((63, 200))),
    ("banner", "too wide", encoded((400, 70))),
]
COUNTS = {"used": 4, "broken": 2, "missing": 1, "caption": 1, "small": 1, "aspect": 1}


def write(kind: str, folder: Path, samples=MIXED) -> Path:
    """Samples of a name, a caption and a file, written as one of `FORMATS`."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("tar", "parquet"):
        (write_tars if kind == "tar" else write_parquet)(folder, samples)
        return folder
    for name, _, file in samples:
        if file is not None:
            (folder / f"{name}.jpg").write_bytes(file)
    rows = [{"file_name": f"{name}.jpg", "text": text} for name, text, _ in samples]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "texts":
        for name, text, _ in samples:
            (folder / f"{name}.txt").write_text(text)
    return folder


def write_tars(folder: Path, samples) -> None:
    half = len(samples) // 2
    write_tar(folder / "0.tar", samples[:half], as_json=False)
    write_tar(folder / "1.tar", samples[half:], as_json=True)


def write_parquet(folder: Path, samples) -> None:
    for i in range(2):
        some = samples[i::2]
        images = [{"bytes": file, "path": None} for _, _, file in some]
        table = pa.table({"text": [text for _, text, _ in some], "image": images})
        pyarrow.parquet.write_table(table, folder / f"{i}.parquet", row_group_size=3)


def write_tar(path: Path, samples, as_json: bool) -> None:
    with tarfile.open(path, "w") as tar:
        for name, text, file in samples:
            described = json.dumps({"caption": text}) if as_json else text
            parts = {"json" if as_json else "txt": described.encode(), "png": file}
            for extension, content in parts.items():
                if content is not None:
                    member = tarfile.TarInfo(f"{name}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def many(count: int):
    return [(f"{i:03}", f"picture number {i}", encoded()) for i in range(count)]


def one_epoch(source: Captioned):
    batches = CaptionedBatches(source, 0, 10_000, data.CPU, epochs=1)
    batch = batches.at(0)
    batches.close()
    return batch, batches


@pytest.mark.parametrize("kind", FORMATS)
def test_what_cannot_be_used_is_left_out_and_counted(kind, tmp_path):
    batch, batches = one_epoch(Captioned(write(kind, tmp_path / kind)))
    assert batches.counts == COUNTS
    assert sorted(batch.captions) == [f"picture number {i}" for i in range(4)]
    assert batches.report() == (
        "10 rows, 4 used; left out: 1 aspect, 2 broken, 1 caption, 1 missing, 1 small"
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_keeps_its_caption_and_its_pixels(kind, tmp_path):
    batch, _ = one_epoch(Captioned(write(kind, tmp_path / kind)))
    assert batch.pictures.shape == (4, 3, 64, 64)
    for caption, picture in zip(batch.captions, batch.pictures, strict=True):
        red = 20 * int(caption.rpartition(" ")[2])
        wanted = torch.tensor([red, 0.0, 0.0])[:, None, None] / 127.5 - 1
        torch.testing.assert_close(picture, wanted.expand(3, 64, 64), atol=0.03, rtol=0)


COYO = {
    "width": 80, "height": 72, "clip_similarity_vitb32": 0.3, "clip_similarity_vitl14": 0.25,
    "aesthetic_score_laion_v2": 5.0, "watermark_score": 0.1, "nsfw_score_opennsfw2": 0.1,
}  # fmt: skip
DROPPED = {
    "clip_similarity_vitb32>=0.28": {"clip_similarity_vitb32": 0.27},
    "clip_similarity_vitl14>=0.2": {"clip_similarity_vitl14": 0.19},
    "aesthetic_score_laion_v2>=4.5": {"aesthetic_score_laion_v2": None},
    "watermark_score<=0.5": {"watermark_score": 0.6},
    "nsfw_score_opennsfw2<=0.5": {"nsfw_score_opennsfw2": float("nan")},
    "small": {"width": 63},
    "aspect": {"width": 1000},
}


def coyo(folder: Path, url: str, changes) -> Path:
    """Parquet with COYO-700M's columns, a row for each of `changes`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"url": f"{url}/good/{i}", "text": f"row {i}"} | COYO | changed
            for i, changed in enumerate(changes)]  # fmt: skip
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "part-00000.parquet")
    return folder


class Web(BaseHTTPRequestHandler):
    """A web of good and bad pictures; counts how many are asked for at a time."""

    live = most = 0
    lock = threading.Lock()
    three = threading.Barrier(3)

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        with Web.lock:
            Web.live += 1
            Web.most = max(Web.most, Web.live)
        if kind == "three-good":  # answered once three are asked for
            Web.three.wait(60)
            time.sleep(0.02)  # for a fourth
        with Web.lock:  # before the answer, after which the client may ask for the next
            Web.live -= 1
        with contextlib.suppress(OSError):  # the client hung up, as it should
            self.answer(kind)

    def answer(self, kind: str) -> None:
        time.sleep({"silent": 1.5}.get(kind, 0))
        if kind in ("404", "500"):
            self.send_error(int(kind))
            return
        self.send_response(302 if kind == "moved" else 200)
        if kind == "moved":
            self.send_header("Location", "/good/elsewhere")
        if kind == "large-told":
            self.send_header("Content-Length", "1000000000")
        self.end_headers()
        for part in self.body(kind):
            self.wfile.write(part)

    def body(self, kind: str) -> Iterator[bytes]:
        if kind == "large":
            yield from [bytes(10_000)] * 100
        elif kind == "drip":
            for _ in range(600):
                yield b"x"
                time.sleep(0.1)
        elif kind in ("good", "three-good"):
            yield encoded()

    def log_message(self, *_) -> None:
        """Quiet."""


@contextlib.contextmanager
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    Web.live = Web.most = 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_rows_are_filtered_by_the_columns_of_coyo(tmp_path):
    with web() as url:
        source = Captioned(coyo(tmp_path / "coyo", url, [{}, *DROPPED.values(), {}]))
        batch, batches = one_epoch(source)
    assert batches.counts == {"used": 2} | dict.fromkeys(DROPPED, 1)
    assert sorted(batch.captions) == ["row 0", "row 8"]


@pytest.mark.parametrize("text", ["watermark_score<=0.7", "watermark_score >= 0.55"])
def test_a_bound_is_read_from_text_and_takes_both_sides(text):
    bound = Bound.parse(text)
    assert bound.holds({"watermark_score": 0.6})
    assert bound.holds({"watermark_score": "0.6"})
    assert bound.holds({})
    assert not bound.holds({"watermark_score": 0.8 if bound.sign == "<=" else 0.5})
    assert not bound.holds({"watermark_score": "n/a"})


def test_the_web_answers_in_every_way(tmp_path):
    limits = Preparation(timeout=0.5, deadline=1.0, max_bytes=100_000)
    ways = {
        "good": "used", "moved": "used", "404": "missing", "500": "unreachable",
        "silent": "unreachable", "drip": "unreachable", "large": "too large",
        "large-told": "too large",
    }  # fmt: skip
    with web() as url:
        rows = [{"url": f"{url}/{way}/x"} for way in ways]
        elsewhere = [{"url": "file:///etc/hostname"}, {"url": "http://127.0.0.1:1/refused"},
                     {"url": "http://[broken"}]  # fmt: skip
        started = time.monotonic()
        _, batches = one_epoch(Captioned(coyo(tmp_path / "c", url, rows + elsewhere), limits))
    assert batches.counts == Counter([*ways.values(), *["unreachable"] * 3])
    assert time.monotonic() - started < 20


def test_downloads_run_side_by_side_and_never_more_than_allowed(tmp_path):
    with web() as url:
        rows = [{"url": f"{url}/three-good/{i}"} for i in range(48)]
        one_epoch(Captioned(coyo(tmp_path / "c", url, rows), Preparation(fetchers=3)))
    assert Web.most == 3


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Fish &amp; Chips &lt;3", "Fish & Chips <3"),
        ("twice &amp;quot;quoted&amp;quot;", 'twice "quoted"'),
        ("<p>a <b>red</b><br>cat</p>", "a red cat"),
        ("see https://example.org/a?b=c for a cat www.example.org", "see for a cat"),
        ("a\tcat\x00 on\n\u200ba\u00a0mat ", "a cat on a mat"),
        ("cafe\u0301", "café"),
        ("one two three four five six", "one two three four"),
        ("x" * 40, "x" * 20),
        ("&nbsp;<br/>", ""),
    ],
)
def test_captions_are_cleaned(text, clean):
    assert clean_caption(text, 20) == clean


def striped(width=192, height=64) -> bytes:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.arange(width)
    memory = io.BytesIO()
    Image.fromarray(pixels).save(memory, "PNG")
    return memory.getvalue()


def test_crops_are_square_and_where_they_should_be():
    middle = Preparation().picture(striped(), np.random.default_rng(0))
    assert middle.shape == (64, 64, 3)
    assert middle[0, :, 0].tolist() == list(range(64, 128))
    anywhere = Preparation(crop="random")
    starts = {
        int(anywhere.picture(striped(), np.random.default_rng(i))[0, 0, 0]) for i in range(30)
    }
    assert len(starts) > 15
    assert min(starts) < 30
    assert max(starts) > 98
    halved = Preparation().picture(striped(192, 128), np.random.default_rng(0))
    assert halved[0, 1:-1, 0].tolist() == pytest.approx([32.5 + 2 * i for i in range(1, 63)], abs=1)


def test_what_is_transparent_becomes_white():
    memory = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(memory, "PNG")
    assert (Preparation().picture(memory.getvalue(), np.random.default_rng(0)) == 255).all()


def test_a_picture_of_too_many_pixels_is_not_decoded(monkeypatch):
    monkeypatch.setattr("training.preparation.MAX_PIXELS", 1000)
    with pytest.raises(LeftOut, match="too large"):
        Preparation().picture(encoded(), np.random.default_rng(0))


def test_a_picture_of_a_kind_that_pillow_does_not_decode_is_broken():
    dds = b"DDS " + bytes([124]) + bytes(123)
    with pytest.raises(LeftOut, match="broken"):
        Preparation().picture(dds, np.random.default_rng(0))


def test_a_file_of_too_many_bytes_is_not_read(tmp_path):
    (tmp_path / "x").write_bytes(bytes(2000))
    with pytest.raises(LeftOut, match="too large"):
        Fetcher(Preparation(max_bytes=1999)).read(tmp_path / "x")
    assert len(Fetcher(Preparation(max_bytes=2000)).read(tmp_path / "x")) == 2000


@pytest.mark.parametrize("kind", FORMATS)
def test_every_epoch_brings_every_row_once_in_an_order_of_its_own(kind, tmp_path):
    source = Captioned(write(kind, tmp_path / kind, many(40)), shuffle=8)
    texts = [row["text"] for row, _ in islice(source.rows(seed=3), 80)]
    first, second = texts[:40], texts[40:]
    assert sorted(first) == sorted(second) == sorted(text for _, text, _ in many(40))
    assert first != second
    assert first != sorted(first)
    assert texts == [row["text"] for row, _ in islice(source.rows(seed=3), 80)]
    assert first != [row["text"] for row, _ in islice(source.rows(seed=4), 40)]


@pytest.mark.parametrize("kind", FORMATS)
def test_reading_goes_on_from_any_place(kind, tmp_path):
    source = Captioned(write(kind, tmp_path / kind, many(20)), shuffle=6)
    texts, places = zip(
        *((row["text"], place) for row, place in islice(source.rows(seed=3), 50)), strict=True
    )
    for k in (0, 4, 5, 6, 18, 19, 20, 21, 33):
        kept = Place(**json.loads(json.dumps(vars(places[k]))))
        after = [row["text"] for row, _ in islice(source.rows(3, kept), 49 - k)]
        assert after == list(texts[k + 1 :]), k
        for m in range(k + 1, min(k + 9, 49)):  # stopped again, soon after it went on
            *_, (_, again) = islice(source.rows(3, kept), m - k)
            assert again.stream is not None
            after = [row["text"] for row, _ in islice(source.rows(3, again), 49 - m)]
            assert after == list(texts[m + 1 :]), (k, m)


def test_batches_go_on_with_their_pictures_and_counts(tmp_path):
    samples = [(f"{i}", f"picture number {i}", striped()) for i in range(5)] + MIXED[4:]
    folder = write("tar", tmp_path / "tar", samples)
    source = Captioned(folder, Preparation(crop="random"), shuffle=3)
    whole = source.batches(1, 3, data.CPU)
    wanted = [whole.at(step) for step in range(7)]
    begun = source.batches(1, 3, data.CPU)
    for step in range(4):
        begun.at(step)
    position = json.loads(json.dumps(begun.position))
    resumed = source.batches(1, 3, data.CPU)
    resumed.resume(position)
    for step in range(4, 7):
        batch = resumed.at(step)
        assert batch.captions == wanted[step].captions
        assert torch.equal(batch.pictures, wanted[step].pictures)
    assert resumed.counts == whole.counts
    for batches in (whole, begun, resumed):
        batches.close()


def test_captions_alone_fetch_no_picture(tmp_path):
    source = Captioned(coyo(tmp_path / "c", "http://127.0.0.1:1", [{}] * 5))
    batches = source.batches(0, 5, data.CPU, captions_only=True)
    assert sorted(batches.at(0).captions) == [f"row {i}" for i in range(5)]
    assert batches.counts == {"used": 5}
    batches.close()


def broken_tar(folder: Path) -> None:
    (folder / "x.tar").write_bytes(b"no tar at all" * 100)


def cut_tar(folder: Path) -> None:
    """Where a header would begin, as a download may end."""
    write_tar(folder / "x.tar", many(6), as_json=False)
    whole = (folder / "x.tar").read_bytes()
    with tarfile.open(folder / "x.tar") as tar:
        offset = tar.getmembers()[5].offset
    (folder / "x.tar").write_bytes(whole[:offset])


def tar_with_a_broken_header(folder: Path) -> None:
    write_tar(folder / "x.tar", many(6), as_json=False)
    with tarfile.open(folder / "x.tar") as tar:
        offset = tar.getmembers()[5].offset
    with (folder / "x.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"?" * 512)


def other_columns(folder: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"url": ["x"], "title": ["y"]}), folder / "x.parquet")


BAD = {
    "does not exist": lambda folder: folder.rmdir(),
    "is empty": lambda folder: None,
    "holds no .tar, no .parquet": lambda folder: (folder / "notes.md").write_text("x"),
    "has the columns url, title; needed are text or caption, and url or image": other_columns,
    "is not parquet": lambda folder: (folder / "x.parquet").write_bytes(b"x" * 100),
    "is not a whole tar": broken_tar,
    "is not a whole tar: it is cut": cut_tar,
    "is not a whole tar: it is cut or broken": tar_with_a_broken_header,
    "metadata.jsonl cannot be read": lambda f: (f / "metadata.jsonl").write_text("{'a': 1}"),
    "metadata.csv cannot be read: .*quote commas": lambda f: (f / "metadata.csv").write_text(
        "file_name,text\na.jpg,a red circle, on white\n"
    ),
}


def test_a_size_that_is_no_number_is_left_out_and_counted(tmp_path):
    said = ['"n/a"', "NaN", "Infinity", "[1]", "80"]
    row = '{"file_name": "a.jpg", "text": "a red circle", "height": 72, "width": '
    rows = (row + width + "}" for width in said)
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    (tmp_path / "a.jpg").write_bytes(encoded())
    _, batches = one_epoch(Captioned(tmp_path))
    assert batches.counts == {"used": 1, "size": 4}


def test_a_column_named_file_is_not_taken_for_the_picture(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        described = json.dumps({"caption": "a red circle", "file": "/etc/hostname"}).encode()
        for name, content in (("a.json", described), ("a.jpg", encoded())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    _, batches = one_epoch(Captioned(tmp_path))
    assert batches.counts == {"used": 1}


@pytest.mark.parametrize("message", BAD)
def test_bad_data_is_one_clear_sentence(message, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    BAD[message](folder)
    with pytest.raises(ValueError, match=f"--data: .*{message}") as caught:
        Captioned(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Preparation(side=60), "--side: 60 is not a multiple of 16 from 32"),
        (lambda: Preparation(crop="left"), "--crop: 'left' is not one of center, random"),
        (lambda: Preparation(min_caption=9, max_caption=8), "--min-caption: 9 is not from 1 to"),
        (lambda: Bound.parse("watermark<0.5"), "--keep: 'watermark<0.5' is not COLUMN>=NUMBER"),
    ],
)
def test_bad_preparation_names_its_flag(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bound_on_a_column_that_is_not_there_is_refused(tmp_path):
    folder = write("jsonl", tmp_path / "x")
    with pytest.raises(ValueError, match="--keep: 'stars>=3' names a column that the data has not"):
        Captioned(folder, Preparation(bounds=(Bound.parse("stars>=3"),)))


def test_data_of_which_nothing_can_be_used_ends_instead_of_going_round(tmp_path):
    source = Captioned(write("jsonl", tmp_path / "x", MIXED[4:]))
    with pytest.raises(ValueError, match=r"nothing in .* can be used: .*2 missing"):
        source.batches(0, 2, data.CPU).at(0)


def test_data_of_which_nothing_more_can_be_used_ends_too(tmp_path):
    pictures = iter([np.zeros((64, 64, 3), np.uint8)])

    class Once(Preparation):
        def picture(self, encoded, rng):
            if (one := next(pictures, None)) is None:
                raise LeftOut("broken")
            return one

    source = Captioned(write("jsonl", tmp_path / "x"), Once())
    with pytest.raises(ValueError, match=r"nothing in .* can be used: 20 rows, 1 used"):
        source.batches(0, 2, data.CPU).at(0)


def test_scenes_and_data_never_go_on_from_each_others_saves(tmp_path):
    source = Captioned(write("jsonl", tmp_path / "x"))
    with pytest.raises(ValueError, match="--data: the run's save was trained without --data"):
        source.batches(0, 2, data.CPU).resume(None)
    position = source.batches(0, 2, data.CPU).position
    for other in (replace(source, shuffle=3), replace(source, preparation=Preparation(side=32))):
        with pytest.raises(ValueError, match="--data: the run's save was trained on other data"):
            other.batches(0, 2, data.CPU).resume(position)
    patient = replace(source, preparation=Preparation(timeout=99))
    patient.batches(0, 2, data.CPU).resume(position)
    write("jsonl", tmp_path / "x" / "more")
    with pytest.raises(ValueError, match="--data: the run's save was trained on other data"):
        replace(source).batches(0, 2, data.CPU).resume(position)
    with pytest.raises(ValueError, match="--data: none is given"):
        SceneWorld().batches(0, 2, data.CPU).resume({"place": {}, "counts": {}})
