"""Rotary content against an independent rewrite with complex numbers in float64."""

import pytest
import torch
from attention.oracles import attention, causal, normal
from lowered_graphs import graphs_of
from tolerances import assert_close
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from eotattn.attention import PriorAttention, Rotary, prior_attention
from eotattn.attention.layer import rotary_tables

B, H, L = 2, 3, 7


def turned(content, positions, *, base=10_000.0, width=None):
    """Each pair (r, r + width / 2) is one complex number, turned by exp(i position base^(-2 r / width))."""
    content = content.double()
    width = content.shape[-1] if width is None else width
    half = width // 2
    pairs = torch.complex(content[..., :half], content[..., half:width])
    r = torch.arange(half, dtype=torch.float64)
    angle = positions.double()[..., None] * torch.exp(
        -torch.log(torch.tensor(base, dtype=torch.float64)) * 2 * r / width
    )
    angle = angle if positions.dim() == 1 else angle[:, None]
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag, content[..., width:]], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [10_000.0, 50.0])
def test_rotation(dtype, base):
    content, positions = normal(B, H, L, 10, dtype=dtype), torch.tensor([0, 3, 1, 131_072, 9, 500, 2])
    output = Rotary(10, base=base)(content, positions)
    assert output.dtype == dtype
    # float64 itself rounds a phase of 131 072 radians to 1.5e-11
    assert_close(output, turned(content, positions, base=base), tolerance=5e-11 if dtype == torch.float64 else None)


def test_positions_of_every_sample():
    content, positions = normal(B, H, L, 10), torch.stack([torch.arange(L), torch.arange(L) + 40])
    assert_close(Rotary(10)(content, positions), turned(content, positions))


@pytest.mark.parametrize("width", [2, 6, 10])
def test_partial_rotation_leaves_the_rest(width):
    content, positions = normal(B, H, L, 11), torch.arange(L) + 5
    output = Rotary(11, rotary_width=width)(content, positions)
    assert_close(output, turned(content, positions, width=width))
    assert torch.equal(output[..., width:], content[..., width:])


@pytest.mark.parametrize("factor", [4.0, 1.7])
def test_interpolation_divides_positions(factor):
    content, positions = normal(B, H, L, 10), torch.arange(L) * 16
    output = Rotary(10, interpolation=factor)(content, positions)
    assert_close(output, turned(content, positions / torch.tensor(factor, dtype=torch.float64)))
    if factor == 4.0:
        assert_close(output, Rotary(10)(content, torch.arange(L) * 4))


def test_scores_depend_on_the_lag_alone():
    rotary, query, key = Rotary(10), normal(B, H, L, 10), normal(B, H, L, 10, seed=1)

    def score(offset):
        positions = torch.arange(L) + offset
        return rotary(query, positions) @ rotary(key, positions).transpose(-1, -2)

    assert_close(score(1000), score(0))
    assert_close(score(0).diagonal(dim1=-2, dim2=-1), (query * key).sum(-1))
    assert (score(0) - query @ key.transpose(-1, -2)).abs().max() > 0.1


def test_norms_are_kept_and_gradients_turn_back():
    rotary, content, positions = Rotary(10), normal(B, H, L, 10).requires_grad_(), torch.arange(L)
    output = rotary(content, positions)
    assert_close(output.square().sum(-1), content.square().sum(-1))
    weight = normal(B, H, L, 10, seed=4)
    (gradient,) = torch.autograd.grad((weight * output).sum(), content)
    assert_close(gradient, turned(weight, -positions))


def test_attention_with_rotary_content():
    rotary, positions = Rotary(10), torch.arange(L)
    query, key, value = normal(B, H, L, 10), normal(B, H, L, 10, seed=1), normal(B, H, L, 4, seed=2)
    expected, _ = attention(
        turned(query, positions), turned(key, positions), value, allowed=causal(positions, positions)
    )
    output = prior_attention(rotary(query, positions), rotary(key, positions), value, is_causal=True)
    assert_close(output, expected)


# Tables ---------------------------------------------------------------------------------------------------------------


class Profile:
    """Counts operators that ran, without being a mode that tables could see."""

    def __enter__(self):
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profiler.__enter__()
        return self

    def __exit__(self, *error):
        self.profiler.__exit__(*error)
        self.cosines = sum(event.count for event in self.profiler.key_averages() if event.key == "aten::cos")


POSITIONS = {
    "none": lambda: None,
    "range": lambda: range(100, 100 + L),
    "row": lambda: torch.tensor([4, 0, 9, 2, 7, 1_000_000, 3]),
    "samples": lambda: torch.stack([torch.arange(L), torch.arange(L) + 40]),
    "half": lambda: torch.arange(L) / 2,
}


@pytest.mark.parametrize("name", POSITIONS)
def test_no_layer_and_no_call_computes_phases_again(name):
    layers, positions = [Rotary(10, base=123.0) for _ in range(4)], POSITIONS[name]()
    content = normal(B, H, L, 10).float()
    layers[0](content, positions)
    with Profile() as profile:
        outputs = [layer(content, positions) for layer in layers]
    assert profile.cosines == 0
    at = torch.arange(L) if positions is None else torch.as_tensor(positions)
    for output in outputs:
        assert_close(output, turned(content, at, base=123.0))


@pytest.mark.parametrize("write", ["tensor", "numpy"])
def test_positions_that_were_written_to_are_read_again(write):
    rotary, content = Rotary(10), normal(B, H, L, 10)
    array = torch.arange(L).numpy()
    positions = torch.from_numpy(array)
    rotary(content, positions)
    if write == "numpy":
        array += 5
    else:
        positions += 5
    assert_close(rotary(content, positions), turned(content, torch.arange(L) + 5))


def test_inference_mode_leaves_tables_that_training_can_use():
    rotary, positions, content = Rotary(10, base=77.0), torch.arange(L) * 2, normal(B, H, L, 10).requires_grad_()
    with torch.inference_mode():
        rotary(content, positions), rotary(content)
    (rotary(content, positions) + rotary(content)).sum().backward()
    assert content.grad.isfinite().all()


def test_tables_go_with_the_positions():
    rotary, before = Rotary(10), len(rotary_tables._GIVEN)
    positions = torch.arange(L) * 3
    rotary(normal(B, H, L, 10), positions)
    assert len(rotary_tables._GIVEN) == before + 1
    del positions
    assert len(rotary_tables._GIVEN) == before


@pytest.mark.parametrize("first", [0, 8_190, 1_048_576, -3])
def test_consecutive_positions_are_exact_wherever_they_start(first):
    content = normal(1, 1, L, 10).float()
    expected = turned(content, torch.arange(first, first + L))
    assert_close(Rotary(10)(content, range(first, first + L)), expected, tolerance=5e-7)
    assert_close(Rotary(10)(content, torch.arange(first, first + L)), expected, tolerance=5e-7)


@pytest.mark.parametrize("name", POSITIONS)
def test_compiled_graphs_compute_no_phase_in_a_rotation(name):
    """Consecutive positions are an input; others are one operator for all layers that a compiler cannot repeat."""
    layers = [PriorAttention(24, 2, rotary=Rotary(12), batch_first=True) for _ in range(3)]
    positions = POSITIONS[name]()

    def decoder(x):
        for layer in layers:
            x = x + layer(x, is_causal=True, need_weights=False, query_positions=positions)[0]
        return x

    for graph in graphs_of(decoder, normal(B, L, 24).float()):
        assert not [target for target in graph if "cos" in target or "sin" in target]
        known = name in ("none", "range")
        assert graph["eotattn.rotary_table.default"] <= (0 if known else 1)


def test_a_graph_serves_every_length_of_a_table():
    torch._dynamo.reset()
    rotary, counter = Rotary(10), CompileCounter()
    compiled = torch.compile(rotary, fullgraph=True, backend=counter)
    for length in (5, 7, 12, 33):
        content = normal(B, H, length, 10).float()
        assert_close(compiled(content), turned(content, torch.arange(length)))
    assert counter.frame_count <= 2
    content = normal(1, 1, 9_000, 10).float()  # longer than the table so far
    assert_close(compiled(content), turned(content, torch.arange(9_000)))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_export_for_lengths_beyond_any_table(given, strict):
    class Turn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rotary = Rotary(10)

        def forward(self, content, positions):
            return self.rotary(content, positions if given else None)

    length = torch.export.Dim("length", min=2, max=100_000)
    inputs = (normal(B, H, L, 10).float(), torch.arange(L))
    shapes = {"content": {2: length}, "positions": {0: length}}
    program = torch.export.export(Turn(), inputs, dynamic_shapes=shapes, strict=strict)
    assert "eotattn" not in str(program.graph), "a stored program needs no package"
    content = normal(1, H, 9_000, 10).float()[:, :, :9_000].expand(B, -1, -1, -1)
    assert_close(program.module()(content, torch.arange(9_000)), turned(content, torch.arange(9_000)))


def test_transforms_and_fake_tensors_leave_the_tables_alone():
    rotary, content, positions = Rotary(10), normal(B, H, L, 10), torch.arange(L)
    expected = rotary(content, positions)
    assert_close(torch.func.vmap(lambda x: rotary(x[None], positions)[0])(content), expected)
    shifted = torch.func.vmap(lambda p: rotary(content, p))(torch.stack([positions, positions + 4]))
    assert_close(shifted[1], rotary(content, positions + 4))
    with FakeTensorMode():
        assert rotary(torch.empty(B, H, L, 10)).shape == (B, H, L, 10)
    assert_close(rotary(content), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_do_not_touch_the_phases(dtype):
    layer = torch.nn.Sequential(Rotary(10)).to(dtype)
    content, positions = normal(B, H, L, 10).float(), torch.arange(L) + 100_000
    assert_close(layer[0](content, positions), turned(content, positions))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"width": 1}, ValueError, "Rotary: width must be at least 2"),
        ({"width": 7}, ValueError, "rotary_width must be even and at most 7; got 7"),
        ({"width": 8, "rotary_width": 3}, ValueError, "rotary_width must be even"),
        ({"width": 8, "rotary_width": 10}, ValueError, "at most 8"),
        ({"width": 8, "base": 0.0}, ValueError, "base must be positive"),
        ({"width": 8, "interpolation": -2.0}, ValueError, "interpolation must be positive"),
        ({"width": 8.0}, TypeError, "width must be an integer"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        Rotary(**arguments)
