"""Image priors: what an attack holds for natural."""

from fl_app.util.extras import extras as _extras

with _extras():
    from server_strategies.priors.flow import FlowPrior as FlowPrior
    from server_strategies.priors.flow import load_flow as load_flow
    from server_strategies.priors.group import GroupConsistency as GroupConsistency
    from server_strategies.priors.order_invariance import OrderInvariance as OrderInvariance
    from server_strategies.priors.squared_norm import SquaredNorm as SquaredNorm
    from server_strategies.priors.total_variation import TotalVariation as TotalVariation
