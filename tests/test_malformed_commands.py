"""Malformed commands: each is refused in one line that names what was written, with status 2, before any work."""

import json
import re

import numpy as np
import pytest

from eotattn import cli
from eotattn.experiments.tasks.token_text import DATA_VARIABLE

COMMANDS = ("analyze", "bench", "prepare", "reproduce", "train", "verify")

#: (command, what its line says). Files are those of :func:`files`.
PARSED = [
    ("", "eotattn: error: the following arguments are required: COMMAND"),
    ("plot", "eotattn: error: argument COMMAND: invalid choice: 'plot'"),
    ("--figure 1", "eotattn: error: .*"),
    ("Train", "invalid choice: 'Train'"),
    ("train 1", "eotattn train: error: unrecognized arguments: 1. See eotattn train --help"),
    ("train --epochs 3", "eotattn train: error: unrecognized arguments: --epochs 3"),
    ("train --figure", r"eotattn train: error: argument --figure: expected at least one argument"),
    ("train --fig 1", "unrecognized arguments: --fig 1"),
    ("train --jobs", "argument --jobs: expected one argument"),
    ("train --jobs two", "argument --jobs: invalid int value: 'two'"),
    ("train --jobs 1.5", "argument --jobs: invalid int value: '1.5'"),
    ("train --scale", "argument --scale: expected one argument"),
    ("train --out", "argument --out: expected one argument"),
    ("train --only", "argument --only: expected at least one argument"),
    ("train --fresh=yes", "argument --fresh: ignored explicit argument 'yes'"),
    ("reproduce --only a-*", "eotattn reproduce: error: unrecognized arguments: --only a-*"),
    ("reproduce --jobs none", "argument --jobs: invalid int value: 'none'"),
    ("reproduce --figures 1", "unrecognized arguments: --figures 1"),
    ("reproduce fig1", "unrecognized arguments: fig1"),
    ("verify now", "eotattn verify: error: unrecognized arguments: now"),
    ("verify --seed", "argument --seed: expected one argument"),
    ("verify --seed x", "argument --seed: invalid int value: 'x'"),
    ("verify --seed 1e3", "argument --seed: invalid int value: '1e3'"),
    ("verify --dtype float64", "unrecognized arguments: --dtype float64"),
    ("bench", "eotattn bench: error: the following arguments are required: suite"),
    ("bench decode layer", "unrecognized arguments: layer"),
    ("bench decode --rounds many", "argument --rounds: invalid int value: 'many'"),
    ("bench decode --size small", "unrecognized arguments: --size small"),
    ("analyze", "eotattn analyze: error: the following arguments are required: --out"),
    ("analyze model", "the following arguments are required: --out"),
    ("analyze model --out new", "one of the arguments --text --texts --attention is required"),
    ("analyze model --text note.txt", "the following arguments are required: --out"),
    ("analyze model --text note.txt --texts two.jsonl --out new", "--texts: not allowed with argument --text"),
    ("analyze --attention maps.npy --text note.txt --out new", "--text: not allowed with argument --attention"),
    ("analyze model --text note.txt --out new --heads first", "argument --heads: invalid int value: 'first'"),
    ("analyze model --text note.txt --out new --max-length x", "argument --max-length: invalid int value: 'x'"),
    ("analyze model --text note.txt --out new --heads", "argument --heads: expected at least one argument"),
    ("analyze model other --text note.txt --out new", "unrecognized arguments: other"),
]

FIGURES = [
    (
        "{} --figure 9",
        r"--figure must be among 1, .*, ablations, sinks, books; got \['9'\]\. Choose among these",
    ),
    ("{} --figure 1 nine", r"--figure must be among .*; got \['nine'\]"),
    ("{} --figure fig1", r"--figure must be among .*; got \['fig1'\]"),
    ("{} --scale huge", "--scale must be one of 'smoke', 'laptop', 'h200', 'paper', 'gpu'; got 'huge'"),
    ("{} --scale LAPTOP", "--scale must be one of .*; got 'LAPTOP'"),
    ("{} --jobs 0", "--jobs must be at least 1; got 0"),
    ("{} --jobs -2", "--jobs must be at least 1; got -2"),
    ("{} --out note.txt", r"--out must be a folder that can be written; got 'note\.txt \(Not a directory\)'"),
    ("{} --out note.txt/inside", r"--out must be a folder that can be written; got 'note\.txt/inside"),
    ("{} --out /proc/eotattn", r"--out must be a folder that can be written; got '/proc/eotattn"),
    (f"{{}} --out {'x' * 300}", r"--out must be a folder that can be written; got 'x+ \(File name too long\)'"),
    ("{} --fresh --figure 9 --out taken", r"--figure must be among .*; got \['9'\]"),
]

PREPARE = [
    ("prepare", "eotattn prepare: error: the following arguments are required: folder, --out"),
    ("prepare others", "the following arguments are required: --out"),
    ("prepare --out new", "the following arguments are required: folder"),
    ("prepare others more --out new", "unrecognized arguments: more"),
    ("prepare others --out new --scale smoke", "unrecognized arguments: --scale smoke"),
    ("prepare others --out new --vocabulary-size many", "argument --vocabulary-size: invalid int value: 'many'"),
    ("prepare others --out new --train-characters 4e8", "argument --train-characters: invalid int value: '4e8'"),
    ("prepare nowhere --out new", "folder must be a folder that exists; got 'nowhere'. Pass one of .txt files"),
    ("prepare note.txt --out new", "folder must be a folder that exists; got 'note.txt'"),
    ("prepare others --out new", "folder must hold enough authors for three parts; got 'others'. Add books"),
    ("prepare taken --out new", "folder must hold enough authors for three parts; got 'taken'"),
    (
        "prepare others --out note.txt",
        r"--out must be a folder that can be written; got 'note\.txt \(Not a directory\)'",
    ),
    ("prepare others --out /proc/x", "--out must be a folder that can be written; got '/proc/x"),
    ("prepare others --out new --vocabulary-size 100", "--vocabulary-size must be at least 512; got 100"),
    ("prepare others --out new --vocabulary-size 70000", "--vocabulary-size must fit 16 bits; got 70000"),
    ("prepare others --out new --train-characters 0", "--train-characters must be at least 1; got 0"),
    ("prepare others --out new --train-characters -3", "--train-characters must be at least 1; got -3"),
]

BOOKS = [
    (
        "train --figure sinks --scale gpu",
        "--data must name a folder of prepared books; got 'nothing'. Pass --data FOLDER",
    ),
    ("train --figure sinks --scale gpu --data nowhere", "--data must be a folder that exists; got 'nowhere'"),
    ("train --figure sinks --scale gpu --data note.txt", "--data must be a folder that exists; got 'note.txt'"),
    ("train --figure sinks --scale gpu --data others", "--data must be a folder with a corpus.json; got '.*/others'"),
    ("train --figure sinks --scale gpu --data cut", "--data must have the corpus.json that eotattn prepare wrote; got"),
    ("train --figure sinks --scale gpu --data listing", "--data must have the corpus.json that eotattn prepare wrote"),
    ("train --figure sinks --scale gpu --data hollow", r"--data must hold the files of its corpus.json; got \['valid"),
    ("train --figure sinks --scale h200", "--scale must be one of 'smoke', 'laptop', .*; got 'h200'"),
    ("train --figure 1 --scale gpu", "--scale must be one of 'smoke', 'laptop', 'h200', 'paper'; got 'gpu'"),
    ("train --figure 1 --data others", "--data must go with a figure that reads books; got 'others'. Drop it"),
    ("train --figure 1 --minutes 0", "--minutes must be positive; got 0.0"),
    ("train --figure 1 --minutes nan", "--minutes must be positive; got nan"),
    ("train --figure 1 --minutes soon", "argument --minutes: invalid float value: 'soon'"),
    ("train --data", "argument --data: expected one argument"),
    ("reproduce --data others", "unrecognized arguments: --data others"),
    ("reproduce --minutes 3", "unrecognized arguments: --minutes 3"),
    (
        "reproduce --scale gpu --out new",
        "data must name a folder of prepared books; got 'nothing'. .* or set EOTATTN_DATA",
    ),
]

VERIFY = [
    ("verify --device gpu", "--device must be a device of this machine; got 'gpu'. Pass e.g. 'cpu'"),
    ("verify --device cuda:99", "--device must be a device of this machine; got 'cuda:99'"),
    ("verify --device cpu0", "--device must be a device of this machine; got 'cpu0'"),
    ("verify --seed -1", "--seed must be at least 0; got -1"),
    ("verify --seed 99999999999999999999", "--seed must be below 2\\^63; got 99999999999999999999"),
]

BENCH = [
    ("bench speed", "suite must be one of 'overview', .*; got 'speed'"),
    ("bench Attention", "suite must be one of .*; got 'Attention'"),
    ("bench decode --device tpu", "--device must be a device of this machine; got 'tpu'"),
    ("bench decode --device cuda:99", "--device must be a device of this machine; got 'cuda:99'"),
    ("bench decode --dtype half", "--dtype must be one of 'float32', 'bfloat16', 'float16'; got 'half'"),
    ("bench decode --dtype float64", "--dtype must be one of .*; got 'float64'"),
    ("bench decode --sizes large", "--sizes must be one of 'small', 'full'; got 'large'"),
    ("bench decode --rounds 0", "--rounds must be at least 1; got 0"),
    ("bench decode --rounds -5", "--rounds must be at least 1; got -5"),
    ("bench decode --out note.txt", r"--out must be a folder that can be written; got 'note\.txt \(Not a directory\)'"),
    ("bench decode --out /proc/x", "--out must be a folder that can be written; got '/proc/x"),
    ("bench transport --dtype float16", "--dtype must be one of 'float32', 'bfloat16'; got 'float16'"),
    ("bench ring --dtype int8", "--dtype must be one of 'float32', 'bfloat16', 'float16'; got 'int8'"),
    ("bench ring --device cuda:99", "--device must be a device of this machine; got 'cuda:99'"),
    ("bench ring --world-size 4", "unrecognized arguments: --world-size 4"),
]

TEXTS = [
    ("--text none.txt", "--text must be an existing file; got 'none.txt'. Check the path"),
    ("--text others", "--text must be an existing file; got 'others'"),
    ("--texts none.jsonl", "--texts must be an existing file; got 'none.jsonl'"),
    ("--text latin.txt", "--text must be UTF-8; got 'latin.txt'"),
    ("--text blank.txt", r"texts\[0\] must not be empty"),
    ("--texts empty.jsonl", "--texts must hold at least one text"),
    ("--texts broken.jsonl", """line 2 of texts must be JSON; got '{"text": '"""),
    ("--texts number.jsonl", "line 1 of texts must hold a text; got 3"),
    ("--texts nokey.jsonl", "line 1 of texts must hold a text; got None"),
    ("--texts note.txt", "line 1 of texts must be JSON; got 'the key and the query'"),
    (
        "--text long.txt",
        r"texts\[0\] must fit into the model's 32 positions; got '102 tokens'. Cut it with max_length=32",
    ),
    ("--text note.txt --max-length 33", "--max-length must be at most the model's 32 positions; got 33"),
    ("--text note.txt --max-length 1", "--max-length must be at least 2; got 1"),
    ("--text note.txt --max-length 0", "--max-length must be at least 2; got 0"),
    ("--text note.txt --layers 7", r"--layers must be among .*; got \[7\]"),
    ("--text note.txt --layers top", r"--layers must be among .*; got \['top'\]"),
    ("--text note.txt --layers -1", r"(--layers must be among|expected at least one argument)"),
    ("--text note.txt --heads 2", r"--heads must name heads from 0 to 1.*; got \[2\]"),
    ("--text note.txt --heads 0 0", r"--heads must name at least one, and each once; got \[0, 0\]"),
    ("--text note.txt --device tpu", "--device must be a device of this machine; got 'tpu'"),
    ("--text note.txt --dtype float8_e4m3fn", "--dtype must be one of 'float16', .*; got 'float8_e4m3fn'"),
    ("--text note.txt --dtype int8", "--dtype must be one of 'float16', .*; got 'int8'"),
]

MODELS = [
    ("nowhere", "model must be a local folder; got 'nowhere'. Download the model first"),
    ("note.txt", "model must be a local folder; got 'note.txt'"),
    ("gpt2", "model must be a local folder; got 'gpt2'"),
    ("others", "model must hold config.json; got 'others'"),
    ("weightless", "model must hold safetensors; got 'weightless'"),
    ("pickled", "model must hold safetensors; got 'pickled'. Convert the weights; pickles are refused"),
    ("broken", "model must hold a config.json that is JSON; got 'broken'"),
    ("listed", "model must hold a config.json of an object; got 'listed'"),
    ("coded", "model must need no code of its own; got"),
    ("unknown", "model must be of a kind that transformers knows; got 'no_such_model'"),
    ("damaged", r"model must be readable \(.*header.*\); got 'damaged'. Save it again"),
    ("partial", "model must hold every weight of its class; got"),
    ("speechless", "model must hold the files of its tokenizer; got 'speechless'"),
    ("mute", "model must hold the files of its tokenizer; got 'mute'"),
]

MAPS = [
    ("none.npy", "--attention must be an existing file; got 'none.npy'"),
    ("note.txt", "--attention must end in .npy, .npz or .safetensors; got 'note.txt'"),
    ("others", "--attention must be an existing file; got 'others'"),
    ("cut.npy", "--attention must be a .npy file of numbers, without pickles; got 'cut.npy'"),
    ("objects.npy", "--attention must be a .npy file of numbers, without pickles; got 'objects.npy'"),
    ("nothing.npz", "--attention must hold at least one map"),
    ("cut.npz", "--attention must be a .npz file of numbers, without pickles; got 'cut.npz'"),
    ("cut.safetensors", "--attention must be a .safetensors file of numbers, without pickles; got 'cut.safetensors'"),
    ("flat.npy", r"the maps must have shape \(H, Q, K\) or \(layers, H, Q, K\); got shape \(6, 6\)"),
    ("complex.npy", "the maps must be real numbers"),
    ("words.npy", "the maps must be numbers"),
    ("nan.npy", "the map '0' must be finite; got '1 such entries of 72'"),
    ("logits.npy", r"the map '0' must lie in \[0, 1\]; got"),
    ("sums.npy", "the map '0' must have rows that sum to one .*; got 'a sum of 0.5"),
    ("maps.npy --layers 2", r"--layers must be among \{0: 0\}; got \[2\]"),
    ("maps.npy --heads 2", r"--heads must name heads from 0 to 1; got \[2\]"),
    ("maps.npy --heads 1 1", r"--heads must name at least one, and each once; got \[1, 1\]"),
    ("maps.npy --max-length 4", "--max-length must not be given with attention maps; got 4. Drop it"),
    ("maps.npy --device cpu", "--device must not be given with attention maps; got 'cpu'"),
    ("maps.npy --dtype float32", "--dtype must not be given with attention maps; got 'float32'"),
]

OUTPUTS = [
    ("note.txt", r"--out must be a folder that can be written; got 'note\.txt \(Not a directory\)'"),
    ("note.txt/new", "--out must be a folder that can be written; got 'note.txt/new"),
    ("others", r"--out must be empty or hold an earlier report and nothing else; got \['letter.txt'\]"),
    (".", "--out must be neither the current folder nor a mount; got '.'"),
    ("/proc", "--out must be a folder that can be written; got '/proc \\("),
    ("/proc/new", "--out must be a folder that can be written; got '/proc/new"),
    ("x" * 300, r"--out must be a folder that can be written; got 'x+ \(File name too long\)'"),
]

CALLS = [
    *PARSED,
    *[(call.format(command), says) for command in ("train", "reproduce") for call, says in FIGURES],
    *PREPARE,
    *BOOKS,
    *VERIFY,
    *BENCH,
    *[(f"analyze model {call} --out new", says) for call, says in TEXTS],
    *[(f"analyze {call} --text note.txt --out new", says) for call, says in MODELS],
    ("analyze --text note.txt --out new", "model must be given if and only if attention is not; got None"),
    (
        "analyze model --attention maps.npy --out new",
        "model must be given if and only if attention is not; got 'model'",
    ),
    *[(f"analyze --attention {call} --out new", says) for call, says in MAPS],
    *[(f"analyze model --text note.txt --out {call}", says) for call, says in OUTPUTS],
]


def encoder(path):
    """A small random sentence encoder with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "key", "and", "query"]
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
    transformers.BertModel(config).save_pretrained(path)
    return config


def folder(path, **contents):
    path.mkdir()
    for name, content in contents.items():
        (path / name.replace("_", ".")).write_bytes(content)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the calls name."""
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("files")
    texts = {"note.txt": "the key and the query", "blank.txt": " \n", "long.txt": "the key " * 50, "empty.jsonl": "\n"}
    texts |= {"two.jsonl": '"the key"\n"the query"\n', "broken.jsonl": '"the key"\n{"text": \n', "number.jsonl": "3\n"}
    texts |= {"nokey.jsonl": '{"words": "the key"}\n', "cut.npy": "\x93NUM", "cut.npz": "PK", "cut.safetensors": "x"}
    for name, content in texts.items():
        (root / name).write_text(content)
    (root / "latin.txt").write_bytes(b"G\xe4nse")
    weights = np.full((2, 6, 6), 1 / 6, dtype=np.float32)
    holed = weights.copy()
    holed[0, 0, 0] = np.nan
    arrays = {"maps": weights, "flat": weights[0], "complex": weights + 0j, "nan": holed, "logits": weights - 1}
    arrays |= {"sums": weights / 2, "words": np.array([[["a"]]]), "objects": np.array([None])}
    for name, array in arrays.items():
        np.save(root / f"{name}.npy", array, allow_pickle=True)
    np.savez(root / "nothing.npz")
    config = encoder(root / "model")
    tensors = load_file(root / "model" / "model.safetensors")
    own = json.loads((root / "model" / "config.json").read_text())
    folder(root / "others", letter_txt=b"mine")
    folder(root / "taken")
    folder(root / "cut", corpus_json=b"{")
    folder(root / "listing", corpus_json=b"[]")
    facts = {"sha256": {}, "vocabulary_size": 600, "validation": {}, "test": {}}
    folder(root / "hollow", corpus_json=json.dumps(facts).encode())
    folder(root / "weightless", config_json=b"{}")
    folder(root / "pickled", config_json=b"{}", weights_bin=b"")
    folder(root / "broken", config_json=b"{", model_safetensors=b"")
    folder(root / "listed", config_json=b"[]", model_safetensors=b"")
    folder(root / "coded", config_json=b'{"auto_map": {"AutoModel": "mine.Model"}}', model_safetensors=b"")
    folder(root / "unknown", config_json=b'{"model_type": "no_such_model"}', model_safetensors=b"")
    folder(root / "mute", config_json=b'{"model_type": "llama"}', model_safetensors=b"")
    folder(root / "damaged")
    folder(root / "partial")
    folder(root / "speechless")
    for name in ("damaged", "partial", "speechless"):
        config.save_pretrained(root / name)
        for file in (root / "model").glob("*") if name != "speechless" else ():
            if "token" in file.name or file.name == "vocab.txt":
                (root / name / file.name).write_bytes(file.read_bytes())
    (root / "damaged" / "model.safetensors").write_bytes(b"damaged")
    kept = {name: tensor for name, tensor in tensors.items() if "layer.1" not in name}
    save_file(kept, root / "partial" / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, root / "speechless" / "model.safetensors", metadata={"format": "pt"})
    assert own["max_position_embeddings"] == 32
    return root


def test_there_are_enough_calls():
    assert len(CALLS) == len(set(CALLS))
    assert len(CALLS) >= 175


@pytest.mark.parametrize(("call", "says"), CALLS)
def test_a_malformed_command_is_one_line_and_status_2(call, says, files, monkeypatch, capfd):
    monkeypatch.chdir(files)
    monkeypatch.setenv(DATA_VARIABLE, "")  # is put back afterwards: train sets it
    before = sorted(files.rglob("*"))
    assert cli.main(call.split()) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    word = call.partition(" ")[0]
    assert error.startswith(f"eotattn {word}: error: " if word in COMMANDS else "eotattn: error: "), error
    assert re.search(says, error), error
    assert sorted(files.rglob("*")) == before
