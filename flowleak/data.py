"""The images that clients hold."""

from fl_app.util.extras import extras as _extras

with _extras():
    from fl_app.config import load_config as load_config
    from fl_app.data import ImageSet as ImageSet
    from fl_app.data import dataset_info as dataset_info
    from fl_app.data import load_partition as load_partition
    from fl_app.data import load_split as load_split
    from fl_app.data.base import Source as Source
    from fl_app.data.base import encoded as encoded
