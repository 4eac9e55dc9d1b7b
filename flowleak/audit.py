"""Scores and pictures, for whoever holds the ground truth."""

from fl_app.util.extras import extras as _extras

with _extras():
    from fl_app.audit.leakage_log import read_lines as read_lines
    from fl_app.audit.metrics import psnr as psnr
    from fl_app.audit.metrics import score as score
    from fl_app.audit.pictures import save_picture as save_picture
    from fl_app.audit.truth import Truth as Truth
    from fl_app.audit.truth import write_truth as write_truth
    from fl_app.runs.verdict import Verdict as Verdict
    from fl_app.runs.verdict import attack_update as attack_update
