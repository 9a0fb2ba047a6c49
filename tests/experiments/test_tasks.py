"""The data: deterministic, what it says it is, and split so that nothing leaks."""

import math
from pathlib import Path

import pytest
import torch

from eotattn.experiments.tasks import CopyMixture, LanguageTask, find_texts, split_by_file, step_generator


def small_language(length=8):
    generator = torch.Generator().manual_seed(0)
    files = tuple(torch.randint(1, 256, (size,), generator=generator, dtype=torch.uint8) for size in (40, 10, 25))
    return LanguageTask(torch.arange(1, 101, dtype=torch.uint8), files[:1], files, length)


def test_copy_mixture_batches_depend_on_seed_and_step_alone():
    task = CopyMixture(vocabulary_size=5, length=7)
    one, again = (task.batch(3, seed=4, step=2) for _ in range(2))
    assert torch.equal(one.inputs, again.inputs)
    assert torch.equal(one.inputs[:, 1:], one.targets[:, :-1])
    for other in (task.batch(3, seed=5, step=2), task.batch(3, seed=4, step=3)):
        assert not torch.equal(one.inputs, other.inputs)


def test_copy_mixture_copies_as_often_as_it_says():
    task = CopyMixture(vocabulary_size=100, length=20, first_probability=0.5, previous_probability=0.3)
    batch = task.batch(3000, seed=0, step=0)
    first, previous, target = batch.inputs[:, :1].expand(-1, 20), batch.inputs, batch.targets
    differ = first != previous  # where they agree one cannot tell whom the target copied
    noise = 0.2 / 100
    assert float((target == first)[differ].double().mean()) == pytest.approx(0.5 + noise, abs=0.01)
    assert float((target == previous)[differ].double().mean()) == pytest.approx(0.3 + noise, abs=0.01)


def test_best_loss_is_the_entropy_of_the_generator():
    copies = CopyMixture(vocabulary_size=4, length=6, first_probability=1.0, previous_probability=0.0)
    assert copies.best_loss(copies.batch(5, seed=0, step=0)) == pytest.approx(0.0)
    noise = CopyMixture(vocabulary_size=4, length=6, first_probability=0.0, previous_probability=0.0)
    assert noise.best_loss(noise.batch(5, seed=0, step=0)) == pytest.approx(math.log(4))


def test_ideal_attention_reads_the_sources():
    weights = CopyMixture(length=5, first_probability=0.6, previous_probability=0.2).ideal_attention()
    assert weights.sum(-1).tolist() == pytest.approx([1.0] * 5)
    assert weights[0, 0] == 1
    assert weights[3].tolist() == pytest.approx([0.75, 0, 0, 0.25, 0])
    log_prior = CopyMixture(length=5).ideal_log_prior(floor=1e-3)
    assert bool((log_prior.triu(1)[log_prior.triu(1) != 0] == -math.inf).all())
    assert float(log_prior[3, 1]) == pytest.approx(math.log(1e-3))


def test_every_seed_and_step_has_its_own_stream():
    """torch reads 32 bits of a seed, so that 0 and 2**32 are one."""
    pairs = [(seed, step) for seed in (0, 1, 2, 3, 2**20, 2**31) for step in (0, 1, 2, 500, 2**31, 2**32)]
    drawn = {tuple(torch.rand(2, generator=step_generator(*pair)).tolist()) for pair in pairs}
    assert len(drawn) == len(pairs)


def test_split_puts_every_file_on_exactly_one_side_and_does_not_depend_on_the_others():
    texts = [Path(f"package_{k % 7}/module_{k}.py") for k in range(400)]
    split = split_by_file(texts, percent=10)
    assert sorted(split.train + split.validation + split.held_out) == sorted(texts)
    assert 15 <= len(split.held_out) <= 70
    assert 15 <= len(split.validation) <= 70
    half = split_by_file(texts[::2], percent=10)
    assert set(half.held_out) == set(split.held_out) & set(texts[::2])


@pytest.fixture
def texts(tmp_path):
    for k in range(60):
        (tmp_path / f"text_{k}.txt").write_bytes(bytes([65 + k % 26]) * 20)
    (tmp_path / "image.png").write_bytes(b"x" * 50)
    return tmp_path


def test_corpus_of_a_folder_is_split_by_files(texts):
    task = LanguageTask.from_corpus(str(texts), length=4, percent=20)
    split = split_by_file(find_texts(str(texts))[1], percent=20)
    assert len(set(split.train) | set(split.validation) | set(split.held_out)) == sum(map(len, split)) == 60
    assert task.train_bytes.numel() == 21 * len(split.train) - 1
    for part, files in (("validation", task.validation_files), ("held_out", task.held_out_files)):
        expected = [(texts / path).read_bytes() for path in getattr(split, part)]
        assert [bytes(file.tolist()) for file in files] == expected
    assert torch.equal(task.validation_windows(19, 1)[0], task.validation_files[0].long())
    assert task.fingerprint["train_files"] == len(split.train)
    assert task.fingerprint["held_out_bytes"] == 20 * len(split.held_out)


@pytest.mark.parametrize("change", ["nothing", "byte", "name"])
def test_the_fingerprint_is_of_names_and_bytes(texts, change):
    before = LanguageTask.from_corpus(str(texts), length=4, percent=20).fingerprint
    if change == "byte":
        (texts / "text_7.txt").write_bytes(b"B" * 20)
    if change == "name":
        (texts / "text_7.txt").rename(texts / "text_x.txt")
    after = LanguageTask.from_corpus(str(texts), length=4, percent=20).fingerprint
    assert (after["sha256"] == before["sha256"]) == (change == "nothing")
    assert str(texts) not in str(after)


def test_standard_library_is_found_without_installed_packages():
    folder, texts = find_texts("python-stdlib")
    assert Path("heapq.py") in texts
    assert not any("site-packages" in path.parts for path in texts)
    assert (folder / "heapq.py").is_file()
    assert not any(path.is_absolute() for path in texts)


def test_language_batches_are_windows_of_the_training_text():
    task = small_language()
    batch = task.batch(6, seed=1, step=0)
    assert torch.equal(batch.inputs, task.batch(6, seed=1, step=0).inputs)
    assert torch.equal(batch.inputs + 1, batch.targets)  # the text counts upwards
    assert batch.inputs.shape == (6, 8)


def test_held_out_windows_lie_in_one_file_each_and_do_not_overlap():
    task = small_language()
    windows = task.held_out_windows(9, 7)
    expected = [(0, 0), (1, 0), (2, 0), (0, 10), (2, 10), (0, 20), (0, 30)]  # files take turns
    for window, (file, start) in zip(windows, expected, strict=True):
        assert torch.equal(window, task.held_out_files[file][start : start + 10].long())


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: CopyMixture(vocabulary_size=1), ValueError, "vocabulary_size must be at least 2; got 1"),
        (lambda: CopyMixture(first_probability=0.8, previous_probability=0.4), ValueError, "be at most 1"),
        (lambda: CopyMixture(first_probability=-0.1), ValueError, "first_probability must be non-negative"),
        (lambda: find_texts("no/such/folder"), ValueError, "corpus must be a folder that exists; got 'no/such/folder'"),
        (lambda: split_by_file([Path("a")], percent=50), ValueError, "percent must be below 50"),
        (lambda: small_language(100), ValueError, "train_bytes must hold more than length = 100 bytes"),
        (lambda: small_language().held_out_windows(9, 8), ValueError, "number of windows of 10 bytes, 7"),
        (lambda: small_language().held_out_windows(0, 1), ValueError, "window_length must be at least 1"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_empty_folders_and_single_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"corpus must hold \.txt or \.py files"):
        find_texts(str(tmp_path))
    (tmp_path / "one.txt").write_text("only one file")
    with pytest.raises(ValueError, match="have files for every part; got '1 train, 0 validation, 0 held_out'"):
        LanguageTask.from_corpus(str(tmp_path), length=4)
