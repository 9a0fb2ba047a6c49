"""C4 from shards in the Hub's own format, and a clear sentence where there are none."""

import gzip
import importlib.util
import json

import pytest
import torch

from eotattn.experiments.tasks import LanguageTask
from eotattn.experiments.tasks.c4 import read_c4

datasets = pytest.importorskip("datasets")

TRAIN = ["the first page", "page two", "a third page é"]
VALIDATION = ["one", "two", "three", "four", "five"]


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Two packed shards of training pages and one of validation pages, with the fields of the data set."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pages = {"train.00000": TRAIN[:2], "train.00001": TRAIN[2:], "validation.00000": VALIDATION}
    for name, texts in pages.items():
        split = name.split(".")[0]
        with gzip.open(tmp_path / f"c4-{name}-of-{split}.json.gz", "wt", encoding="utf-8") as file:
            for text in texts:
                record = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.com"}
                file.write(json.dumps(record) + "\n")
    return tmp_path


def test_pages_of_all_shards_are_joined_and_the_validation_split_serves_twice(shards):
    found = read_c4(f"c4:{shards}")
    assert bytes(found.train.tolist()) == "\0".join(TRAIN).encode()
    assert [bytes(part.tolist()) for (part,) in (found.validation, found.held_out)] == [
        b"one\0three\0five",
        b"two\0four",
    ]
    assert found.fingerprint["train_bytes"] == len("\0".join(TRAIN).encode())
    assert str(shards) not in str(found.fingerprint)


def test_training_may_take_the_first_bytes_alone(shards):
    found = read_c4(f"c4:{shards}:10")
    assert bytes(found.train.tolist()) == b"the first "
    assert found.fingerprint["sha256"] != read_c4(f"c4:{shards}").fingerprint["sha256"]


def test_a_language_task_reads_c4(shards):
    task = LanguageTask.from_corpus(f"c4:{shards}", length=6)
    assert task.batch(3, seed=0, step=0).inputs.shape == (3, 6)
    assert torch.equal(task.held_out_windows(7, 1)[0], torch.tensor(list(b"two\0four")))


def test_what_is_missing_is_said_at_once(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"the folder must hold shards named c4-train\.\*\.json\*; got"):
        read_c4(f"c4:{tmp_path}")
    with pytest.raises(ValueError, match="corpus must end with a number of bytes; got 'c4:x:many'"):
        read_c4("c4:x:many")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"read_c4: datasets must be installed; got none\. Run pip install"):
        read_c4(f"c4:{tmp_path}")


@pytest.mark.parametrize(
    "damage", [lambda packed: packed[: len(packed) // 2], lambda packed: gzip.compress(b'{"page": "no text"}\n')]
)
def test_damaged_shards_are_named(shards, damage):
    for file in shards.iterdir():
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"read_c4: every shard must be whole, with a field 'text'; got .* again\."):
        read_c4(f"c4:{shards}")


def test_every_run_of_a_study_shares_the_bytes(shards):
    assert read_c4(f"c4:{shards}") is read_c4(f"c4:{shards}")


def test_without_network_the_sentence_says_what_to_do(monkeypatch):
    import huggingface_hub

    def refuse(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    says = r"must be reachable on the Hugging Face Hub; got ConnectionError: no route to host\. Connect .* 'c4:FOLDER'"
    with pytest.raises(ValueError, match=says):
        read_c4("c4")
