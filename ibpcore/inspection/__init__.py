"""Inspection of a network: does it satisfy the theory's assumptions, how tight are its bounds?"""
