"""How an update follows from data: what an attack compares with what it saw."""

from fl_app.util.extras import extras as _extras

with _extras():
    from server_strategies.attacks.matching import OBJECTIVES as OBJECTIVES
    from server_strategies.attacks.matching import matching_objective as matching_objective
    from server_strategies.attacks.matching.base import MatchingObjective as MatchingObjective
    from server_strategies.attacks.matching.base import Setting as Setting
    from server_strategies.attacks.matching.distance import DISTANCES as DISTANCES
    from server_strategies.attacks.matching.restarts import Restarts as Restarts
