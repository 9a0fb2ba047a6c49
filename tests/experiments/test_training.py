"""Training: resumes to the bit, learns, and keeps log-priors in a group of their own."""

import signal
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from eotattn.experiments.networks import CopyReader, CopyReaderConfig, Decoder, DecoderConfig
from eotattn.experiments.optimisation import TrainingConfig, learning_rate_factor, parameter_groups
from eotattn.experiments.tasks import CopyMixture, step_generator
from eotattn.experiments.tasks.batches import IGNORED, Batch
from eotattn.experiments.training import _batches, train

TASK = CopyMixture(vocabulary_size=5, length=7)
CONFIG = TrainingConfig(steps=9, batch_size=3, warmup_steps=2, log_every=2, checkpoint_every=4, evaluate_every=3)


def reader():
    torch.manual_seed(0)
    network = CopyReader(CopyReaderConfig(vocabulary_size=5, embed_dim=6, num_heads=3, num_frequencies=2))
    network.readout = nn.Sequential(nn.Dropout(0.2), network.readout)  # makes the random state matter
    return network


def weight_norm(network, step):
    return [{"norm": float(sum(p.square().sum() for p in network.parameters()))}]


class BreakOffError(Exception):
    pass


class Interrupting:
    """A task that breaks off once, before a given step."""

    def __init__(self, at):
        self.at = at

    def batch(self, batch_size, *, seed, step):
        if step == self.at:
            raise BreakOffError
        return TASK.batch(batch_size, seed=seed, step=step)


@pytest.mark.parametrize("at", [0, 3, 4, 7])
def test_interrupted_and_resumed_run_equals_the_uninterrupted_one_to_the_bit(at, tmp_path):
    whole = reader()
    whole_result = train(whole, TASK, CONFIG, evaluate=weight_norm)
    with pytest.raises(BreakOffError):
        train(reader(), Interrupting(at), CONFIG, evaluate=weight_norm, checkpoint=tmp_path / "run.pt")
    fresh = reader()  # seeds the dropout too, as a new process would
    result = train(fresh, TASK, CONFIG, evaluate=weight_norm, checkpoint=tmp_path / "run.pt")
    assert result.rows == whole_result.rows
    assert result.evaluations == whole_result.evaluations
    for one, other in zip(whole.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import test_training as here

torch.set_num_threads(int(sys.argv[4]))

class Deadly:
    def batch(self, batch_size, *, seed, step):
        if step == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return here.TASK.batch(batch_size, seed=seed, step=step)

here.train(here.reader(), Deadly(), here.CONFIG, evaluate=here.weight_norm, checkpoint=Path(sys.argv[2]))
"""


def test_killed_and_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path):
    path, whole = tmp_path / "run.pt", reader()
    expected = train(whole, TASK, CONFIG, evaluate=weight_norm)
    threads = str(torch.get_num_threads())  # sums over other numbers of threads round otherwise
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(path), "6", threads]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert torch.load(path)["step"] == 4
    resumed = reader()
    assert train(resumed, TASK, CONFIG, evaluate=weight_norm, checkpoint=path).rows == expected.rows
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rows_come_every_few_steps_and_hooks_when_due(tmp_path):
    result = train(reader(), TASK, CONFIG, evaluate=weight_norm)
    assert [row["step"] for row in result.rows] == [2, 4, 6, 8]
    assert [row["step"] for row in result.evaluations] == [0, 3, 6, 9]
    assert result.device == "cpu"


def test_finished_run_is_not_trained_again(tmp_path):
    network, path = reader(), tmp_path / "run.pt"
    first = train(network, TASK, CONFIG, checkpoint=path)
    before = [p.clone() for p in network.parameters()]
    again = reader()
    assert train(again, TASK, CONFIG, checkpoint=path).rows == first.rows
    assert all(torch.equal(one, other) for one, other in zip(before, again.parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_failed_checkpoint_leaves_the_old_one(tmp_path, monkeypatch):
    path, save, calls = tmp_path / "run.pt", torch.save, []

    def break_off_at_the_second(state, target):
        calls.append(state["step"])
        if len(calls) == 1:
            return save(state, target)
        target.write_bytes(b"half")
        raise BreakOffError

    monkeypatch.setattr(torch, "save", break_off_at_the_second)
    with pytest.raises(BreakOffError):
        train(reader(), TASK, CONFIG, checkpoint=path)
    assert calls == [4, 8]
    assert torch.load(path)["step"] == 4


def test_accumulation_takes_the_same_steps():
    plain, parted = reader().eval(), reader().eval()
    plain.readout[0].p = parted.readout[0].p = 0.0  # random numbers of parts are others than those of the whole
    config = replace(CONFIG, batch_size=6)
    expected = train(plain, TASK, config).rows
    found = train(parted, TASK, replace(config, accumulation=3)).rows
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], abs=1e-6)
    inputs = TASK.batch(2, seed=1, step=0).inputs
    torch.testing.assert_close(plain(inputs), parted(inputs), rtol=0, atol=1e-5)


def test_compiled_training_takes_the_same_steps_and_compiles_the_network(monkeypatch):
    compiled = []

    def trace_only(module, **options):
        compiled.append(options)
        return compile_module(module, backend="eager", **options)

    compile_module = torch.compile
    monkeypatch.setattr(torch, "compile", trace_only)
    plain, traced = reader(), reader()
    plain.readout[0].p = traced.readout[0].p = 0.0
    expected = train(plain, TASK, CONFIG, evaluate=weight_norm)
    result = train(traced, TASK, replace(CONFIG, compile=True), evaluate=weight_norm)
    assert len(compiled) == 1
    assert [row["loss"] for row in result.rows] == pytest.approx([row["loss"] for row in expected.rows], abs=1e-6)
    assert result.evaluations[-1]["norm"] == pytest.approx(expected.evaluations[-1]["norm"], rel=1e-5)


def test_mixed_precision_ends_with_training():
    network, seen = reader(), set()
    network.readout.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    rows = train(network, TASK, replace(CONFIG, precision="bf16"), evaluate=weight_norm).rows
    assert seen == {torch.bfloat16}
    assert rows[0]["loss"] == pytest.approx(train(reader(), TASK, CONFIG).rows[0]["loss"], abs=3e-2)
    assert network(TASK.batch(2, seed=0, step=0).inputs).dtype == torch.float32
    assert network.attention.out_proj(torch.ones(1, 6)).dtype == torch.float32


class Images:
    """Two classes of (1, 2, 2) images that a linear map tells apart."""

    def batch(self, batch_size, *, seed, step):
        generator = step_generator(seed, step)
        classes = torch.randint(2, (batch_size,), generator=generator)
        noise = torch.randn(batch_size, 1, 2, 2, generator=generator)
        return Batch(noise / 4 + classes.view(-1, 1, 1, 1), classes)


def test_images_are_classified_by_the_same_loop():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    config = TrainingConfig(steps=60, batch_size=16, learning_rate=5e-2, log_every=10)
    losses = [row["loss"] for row in train(network, Images(), config).rows]
    assert losses[-1] < 0.3 < losses[0]


def test_batches_made_ahead_are_the_same_ones_in_the_same_order():
    made = list(_batches(TASK, CONFIG, 2, ahead=True))
    expected = list(_batches(TASK, CONFIG, 2, ahead=False))
    assert len(made) == CONFIG.steps - 2
    assert all(torch.equal(one.inputs, other.inputs) for one, other in zip(made, expected, strict=True))
    with pytest.raises(BreakOffError):
        list(_batches(Interrupting(5), CONFIG, 2, ahead=True))
    assert list(_batches(TASK, CONFIG, CONFIG.steps, ahead=True)) == []


def test_a_batch_without_targets_is_refused():
    class Silent:
        def batch(self, batch_size, *, seed, step):
            batch = TASK.batch(batch_size, seed=seed, step=step)
            return Batch(batch.inputs, torch.full_like(batch.targets, IGNORED))

    with pytest.raises(ValueError, match="a batch must have a target that counts"):
        train(reader(), Silent(), CONFIG)


def test_training_lowers_the_loss_towards_the_best_possible():
    network = CopyReader(CopyReaderConfig(vocabulary_size=5, embed_dim=12, num_frequencies=4, max_period=14.0))
    config = TrainingConfig(steps=60, batch_size=16, learning_rate=1e-2, prior_learning_rate=3e-2, log_every=10)
    losses = [row["loss"] for row in train(network, TASK, config).rows]
    assert losses[-1] < losses[0] - 0.2


def test_log_priors_have_their_own_rate_and_no_decay():
    network = Decoder(DecoderConfig("goat", embed_dim=12, num_heads=3, train_length=6))
    matrices, vectors, priors = parameter_groups(network, CONFIG)
    assert priors["peak"] == CONFIG.prior_learning_rate
    assert (matrices["weight_decay"], vectors["weight_decay"], priors["weight_decay"]) == (0.1, 0.0, 0.0)
    in_priors = sum(p.numel() for block in network.blocks for p in block.attention.prior.parameters())
    assert sum(p.numel() for p in priors["params"]) == in_priors
    everything = sum(p.numel() for p in network.parameters())
    assert sum(p.numel() for group in (matrices, vectors, priors) for p in group["params"]) == everything


def test_frozen_priors_are_in_no_group():
    network = Decoder(DecoderConfig("alibi", embed_dim=12, num_heads=3, train_length=6))
    assert len(parameter_groups(network, CONFIG)) == 2


def test_learning_rate_warms_up_then_falls_to_a_tenth():
    config = TrainingConfig(steps=101, batch_size=1, warmup_steps=20)
    factors = [learning_rate_factor(step, config) for step in range(101)]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert factors[60] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(factors[20:]))


def test_configuration_is_frozen():
    with pytest.raises(FrozenInstanceError):
        CONFIG.steps = 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"warmup_steps": 9}, "warmup_steps must be below steps = 9; got 9"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite"),
        ({"accumulation": 0}, "accumulation must be at least 1; got 0"),
        ({"precision": "fp8"}, "precision must be one of 'no', 'bf16'; got 'fp8'"),
        ({"checkpoint_every": -1}, "checkpoint_every must be at least 0"),
    ],
)
def test_bad_configurations_say_what_is_wrong(changes, says):
    with pytest.raises(ValueError, match=says):
        replace(CONFIG, **changes)


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    train(reader(), TASK, CONFIG, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="checkpoint must come from the same TrainingConfig"):
        train(reader(), TASK, replace(CONFIG, seed=1), checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="checkpoint must be in a folder that exists"):
        train(reader(), TASK, CONFIG, checkpoint=tmp_path / "missing" / "run.pt")
