"""The attacks: one short file each, and one way to run them.

An attack is a frozen dataclass of its constants, called on tensors, see `Attack`::

    from flowleak.attacks import SME

    found = SME(tv=0.03)(observation, knowledge, budget=Budget(iterations=300))
    found.images  # (N, C, H, W) in [0, 1]
"""
