"""The explorer: a page, served locally, that shows a posterior at work (extra `web`)."""

from .server import serve

__all__ = ["serve"]
