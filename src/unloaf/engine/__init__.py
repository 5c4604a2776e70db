"""Trains a network by any method: the only room that knows devices and clocks.

This file imports nothing, so that a run folder can be looked at without torch.
"""
