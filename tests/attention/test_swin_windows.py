"""Swin's windows in lanes: 32 781 tokens as windows of 7 x 7, against dense float64 with Swin's own indexing."""

import pytest
import torch
from priors.test_relative import swin_window
from tolerances import assert_close

from eotattn import prior_attention
from eotattn.priors import GridTablePrior, grid_positions

HEADS, WIDTH = 3, 32


@pytest.mark.parametrize("windows", [42, 669])
def test_windows_are_attended_in_one_fused_call(windows):
    generator = torch.Generator().manual_seed(0)
    table = 2 * torch.randn(169, HEADS, generator=generator)
    content = torch.randn(3, windows, HEADS, 49, WIDTH, generator=generator).bfloat16()
    prior, cells = GridTablePrior.from_swin(table, 7, 7), grid_positions(7, 7)
    call = {"prior": prior, "query_positions": cells, "key_positions": cells, "backend": "sdpa"}
    score = content[0].double() @ content[1].double().mT / WIDTH**0.5
    expected = (score + swin_window(7, table.double())).softmax(-1) @ content[2].double()
    plain = score.softmax(-1) @ content[2].double()
    with torch.no_grad():
        assert_close(prior_attention(*content.float(), **call), expected)
        errors = [
            float((output.double() - exact).norm() / exact.norm())
            for output, exact in ((prior_attention(*content, **call), expected), (prior_attention(*content), plain))
        ]
    assert errors[0] <= 1.5 * errors[1]
