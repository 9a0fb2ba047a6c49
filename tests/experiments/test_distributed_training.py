"""Training over several processes: the run that one process makes, also resumed by other numbers, also after kills."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from eotattn.cli import main
from eotattn.experiments.networks import CopyReader, CopyReaderConfig
from eotattn.experiments.records import RunFolder
from eotattn.experiments.results import ResultFolder
from eotattn.experiments.tasks import CopyMixture
from eotattn.experiments.tasks.batches import IGNORED, Batch
from eotattn.experiments.training import TrainingConfig, train

#: A checkpoint at step 4 or 8 falls between two rows of the loss, whose sums it must hold.
CONFIG = TrainingConfig(steps=12, batch_size=8, warmup_steps=2, log_every=3, checkpoint_every=4, learning_rate=1e-3)
#: Gradients of log-priors are float32 numbers, so parts of a batch round them by 6e-8; a dozen steps of Adam of 1e-3
#: each move a log-prior by 1e-9 at most from where the whole batch does. All else is float64.
LOSSES, OUTPUTS = 1e-9, 1e-7
ACCUMULATIONS = (1, 4)


class BreakOffError(Exception):
    pass


class Uneven:
    """Rows of even number, which process 0 gets, keep one target in seven; the others keep all."""

    mixture = CopyMixture(vocabulary_size=5, length=7)

    def __init__(self, stop=None):
        self.stop = stop

    def batch(self, batch_size, *, seed, step):
        if step == self.stop:
            raise BreakOffError
        inputs, targets = self.mixture.batch(batch_size, seed=seed, step=step)
        targets[::2, 1:] = IGNORED
        return Batch(inputs, targets)


def reader():
    torch.manual_seed(0)
    return CopyReader(CopyReaderConfig(vocabulary_size=5, embed_dim=6, num_heads=3, num_frequencies=2)).double()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def told(rank, count, port):
    """What a launcher tells a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {**{name: str(value) for name, value in numbers.items()}, "MASTER_ADDR": "127.0.0.1"}


def work(rank, count, port, folder, stop):
    """A whole run a number of parts; then one that goes on from ``shared.pt`` and breaks off at a step."""
    os.environ |= told(rank, count, port)
    torch.set_num_threads(1)
    for accumulation in ACCUMULATIONS:
        network = reader()
        rows = train(network, Uneven(), replace(CONFIG, accumulation=accumulation)).rows
        torch.save({"rows": rows, "weights": network.state_dict()}, folder / f"{count}-{accumulation}-{rank}.pt")
    assert torch.distributed.get_world_size() == count
    resume(folder, stop, f"{count}-resumed-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def resume(folder, stop, name):
    network = reader()
    try:
        rows = train(network, Uneven(stop), CONFIG, checkpoint=folder / "shared.pt").rows
    except BreakOffError:
        return
    torch.save({"rows": rows, "weights": network.state_dict()}, folder / name)


@pytest.fixture(scope="module")
def alone():
    network = reader()
    return network, train(network, Uneven(), CONFIG).rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Whole runs of two and of four processes; and one that two begin, one continues and four end."""
    folder = tmp_path_factory.mktemp("runs")
    multiprocessing.spawn(work, args=(2, free_port(), folder, 5), nprocs=2)
    assert torch.load(folder / "shared.pt")["step"] == 4
    resume(folder, 10, "unfinished.pt")
    assert torch.load(folder / "shared.pt")["step"] == 8
    multiprocessing.spawn(work, args=(4, free_port(), folder, None), nprocs=4)
    return folder


def assert_same_run(file, alone):
    network, expected = alone
    found = torch.load(file)
    assert [row["step"] for row in found["rows"]] == [3, 6, 9, 12]
    assert [row["loss"] for row in found["rows"]] == pytest.approx([row["loss"] for row in expected], abs=LOSSES)
    inputs, again = Uneven().batch(4, seed=1, step=0).inputs, reader()
    again.load_state_dict(found["weights"])
    # Outputs, because the bias of the keys has no gradient but rounding, which Adam divides by itself.
    torch.testing.assert_close(again(inputs), network(inputs), rtol=0, atol=OUTPUTS)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_like_one(count, accumulation, folder, alone):
    for rank in range(count):
        assert_same_run(folder / f"{count}-{accumulation}-{rank}.pt", alone)


@pytest.mark.slow
def test_other_numbers_of_processes_resume_the_same_run(folder, alone):
    for rank in range(4):
        assert_same_run(folder / f"4-resumed-{rank}.pt", alone)
    assert not list(folder.glob("*.partial"))


def test_the_oracle_can_fail():
    """A mean over processes of their own means would weigh the few targets of process 0 too much."""
    network, batch = reader(), Uneven().batch(8, seed=0, step=0)
    losses = torch.nn.functional.cross_entropy(
        network(batch.inputs).flatten(0, -2), batch.targets.flatten(), reduction="none"
    ).view(8, 7)
    counts = (batch.targets != IGNORED).sum(1)
    right = losses.sum() / counts.sum()
    found = train(reader(), Uneven(), replace(CONFIG, log_every=1)).rows[0]["loss"]
    assert found == pytest.approx(right.item(), abs=1e-12)
    of_means = (losses[::2].sum() / counts[::2].sum() + losses[1::2].sum() / counts[1::2].sum()) / 2
    assert abs(of_means - right) > 1e-3


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr("eotattn.experiments.training.num_processes", lambda: 3)
    monkeypatch.setattr("eotattn.experiments.training.join_processes", lambda: None)
    with pytest.raises(ValueError, match="train: batch_size must be a multiple of 6, processes times the parts"):
        train(reader(), Uneven(), replace(CONFIG, accumulation=4))


# Kills --------------------------------------------------------------------------------------------------------------

#: Trains as a process of a launcher does; each attempt but the last kills a process, as ``kills.json`` says.
VICTIM = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import test_distributed_training as here

torch.set_num_threads(1)
folder, rank = Path(sys.argv[2]), int(os.environ["RANK"])
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
kills = json.loads((folder / "kills.json").read_text())
victim, at, writes = kills[attempt] if attempt < len(kills) else (None, None, False)
(folder / f"attempt{attempt}-{rank}").write_text(str(os.getpid()))

def die():
    (folder / f"killed{attempt}").touch()
    os.kill(os.getpid(), signal.SIGKILL)

class Deadly(here.Uneven):
    def batch(self, batch_size, *, seed, step):
        if rank == victim and step == at and not writes:
            die()
        time.sleep(float(os.environ.get("PAUSE", 0)))
        return super().batch(batch_size, seed=seed, step=step)

save = torch.save

def half(state, target):
    if rank == victim and writes and state["step"] >= at:
        target.write_bytes(b"half of a checkpoint")
        die()
    save(state, target)

torch.save = half
config = here.replace(here.CONFIG, checkpoint_every=2)
rows = here.train(here.reader(), Deadly(), config, checkpoint=folder / "shared.pt").rows
(folder / f"rows{rank}.json").write_text(json.dumps(rows))
"""


def torchrun(folder, *options):
    script = folder / "victim.py"
    script.write_text(VICTIM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    return [*command, str(script), str(Path(__file__).parent), str(folder)]


def has_ended(pid):
    """Whether a process is gone, or waits for nothing but its parent's notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_kills_at_any_step_and_during_a_write_change_nothing(seed, tmp_path, alone):
    draw = random.Random(seed)
    kills = [(draw.randrange(2), draw.randrange(12), False), (0, draw.choice([6, 8]), True), (1, 11, False)]
    (tmp_path / "kills.json").write_text(json.dumps(kills))
    command = torchrun(tmp_path, "--max-restarts", "3")
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / f"killed{attempt}").exists() for attempt in range(3)), done.stderr
    for rank in range(2):
        rows = json.loads((tmp_path / f"rows{rank}.json").read_text())
        assert [row["step"] for row in rows] == [3, 6, 9, 12]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone[1]], abs=LOSSES)


@pytest.mark.slow
def test_a_process_whose_fellow_is_killed_ends_with_an_error(tmp_path):
    """Without a launcher that would end it: gloo sees the connection close."""
    (tmp_path / "kills.json").write_text(json.dumps([(1, 3, False)]))
    script, port = torchrun(tmp_path)[-3:], free_port()
    processes = [
        subprocess.Popen([sys.executable, *script], env={**os.environ, **told(rank, 2, port)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        assert processes[1].wait(120) == -signal.SIGKILL
        said = processes[0].communicate(timeout=60)[1].decode()
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode not in (0, -signal.SIGKILL)
    assert "Error" in said
    assert torch.load(tmp_path / "shared.pt")["step"] == 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the states of processes from /proc")
def test_processes_whose_launcher_is_killed_end(tmp_path):
    """Else they would write the same checkpoint as those of the next launcher."""
    (tmp_path / "kills.json").write_text("[]")
    environment = {**os.environ, "PAUSE": "1"}
    launcher = subprocess.Popen(torchrun(tmp_path), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: (tmp_path / "shared.pt").exists(), 120)
        launcher.kill()
        pids = [int((tmp_path / f"attempt0-{rank}").read_text()) for rank in range(2)]
        wait_for(lambda: all(map(has_ended, pids)), 60)
    finally:
        launcher.kill()
    assert torch.load(tmp_path / "shared.pt")["step"] < CONFIG.steps
    assert "the launcher of this process has ended" in launcher.stderr.read().decode()


def wait_for(happens, seconds):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# The command line ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_shares_a_run_and_speaks_once(tmp_path, capsys):
    asked = ["train", "--figure", "sinks", "--scale", "smoke", "--only", "rope-seed0", "--out"]
    assert main([*asked, str(tmp_path / "alone")]) == 0
    lines = capsys.readouterr().out.splitlines()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eotattn"]
    told_to = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run([*command, *asked, str(tmp_path / "two")], **told_to)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(lines) == 2
    assert done.stderr.count("rope, seed 0, step 5: loss") == 1
    (one, device), (two, devices) = (read_run(tmp_path / name) for name in ("alone", "two"))
    assert (device, devices) == ("cpu", "2 x cpu")
    assert two == pytest.approx(one, abs=1e-4)  # float32: ten times what was measured
    wrong = subprocess.run([*command, *asked, str(tmp_path / "two"), "--jobs", "2"], **told_to)
    assert wrong.stderr.count("--jobs must be 1 where the processes of a launcher share each run; got 2") == 1


def read_run(out):
    """Losses of a run, and the device that its record names."""
    folder = RunFolder(ResultFolder(str(out), "smoke", "fig_sinks"))
    record = json.loads((folder.path / "rope-seed0.json").read_text())
    losses = [row["value"] for row in record["rows"] if row["quantity"] in ("training_loss", "validation_loss")]
    return losses, record["device"]
