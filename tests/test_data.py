import io
import json
import os
import pickle
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from conftest import toy_unet
from PIL import Image
from test_training import _stopped_at, finish, fresh_accelerator, launch, options, same, settings  # noqa: F401
from torch.utils.data import DataLoader, default_collate

from palette_diffusers import PaletteScheduler, data
from palette_diffusers.data import PaletteDataset, PaletteStream
from palette_diffusers.report import read_log
from palette_diffusers.sources import Unusable, decode_photos, load_images, load_sources, split_sources, undecoded
from palette_diffusers.tasks import Given, fill_holes, network_condition
from palette_diffusers.training import TrainSettings, last_state, sample_losses, train

ROWS = 12


def picture(number: int) -> Image.Image:
    """A photograph that tells its number by its level."""
    return Image.fromarray(np.full((40, 48, 3), 20 * number, np.uint8))


def file_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    """ROWS pictures in four WebDataset shards."""
    (tmp_path / "shards").mkdir()
    for shard in range(4):
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as tar:
            for number in range(shard * 3, shard * 3 + 3):
                data = file_of(picture(number))
                entry = tarfile.TarInfo(f"{number:03d}.png")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return tmp_path / "shards"


@pytest.fixture
def parquet(tmp_path):
    """The same in one parquet file."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    (tmp_path / "parquet").mkdir()
    rows = {"image": [{"bytes": file_of(picture(number)), "path": None} for number in range(ROWS)]}
    Dataset.from_dict(rows, Features({"image": ImageFeature()})).to_parquet(tmp_path / "parquet" / "train-0.parquet")
    return tmp_path / "parquet"


def number_of(clean: torch.Tensor) -> int:
    return round((clean.amax().item() + 1) * 127.5 / 20)


def take(path, batches: int, size: int = 2, **options) -> tuple[list[int], torch.Tensor]:
    """The numbers of the pictures in the first batches, and what was read last by each worker."""
    workers = options.get("workers", 0)
    images = load_images(str(path), streaming=True)
    stream = PaletteStream(images, PaletteScheduler(), ["inpainting"], size=32, batch=size, **options)
    numbers, read = [], torch.zeros(max(1, workers), 2, dtype=torch.long)
    loader = iter(DataLoader(stream, batch_size=size, num_workers=workers))
    for k in range(options.get("begun", 0), options.get("begun", 0) + batches):
        batch = next(loader)
        numbers += [number_of(clean) for clean in batch["clean"]]
        read[k % len(read)] = batch["read"][-1]
    return numbers, read


def test_a_stream_keeps_its_order_and_loses_nothing(parquet):
    numbers, _ = take(parquet, 9)
    assert numbers[:ROWS] == list(range(ROWS))
    assert numbers[ROWS:] == list(range(6))  # the next epoch begins where the first ended


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_readers_share_an_epoch(kind, request):
    """Two processes of two workers read every row once, whether the shards can be dealt out or not."""
    path = request.getfixturevalue(kind)
    seen = [take(path, 2, size=3 - 1, process=p, processes=2, workers=2)[0] for p in range(2)]
    first = [take(path, 6, size=1, process=p, processes=2, workers=2)[0] for p in range(2)]
    assert sorted(first[0] + first[1]) == list(range(ROWS))
    assert not set(seen[0]) & set(seen[1])


def test_noise_is_of_the_position_and_not_shared_by_readers(parquet):
    noises = set()
    for process in range(2):
        images = load_images(str(parquet), streaming=True)
        stream = PaletteStream(images, PaletteScheduler(), ["inpainting"], size=32, process=process, processes=2)
        samples = [sample for _, sample in zip(range(10), stream, strict=False)]
        noises |= {sample["noise"].numpy().tobytes() for sample in samples}
    assert len(noises) == 20


@pytest.mark.parametrize("options", [{}, dict(workers=2), dict(shuffle_buffer=5), dict(shuffle_buffer=5, workers=2)])
def test_a_stream_goes_on_where_it_was(parquet, options):
    """Also inside the second epoch, and with a shuffle buffer, which is filled again."""
    whole, _ = take(parquet, 11, **options)
    for cut in (1, 3, 8):
        before, read = take(parquet, cut, **options)
        after, _ = take(parquet, 11 - cut, begun=cut, read=read, **options)
        assert before + after == whole
    assert (sorted(whole[:ROWS]) != whole[:ROWS]) == bool(options)


@pytest.mark.parametrize(
    ("cut", "changes"), [(1, {}), (3, dict(workers=2, accumulate=2)), (2, dict(shuffle_buffer=5, workers=1))]
)
def test_a_streamed_run_equals_an_uninterrupted_one(shards, tmp_path, cut, changes):
    changes = changes | dict(streaming=True, tasks="inpainting,uncropping")
    train(settings(shards, tmp_path / "a", **changes))
    _stopped_at(cut, settings(shards, tmp_path / "b", save_every=1, **changes))
    train(settings(shards, tmp_path / "b", resume=True, **changes))
    same(last_state(tmp_path / "a"), last_state(tmp_path / "b"))
    logs = [[line["loss"] for line in read_log(tmp_path / name / "log.jsonl")] for name in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_two_processes_stream_and_go_on(shards, tmp_path):
    """gloo: stopped after half of the steps and continued, against a run that was not."""

    def arguments(name, steps):
        return [*options(shards, tmp_path / name, steps=steps), "--streaming", "--tasks", "inpainting,uncropping"]

    for name, steps, more in (("a", 4, []), ("b", 2, []), ("b", 4, ["--resume"])):
        finish(launch(*arguments(name, steps), *more, processes=2))
    state = last_state(tmp_path / "a")
    same(state, last_state(tmp_path / "b"))
    assert state["read"].shape == (2, 1, 2) and (state["read"][..., 1] > 0).any()


def test_a_stream_goes_on_only_as_it_was_divided(shards, tmp_path):
    train(settings(shards, tmp_path / "run", streaming=True, steps=2, tasks="inpainting"))
    with pytest.raises(ValueError, match="1 processes of 1 workers, now over 1 of 2"):
        train(settings(shards, tmp_path / "run", streaming=True, resume=True, workers=2, tasks="inpainting"))


def test_broken_rows_of_a_stream_are_counted(shards, tmp_path):
    with tarfile.open(shards / "0a.tar", "w") as tar:
        for name, data in (("a.png", file_of(picture(1))[:60]), ("b.png", file_of(picture(1).resize((9, 9))))):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    images = load_images(str(shards), streaming=True)
    stream = PaletteStream(images, PaletteScheduler(), ["inpainting"], size=32)
    samples = [sample for _, sample in zip(range(ROWS + 1), stream, strict=False)]
    assert [int(sample["skipped"]) for sample in samples] == [0, 0, 0, 2] + [0] * (ROWS - 3)
    assert sorted(number_of(sample["clean"]) for sample in samples[:ROWS]) == list(range(ROWS))
    with pytest.raises(ValueError, match="row 3 of the stream can't be decoded"):
        rows = iter(PaletteStream(images, PaletteScheduler(), ["inpainting"], size=32, strict=True))
        [next(rows) for _ in range(ROWS)]


def test_what_is_looked_at_does_not_move_the_stream(parquet):
    images = load_images(str(parquet), streaming=True)
    stream = PaletteStream(images, PaletteScheduler(), ["inpainting"], size=32)
    rows = iter(stream)
    assert [number_of(next(rows)["clean"]) for _ in range(2)] == [0, 1]
    assert [number_of(clean) for clean, _ in stream.fixed("inpainting", 3)] == [0, 1, 2]
    assert number_of(next(rows)["clean"]) == 2


def test_streams_are_mixed_by_weight(shards, parquet, tmp_path):
    images, weights = load_sources(f"{shards}@1,{parquet}@3", streaming=True)
    stream = PaletteStream(images, PaletteScheduler(), ["inpainting"], size=32, source_weights=weights)
    numbers = [number_of(sample["clean"]) for _, sample in zip(range(16), stream, strict=False)]
    assert numbers == [number_of(s["clean"]) for _, s in zip(range(16), stream, strict=False)]
    assert 2 <= sum(a != b for a, b in zip(numbers, sorted(numbers), strict=True))  # of both, interleaved


def test_pairs_are_streamed(tmp_path, parquet):
    folder = tmp_path / "pairs"
    folder.mkdir()
    lines = []
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
        picture(number + 5).save(folder / f"{number}-source.png")
        lines.append({"file_name": f"{number}.png", "source_file_name": f"{number}-source.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    images = load_images(str(folder), streaming=True)
    stream = PaletteStream(images, PaletteScheduler(), ["paired"], size=32, source_column="source")
    sample = next(iter(stream))
    assert number_of(sample["condition"]) == number_of(sample["clean"]) + 5


def small_dataset(tmp_path, number=6, size=32, **options):
    folder = tmp_path / "small"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for k in range(number):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{k}.png")
    return PaletteDataset(load_images(str(folder)), PaletteScheduler(), ["inpainting"], size=32, **options)


def test_photographs_of_the_size_are_decoded_once_and_nothing_changes(tmp_path, monkeypatch):
    decoded = []
    original = data.decode_photos
    monkeypatch.setattr(data, "decode_photos", lambda *args: decoded.append(1) or original(*args))
    dataset = small_dataset(tmp_path)
    kept = [dataset[k] for k in range(18)]  # three epochs
    assert len(decoded) == 6
    monkeypatch.setattr(data, "KEPT", 0)
    plain = small_dataset(tmp_path)
    for k in range(18):
        for name, value in plain[k].items():
            assert torch.equal(value, kept[k][name]), (k, name)
    assert len(decoded) == 24
    monkeypatch.undo()
    other = pickle.loads(pickle.dumps(dataset))  # as a worker that is not forked gets it
    assert torch.equal(other[0]["clean"], kept[0]["clean"]) and dataset._kept and not other._kept


def test_workers_decode_together(tmp_path, monkeypatch):
    """What a worker decoded, the process that forked it and the others need not."""
    dataset = small_dataset(tmp_path)
    expected = [dataset[k]["clean"] for k in range(12)]
    dataset = small_dataset(tmp_path)
    batches = list(DataLoader(dataset, batch_size=3, num_workers=2, sampler=range(6), multiprocessing_context="fork"))
    assert torch.equal(torch.cat([batch["clean"] for batch in batches]), torch.stack(expected[:6]))

    def never(*args):
        raise AssertionError("decoded again")

    monkeypatch.setattr(data, "decode_photos", never)
    for k in range(12):
        assert torch.equal(dataset[k]["clean"], expected[k])


def test_larger_photographs_are_not_kept(tmp_path):
    dataset = small_dataset(tmp_path, size=40)
    assert len({dataset[k]["clean"].sum().item() for k in range(0, 60, 6)}) > 5  # each time another square of them
    assert all(kept.get(row) is None for kept in dataset._kept for row in range(6))


def test_a_batch_is_filled_as_each_of_its_samples(tmp_path):
    dataset = PaletteDataset(
        small_dataset(tmp_path).images, PaletteScheduler(), ["inpainting", "colorization"], size=32, holes=True
    )
    batch = default_collate([dataset[k] for k in range(12)])
    assert {0, 1} == set(batch["task"].tolist())
    filled = fill_holes(batch["condition"])
    for k in range(12):
        hole = batch["mask"][k : k + 1] if batch["task"][k] == 0 else None
        given = Given(batch["known"][k : k + 1], batch["condition"][k : k + 1, :3], hole)
        assert torch.equal(filled[k : k + 1], network_condition(given, True))
    anything = batch["condition"].clone()
    anything[:, :3] = torch.where(anything[:, 3:] > 0, 0.7, anything[:, :3])
    assert torch.equal(fill_holes(anything), filled) and torch.equal(fill_holes(filled), filled)
    unet = toy_unet(hole_skip=0.5, condition_skip=0.2)
    with torch.no_grad():
        torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    settings = TrainSettings(prediction_type="v_prediction")
    losses = [sample_losses(unet, batch | {"condition": shown}, settings) for shown in (batch["condition"], filled)]
    assert torch.equal(*losses) and losses[0].min() > 0


def names_in(folder, split="train", **options) -> list[str]:
    rows = undecoded(load_images(str(folder), split, **options), ["image"])
    return [os.path.basename(row["image"]["path"]) for row in rows]


def test_names_of_files_and_folders_mean_nothing(tmp_path):
    """Words like `train` and `test` in a name, which would be taken for splits, and characters of patterns."""
    folder = tmp_path / "br [1] *?"
    names = ["train_station.png", "test-1.png", "dev/a.png", "b/val.png", "c.TIF", "d.webp", "[e].png", "f@2.jpg"]
    names += ["g.gif", "h.jp2", "i.jfif", "j.ppm", "k.AVIF", "ä☃.png"]
    for name in [*names, ".hidden.png", ".cache/g.png", "__MACOSX/._a.png"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(3).save(folder / name)
    (folder / "notes.txt").write_text("of no picture")
    (folder / "b" / "above").symlink_to(folder)
    for streaming in (False, True):
        assert sorted(names_in(folder, streaming=streaming)) == sorted(os.path.basename(name) for name in names)
    assert len(PaletteDataset(load_images(str(folder)), PaletteScheduler(), ["inpainting"], size=32)) == len(names)
    assert split_sources(f"{tmp_path / 'br [1] *?'}@2") == [(str(folder), 2)]
    folder.rename(tmp_path / "me@home")
    assert split_sources(f"{tmp_path / 'me@home'},{tmp_path / 'me@home'}@3") == [
        (str(tmp_path / "me@home"), 1), (str(tmp_path / "me@home"), 3),
    ]  # fmt: skip


def test_a_folder_of_splits_gives_the_split(tmp_path, capsys):
    """Where there is nothing else; a folder that is called `train` among others is one of trains."""
    for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(3).save(tmp_path / name)
    assert names_in(tmp_path) == ["a.png", "b.png"] and names_in(tmp_path, "validation") == ["c.png"]
    rows = load_images(str(tmp_path))
    assert rows.features["label"].names == ["cat", "dog"] and list(rows["label"]) == [0, 1]
    (tmp_path / "plane").mkdir()
    picture(3).save(tmp_path / "plane" / "d.png")
    assert sorted(names_in(tmp_path)) == ["a.png", "b.png", "c.png", "d.png"]
    (tmp_path / "plane" / "d.png").rename(tmp_path / "d.png")
    (tmp_path / "plane").rmdir()
    assert len(names_in(tmp_path)) == 4  # a picture beside them
    (tmp_path / "d.png").rename(tmp_path / "d.txt")
    (tmp_path / "README.md").write_text("of what is here")
    (tmp_path / "val").rename(tmp_path / "Validation")
    capsys.readouterr()
    assert names_in(tmp_path) == ["a.png", "b.png"] and names_in(tmp_path, "validation") == ["c.png"]
    assert "of Validation, train the images of train" in capsys.readouterr().err
    (tmp_path / "plane").mkdir()
    picture(3).save(tmp_path / "plane" / "d.png")
    only = tmp_path / "plane" / "test"
    only.mkdir()
    (tmp_path / "plane" / "d.png").rename(only / "d.png")
    assert names_in(tmp_path / "plane") == ["d.png"]  # no split of that name


def test_other_folders_with_characters_of_patterns(shards, parquet):
    for folder in (shards, parquet):
        folder.rename(folder.with_name(f"{folder.name} [1]"))
        assert len(load_images(f"{folder} [1]")) == ROWS


def test_levels_and_transparency_are_seen_as_they_are_shown(tmp_path):
    """Sixteen bits are not white, what is transparent shows white, a broken row says which file it is."""
    ramp = np.tile(np.linspace(0, 1, 40), (40, 1))
    deep = Image.fromarray((ramp * 65535).astype(np.uint16))
    half = np.full((40, 40, 4), 60, np.uint8)
    half[:, :20, 3], half[:, 20:, 3] = 0, 255
    clear = Image.fromarray(np.full((40, 40), 7, np.uint8)).convert("P")
    for name, image in (("a.png", deep), ("b.tif", deep), ("c.png", Image.fromarray(half)), ("e.png", clear)):
        image.save(tmp_path / name, **(dict(transparency=7) if name == "e.png" else {}))
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "d.tif")
    rows = undecoded(load_images(str(tmp_path)), ["image"])
    a, b, c, d, e = (decode_photos(row, ["image"], 32)[0] for row in rows)
    for picture_ in (a, b, d):
        assert np.abs(picture_[..., 1] - ramp * 255).max() <= 1
    assert (c[:, :20] == 255).all() and (c[:, 20:] == 60).all() and (e == 255).all()


@pytest.mark.parametrize("kind", ["text", "text chunk", "nothing", "none"])
def test_whatever_breaks_a_file_makes_its_row_unusable(tmp_path, kind):
    text = b"zTXta\0\0" + zlib.compress(b"x" * 3_000_000)  # too much of it for Pillow
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    whole = file_of(picture(3))
    content = {"text": b"no picture", "text chunk": whole[:33] + chunk + whole[33:]}.get(kind, b"")
    (tmp_path / "a.png").write_bytes(content)
    row = {"image": {"bytes": None, "path": None if kind == "none" else str(tmp_path / "a.png")}}
    with pytest.raises(Unusable, match="can't be decoded: .*" + ("" if kind == "none" else r"a\.png")):
        decode_photos(row, ["image"], 32)


def test_a_stream_may_begin_with_many_small_pictures(tmp_path):
    """It is told; only where a whole epoch has none that can be used, the run ends."""
    for number in range(130):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number:03d}.png")
    stream = PaletteStream(load_images(str(tmp_path), streaming=True), PaletteScheduler(), ["inpainting"], size=32)
    with pytest.raises(ValueError, match="of the stream is 9x9, below 32 pixels: .*and 260 before"):
        next(iter(stream))
    picture(3).save(tmp_path / "200.png")
    stream = PaletteStream(load_images(str(tmp_path), streaming=True), PaletteScheduler(), ["inpainting"], size=32)
    with pytest.warns(UserWarning, match="100 rows of the stream, up to 100, could not be used"):
        samples = [sample for _, sample in zip(range(2), stream, strict=False)]
    assert [int(sample["skipped"]) for sample in samples] == [130, 130]


def test_a_shard_that_was_cut_off_is_named(shards):
    whole = (shards / "2.tar").read_bytes()
    (shards / "2.tar").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"shards/2.tar can't be read: unexpected end of data"):
        load_images(str(shards))
    stream = PaletteStream(load_images(str(shards), streaming=True), PaletteScheduler(), ["inpainting"], size=32)
    with pytest.raises(ValueError, match="a shard of the stream can't be read"):
        [sample for _, sample in zip(range(ROWS), stream, strict=False)]


def test_a_mistyped_folder_is_told_without_a_network(monkeypatch):
    import datasets

    def no_network(*_, **__):
        raise ConnectionError("no such host")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(FileNotFoundError, match="photso/mine is no folder here, and can't be fetched"):
        load_images("photso/mine")


def test_a_broken_parquet_file_is_named(parquet):
    (parquet / "train-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="parquet can't be read: .*magic bytes not found"):
        load_images(str(parquet))


def test_what_is_left_out_of_a_folder_is_told(tmp_path, capsys):
    """A name that is not UTF-8; images that no metadata file names; other metadata; parquet files further below."""
    for name in ("a.png", "b.png"):
        picture(3).save(tmp_path / name)
    os.rename(tmp_path / "b.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    for streaming in (False, True):
        with pytest.warns(UserWarning, match="caf.*xe9.png' is left out: its name is not UTF-8"):
            assert names_in(tmp_path, streaming=streaming) == ["a.png"]
    os.rename(os.fsencode(tmp_path) + b"/caf\xe9.png", tmp_path / "b.png")
    (tmp_path / "metadata.csv").write_text("id,age\n1,2\n")
    with pytest.raises(ValueError, match="metadata.csv: .*file_name.* rename others"):
        load_images(str(tmp_path))
    (tmp_path / "metadata.csv").write_text("file_name,age\nb.png,2\n")
    assert names_in(tmp_path) == ["b.png"]
    assert "1 rows by" in (said := capsys.readouterr().err) and "metadata.csv, of 2 images" in said
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    for name in ("data/train-00000-of-00001.parquet", "x.heic", "y.HEIC", "LICENSE"):
        (clone / name).touch()
    with pytest.raises(FileNotFoundError, match="it has 2 .heic, .*1 .parquet.*; .*clone/data has"):
        load_images(str(clone))


def test_the_target_of_a_pair_is_not_its_source(tmp_path):
    """Whichever column comes first; of metadata, `datasets` would take one for the other."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    rows = {name: [{"bytes": file_of(picture(n)), "path": None}] for name, n in (("bad", 6), ("image", 1))}
    data = Dataset.from_dict(rows, Features(bad=ImageFeature(), image=ImageFeature()))
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "train-0.parquet")
    (tmp_path / "folder").mkdir()
    for name, value in (("a", 1), ("b", 6)):
        picture(value).save(tmp_path / "folder" / f"{name}.png")
    (tmp_path / "folder" / "metadata.csv").write_text("bad_file_name,file_name\nb.png,a.png\n")
    with pytest.raises(ValueError, match="metadata.csv: bad_file_name is before file_name, expected after it"):
        load_images(str(tmp_path / "folder"))
    (tmp_path / "folder" / "metadata.csv").write_text("file_name,bad_file_name\na.png,b.png\n")
    for kind in ("folder", "parquet"):
        images = load_images(str(tmp_path / kind))
        pairs = PaletteDataset(images, PaletteScheduler(), ["paired"], size=32, source_column="bad")
        assert (number_of(pairs[0]["clean"]), number_of(pairs[0]["condition"])) == (1, 6)
    for wrong in (dict(column="bad", source_column="bad"), dict(column="image", source_column="image")):
        with pytest.raises(ValueError, match="is the column of sources, expected the targets in another"):
            PaletteDataset(images, PaletteScheduler(), ["paired"], size=32, **wrong)


@pytest.mark.parametrize("readers", [1, 4])
def test_many_broken_rows_in_a_shuffled_stream_are_no_end(tmp_path, readers):
    """Every epoch has another order, and a reader other rows."""
    for number in range(24):
        picture(3).save(tmp_path / f"{number:02d}.png")
        if number % 2:
            (tmp_path / f"{number:02d}.png").write_bytes(b"no picture")
    for seed in range(3):
        for reader in range(readers):
            place = dict(process=reader, processes=readers, seed=seed, shuffle_buffer=100)
            images = load_images(str(tmp_path), streaming=True)
            stream = PaletteStream(images, PaletteScheduler(), ["inpainting"], size=32, **place)
            assert len([sample for _, sample in zip(range(30), stream, strict=False)]) == 30
