"""The cases of every benchmark of attacks: `flowleak bench NAME`.

The first case of a client (at equal iterations) is what its others are compared
with, draw by draw. Times are of one thread of a shared 2-core machine.
"""

from __future__ import annotations

from dataclasses import replace

from client_app.training import NO_DEFENSE
from fl_app.bench import Case
from fl_app.config import AttackConfig
from fl_app.protocol import Defense, LocalTraining

Options = dict[str, float | str]

_ADAM = LocalTraining(optimizer="adam", lr=1e-3, local_steps=5)
_SGD = LocalTraining(optimizer="sgd", lr=0.01, local_steps=5)


def _flow(iterations: int, **options: float | str) -> AttackConfig:
    return AttackConfig("flow_matching", iterations, options=options)


def _quick() -> tuple[Case, ...]:
    """Return the cases of `quick`: both clients, and what explaining by a surrogate loses."""
    sgd = replace(_SGD, batch_size=4)
    return (
        Case(replace(_ADAM, batch_size=1), _flow(200), bar=21.5),
        Case(replace(_ADAM, batch_size=4), _flow(200), bar=21.0),
        Case(sgd, _flow(200), bar=22.0),
        Case(sgd, _flow(200, explain="surrogate")),
        Case(sgd, AttackConfig("sme", 300, options={"tv": 0.03}), bar=21.0),
    )


def _explained() -> tuple[Case, ...]:
    """Return the cases of `explain`: its bars, then every way to explain."""
    long = replace(_ADAM, local_steps=20, batch_size=4)
    cases = [
        Case(replace(_ADAM, local_steps=1, batch_size=4), _flow(150), bar=28.0),
        Case(replace(_ADAM, batch_size=1), _flow(200), bar=24.0),
        Case(replace(_ADAM, batch_size=4), _flow(300)),
        Case(replace(_ADAM, batch_size=4), _flow(200), labels_known=False),
        Case(replace(_ADAM, batch_size=8), _flow(500), bar=22.0),
        Case(replace(long, reshuffle=False), _flow(300), bar=24.0, num_examples=20),
        Case(long, _flow(300), bar=21.0, num_examples=20),
        Case(replace(_SGD, momentum=0.9, batch_size=4), _flow(300), bar=23.0),
    ]
    for client, at_once in ((_SGD, "gradient"), (_ADAM, "inversion")):
        for steps in (1, 5, 20):
            kinds = ["surrogate", "trajectory"]
            if steps == 1:
                kinds += [at_once, "sign"]
            elif client is _ADAM:
                kinds += ["fingerprints"]
            one_image = replace(client, local_steps=steps, batch_size=1, reshuffle=False)
            cases += [
                Case(one_image, _flow(60, explain=kind), num_examples=min(steps, 5))
                for kind in kinds
            ]
    return tuple(cases)


def _ablation() -> tuple[Case, ...]:
    """Return the cases of `ablation`: how the flow prior is best used.

    One change at a time to the defaults, which come first. 18 cases of each
    client at B=1, the 8 that tell most at B=4 and B=8. With 16 draws, 7 to 8
    hours of one thread, 2.5 for each B; ``--cases B=4,`` runs a part.
    """
    # As eq. 17 and 18 have it: absolute weights, here at a constant flow time.
    literal: Options = {"mode": "velocity", "balance": 0, "t_start": 0.95, "t_end": 0.95}
    telling: list[Options] = [
        {},
        {**literal, "flow": 0.01},
        {"flow": 0},
        {"every": 2},
        {"every": 4},
        {"polish": 0.1},
        {"polish": 0.25},
    ]
    others: list[Options] = [
        {**literal, "flow": 0.001},
        {"tv": 0},
        {"balance": 0.75, "last_balance": 0.1},
        {"balance": 3.0, "last_balance": 0.4},
        {"draws": 2},
        {"t_start": 0.8, "t_end": 0.8},
        {"t_start": 0.9, "t_end": 0.9},
        {"t_start": 0.95, "t_end": 0.95},
        {"t_start": 0.6, "t_end": 0.95},
        {"t_start": 0.95, "t_end": 0.8},
    ]
    cases = []
    for size, iterations in ((1, 100), (4, 100), (8, 60)):
        # An absolute weight has to fit the client's loss; chosen by hand on one draw of each.
        for client, flow in ((_SGD, 0.3), (_ADAM, 1.0)):
            absolute: Options = {"balance": 0, "flow": flow}
            cases += [
                Case(replace(client, batch_size=size), _flow(iterations, **options))
                for options in (*telling, absolute, *(others if size == 1 else []))
            ]
    return tuple(cases)


_PAIR = (replace(_SGD, batch_size=4), replace(_ADAM, batch_size=4))


def _tv_weights() -> tuple[Case, ...]:
    """Return the cases of `tv-weights`: the grids that `prior` takes its weights from.

    On draws that `prior` does not use: ``--seed 1000 --draws 4``, about 80
    minutes of one thread. Where total variation pulls alone, balanced, its own
    weight does not matter.
    """
    alone: list[Options] = [
        {"flow": 0, "balance": 0, "tv": 0.03},
        {"flow": 0, "balance": 0, "tv": 0.1},
        {"flow": 0, "balance": 0, "tv": 0.3},
        {"flow": 0, "balance": 0.4, "last_balance": 0.1},
        {"flow": 0, "balance": 1.5, "last_balance": 0.2},
    ]
    beside_flow: list[Options] = [{"tv": tv} for tv in (0.01, 0.03, 0.1)]
    return tuple(
        Case(client, _flow(200, **options))
        for client in _PAIR
        for options in (*alone, *beside_flow)
    )


# Not tuned yet: to be set by `flowleak bench tv-weights --seed 1000 --draws 4`.
_BEST_ALONE: dict[str, Options] = {
    "sgd": {"flow": 0, "balance": 1.5, "last_balance": 0.2},
    "adam": {"flow": 0, "balance": 1.5, "last_balance": 0.2},
}
_BEST_BESIDE_FLOW: dict[str, Options] = {"sgd": {"tv": 0.03}, "adam": {"tv": 0.03}}
_GAINS = {"sgd": 1.5, "adam": 2.5}


def _prior() -> tuple[Case, ...]:
    """Return the cases of `prior`: what the flow prior gains over the best total variation.

    With 16 draws, about 2.5 hours of one thread.
    """
    cases = []
    for client in _PAIR:
        alone, beside_flow = _BEST_ALONE[client.optimizer], _BEST_BESIDE_FLOW[client.optimizer]
        cases += [
            Case(client, _flow(500, **alone)),
            Case(client, _flow(500, **beside_flow), gain=_GAINS[client.optimizer]),
        ]
    return tuple(cases)


# The paper's defences (section 4). Its sigma is lost; it is taken in units of the update, for
# the federation that tells the cost makes larger updates than the client that is attacked.
_PAPERS_DEFENSES = (
    Defense(noise="gaussian", sigma=1.0, relative=True),
    Defense(clip=0.05),
    Defense(sparsify=0.05),
)
# One curve each: the gaussian ones are the paper's table 1.
_CURVES = (
    *(
        Defense(noise="gaussian", sigma=s)
        for s in (0.0005, 0.001, 0.005, 0.02, 0.05, 0.08, 0.1, 0.2)
    ),
    *(
        Defense(noise=kind, sigma=sigma, relative=True)
        for kind in ("gaussian", "laplace")
        for sigma in (0.1, 0.3, 1.0, 3.0)
    ),
    *(Defense(clip=bound) for bound in (0.05, 0.002, 0.0005, 0.0001)),
    *(Defense(sparsify=share) for share in (0.05, 0.5, 0.9, 0.99)),
    *(Defense(quantize=kind) for kind in ("bf16", "int8")),
    *(Defense(dp_clip=1.0, dp_noise=noise) for noise in (0.01, 0.1, 1.0)),
    Defense(clip=0.1, clip_by="norm", local_dp=100.0),
    Defense(soteria=0.1),
)


def _defenses() -> tuple[Case, ...]:
    """Return the cases of `defenses`: each attacked by who knows it and by who does not.

    Table 4 of the paper, every attack on two clients; then curves over each
    defence's parameter, with flow_matching. 126 attacks a draw; by estimate
    18 hours of one thread for 8 draws, and 6 for the federations. ``--cases`` runs a
    part, for example ``--cases noise=gaussian``.
    """
    attacks = (
        _flow(200),
        AttackConfig("sme", 1000, options={"tv": 0.03}),
        AttackConfig("dlf", 400),
        AttackConfig("ggl", 500),
        AttackConfig("gradinversion", 500),
    )
    small = replace(_ADAM, batch_size=1)
    cases = [
        Case(client, attack, defense=defense, defense_known=known)
        for client in (replace(_SGD, batch_size=4), small)
        for defense in (NO_DEFENSE, *_PAPERS_DEFENSES)
        for attack in attacks
        for known in ((True,) if defense == NO_DEFENSE else (True, False))
    ]
    cases += [
        Case(small, _flow(200), defense=defense, defense_known=known)
        for defense in _CURVES
        for known in (True, False)
    ]
    return tuple({case.name: case for case in cases}.values())


BENCHMARKS: dict[str, tuple[Case, ...]] = {
    "quick": _quick(),
    "explain": _explained(),
    "ablation": _ablation(),
    "tv-weights": _tv_weights(),
    "prior": _prior(),
    "defenses": _defenses(),
}
"""The cases of each benchmark, by its name."""
