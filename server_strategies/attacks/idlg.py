"""Improved Deep Leakage from Gradients: the labels first, then DLG on the images alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from server_strategies.attacks.dlg import DLG


@dataclass(frozen=True)
class IDLG(DLG):
    """DLG after the labels, from the signs of the last layer's gradient.

    Labels are fitted jointly with the images where several of a batch are alike.

    Source: Zhao, Mopuri & Bilen, iDLG, 2020.
    """

    name: ClassVar[str] = "idlg"
    labels: ClassVar[str] = "idlg"
