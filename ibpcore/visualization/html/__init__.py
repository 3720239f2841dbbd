"""HTML pages about certificates, each a single file.

Start with `contents`; `page` lays out what it makes.
"""
