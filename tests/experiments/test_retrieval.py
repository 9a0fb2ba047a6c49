"""Figure 3: sequences that say what they should, examinations that count right answers, a study made of records."""

from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch

from eotattn.experiments.examination import correct_answers, examine
from eotattn.experiments.figures import fig3_retrieval
from eotattn.experiments.figures.fig3_retrieval import RetrievalStudy
from eotattn.experiments.networks import Decoder, DecoderConfig
from eotattn.experiments.records import Record
from eotattn.experiments.study import as_table
from eotattn.experiments.tasks import IGNORED, NEEDLE, PASSKEY, RetrievalTask
from eotattn.experiments.tasks.retrieval import ALPHABET

SIZES = {"vocabulary_size": len(ALPHABET), "num_layers": 1, "embed_dim": 8, "num_heads": 2, "train_length": 48}


def text(tokens):
    return "".join(ALPHABET[token] for token in tokens)


class Reader(torch.nn.Module):
    """Knows the protocol: reads the answer behind the marker, and gets chosen answer tokens wrong."""

    def __init__(self, haystack, wrong=()):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.haystack, self.wrong = haystack, set(wrong)

    def forward(self, tokens, *, num_targets):
        logits = torch.zeros(tokens.shape[0], num_targets, len(ALPHABET))
        for row, sequence in enumerate(tokens):
            start = text(sequence).index(self.haystack.marker) + len(self.haystack.marker)
            for k in range(num_targets):
                found = int(sequence[start + k])
                logits[row, k, (found + 1) % len(ALPHABET) if k in self.wrong else found] = 1.0
        return logits


# The task ------------------------------------------------------------------------------------------------------------


def test_passkeys_are_written_as_the_protocol_says():
    batch = RetrievalTask(length=80, haystacks=(PASSKEY,)).batch(20, seed=1, step=2)
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        whole = text([*inputs, targets[-1]])
        assert whole.startswith("read on. ")
        assert len(whole) == 81
        hidden, _, asked = whole.rpartition("? passkey: ")
        answer = hidden.split("passkey: ")[1][:8]
        assert answer.isdigit()
        assert asked == answer
        assert set(hidden.replace(f"passkey: {answer}. ", "").removeprefix("read on. ")) <= set(PASSKEY.filler)


def test_needles_are_written_as_the_protocol_says():
    batch = RetrievalTask(length=80, haystacks=(NEEDLE,)).batch(20, seed=1, step=2)
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        hidden, _, asked = text([*inputs, targets[-1]]).partition("?[")
        needle = hidden[hidden.index("[") + 1 : hidden.index("]")]
        assert len(needle) == 12
        assert asked == needle
        assert set(hidden) == set("acgt[]")


def test_the_loss_is_on_the_answer_alone_and_targets_are_successors():
    batch = RetrievalTask(length=70).batch(5, seed=0, step=0)
    counted = batch.targets != IGNORED
    for row, length in enumerate((8, 12, 8, 12, 8)):  # tasks take turns
        assert counted[row].tolist() == [False] * (70 - length) + [True] * length
    assert torch.equal(batch.inputs[:, 1:][counted[:, :-1]], batch.targets[:, :-1][counted[:, :-1]])


def test_batches_depend_on_seed_and_step_alone():
    task = RetrievalTask(length=64)
    one, again = (task.batch(4, seed=3, step=5) for _ in range(2))
    assert torch.equal(one.inputs, again.inputs)
    assert torch.equal(one.targets, again.targets)
    for other in (task.batch(4, seed=4, step=5), task.batch(4, seed=3, step=6)):
        assert not torch.equal(one.inputs, other.inputs)


@pytest.mark.parametrize("haystack", [PASSKEY, NEEDLE], ids=lambda haystack: haystack.name)
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_examined_answers_lie_at_their_depth(haystack, depth):
    length = 500
    tokens = RetrievalTask(length).examination(haystack, 3, depth=depth)
    room = length + 1 - haystack.shortest
    for row in tokens:
        start = text(row).index(haystack.marker)
        assert start == len(haystack.preamble) + round(depth * room)


def test_training_depths_cover_their_range():
    rows = RetrievalTask(400, (PASSKEY,)).batch(400, seed=0, step=0).inputs
    places = [(text(row).index("passkey: ") - 9) / (401 - PASSKEY.shortest) for row in rows]
    assert min(places) < 0.02
    assert 0.77 < max(places) <= 0.801
    assert np.mean(places) == pytest.approx(0.4, abs=0.04)


def test_examinations_of_different_depths_and_lengths_are_different_sequences():
    near, far = RetrievalTask(64), RetrievalTask(64)
    assert torch.equal(near.examination(NEEDLE, 2, depth=0.5), far.examination(NEEDLE, 2, depth=0.5))
    answers = [text(near.examination(NEEDLE, 1, depth=depth)[0, -12:]) for depth in (0.1, 0.5, 0.9)]
    assert len(set(answers)) == 3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: RetrievalTask(20), r"RetrievalTask: length must be at least 47; got 20"),
        (lambda: RetrievalTask(64, ()), r"haystacks must hold at least one"),
        (lambda: RetrievalTask(64).examination(NEEDLE, 1, depth=1.5), r"depth must lie between 0 and 1; got 1.5"),
        (lambda: RetrievalTask(64).examination(NEEDLE, 0, depth=0.5), r"count must be at least 1; got 0"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# The examination -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [100, 10_000])
def test_right_answers_are_counted_token_by_token(batch_tokens):
    right = correct_answers(
        Reader(NEEDLE, wrong=(2, 7)), NEEDLE, length=64, depth=0.3, count=5, batch_tokens=batch_tokens
    )
    assert right.shape == (5, 12)
    assert (~right).nonzero()[:, 1].tolist() == [2, 7] * 5


def test_examination_has_a_row_a_cell_and_quantity():
    rows = examine(Reader(PASSKEY, wrong=(0,)), [PASSKEY], lengths=(64, 128), depths=(0.1, 0.9), count=4)
    values = {(row["quantity"], row["length"], row["depth"]): row["value"] for row in rows}
    assert len(rows) == len(values) == 8
    assert {value for (quantity, _, _), value in values.items() if quantity == "exact_match"} == {0.0}
    assert {value for (quantity, _, _), value in values.items() if quantity == "token_accuracy"} == {7 / 8}


def test_teacher_forced_exact_matches_are_those_of_greedy_decoding():
    torch.manual_seed(0)
    network = Decoder(DecoderConfig("alibi", **SIZES)).eval()
    with torch.no_grad():
        network.readout.weight[[token for token in range(len(ALPHABET)) if ALPHABET[token] not in "acgt"]] = 0.0
    right = correct_answers(network, NEEDLE, length=48, depth=0.4, count=64)
    tokens = RetrievalTask(48, (NEEDLE,)).examination(NEEDLE, 64, depth=0.4)
    written = tokens[:, :-12]
    with torch.no_grad():
        for _ in range(12):
            written = torch.cat([written, network(written)[:, -1:].argmax(-1)], dim=1)
    greedy = written[:, -12:] == tokens[:, -12:]
    assert torch.equal(right.all(-1), greedy.all(-1))
    first_error = greedy.int().cumprod(-1).sum(-1)  # up to the first error both have read the same
    assert torch.equal(right.int().cumprod(-1).sum(-1), first_error)
    assert int(first_error.max()) > 0


# The study -----------------------------------------------------------------------------------------------------------


RECIPE = fig3_retrieval.recipe("laptop")


def record(name, seed, values, variants, loss=0.0):
    """A record of some variants with the accuracies that functions of (task, length, depth) give."""
    rows = [{"panel": "training", "quantity": "training_loss", "unit": "nats per token", "step": 9, "value": loss}]
    rows += [
        {"variant": variant, "quantity": quantity, "task": task, "length": length, "depth": depth}
        | {"value": values.get(variant, lambda *_: 0.5)(task, length, depth) - 1e-6 * seed}
        for variant in variants
        for quantity in ("exact_match", "token_accuracy")
        for task in ("passkey", "needle")
        for length in RECIPE.lengths
        for depth in RECIPE.depths
    ]
    rows += [
        {"variant": "goat", "quantity": "log_prior", "block": b, "head": h, "lag": lag, "value": 0.0}
        for b in range(2)
        for h in range(4)
        for lag in (fig3_retrieval.shown_lags(128) if "goat" in variants and seed == 0 else ())
    ]
    return Record(name, {}, seed, rows, "", "cpu", 1.0, {})


def study_of(recipe=RECIPE, **values):
    named = {run.name: run.configuration for run in fig3_retrieval.runs(recipe, {})}
    readers = {name: (run.decoder.attention, *run.also_read_as) for name, run in named.items()}
    records = {name: record(name, named[name].seed, values, read) for name, read in readers.items()}
    return RetrievalStudy(recipe, as_table(records), {"runs": {}, "data": []})


THREE = replace(RECIPE, seeds=(0, 1, 2), repeated=tuple(RECIPE.trained))


def verdict(**values):
    return fig3_retrieval.verdict(study_of(THREE, **values))


def test_scores_are_laid_out_by_seed_length_and_depth():
    study = study_of(goat=lambda task, length, depth: length + depth + (0.001 if task == "needle" else 0))
    scores = study.scores("goat", "needle")
    assert scores.shape == (1, 5, 5)
    assert scores[0, 1, 2] == pytest.approx(128.501)
    assert study.scores("goat", "passkey")[0, 4, 0] == pytest.approx(1024.1)


def test_scaled_rope_is_read_from_the_records_of_rope():
    study = study_of(rope=lambda *_: 0.25, ntk_rope=lambda *_: 0.75)
    assert float(study.scores("rope", "needle").mean()) == 0.25
    assert float(study.scores("ntk_rope", "needle").mean()) == 0.75


def test_the_verdict_follows_from_the_numbers():
    good = verdict(goat=lambda *_: 1.0, alibi=lambda *_: 0.99)
    assert "**GOAT, passkey, 16x: at least 0.99: held.**" in good
    assert "**GOAT nowhere more than 0.01 below ALiBi: held.**" in good
    assert "**GOAT, paper's form, needle, 16x: at least 0.99: refuted.**" in good
    one_cell = verdict(
        goat=lambda task, length, depth: 0.9 if (task, length, depth) == ("needle", 1024, 0.3) else 1.0,
        alibi=lambda *_: 1.0,
    )
    assert "**GOAT, needle, 16x: at least 0.99: refuted.**" in one_cell
    assert "**GOAT, passkey, 16x: at least 0.99: held.**" in one_cell
    assert "**GOAT nowhere more than 0.01 below ALiBi: refuted.**" in one_cell
    assert "-0.020 ± 0.000 (needle, 1024 tokens)" in one_cell
    one_seed = fig3_retrieval.verdict(study_of(goat=lambda *_: 1.0))
    assert "**GOAT, passkey, 16x: at least 0.99: undecided.**" in one_seed


def test_tables_and_figure_are_drawn_from_records_alone(tmp_path):
    study = study_of(goat=lambda *_: 1.0)
    assert study.accuracies().shape == (7 * 2, 2 * 5)
    figure = fig3_retrieval.draw(study)
    assert len(figure.axes) == 3 + 14
    assert len(figure.axes[2].lines) == 2 * 4 + 1  # heads, and the training length
    figure.savefig(tmp_path / "figure.png", dpi=40)


def planned(recipe, losses):
    """Runs by name, when the choosing ones have ended with training losses by rate."""
    first = {run.name: run.configuration for run in fig3_retrieval.runs(recipe, {}) if run.chooses}
    assert {run.seed for run in first.values()} <= {0}
    ended = {name: record(name, 0, {}, (), losses[run.training.learning_rate]) for name, run in first.items()}
    return {run.name: run.configuration for run in fig3_retrieval.runs(recipe, ended)}


def test_all_seeds_take_the_rate_that_the_first_seed_chose():
    for losses, best in (({3e-4: 0.5, 6e-4: 0.4}, 6e-4), ({3e-4: 0.3, 6e-4: 0.4}, 3e-4)):
        named = planned(replace(fig3_retrieval.recipe("h200"), learning_rates=tuple(losses)), losses)
        assert len(named) == 2 * 5 + 5 + 2 * 3  # two rates of all that train; their reports, three of them thrice
        reports = [run.training for name, run in named.items() if not name.startswith("choose-")]
        assert {(run.learning_rate, run.prior_learning_rate) for run in reports} == {(best, best)}


def test_log_priors_of_fast_kinds_train_at_ten_times_the_rate():
    fast = replace(RECIPE.trained["goat"], attention="fast_goat")
    (run,) = fig3_retrieval.runs(replace(RECIPE, variants=(fast,)), {})
    (rate,) = RECIPE.learning_rates
    training = run.configuration.training
    assert (training.learning_rate, training.prior_learning_rate) == (rate, pytest.approx(10 * rate))


def test_scores_are_those_of_the_best_rate():
    """Of tables too in which every rate was examined."""
    recipe = replace(RECIPE, learning_rates=(1e-3, 3e-3))
    outcomes = {1e-3: (0.25, 0.2), 3e-3: (0.75, 0.1)}  # accuracy, training loss
    records = {}
    for run in fig3_retrieval.runs(recipe, {}):
        accuracy, loss = outcomes[run.configuration.training.learning_rate]
        name, run_name = run.configuration.decoder.attention, run.name.removeprefix("choose-")
        records[run_name] = record(run_name, 0, {name: lambda *_, accuracy=accuracy: accuracy}, (name,), loss)
    study = RetrievalStudy(recipe, as_table(records), {"runs": {}, "data": []})
    assert study.scores("goat", "needle").tolist() == [[[0.75] * 5] * 5]
    assert study.sweep().taken.to_dict() == dict.fromkeys(("goat", "paper_goat", "alibi", "rope", "sinusoidal"), 3e-3)
    ends = "(at an end of the range: goat, paper_goat, alibi, rope, sinusoidal)"
    assert study.rates().endswith(f"0.003 for sinusoidal {ends}")
    records |= {name.replace("0.001", "0.01"): kept for name, kept in records.items() if "-rate0.001-" in name}
    wider = replace(recipe, learning_rates=(1e-3, 3e-3, 1e-2))
    assert replace(study, recipe=wider, table=as_table(records)).rates().endswith("(at an end of the range: none)")
    assert study_of().rates() == "one learning rate, 0.003"


def test_runs_cover_every_variant_and_seed_with_the_papers_sizes():
    recipe = fig3_retrieval.recipe("paper")
    named = planned(recipe, {3e-4: 0.5})
    assert len(named) == 3 * 3 + 2
    assert named["rope-rate0.0003-seed0"].also_read_as == ("interpolated_rope", "ntk_rope")
    assert {run.seed for run in named.values()} == {0, 1, 2}
    run = named["paper_goat-rate0.0003-seed1"]
    assert (run.decoder.num_layers, run.decoder.embed_dim, run.decoder.num_heads) == (12, 512, 8)
    assert (run.training.steps, run.training.batch_size, run.training.learning_rate) == (2000, 32, 3e-4)
    assert (run.training.warmup_steps, run.task.length, run.decoder.num_frequencies) == (400, 256, 8)
    assert run.lengths == (256, 512, 1024, 2048, 4096, 8192)
    faster = fig3_retrieval.recipe("h200")
    assert (faster.variants, faster.task) == (recipe.variants, recipe.task)
    assert (faster.training.steps, faster.learning_rates) == (2000, (1.5e-4, 3e-4, 6e-4, 1.2e-3))


def test_a_run_trains_examines_and_reads_the_prior(tmp_path):
    recipe = replace(fig3_retrieval.recipe("smoke"), learning_rates=(3e-3,))
    (run,) = [run for run in fig3_retrieval.runs(recipe, {}) if run.name == "goat-rate0.003-seed0"]
    found = pandas.DataFrame(fig3_retrieval.measure(run.configuration, tmp_path / "run.pt").rows)
    assert set(found.quantity) >= {"exact_match", "token_accuracy", "training_loss"}
    prior = found[found.quantity == "log_prior"].pivot_table(index=["block", "head"], columns="lag", values="value")
    assert prior.shape == (2 * 4, len(fig3_retrieval.shown_lags(128)))
    assert prior.max(axis=None) == 0.0
    assert (prior.diff(axis=1).abs().max(axis=1) > 0).all()
