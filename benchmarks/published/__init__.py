"""Certificates of networks that other projects have published, beside auto_LiRPA's CROWN."""
