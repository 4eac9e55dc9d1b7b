"""The ServerApp: two lines more than the tutorial's, marked."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

import flowleak  # 1
from pytorchexample.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation."""
    strategy = FedAvg(fraction_evaluate=0.0)
    strategy = flowleak.watch(strategy, client="audit.py", rounds=[1], runs_dir="leaks")  # 2
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
    )
