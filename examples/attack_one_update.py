"""Train one client on embedded photographs, and draw what its update gives away: leak.png."""

from pathlib import Path

from flowleak import Budget
from flowleak.attacks import FlowMatching
from flowleak.audit import psnr, save_picture
from flowleak.benchmarks import Case, draw_client
from flowleak.data import dataset_info, load_config, load_split

# One step of Adam on four images; any setting of conf/ can stand here.
config = load_config({"overrides": "client.batch_size=4 client.local_steps=1"})
photos, info = load_split(config.dataset, "test"), dataset_info(config.dataset)
seen, known, truth = draw_client(Case(config.client, config.attack), photos, info, seed=0)
found = FlowMatching()(seen, known, budget=Budget(iterations=50)).images
save_picture(Path("leak.png"), found, truth.images, [f"{psnr(found, truth.images).mean():.1f} dB"])
