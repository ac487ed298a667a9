"""The anchor: a small detached process for each device, which owns memory segments and does nothing else.

``launch`` starts anchors, ``client`` calls them, and their sockets are in the run directory (``rundir``). The other
modules and ``memory.arena`` run in the anchor itself: they may not import torch, sglang or numpy.
"""
