"""What the server knows of its clients: all that flowleak needs."""

from pytorchexample.task import Net

import flowleak

client = flowleak.Client(
    model=Net,
    num_classes=10,
    image_shape=(3, 32, 32),
    mean=0.5,
    std=0.5,
    loss="cross_entropy",
    optimizer="sgd",
    lr=0.01,
    momentum=0.9,
    batch_size=1,
    epochs=1,
)
