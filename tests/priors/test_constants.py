"""Constants of priors come from the constructor: no loader, move or mode spoils them, and none is ever stale."""

import copy
import pickle
from functools import partial

import pytest
import torch
from priors.cases import CASES, HEADS, off_neutral
from tolerances import assert_close, centre_rows
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from eotattn.attention import prior_attention
from eotattn.priors import (
    BilinearPrior,
    ClassTokenPrior,
    FourierPrior,
    GridPrior,
    HeadsPrior,
    JoinedPrior,
    KeyTablePrior,
    RecencyPrior,
    RelativeBiasPrior,
    ScaledPrior,
    SinkPrior,
    goat_prior,
    grid_positions,
)

AT = torch.arange(9)


def goat():
    """A prior with constants of every kind: frequencies, unit slopes, a length scale, a horizon, and multiples."""
    return off_neutral(goat_prior(HEADS, num_frequencies=3, length_scale=5.0))


def assert_is_the_same(prior, expected):
    """Every form of a prior, against the dense form that another one had."""
    assert torch.equal(prior.dense(AT, AT, dtype=torch.float64), expected)
    lanes = prior.lanes(AT, AT, dtype=torch.float64).dense()
    assert_close(centre_rows(lanes), centre_rows(expected))
    head, query, key = torch.meshgrid(torch.arange(HEADS), AT, AT, indexing="ij")
    modified = prior.score_mod(AT, AT)(torch.zeros(HEADS, 9, 9), torch.tensor(0), head, query, key)
    assert_close(modified, expected.float())


# Loaders and copies -------------------------------------------------------------------------------------------------


def test_parameters_copied_into_a_prior_made_on_the_meta_device_are_all_it_needs():
    prior = goat()
    with torch.device("meta"):
        loaded = goat_prior(HEADS, num_frequencies=3, length_scale=5.0)
        assert loaded.num_lanes(torch.bfloat16) == prior.num_lanes(torch.bfloat16)
    assert all(parameter.is_meta for parameter in loaded.parameters())
    loaded = loaded.to_empty(device="cpu")
    with torch.no_grad():
        for empty, full in zip(loaded.parameters(), prior.parameters(), strict=True):
            empty.copy_(full)
    assert_is_the_same(loaded, prior.dense(AT, AT, dtype=torch.float64))
    assert torch.equal(loaded.parts[1].slopes, prior.parts[1].slopes)


def test_no_prior_hides_numbers_from_its_state_dict():
    """A loader fills what the state dict names; a buffer outside it would keep what memory held."""
    for make_prior, _ in CASES.values():
        prior = make_prior()
        stated = set(prior.state_dict())
        assert {name for name, _ in (*prior.named_parameters(), *prior.named_buffers())} == stated


def test_from_pretrained_gives_the_prior_that_was_saved(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "tiny-of-a-test"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.prior = goat_prior(HEADS, num_frequencies=3, length_scale=5.0)
            self.scaled = ScaledPrior(SinkPrior(HEADS, 2), 0.3) + FourierPrior(HEADS, 2) * (0.3, 1.0, 0.0)
            self.linear = nn.Linear(4, 4)
            self.post_init()

        def _init_weights(self, module):
            """Leave everything as its constructor made it."""

    model = Model(Config())
    off_neutral(model.prior)
    off_neutral(model.scaled)
    model.save_pretrained(tmp_path)
    for dtype in (None, torch.bfloat16):
        loaded = Model.from_pretrained(tmp_path, dtype=dtype) if dtype else Model.from_pretrained(tmp_path)
        for name in ("prior", "scaled"):
            expected = getattr(model, name).dense(AT, AT, dtype=torch.float64).detach()
            # a loader that casts checkpoints to bfloat16 costs parameters nine bits, and constants none
            actual = getattr(loaded, name).dense(AT, AT, dtype=torch.float64).detach()
            assert_close(actual, expected, tolerance=1e-12 if dtype is None else 2e-2)
        assert loaded.prior.parts[1].unit_slopes == model.prior.parts[1].unit_slopes
        assert loaded.scaled.parts[0].factor == (0.3,) * HEADS


MOVES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda prior: pickle.loads(pickle.dumps(prior)),
    "half": lambda prior: prior.half(),
    "bfloat16": lambda prior: prior.bfloat16(),
    "double": lambda prior: prior.double(),
    "a parent's cast": lambda prior: nn.Sequential(nn.Identity(), nn.ModuleList([prior])).bfloat16()[1][0],
}


@pytest.mark.parametrize("move", MOVES)
def test_copies_and_casts_leave_the_prior_as_it_is(move):
    prior = goat()
    expected = prior.dense(AT, AT, dtype=torch.float64)
    assert_is_the_same(MOVES[move](prior), expected)


def test_a_fixed_multiple_is_in_no_checkpoint_and_loads_whole():
    """0.3 through bfloat16 would be 0.30078."""
    multiple = 0.3 * SinkPrior(HEADS, 2)
    assert all("factor" not in name and "extra" not in name for name in multiple.state_dict())
    other = 0.3 * SinkPrior(HEADS, 2)
    other.load_state_dict({name: tensor.bfloat16() for name, tensor in multiple.state_dict().items()})
    assert other.bfloat16().factor == (0.3,) * HEADS


# Features -----------------------------------------------------------------------------------------------------------


class Reading(BilinearPrior):
    """Its key feature reads whatever a test puts at ``read``."""

    def __init__(self, read):
        super().__init__(2)
        self.height = nn.Parameter(torch.ones(2))
        self.read = read

    def query_features(self, positions):
        return torch.ones_like(positions).unsqueeze(-1)

    def key_features(self, positions):
        return (positions * self.read_number()).unsqueeze(-1)

    def read_number(self):
        return self.read if isinstance(self.read, float) else self.read[0]

    def weights(self):
        return self.height[:, None, None]


class ReadingBuffer(Reading):
    def __init__(self):
        super().__init__(1.0)
        self.register_buffer("table", torch.ones(3))

    def read_number(self):
        return self.table[0]


class ReadingPart(Reading):
    def __init__(self):
        super().__init__(1.0)
        self.part = nn.Linear(1, 1)

    def read_number(self):
        return self.part.weight[0, 0]


FORMS = {
    "dense": lambda prior: prior.dense(AT, AT),
    "lanes": lambda prior: prior.lanes(AT, AT, dtype=torch.float32),
    "num_lanes": lambda prior: prior.num_lanes(),
    "score_mod": lambda prior: prior.score_mod(AT, AT),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("make_prior", "what"),
    [
        (lambda: Reading(nn.Parameter(torch.ones(2))), "read, a Parameter"),
        (lambda: Reading(torch.ones(2)), "read, a Tensor"),
        (lambda: Reading([1.0]), "read, a list"),  # a list may change without a word
        (ReadingBuffer, "table, a Tensor"),
        (ReadingPart, "part, a Linear"),
    ],
    ids=["parameter", "tensor", "list", "buffer", "module"],
)
def test_a_feature_that_reads_what_can_change_is_refused(make_prior, what, form):
    rule = "features must read nothing but numbers, strings and tuples of them that the constructor set"
    with pytest.raises(TypeError, match=rf"Reading\w*: {rule}; got '{what}'. Let weights\(\) read what is learned"):
        FORMS[form](make_prior())


@pytest.mark.parametrize("read", [0.7, (0.7,)])
def test_a_constant_changed_after_construction_is_used_by_every_form(read):
    prior = Reading(1.3 if isinstance(read, float) else (1.3,))
    combined = [prior, 2.0 * prior, HeadsPrior(prior, [0, 0]), JoinedPrior(prior), prior + RecencyPrior(2)]
    for form in (*combined, GridPrior(prior, prior)):
        at = AT if form.num_coordinates == 1 else grid_positions(3, 3)
        form.lanes(at, at, dtype=torch.float64)
    prior.read = read
    assert_close(prior.dense(AT, AT, dtype=torch.float64), 0.7 * AT.double().expand(2, 9, 9))
    for form in (*combined, GridPrior(prior, prior)):
        at = AT if form.num_coordinates == 1 else grid_positions(3, 3)
        dense = form.dense(at, at, dtype=torch.float64)
        assert_close(centre_rows(form.lanes(at, at, dtype=torch.float64).dense()), centre_rows(dense))


def test_equal_constants_share_features_and_other_constants_do_not():
    names = [
        FourierPrior(heads, 3, 4.0, longest).terms()[0].features.name for heads, longest in ((2, 9), (2, 9), (2, 8))
    ]
    assert names[0] == names[1] != names[2]


class Steep(RecencyPrior):
    """Of the same constants as its parent, but not of the same features."""

    def key_features(self, positions):
        return super().key_features(3 * positions)


class Reversed(RecencyPrior):
    def coefficients(self):
        return -super().coefficients()


def test_coefficients_of_a_subclass_hold_in_every_form():
    prior = Reversed(2)
    dense = prior.dense(AT, AT, dtype=torch.float64)
    assert_close(dense, -RecencyPrior(2).dense(AT, AT, dtype=torch.float64))
    for num_kv_heads in (1, 2):
        lanes = prior.lanes(AT, AT, dtype=torch.float64, num_kv_heads=num_kv_heads).dense()
        assert_close(centre_rows(lanes), centre_rows(dense))


def test_weights_beside_coefficients_are_refused():
    """Dense forms would follow the one, and lanes the other."""
    with pytest.raises(TypeError, match=r"Twice: weights must follow from coefficients\(\) and entries\(\)"):

        class Twice(RecencyPrior):
            def weights(self):
                return -super().weights()


def test_features_of_a_subclass_are_its_own():
    at = torch.tensor([1, 2])
    slope, steep = (prior(1).lanes(at, at, dtype=torch.float64).dense() for prior in (RecencyPrior, Steep))
    assert_close(steep[0, 0, 1] - steep[0, 0, 0], 3 * (slope[0, 0, 1] - slope[0, 0, 0]))


# Weights that change ------------------------------------------------------------------------------------------------


def change_in_place(prior):
    with torch.no_grad():
        prior.parts[2].growth.mul_(2)


def change_data(prior):
    prior.parts[2].growth.data.mul_(2)


def change_parameter(prior):
    prior.parts[2].growth = nn.Parameter(2 * prior.parts[2].growth.detach())


def step_fused(prior):
    optimizer = torch.optim.AdamW(prior.parameters(), lr=0.1, fused=True)
    prior.dense(AT, AT).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [change_in_place, change_data, change_parameter, step_fused])
def test_lanes_follow_every_change_of_a_parameter(change):
    prior = goat()
    before = prior.lanes(AT, AT, dtype=torch.float64).dense().detach()
    change(prior)
    after = prior.lanes(AT, AT, dtype=torch.float64).dense().detach()
    assert (after - before).abs().max() > 1e-3
    assert_close(centre_rows(after), centre_rows(prior.dense(AT, AT, dtype=torch.float64)))


# Modes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["plain", "fake"])
@pytest.mark.parametrize("name", [name for name, (make, _) in CASES.items() if make().num_coordinates == 1])
def test_fake_tensors_and_real_ones_do_not_mix(name, first):
    """Plans and tables that are remembered serve both, whichever comes first."""
    make_prior = CASES[name][0]
    shift = {"plain": 0, "fake": 1}[first]  # other positions, so that other tables are made
    queries, keys = torch.arange(2 + shift, 7 + shift), torch.arange(7 + shift)
    if first == "plain" and make_prior().has_lanes:
        make_prior().lanes(queries, keys, dtype=torch.bfloat16)
    with FakeTensorMode():
        prior = make_prior() if "given" not in name else None
        if prior is not None:
            at = torch.arange(5)
            assert isinstance(prior.dense(at, at), FakeTensor)
            content = torch.empty(1, HEADS, 5, 8)
            assert isinstance(prior_attention(content, content, content, prior=prior), FakeTensor)
            if prior.has_lanes:
                assert isinstance(prior.lanes(at, at, dtype=torch.bfloat16).query, FakeTensor)
    prior = make_prior()
    if prior.has_lanes:
        lanes = prior.lanes(queries, keys, dtype=torch.float64).dense()
        assert_close(centre_rows(lanes), centre_rows(prior.dense(queries, keys, dtype=torch.float64)))


def test_what_is_made_in_inference_mode_serves_training():
    prior = FourierPrior(2, 3, 4.0, 77.0)  # constants that no other test has
    content = torch.randn(1, 2, 9, 8)
    with torch.inference_mode():
        prior.lanes(AT, AT, dtype=torch.bfloat16)
        prior_attention(content, content, content, prior=prior)
    prior.lanes(AT, AT, dtype=torch.bfloat16).dense().sum().backward()
    prior_attention(content, content, content, prior=prior).sum().backward()
    assert prior.even.grad is not None


def test_function_transforms_see_and_leave_the_same_lanes():
    prior = FourierPrior(2, 3, 4.0, 78.0)
    weight = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0))

    def loss(even):
        held = nn.ModuleList([prior])
        held.forward = lambda: (weight * prior.lanes(AT, AT, dtype=torch.float32).dense()).sum()
        return torch.func.functional_call(held, {"0.even": even}, ())

    many = torch.stack([prior.even.detach(), prior.even.detach() + 1])
    gradients = torch.vmap(torch.func.grad(loss))(many)
    (plain,) = torch.autograd.grad(loss(prior.even), prior.even)
    assert_close(gradients[0], plain)
    assert_close(gradients[1], plain)  # linear in the weights


@pytest.mark.parametrize("context", [lambda: torch.device("meta"), torch.inference_mode, FakeTensorMode])
def test_lanes_can_be_counted_anywhere(context):
    with context():
        assert FourierPrior(2, 3, 4.0, 79.0).num_lanes(torch.bfloat16) == 6
    assert FourierPrior(2, 3, 4.0, 79.0).lanes(AT, AT, dtype=torch.bfloat16).num_lanes == 6


# Positions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_prior", [goat, lambda: off_neutral(RelativeBiasPrior(HEADS, 3)), lambda: off_neutral(KeyTablePrior(HEADS, 4))]
)
@pytest.mark.parametrize("shared", ["queries", "keys", "both"])
def test_score_mod_serves_a_batch_with_one_row_of_positions(make_prior, shared):
    """One row of positions (1, L) is that of every sample."""
    prior, batch = make_prior(), 3
    queries = AT[None] if shared != "keys" else torch.stack([AT, AT + 1, AT + 2])
    keys = AT[None] if shared != "queries" else torch.stack([AT, AT + 1, AT + 2])
    index = torch.meshgrid(torch.arange(batch), torch.arange(HEADS), AT, AT, indexing="ij")
    modified = prior.score_mod(queries, keys)(torch.zeros(batch, HEADS, 9, 9), *index)
    expected = prior.dense(queries, keys).expand(batch, -1, -1, -1)
    assert_close(modified, expected)


def test_only_minus_one_is_a_class_token():
    """Shifted or rescaled coordinates above -1 are cells of the grid."""
    prior = GridPrior(off_neutral(FourierPrior(HEADS, 2, 4.0, 30.0)), RecencyPrior(HEADS)) + off_neutral(
        ClassTokenPrior(HEADS)
    )
    cells = torch.tensor([[-1.0, -1.0], [-0.5, -0.5], [-0.999, 2.0], [0.0, 0.0], [1.5, -0.25]])
    waves, recency = prior.parts[0].axes
    row, column = cells[1:].clamp(min=0).unbind(-1)
    inside = waves.dense(row, row, dtype=torch.float64) + recency.dense(column, column, dtype=torch.float64)
    dense = prior.dense(cells, cells, dtype=torch.float64)
    assert_close(dense[:, 1:, 1:], inside)
    height = prior.parts[1].class_token.detach().double()
    assert_close(dense[:, :, 0], height[:, None].expand(-1, 5))
    assert not dense[:, 0, 1:].any()
    lanes = prior.lanes(cells, cells, dtype=torch.float64).dense()
    assert_close(centre_rows(lanes), centre_rows(dense))


LONG = {
    "waves": lambda: off_neutral(FourierPrior(HEADS, 4, 2.5, 700.0)),
    "a multiple": lambda: 0.5 * off_neutral(FourierPrior(HEADS, 4, 2.5, 700.0)),
    "the default": goat,
    "chosen heads": lambda: goat().heads([2, 0, 0]),
    "joined heads": lambda: JoinedPrior(goat().heads([1]), off_neutral(FourierPrior(HEADS - 1, 4, 2.5, 700.0))),
    "a grid": lambda: GridPrior(*(off_neutral(FourierPrior(HEADS, 4, 2.5, 700.0), seed=axis) for axis in (0, 1))),
    "a sum with a table": lambda: goat() + off_neutral(RelativeBiasPrior(HEADS, 3)),
}


@pytest.mark.parametrize("name", LONG)
def test_score_mod_is_exact_a_million_tokens_out(name):
    """A float32 phase is off by 0.06 radians there; features at given positions are looked up."""
    prior, at = LONG[name](), torch.arange(1_000_000, 1_000_009)
    at = at if prior.num_coordinates == 1 else torch.stack([at, at.flip(0)], dim=-1)
    index = torch.meshgrid(torch.arange(HEADS), AT, AT, indexing="ij")
    modified = prior.score_mod(at, at)(torch.zeros(HEADS, 9, 9), torch.tensor(0), *index)
    assert_close(modified, prior.dense(at, at))


def test_a_graph_takes_the_constants_of_its_own_prior():
    """-1 and -2 have the same hash in Python: what one graph was given is not what the next one is."""
    x = torch.randn(1, HEADS, 7, 4, generator=torch.Generator().manual_seed(0))
    for factor in (-1.0, -2.0):
        prior = factor * RecencyPrior(HEADS)
        attend = partial(prior_attention, prior=prior)
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x, x, x), attend(x, x, x))
