"""Cases of benchmarks, and clients drawn anew for each."""

from fl_app.util.extras import extras as _extras

with _extras():
    from fl_app.benchmarks.benchmark import Benchmark as Benchmark
    from fl_app.benchmarks.case import Case as Case
    from fl_app.benchmarks.clients import draw_client as draw_client
    from fl_app.config import AttackConfig as AttackConfig
    from fl_app.config import PriorConfig as PriorConfig
