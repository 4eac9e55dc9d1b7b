"""Benchmarks, what a new one is made of, and fresh clients for each trial."""

from fl_app.util.extras import extras as _extras

with _extras():
    from fl_app.benchmarks.accuracy import federated_accuracy as federated_accuracy
    from fl_app.benchmarks.attack_results import AttackResults as AttackResults
    from fl_app.benchmarks.case import Case as Case
    from fl_app.benchmarks.clients import Clients as Clients
    from fl_app.benchmarks.clients import draw_client as draw_client
    from fl_app.benchmarks.federation import Federation as Federation
    from fl_app.benchmarks.results import Results as Results
    from fl_app.benchmarks.suite import AttackSuite as AttackSuite
    from fl_app.benchmarks.suite import ReadingResults as ReadingResults
    from fl_app.benchmarks.suite import ReadingSuite as ReadingSuite
    from fl_app.benchmarks.suite import Setting as Setting
    from fl_app.benchmarks.suite import Suite as Suite
    from fl_app.config import AttackConfig as AttackConfig
    from fl_app.config import PriorConfig as PriorConfig
    from fl_app.registry import BENCHMARKS as BENCHMARKS
