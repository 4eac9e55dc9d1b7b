"""What clients do so that less is seen in their updates."""

from fl_app.util.extras import extras as _extras

with _extras():
    from client_app.defenses import defend as defend
    from client_app.defenses import defended as defended
    from client_app.defenses import defended_weights as defended_weights
    from fl_app.protocol import Defense as Defense
