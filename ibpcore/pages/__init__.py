"""Pages about certificates, for a browser."""

from ibpcore.pages.contents import data_set_page, picture_page
from ibpcore.pages.html import render

__all__ = ["data_set_page", "picture_page", "render"]
