"""The log in TensorBoard, by ``audit.on_line=flowleak.tensorboard:write``."""

from fl_app.util.extras import extras as _extras

with _extras():
    from fl_app.audit.tensorboard import write as write
