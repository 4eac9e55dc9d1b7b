"""Regression instead of search: what an update gives away in forward passes, onto images.

A gradient of a deep model with global average pooling and BatchNorm hardly points to the
image, so that searches end at or below the mean colour. But the same update holds statistics
and features of the images' own forward passes. From these a regression predicts a blurred
image, in seconds and whatever the optimiser, and says beforehand how good it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fl_app.models import clients_model
from server_strategies.attacks.attack import Attack, Parts, Task
from server_strategies.attacks.matching.base import Setting
from server_strategies.attacks.options import option
from server_strategies.attacks.regression.objective import Regression
from server_strategies.attacks.regression.search import predict
from server_strategies.priors.bank import load_bank


@dataclass(frozen=True)
class FeatureRegression(Attack):
    """Kernel ridge regression from statistics, features and a gradient to images, without search.

    A network decodes features in the source; here a kernel is learned at the client's own
    weights, see `Regression`.

    Source: Xue et al., Fast Generation-Based Gradient Leakage Attacks, 2022.
    """

    name: ClassVar[str] = "feature_regression"

    images: int = option(4000, "images that it learns on at most, mirrored ones included", low=50)

    def parts(self, task: Task) -> Parts:
        """See `Attack`."""
        bank = load_bank(task.known.image_shape)
        model = clients_model(task.known, task.seen.w0).to(task.budget.device)
        setting = Setting(model, task.seen, task.known, "asked for")
        return Parts(Regression(setting, bank, self.images), search=predict)
