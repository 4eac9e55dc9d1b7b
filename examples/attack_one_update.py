"""Train one client on embedded photographs, and draw what its update gives away: leak.png."""

from pathlib import Path

from fl_app.audit.metrics import psnr
from fl_app.audit.report import save_picture
from fl_app.bench import Case, draw_client
from fl_app.config import load_config
from fl_app.data import dataset_info, load_split
from fl_app.protocol import Budget
from server_strategies.attacks import flow_matching
from server_strategies.priors.flow import load_flow

# One step of Adam on four images; any setting of conf/ can stand here.
config = load_config({"overrides": "client.batch_size=4 client.local_steps=1"})
photos, info = load_split(config.dataset, "test"), dataset_info(config.dataset)
seen, known, truth = draw_client(Case(config.client, config.attack), photos, info, seed=0)
found = flow_matching(seen, known, load_flow("compact"), Budget(iterations=50)).images
save_picture(Path("leak.png"), found, truth.images, [f"{psnr(found, truth.images).mean():.1f} dB"])
