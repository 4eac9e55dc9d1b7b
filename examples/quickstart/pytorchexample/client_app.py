"""The ClientApp."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from pytorchexample.task import Net, load_data, load_images, train

app = ClientApp()


@app.train()
def train_on_client(msg: Message, context: Context) -> Message:
    """Train the model on local data."""
    config, partition = context.run_config, int(context.node_config["partition-id"])
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loader = load_data(partition, int(config["images"]), int(config["batch-size"]))
    loss = train(model, loader, int(config["local-epochs"]), float(config["learning-rate"]))
    if config["truth-dir"]:  # for this example's scores alone: no client does this
        images, labels = load_images(partition, int(config["images"]))
        file = Path(str(config["truth-dir"])) / f"node-{context.node_id}.pt"
        torch.save({"images": images, "labels": labels}, file)
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)
