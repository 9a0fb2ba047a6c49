"""The page of an analysis: HTML, script and style as files of their own, and what fills them with numbers."""

from eotattn.analysis.page.rendering import page

__all__ = ["page"]
