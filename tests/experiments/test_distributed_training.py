"""Training over two processes: the same run as in one, also where they hold unequal numbers of targets."""

import os
import socket
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import multiprocessing

from eotattn.experiments.networks import CopyReader, CopyReaderConfig
from eotattn.experiments.tasks import CopyMixture
from eotattn.experiments.tasks.batches import IGNORED, Batch
from eotattn.experiments.training import TrainingConfig, train

CONFIG = TrainingConfig(steps=6, batch_size=4, warmup_steps=2, log_every=1, checkpoint_every=3, learning_rate=1e-3)


class Uneven:
    """Even rows, which rank 0 gets, keep one target in seven; odd rows, which rank 1 gets, keep all."""

    mixture = CopyMixture(vocabulary_size=5, length=7)

    def batch(self, batch_size, *, seed, step):
        inputs, targets = self.mixture.batch(batch_size, seed=seed, step=step)
        targets[::2, 1:] = IGNORED
        return Batch(inputs, targets)


def reader():
    torch.manual_seed(0)
    return CopyReader(CopyReaderConfig(vocabulary_size=5, embed_dim=6, num_heads=3, num_frequencies=2))


#: Batches that one step of the optimiser sums.
ACCUMULATIONS = (1, 2)


def work(rank, port, folder):
    """What torchrun does for each process, and then a run of each kind."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    for accumulation in ACCUMULATIONS:
        network, config = reader(), replace(CONFIG, accumulation=accumulation)
        result = train(network, Uneven(), config, checkpoint=folder / f"run{accumulation}.pt")
        assert torch.distributed.get_world_size() == 2
        torch.save({"rows": result.rows, "weights": network.state_dict()}, folder / f"{accumulation}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    alone = reader()
    expected = train(alone, Uneven(), CONFIG).rows
    inputs = Uneven().batch(4, seed=1, step=0).inputs
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(work, args=(port, tmp_path), nprocs=2)
    for accumulation, rank in product(ACCUMULATIONS, (0, 1)):
        found = torch.load(tmp_path / f"{accumulation}-{rank}.pt")
        losses = [row["loss"] for row in found["rows"]]
        assert losses == pytest.approx([row["loss"] for row in expected], abs=1e-5)
        network = reader()
        network.load_state_dict(found["weights"])
        # Outputs, because the bias of the keys has no gradient but rounding, which Adam blows up. It does so, to a
        # degree, with every small gradient: hence a wider tolerance than that of the losses.
        torch.testing.assert_close(network(inputs), alone(inputs), rtol=0, atol=1e-4)


def test_the_oracle_can_fail():
    """A mean over processes of their own means would weigh the few targets of rank 0 too much."""
    network, batch = reader(), Uneven().batch(4, seed=0, step=0)
    losses = torch.nn.functional.cross_entropy(
        network(batch.inputs).flatten(0, -2), batch.targets.flatten(), reduction="none"
    ).view(4, 7)
    counts = (batch.targets != IGNORED).sum(1)
    right = losses.sum() / counts.sum()
    assert train(reader(), Uneven(), CONFIG).rows[0]["loss"] == pytest.approx(right.item(), abs=1e-6)
    of_means = (losses[::2].sum() / counts[::2].sum() + losses[1::2].sum() / counts[1::2].sum()) / 2
    assert abs(of_means - right) > 1e-3
