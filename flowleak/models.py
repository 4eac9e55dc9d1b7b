"""The models that a federation trains."""

from fl_app.util.extras import extras as _extras

with _extras():
    from fl_app.models import create_model as create_model
    from fl_app.models.family import Family as Family
    from fl_app.registry import MODELS as MODELS
