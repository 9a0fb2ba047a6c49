"""Books as tokens: authors apart, copies gone, texts that can be read back, windows that begin as they say."""

import random

import numpy as np
import pytest
import torch

from eotattn.experiments.tasks import books, token_text
from eotattn.experiments.tasks.books import BEGINNING, END, prepare_books
from eotattn.experiments.tasks.token_text import DATA_VARIABLE, TokenText, begin

pytest.importorskip("tokenizers")
AUTHORS = [f"Author {k}" for k in range(9)]


def prose(seed, paragraphs=60):
    """Paragraphs of made-up words with the common ones between them."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(3, 8))) for _ in range(200)]
    common = sorted(books.COMMON_WORDS)
    return "\n\n".join(
        " ".join(draw.choice(common if draw.random() < 0.3 else words) for _ in range(30)) + "."
        for _ in range(paragraphs)
    )


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Nine authors of two books each, one short and one Finnish text; parts of a few thousand characters."""
    monkeypatch.setattr(books, "MIN_CHARACTERS", 2000)
    monkeypatch.setattr(books, "PART_TOKENS", 8000)
    monkeypatch.setattr(books, "BOOKS_AT_ONCE", 2)
    folder = tmp_path / "shelf"
    for k, author in enumerate(AUTHORS):
        (folder / author).mkdir(parents=True)
        for n in range(2):
            (folder / author / f"book {n}.txt").write_text(prose(10 * k + n))
    (folder / AUTHORS[0] / "short.txt").write_text("the and of to in that was his")
    (folder / AUTHORS[1] / "finnish.txt").write_text("talo kissa vesi " * 400)
    return folder


def prepare(shelf, out):
    sizes = {"vocabulary_size": 600, "held_out_characters": 15_000, "train_characters": 10**9}
    return prepare_books(str(shelf), str(out), **sizes, report=lambda line: None)


def parts_of(shelf, limits):
    return books._split(books.find_books(shelf), limits)


def test_authors_serve_one_part_each_and_what_is_no_book_is_left_out(shelf):
    parts = parts_of(shelf, {"test": 15_000, "validation": 7_000, "train": 10**9})
    authors = {name: {book.author for book in each} for name, each in parts.items()}
    assert all(authors.values())
    assert not authors["test"] & authors["validation"]
    assert not (authors["test"] | authors["validation"]) & authors["train"]
    titles = [book.title for each in parts.values() for book in each]
    assert len(titles) == 18, titles


def test_copies_of_held_out_books_and_of_earlier_ones_are_left_out(shelf):
    limits = {"test": 15_000, "validation": 7_000, "train": 10**9}
    parts = parts_of(shelf, limits)
    held, trained = parts["test"][0], parts["train"][0]
    last = shelf / parts["train"][-1].author
    own = prose(1000, 90)
    (last / "copy of a held-out chapter.txt").write_text(own + "\n\n" + "\n\n".join(held.text.split("\n\n")[:5]))
    (last / "copy of a training book.txt").write_text(prose(1001, 20) + "\n\n" + trained.text)
    (last / "new.txt").write_text(own)
    titles = {book.title.split("/")[1] for book in parts_of(shelf, limits)["train"]}
    assert "new.txt" in titles
    assert not {title for title in titles if title.startswith("copy")}


def test_a_prepared_corpus_reads_back(shelf, tmp_path, monkeypatch):
    from tokenizers import Tokenizer

    out = tmp_path / "corpus"
    about = prepare(shelf, out)
    monkeypatch.setenv(DATA_VARIABLE, str(out))
    text = TokenText.open("books")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    parts = parts_of(shelf, {"test": 15_000, "validation": 7_500, "train": 10**9})
    assert (about["beginning"], about["end"]) == (BEGINNING, END)
    for name in ("validation", "test"):
        for document, book in zip(text.documents[name], parts[name], strict=True):
            assert document[-1] == END
            assert tokenizer.decode(document[:-1].tolist()) == book.text
    whole = tokenizer.decode(text.train.tolist(), skip_special_tokens=True)
    assert whole == "".join(book.text for book in parts["train"])
    assert len(list(out.glob("train-*.npy"))) > 1
    (out / "train-1.npy").unlink()  # without the last parts it is another corpus
    for further in out.glob("train-[2-9].npy"):
        further.unlink()
    part = TokenText.open("books")
    assert np.array_equal(part.train, text.train[: len(part.train)])
    assert part.fingerprint["sha256"] != text.fingerprint["sha256"]
    content = bytearray((out / "test.npy").read_bytes())
    content[-2] ^= 1
    (out / "test.npy").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"data must hold whole files; got \['test\.npy'\]"):
        TokenText.open("books")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"folder": "nowhere"}, "prepare_books: folder must be a folder that exists; got 'nowhere'"),
        ({"vocabulary_size": 70_000}, "vocabulary_size must fit 16 bits"),
        ({"vocabulary_size": 5}, "vocabulary_size must be at least 512"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(change, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        prepare_books(**({"folder": str(tmp_path), "out": str(tmp_path / "new")} | change))
    assert not (tmp_path / "new").exists()


def test_a_corpus_that_is_not_named_or_not_there_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="data must name a folder of prepared books"):
        TokenText.open("books")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match=r"data must be a folder with a corpus\.json"):
        TokenText.open("books")


def text_of(*lengths):
    """Document k counts from 1000 k."""
    documents = {"test": [1000 * k + np.arange(n) for k, n in enumerate(lengths)], "validation": []}
    return TokenText(np.arange(100, 400), documents, 7, 5000, {})


def test_windows_begin_with_the_token_and_predict_the_same():
    with_token, without = (text_of(30).training(16, begins=begins) for begins in (True, False))
    one, other = (task.batch(5, seed=3, step=2) for task in (with_token, without))
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.inputs[:, 1:], other.inputs[:, 1:])
    assert (one.inputs[:, 0] == 7).all()
    assert torch.equal(other.inputs[:, 1:], other.targets[:, :-1])
    assert not torch.equal(one.inputs, with_token.batch(5, seed=3, step=3).inputs)


def test_windows_of_documents_lie_in_them_and_documents_take_turns():
    windows = text_of(50, 5, 30, 21).windows("test", 20, per_document=2, limit=4)
    assert windows.documents.tolist() == [0, 2, 3, 0]
    for tokens, document in zip(*windows, strict=True):
        assert torch.equal(tokens.diff(), torch.ones(20, dtype=torch.long))
        assert {int(token) // 1000 for token in tokens} == {int(document)}
    with pytest.raises(
        ValueError, match="length must fit into a document of the test part, of 50 tokens at most; got 60"
    ):
        text_of(50).windows("test", 60, per_document=2, limit=4)


def test_bytes_of_the_standard_library_have_a_token_of_their_own_at_the_beginning():
    text = TokenText.open("python-stdlib")
    assert text.beginning == text.vocabulary_size - 1 == 256
    assert text.train.max() < 256
    assert token_text.begin is begin
