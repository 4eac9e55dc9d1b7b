"""The honest-but-curious server, and the workers that attack what it saw."""

from fl_app.util.extras import extras as _extras

with _extras():
    from fl_app.config import WatchConfig as WatchConfig
    from fl_app.runs.watching import watch as watch
    from server_strategies.attack_pool import AttackPool as AttackPool
    from server_strategies.attack_pool import Job as Job
    from server_strategies.honest_but_curious import HonestButCurious as HonestButCurious
    from server_strategies.observations import ObservationStore as ObservationStore
