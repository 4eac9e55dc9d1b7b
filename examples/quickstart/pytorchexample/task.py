"""Model, data and training, as in the tutorial."""

from importlib.resources import files

import torch
import torch.nn.functional as F
from skimage.io import imread
from skimage.transform import resize
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "ihc.png", "motorcycle_left.png")


class Net(nn.Module):
    """Model (simple CNN adapted from 'PyTorch: A 60 Minute Blitz')."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (B, 10)."""
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def load_images(partition: int, count: int) -> tuple[Tensor, Tensor]:
    """Return a client's images, (N, 3, 32, 32) in [0, 1], and labels: crops of photographs."""
    generator = torch.Generator().manual_seed(partition)
    images, labels = [], []
    for number in range(count):
        label = number % len(PHOTOS)
        photo = imread(str(files("skimage") / "data" / PHOTOS[label]))[..., :3]
        side = min(photo.shape[:2]) // 2
        top, left = (
            int(torch.randint(length - side, (), generator=generator)) for length in photo.shape[:2]
        )
        crop = resize(photo[top : top + side, left : left + side], (32, 32), anti_aliasing=True)
        images.append(torch.from_numpy(crop).permute(2, 0, 1).float())
        labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def load_data(partition: int, count: int, batch_size: int) -> DataLoader:
    """Return a client's loader; images are normalised to [-1, 1]."""
    images, labels = load_images(partition, count)
    return DataLoader(
        TensorDataset((images - 0.5) / 0.5, labels), batch_size=batch_size, shuffle=True
    )


def train(net: nn.Module, trainloader: DataLoader, epochs: int, lr: float) -> float:
    """Train the model on the training set."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    running_loss = 0.0
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = criterion(net(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / len(trainloader)
