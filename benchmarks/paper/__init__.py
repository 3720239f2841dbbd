"""The tables and figures of the paper (arXiv 2307.13078), each made by one command."""
