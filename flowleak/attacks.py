"""The attacks, and what a new one is made of."""

from fl_app.util.extras import extras as _extras

with _extras():
    from server_strategies.attacks.accounting import AttackError as AttackError
    from server_strategies.attacks.attack import Attack as Attack
    from server_strategies.attacks.attack import Task as Task
    from server_strategies.attacks.dlf import DLF as DLF
    from server_strategies.attacks.dlg import DLG as DLG
    from server_strategies.attacks.dropout_inversion import DropoutInversion as DropoutInversion
    from server_strategies.attacks.feature_regression import FeatureRegression as FeatureRegression
    from server_strategies.attacks.flow_matching import FlowMatching as FlowMatching
    from server_strategies.attacks.ggl import GGL as GGL
    from server_strategies.attacks.gradinversion import GradInversion as GradInversion
    from server_strategies.attacks.idlg import IDLG as IDLG
    from server_strategies.attacks.inverting_gradients import (
        InvertingGradients as InvertingGradients,
    )
    from server_strategies.attacks.labels import infer_labels as infer_labels
    from server_strategies.attacks.optimise import Parts as Parts
    from server_strategies.attacks.optimise import cosine_schedule as cosine_schedule
    from server_strategies.attacks.optimise import step_schedule as step_schedule
    from server_strategies.attacks.options import option as option
    from server_strategies.attacks.sme import SME as SME
