"""Images: real digits, folders of files, shifts and other resolutions."""

import numpy as np
import pytest
import torch
from PIL import Image

from eotattn.experiments.tasks import ImageTask, open_images
from eotattn.experiments.tasks.images import FolderImages, StoredImages, load_digits


def stored(count=20, size=4):
    images = torch.arange(count * size * size).view(count, 1, size, size) / (count * size * size)
    return StoredImages(images, torch.arange(count) % 3, ("a", "b", "c"))


@pytest.fixture
def folder(tmp_path):
    """Two classes; a red image that is wide, and gray ones."""
    for name, count in (("cat", 3), ("dog", 2)):
        (tmp_path / name / "deep").mkdir(parents=True)
        for k in range(count):
            Image.fromarray(np.full((6, 6), 40 * k, dtype=np.uint8)).save(tmp_path / name / "deep" / f"{k}.png")
    wide = np.zeros((4, 10, 3), dtype=np.uint8)
    wide[:, 3:7, 0] = 255  # the square in the middle is red
    Image.fromarray(wide).save(tmp_path / "dog" / "wide.PNG")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_digits_are_the_real_ones():
    digits = load_digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.min() == 0
    assert digits.images.max() == 1
    assert torch.bincount(digits.labels).min() > 170
    # Pixels tell the classes apart: the nearest class mean recognises most digits.
    means = torch.stack([digits.images[digits.labels == k].mean(0) for k in range(10)])
    nearest = torch.cdist(digits.images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == digits.labels).double().mean() > 0.85


def test_other_resolutions_show_the_same_image():
    digits = load_digits()
    some = torch.arange(5)
    assert torch.equal(digits.pixels(some, 8), digits.images[:5])
    large = digits.pixels(some, 24)
    torch.testing.assert_close(large[:, :, 1::3, 1::3], digits.images[:5])  # centres of pixels
    assert large.min() >= 0
    assert large.max() <= 1


def test_folders_have_one_class_a_folder(folder):
    images = open_images(str(folder))
    assert isinstance(images, FolderImages)
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = images.pixels(torch.arange(6), 3)
    assert pixels.shape == (6, 3, 3, 3)
    torch.testing.assert_close(pixels[1], torch.full((3, 3, 3), 40 / 255))
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 4, 4)
    assert torch.equal(images.pixels(torch.tensor([5]), 4)[0], red)


def test_damaged_images_are_named(folder):
    (folder / "cat" / "broken.png").write_bytes(b"not an image")
    images = FolderImages.scan(folder)
    with pytest.raises(ValueError, match=r"every file must be a whole image; got broken\.png"):
        images.pixels(torch.arange(len(images.labels)), 3)


@pytest.mark.parametrize("validation", [5, 15])
def test_split_is_fixed_and_complete(validation):
    task = ImageTask(stored(), size=4, held_out_percent=25, validation_percent=validation)
    parts = [task.indices(part) for part in ("train", "validation", "held_out")]
    assert [len(part) for part in parts[1:]] == [20 * validation // 100, 5]
    assert sorted(torch.cat(parts).tolist()) == list(range(20))
    assert torch.equal(parts[2], ImageTask(stored(), size=4, held_out_percent=25).indices("held_out"))


def test_batches_are_training_images_with_their_labels():
    source = stored()
    task = ImageTask(source, size=4)
    one, again = (task.batch(6, seed=2, step=5) for _ in range(2))
    assert torch.equal(one.inputs, again.inputs)
    train = set(task.indices("train").tolist())
    for pixels, label in zip(one.inputs, one.targets, strict=True):
        (index,) = [k for k in range(20) if torch.equal(source.images[k], pixels)]
        assert index in train
        assert source.labels[index] == label


def test_shifts_move_the_image_and_fill_with_zero():
    source = StoredImages(torch.ones(4, 1, 3, 3), torch.arange(4) % 2, ("a", "b"))
    task = ImageTask(source, size=3, max_shift=1, held_out_percent=25, validation_percent=25)
    inputs = task.batch(400, seed=0, step=0).inputs[:, 0]
    rows, columns = inputs.amax(2).sum(1), inputs.amax(1).sum(1)
    assert torch.equal(inputs.sum((1, 2)), rows * columns)  # what is left is a rectangle
    assert sorted(set(rows.tolist())) == [2.0, 3.0]
    share = float((rows == 2).double().mean())  # two of three shifts lose a row
    assert share == pytest.approx(2 / 3, abs=0.1)
    assert not torch.equal(rows, columns)


def test_batches_hold_every_image_of_a_part_once():
    task = ImageTask(stored(), size=4, held_out_percent=25)
    batches = list(task.batches_of("held_out", 8, 2))
    assert [len(batch.targets) for batch in batches] == [2, 2, 1]
    assert batches[0].inputs.shape == (2, 1, 8, 8)
    assert torch.equal(torch.cat([b.targets for b in batches]), task.source.labels[task.indices("held_out")])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: open_images("no/such/folder"), "folder must be a folder that exists; got 'no/such/folder'"),
        (lambda: ImageTask(stored(), size=0), "size must be at least 1"),
        (
            lambda: ImageTask(stored(), size=4, held_out_percent=100),
            r"held_out_percent \+ validation_percent must be below 100",
        ),
        (lambda: ImageTask(stored(2), size=4), "source must have images in all parts of the split"),
        (lambda: ImageTask(stored(), size=4).indices("test"), "part must be one of 'train', 'validation', 'held_out'"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_folder_of_one_class_is_refused(tmp_path):
    (tmp_path / "only").mkdir()
    Image.new("L", (3, 3)).save(tmp_path / "only" / "a.png")
    with pytest.raises(ValueError, match=r"folder must hold images of two classes; got \['only'\]"):
        FolderImages.scan(tmp_path)


@pytest.mark.parametrize(
    ("extra", "call"), [("experiments", load_digits), ("data", lambda: FolderImages.scan("."))], ids=["digits", "files"]
)
def test_missing_libraries_are_named(extra, call, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'eotattn\[{extra}\]'"):
        call()
