"""Attention maps as arrays and files."""

import functools
import importlib
import operator

import numpy as np
import pytest
import torch
from families import BY_NAME
from tolerances import assert_close

from eotattn.diagnostics import fit_prior
from eotattn.integrations import capture, map_statistics, read_maps

H, L = 3, 7


@pytest.fixture
def maps():
    score = 2 * torch.randn(2, H, L, L, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.softmax(score.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf), -1)


def stored(maps, form, folder):
    """The same maps in every form that is read."""
    if form == "array":
        return maps.numpy()
    if form == "layers":
        return {"0": maps[0], "1": maps[1].numpy()}
    path = folder / f"maps.{form}"
    if form == "npy":
        np.save(path, maps.numpy())
    elif form == "npz":
        np.savez(path, **{"0": maps[0].numpy(), "1": maps[1].numpy()})
    else:
        importlib.import_module("safetensors.torch").save_file(
            {"0": maps[0].contiguous(), "1": maps[1].contiguous()}, path
        )
    return str(path) if form == "npy" else path


@pytest.mark.parametrize("form", ["array", "layers", "npy", "npz", "safetensors"])
def test_every_form_gives_the_same_statistics(maps, form, tmp_path):
    if form == "safetensors":
        pytest.importorskip("safetensors.torch")
    read = read_maps(stored(maps, form, tmp_path))
    assert list(read) == ["0", "1"]
    for layer, stats in map_statistics(read, sink_positions=(0, 2)).items():
        p = maps[int(layer)]
        assert_close(stats.column_mass[0], p.sum(-2), tolerance=1e-10)
        assert_close(stats.sums["entropy"][0], -torch.special.xlogy(p, p).sum((-1, -2)), tolerance=1e-10)
        assert_close(stats.key_mass[0], p[:, :, [0, 2]].sum(1), tolerance=1e-10)
        assert stats.lag_mass[0, :, : L - 1].abs().max() == 0


def test_fewer_queries_than_keys_are_the_last_ones(maps):
    stats = map_statistics(read_maps(maps[0][:, 2:]))["0"]
    assert_close(
        stats.lag_mass[0, :, stats.max_lag], maps[0].diagonal(dim1=-2, dim2=-1)[:, 2:].sum(-1), tolerance=1e-10
    )


def test_heads_are_selected(maps):
    assert map_statistics(read_maps(maps), heads=[1])["0"].num_heads == 1
    with pytest.raises(ValueError, match=r"map_statistics: heads must name heads from 0 to 2; got \[3\]"):
        map_statistics(read_maps(maps), heads=[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[0, 0], r"read_maps: the maps must have shape \(H, Q, K\) or \(layers, H, Q, K\)"),
        (lambda p: p.masked_fill(p == p.max(), torch.nan), r"read_maps: the map '\d' must be finite; got '\d+ such"),
        (lambda p: p - 0.1, r"read_maps: the map '0' must lie in \[0, 1\]"),
        (lambda p: 0.9 * p, r"read_maps: the map '0' must have rows that sum to one .* got 'a sum of 0\.9000'"),
        (lambda p: p[:0], r"read_maps: the maps must have shape"),
        (lambda p: {}, r"read_maps: attention must hold at least one map"),
    ],
)
def test_bad_maps_are_named(maps, change, message):
    with pytest.raises(ValueError, match=message):
        read_maps(change(maps))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"read_maps: attention must be an existing file"):
        read_maps(tmp_path / "none.npy")
    (tmp_path / "maps.pt").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"read_maps: attention must end in .npy, .npz or .safetensors; got '.*maps.pt'"
    ):
        read_maps(tmp_path / "maps.pt")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    for name in ("broken.npy", "broken.npz", "broken.safetensors", "empty.npy", "empty.npz"):
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"no numbers at all")
    for name in (
        "objects.npy",
        "objects.npz",
        "broken.npy",
        "broken.npz",
        "broken.safetensors",
        "empty.npy",
        "empty.npz",
    ):
        with pytest.raises(ValueError, match=rf"read_maps: attention must be a .* file of numbers, .* got '.*{name}'"):
            read_maps(tmp_path / name)
    with pytest.raises(ValueError, match=r"read_maps: the maps must be real numbers"):
        read_maps(torch.full((1, 2, 2), 0.5, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"read_maps: attention\['a'\] must be an array"):
        read_maps({"a": [0.5, 0.5]})


def far_apart(length, sequences=6, heads=2):
    """Causal maps whose far keys round to zero in 16 bits, in float64."""
    generator = torch.Generator().manual_seed(1)
    lag = torch.arange(length)[:, None] - torch.arange(length)
    score = torch.randn(sequences, heads, length, length, generator=generator, dtype=torch.float64)
    score = score - torch.tensor([0.7, 0.9], dtype=torch.float64)[:heads, None, None] * lag
    return torch.softmax(score.masked_fill(lag < 0, -torch.inf), -1)


def added(maps, **options):
    statistics = [map_statistics(read_maps(p), **options)["0"] for p in maps]
    return functools.reduce(operator.add, statistics)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_round_to_zero_stay_admissible(dtype, options):
    exact, half = far_apart(48), far_apart(48).to(dtype)
    assert dtype != torch.float16 or (half == 0).sum() > (exact == 0).sum()
    expected, found = added(exact), added(half, **options)
    assert torch.equal(found.column_count, expected.column_count)
    ours, theirs = fit_prior(found), fit_prior(expected)
    assert ours.is_causal
    assert_close(torch.tensor(ours.explained), torch.tensor(theirs.explained), tolerance=1e-2)
    sums = [stats.sums["prior_divergence"] / stats.num_queries[:, None] for stats in (found, expected)]
    assert_close(*sums, tolerance=1e-2)


@pytest.mark.parametrize("window", [None, 3])
def test_identity_maps_are_far_from_uniform(window):
    stats = map_statistics(read_maps(torch.eye(L).half()[None]), is_causal=True, window=window)["0"]
    seen = torch.arange(1, L + 1, dtype=torch.float64).clamp(max=window or L)
    assert_close(stats.column_count[0, 0].sum(), seen.sum(), tolerance=1e-12)
    assert_close(stats.sums["prior_divergence"][0, 0], seen.log().sum(), tolerance=1e-4)
    assert stats.sums["entropy"].max() < 1e-3


def test_maps_beside_an_explicit_sink():
    """The maps of gpt-oss leave the sink out; statistics are those of the running model."""
    pytest.importorskip("transformers")
    model, inputs = BY_NAME["gpt-oss"].build(), BY_NAME["gpt-oss"].inputs()
    with torch.no_grad(), capture(model) as captured:
        maps = model(**inputs, output_attentions=True).attentions
    with pytest.raises(ValueError, match=r"rows that sum to one .* or sink=True for rows"):
        read_maps(maps[0][0])
    for layer, stats in enumerate(captured.layers.values()):
        window = 4 if layer == 0 else None
        for text in range(3):
            read = read_maps(maps[layer][text], sink=True)
            found = map_statistics(read, is_causal=True, window=window, sink=True)["0"]
            expected = stats.sequences(torch.tensor([text]))
            for name in ("entropy", "normalised_entropy", "explicit_sink_mass", "sensitivity"):
                assert_close(found.sums[name], expected.sums[name], tolerance=1e-4)
            assert_close(found.margin_sums["margin"], expected.margin_sums["margin"], tolerance=1e-3)
            assert torch.equal(found.column_count, expected.column_count)


def test_patterns_that_do_not_fit_are_refused(maps):
    read = read_maps(maps)
    with pytest.raises(ValueError, match=r"map_statistics: the map '0' must have weight only where is_causal=True and"):
        map_statistics(read, is_causal=True, window=2)
    with pytest.raises(ValueError, match=r"map_statistics: window must come with is_causal; got 2"):
        map_statistics(read, window=2)
    with pytest.raises(ValueError, match=r"map_statistics: window must be at least 1"):
        map_statistics(read, is_causal=True, window=0)
