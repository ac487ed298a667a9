"""The anchor: a small detached process per device that owns memory segments and does nothing else.

``launch`` starts anchors, ``client`` talks to them, ``rundir`` is where they meet. The rest runs in the
anchor itself, as does ``memory.arena``: none of it may import torch, sglang or numpy.
"""
