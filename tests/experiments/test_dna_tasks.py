"""DNA: the artificial genome against brute force, FASTA files in every shape, data sets of the Hub, windows."""

import gzip
import itertools
import math
import socket

import pandas
import pytest
import torch

from eotattn.experiments.tasks import DnaTask, IsochoreGenome, IsochoreModel, StoredGenome, gc_fraction, open_genome
from eotattn.experiments.tasks.dna_records import DnaRecord, decode_bases, encode_bases, read_fasta, read_hub
from eotattn.experiments.tasks.parts import ClosedDataError, closed_data

TINY = IsochoreModel(
    gc_fractions=(0.2, 0.7),
    class_shares=(0.6, 0.4),
    segment_length=5.0,
    cpg_depletion=0.3,
    periods=(1, 2),
    tandem_share=0.2,
    tandem_length=3.0,
    num_families=1,
    family_length=2,
    element_share=0.25,
    divergence=0.15,
)


# The artificial genome against a second statement of its four rules ---------------------------------------------------


def states():
    families = TINY.families().tolist()
    rules = ["background", *(("tandem", p) for p in TINY.periods)]
    rules += [("element", f, k) for f in range(len(families)) for k in range(TINY.family_length)]
    return list(itertools.product(range(2), rules))


def step_probability(old, new):
    """P(hidden state | hidden state before), in words of the docstring, state by state."""
    (kind, rule), (new_kind, new_rule) = old, new
    background = 1 - TINY.tandem_share - TINY.element_share
    tandem_rate = TINY.tandem_share / background / TINY.tandem_length
    element_rate = TINY.element_share / background / ((TINY.family_length + 1) / 2)
    if rule == "background":
        redraw = 1 / TINY.segment_length
        if new_rule == "background":
            stays = 1 - redraw - tandem_rate - element_rate
            return redraw * TINY.class_shares[new_kind] + stays * (new_kind == kind)
        choices = len(TINY.periods) if new_rule[0] == "tandem" else 2 * TINY.family_length
        rate = tandem_rate if new_rule[0] == "tandem" else element_rate
        return (new_kind == kind) * rate / choices
    if new_kind != kind:
        return 0.0
    if rule[0] == "tandem":
        return {rule: 1 - 1 / TINY.tandem_length, "background": 1 / TINY.tandem_length}.get(new_rule, 0.0)
    _, family, place = rule
    follows = "background" if place == TINY.family_length - 1 else ("element", family, place + 1)
    return float(new_rule == follows)


def background_probability(base, before, kind):
    gc = TINY.gc_fractions[kind]
    plain = [(1 - gc) / 2, gc / 2, gc / 2, (1 - gc) / 2]
    if before == 1:
        lost = plain[2] * (1 - TINY.cpg_depletion)
        plain[2] -= lost
        plain[0] += lost
    return plain[base]


def emission_probability(state, sequence, t):
    kind, rule = state
    background = background_probability(sequence[t], sequence[t - 1] if t else None, kind)
    if rule == "background" or (rule[0] == "tandem" and t < rule[1]):
        return background
    original = sequence[t - rule[1]] if rule[0] == "tandem" else TINY.families()[rule[1], rule[2]].item()
    return (1 - TINY.divergence) * (sequence[t] == original) + TINY.divergence * background


def stationary():
    """Found by power iteration, not by the formula."""
    all_states = states()
    matrix = torch.tensor([[step_probability(a, b) for b in all_states] for a in all_states], dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(all_states), dtype=torch.float64))
    share = torch.full((len(all_states),), 1 / len(all_states), dtype=torch.float64)
    for _ in range(2000):
        share = share @ matrix
    return matrix, share


def brute_force(sequence):
    """P(sequence), summed over every path of hidden states."""
    matrix, share = stationary()
    all_states = states()
    total = 0.0
    for path in itertools.product(range(len(all_states)), repeat=len(sequence)):
        probability = float(share[path[0]])
        for t, state in enumerate(path):
            probability *= float(matrix[path[t - 1], state]) if t else 1.0
            if probability == 0.0:
                break
            probability *= emission_probability(all_states[state], sequence, t)
        total += probability
    return total


@pytest.mark.parametrize("sequence", [[1, 2, 0], [3, 3, 3], [0, 1, 0]])
def test_surprisal_equals_the_sum_over_all_hidden_paths(sequence):
    found = float(TINY.surprisal(torch.tensor([sequence])).sum())
    assert found == pytest.approx(-math.log(brute_force(sequence)), rel=1e-12)


def test_probabilities_of_all_sequences_sum_to_one():
    every = torch.tensor(list(itertools.product(range(4), repeat=5)))
    assert float(TINY.surprisal(every).sum(1).neg().exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_samples_follow_the_likelihood():
    """Every sequence of four bases appears as often as its probability says."""
    count = 20_000
    sample = TINY.sample(count, 4, seed=3).long()
    found = torch.bincount(sample @ torch.tensor([64, 16, 4, 1]), minlength=256).double()
    every = torch.tensor(list(itertools.product(range(4), repeat=4)))
    expected = count * TINY.surprisal(every).sum(1).neg().exp()
    chi_square = float(((found - expected).square() / expected).sum())
    assert chi_square < 255 + 5 * math.sqrt(2 * 255)


def test_continuations_follow_the_likelihood():
    count, prompt = 10_000, torch.tensor([[1, 2, 2, 0]])
    drawn = TINY.continuations(prompt.expand(count, -1), 2, seed=0).long()
    found = torch.bincount(drawn @ torch.tensor([4, 1]), minlength=16).double()
    every = torch.tensor(list(itertools.product(range(4), repeat=2)))
    whole = TINY.surprisal(torch.cat([prompt.expand(16, -1), every], dim=1))[:, 4:].sum(1)
    expected = count * whole.neg().exp()
    chi_square = float(((found - expected).square() / expected).sum())
    assert chi_square < 15 + 5 * math.sqrt(2 * 15)


def test_the_genome_has_what_it_is_made_for():
    model = IsochoreModel(tandem_share=0.0, element_share=0.0, segment_length=1e9)
    genome = model.sample(400, 300, seed=0).long()
    gc = gc_fraction(genome, 300).flatten()
    assert float(gc.std()) > 1.5 * math.sqrt(0.24 / 300)  # isochores differ more than chance
    after_c = genome[:, 1:][genome[:, :-1] == 1]
    after_a = genome[:, 1:][genome[:, :-1] == 0]
    ratio = float((after_c == 2).double().mean() / (after_a == 2).double().mean())
    assert ratio == pytest.approx(model.cpg_depletion, abs=0.05)


def test_equal_seeds_give_equal_genomes():
    one, again, other = (IsochoreModel().sample(3, 40, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# Records --------------------------------------------------------------------------------------------------------------

FASTA = b">chr1 the first\nACGT\nacgtn\n\n;comment\nRYK\n>chr2\r\nTTTT\r\nUU\r\n"


@pytest.mark.parametrize("packed", [False, True])
def test_fasta_of_many_records_cases_and_letters(tmp_path, packed):
    file = tmp_path / ("genome.fa.gz" if packed else "genome.fa")
    file.write_bytes(gzip.compress(FASTA) if packed else FASTA)
    records = list(read_fasta(file))
    assert [record.name for record in records] == ["chr1", "chr2"]
    assert [decode_bases(record.tokens) for record in records] == ["ACGTACGTNNNN", "TTTTTT"]


def test_fasta_is_read_record_by_record(tmp_path):
    file = tmp_path / "genome.fa"
    file.write_bytes(b">good\nACGT\n>bad\nACGJ\n")
    records = read_fasta(file)
    assert next(records).name == "good"
    with pytest.raises(ValueError, match=r"read_fasta: line 4 of genome\.fa must hold bases .* got 'J'"):
        next(records)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"ACGT\n", r"line 1 of genome\.fa must begin a record with '>'; got 'ACGT'"),
        (b"", "path must hold at least one record"),
        (b">\nACGT\n", "line 1 of genome.fa must name its record after '>'"),
        (b">empty\n>next\nACGT\n", r"record 'empty' of genome\.fa must hold bases"),
        (gzip.compress(FASTA, mtime=0)[:-9], "path must be a whole gzip file"),
    ],
)
def test_damaged_fasta_says_where(tmp_path, content, says):
    file = tmp_path / "genome.fa"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        list(read_fasta(file))


def test_missing_fasta_is_named():
    with pytest.raises(ValueError, match=r"read_fasta: path must be a file that exists; got 'no/such\.fa'"):
        next(iter(open_genome("no/such.fa")))


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_data_sets_in_the_format_of_the_hub(tmp_path, ending):
    pytest.importorskip("datasets")
    table = pandas.DataFrame({"ID": ["chr1", "chrX"], "Sequence": ["ACGTNacg", "TTTT"]})
    file = tmp_path / f"test.{ending}"
    table.to_parquet(file) if ending == "parquet" else table.to_csv(file, index=False)
    records = list(open_genome(f"hub:{tmp_path}"))
    assert [(record.name, decode_bases(record.tokens)) for record in records] == [
        ("chr1", "ACGTNACG"),
        ("chrX", "TTTT"),
    ]


def test_data_set_without_sequences_is_refused(tmp_path):
    pytest.importorskip("datasets")
    pandas.DataFrame({"label": [1]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"must have a column named sequence or seq or text; got \['label'\]"):
        list(read_hub(str(tmp_path)))


def test_without_network_the_hub_fails_at_once(monkeypatch):
    pytest.importorskip("datasets")

    def unreachable(*arguments, **keywords):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(ValueError, match=r"'owner/name' must be reachable .* download the genome as a FASTA file"):
        next(read_hub("owner/name"))


def test_without_the_library_the_hub_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'eotattn\[data\]'"):
        next(read_hub("owner/name"))


def test_other_letters_are_refused():
    with pytest.raises(ValueError, match=r"encode_bases: text must hold bases .* got 'E'"):
        encode_bases(b"ACGTE")


# Windows --------------------------------------------------------------------------------------------------------------


def records(*sizes):
    """Records that count upwards, so that every window shows where it comes from."""
    return [DnaRecord(f"r{k}", (torch.arange(size) % 5).to(torch.uint8)) for k, size in enumerate(sizes)]


def blocks_of(task):
    """How many there are in all parts."""
    return len(task.train_blocks) + len(task.validation_blocks) + len(task.held_out_blocks)


def test_batches_are_windows_of_training_blocks_and_depend_on_seed_and_step_alone():
    task = DnaTask.from_records(records(400), length=6, block_length=20, held_out_percent=30)
    one, again, other = (task.batch(7, seed=1, step=step) for step in (3, 3, 4))
    assert torch.equal(one.inputs, again.inputs)
    assert not torch.equal(one.inputs, other.inputs)
    assert torch.equal(one.inputs[:, 1:], one.targets[:, :-1])
    assert torch.equal((one.inputs + 1) % 5, one.targets)


def test_every_block_is_on_one_side_whatever_else_the_genome_holds():
    whole = DnaTask.from_records(records(400, 210), length=6, block_length=20, held_out_percent=30)
    part = DnaTask.from_records(records(400), length=6, block_length=20, held_out_percent=30)
    assert blocks_of(whole) == 30  # ten bases are left over
    assert blocks_of(part) == 20
    for name in ("held_out_blocks", "validation_blocks"):
        assert torch.equal(getattr(whole, name)[: len(getattr(part, name))], getattr(part, name))
    assert whole.fingerprint != part.fingerprint
    assert (
        part.fingerprint
        == DnaTask.from_records(records(400), length=6, block_length=20, held_out_percent=30).fingerprint
    )


def test_blocks_that_are_mostly_unknown_are_dropped():
    unknown = DnaRecord("gap", torch.full((100,), 4, dtype=torch.uint8))
    task = DnaTask.from_records([unknown, *records(400)], length=6, block_length=20, held_out_percent=30)
    assert blocks_of(task) == 20


def test_held_out_windows_do_not_overlap_and_blocks_take_turns():
    blocks = torch.arange(30, dtype=torch.uint8).view(2, 15)
    task = DnaTask(blocks, blocks + 100, blocks, length=6)
    windows = task.held_out_windows(6, 4)
    assert windows[:, 0].tolist() == [0, 15, 7, 22]
    assert torch.equal(windows[3], torch.arange(22, 29))
    assert task.validation_windows(6, 4)[:, 0].tolist() == [100, 115, 107, 122]
    with closed_data(), pytest.raises(ClosedDataError, match="held_out_windows: test data must not be read"):
        task.held_out_windows(6, 4)


def test_genomes_make_tasks():
    genome = IsochoreGenome(IsochoreModel(), num_blocks=3, block_length=30, num_held_out=2)
    task = genome.task(16)
    assert task is genome.task(16)  # once in a process
    assert task.train_blocks.shape == (3, 30)
    assert task.held_out_blocks.shape == task.validation_blocks.shape == (2, 17)
    assert not torch.equal(task.held_out_blocks, task.validation_blocks)


def test_stored_genomes_make_tasks(tmp_path):
    file = tmp_path / "genome.fa"
    file.write_bytes(b">chr1\n" + b"ACGT" * 200 + b"\n")
    task = StoredGenome(str(file), block_length=40, held_out_percent=30).task(8)
    assert task.train_blocks.shape[1] == 40
    assert blocks_of(task) == 20


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: IsochoreModel(class_shares=(0.5, 0.5)), "class_shares must be 5 shares that sum to one"),
        (lambda: IsochoreModel(gc_fractions=(1.0,), class_shares=(1.0,)), r"gc_fractions must lie in \(0, 1\)"),
        (lambda: IsochoreModel(divergence=1.5), r"divergence must lie in \[0, 1\]"),
        (lambda: IsochoreModel(tandem_share=0.6, element_share=0.4), "leave room for background"),
        (lambda: IsochoreModel(periods=()), "periods must hold at least one period"),
        (lambda: IsochoreModel().surprisal(torch.tensor([[0, 4]])), r"tokens must be bases 0 to 3; got \(0, 4\)"),
        (lambda: IsochoreModel().surprisal(torch.zeros(3)), r"tokens must be integers of shape \(B, L\)"),
        (lambda: IsochoreModel().sample(0, 4, seed=0), "count must be at least 1"),
        (
            lambda: DnaTask(torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(2, 8), 8),
            "train_blocks must be .* more than length = 8",
        ),
        (lambda: DnaTask.from_records(records(10), length=4, block_length=20), "fill blocks of all parts"),
        (lambda: gc_fraction(torch.zeros(7), 2), "be a multiple of window = 2 long"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, says):
    with pytest.raises(ValueError, match=says):
        call()
