"""Settings of the tests of analyses."""

import base64

import pytest
from matplotlib.figure import Figure

#: One white pixel.
BLANK = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mP8/x8AAwMCAO+ip1sAAAAASUVORK5CYII=")


@pytest.fixture
def drawn():
    """Asked for by a test whose figures are drawn."""


@pytest.fixture(autouse=True)
def _figures_are_blank(request, monkeypatch):
    """Figures are made, but only drawn where a test asks for that: it takes nine tenths of the time of a report."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(BLANK))
